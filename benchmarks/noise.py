# SPDX-License-Identifier: Apache-2.0
"""The masks that a stochastic implementation draws, so that fp64 can be given the same.

A draw of one projection is (threshold, bits): the logistic noise n of every weight in fp64, with
which M = [L > n] and z = sigmoid((L - n) / tau), and the bits as the implementation rounds them.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import Problem
from stamina_kernels import MaskedProjection, sample_mask, unpack_bits
from stamina_kernels.philox import uniform


class Draw(NamedTuple):
    threshold: Tensor
    bits: Tensor


Sampler = Callable[[Sequence[Tensor]], list[Tensor]]
"""From the fp32 logits of a group to its raw noise, drawn as the implementation draws it."""

_ROUNDING = 1e-6  # an fp32 logit of order one, summed over 16 products, is off by less
_TRIES = 400


def uniforms(logits: Sequence[Tensor]) -> list[Tensor]:
    """The noise of `eager_masked_linear`, which is reused from stamina_adapters."""
    return [torch.rand_like(item).clamp_(min=2.0**-24) for item in logits]


def gumbels(logits: Sequence[Tensor]) -> list[Tensor]:
    """The noise of `F.gumbel_softmax` on logits [L, 0]."""
    pairs = [two_classes(item) for item in logits]
    return [
        -torch.empty_like(pair, memory_format=torch.legacy_contiguous_format).exponential_().log()
        for pair in pairs
    ]


def two_classes(logits: Tensor) -> Tensor:
    """Logits of keep and drop, whose difference is L."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def threshold(noise: Tensor) -> Tensor:
    """n with [L > n], from uniforms [O, I] or from a pair of Gumbels [O, I, 2]."""
    noise = noise.double()
    return torch.logit(noise) if noise.dim() == 2 else noise[..., 1] - noise[..., 0]


def group_logits(problem: Problem) -> list[Tensor]:
    """L = U V + b in fp32, by the operations that eager code uses."""
    return [(p.U @ p.V + p.b).detach() for p in problem.group]


class Noise:
    """The draw behind one checked call: `restart` before the call, `draws` afterwards."""

    def __init__(self, problem: Problem, sampler: Sampler, *, fused: bool) -> None:
        self._problem, self._sampler, self._fused = problem, sampler, fused

    def restart(self) -> None:
        torch.manual_seed(self._chosen[0])

    @property
    def draws(self) -> list[Draw]:
        return self._chosen[1]

    @cached_property
    def _chosen(self) -> tuple[int, list[Draw]]:
        """A seed and its draws.

        Code that a compiler fused may round a logit differently, and a bit that flips says nothing
        of accuracy: for such code a seed is taken that keeps every weight off the threshold.
        """
        logits = group_logits(self._problem)
        for seed in range(_TRIES):
            torch.manual_seed(seed)
            raw = self._sampler(logits)
            draws = [self._draw(*pair) for pair in zip(logits, raw, strict=True)]
            gap = min(
                (item - d.threshold).abs().min() for item, d in zip(logits, draws, strict=True)
            )
            if not self._fused or gap > _ROUNDING:
                return seed, draws
        raise RuntimeError(f"no seed of {_TRIES} keeps every weight off its threshold")

    @staticmethod
    def _draw(logits: Tensor, raw: Tensor) -> Draw:
        if raw.dim() == 2:
            bits = torch.sigmoid(logits - torch.logit(raw)) > 0.5
        else:
            # softmax and argmax as F.gumbel_softmax takes them: ties keep
            soft = F.softmax(two_classes(logits) + raw, dim=-1)
            bits = soft[..., 0] >= soft[..., 1]
        return Draw(threshold(raw), bits)


def philox_draws(
    group: Sequence[MaskedProjection], seed: Tensor, step: Tensor, backend: str | None = None
) -> list[Draw]:
    """What the library draws for this seed and step; backends may differ at the threshold."""
    packed = sample_mask(group, seed=seed, step=step, backend=backend)
    draws, row = [], 0
    for p in group:
        out, inner = p.weight.shape
        u = uniform(seed, step, p.layer_id, range(out), range(inner))
        draws.append(Draw(torch.logit(u.double()), unpack_bits(packed[row : row + out], inner)))
        row += out
    return draws
