# SPDX-License-Identifier: Apache-2.0
"""Time and saved memory of the adapted projections, beside the same formula in eager PyTorch."""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stamina_kernels import MaskedProjection, masked_linear

_FACTORS = ("A", "B", "U", "V", "b")


@dataclass(frozen=True)
class KeyValueShape:
    """A key and a value projection, in_features -> out_features each, applied to `tokens` rows."""

    in_features: int
    out_features: int
    tokens: int


SD15_SHAPES = tuple(KeyValueShape(768, width, 154) for width in (320, 640, 1280))
"""One K/V pair at each of the three widths of SD 1.5's cross-attention, two prompts of 77."""


@dataclass(frozen=True)
class ProjectionCost:
    """Sums over all shapes: MiB saved for backward, median milliseconds of forward and backward.

    Saved memory is the unique storages that autograd keeps, other than x, W, W_init (or the
    difference of the two) and the factors.
    """

    saved_mib_ours: float
    saved_mib_eager: float
    step_ms_ours: float
    step_ms_eager: float


def eager_masked_linear(
    x: Tensor, p: MaskedProjection, change: Tensor, scale: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One-uniform straight-through masked linear with both regularisers, op by op.

    `change` is S = W - W_init, made once beforehand. Returns y, forget, sparse as
    `stamina_kernels.masked_linear` defines them, with M + z - stop(z) for the mask.
    """
    logits = p.U @ p.V + p.b
    noise = torch.rand_like(logits).clamp_(min=2.0**-24)
    soft = torch.sigmoid((logits - torch.logit(noise)) / tau)
    mask = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
    delta = scale * mask * (p.A @ p.B)
    y = F.linear(x, (p.weight + delta).to(x.dtype))
    return y, (change * delta).square().sum(), torch.sigmoid(logits).sum()


class _Case:
    """One K/V pair with its input, ready to run either way."""

    def __init__(self, shape: KeyValueShape, rank: int, mask_rank: int, layer: int) -> None:
        out, inner = shape.out_features, shape.in_features
        self.x = torch.randn(shape.tokens, inner, requires_grad=True)
        self.scale, self.tau = torch.tensor(1.0), torch.tensor(1.0)
        self.seed, self.step = torch.tensor(0), torch.tensor(0)
        self.weight_of_penalties = torch.tensor(1e-6)
        self.changes = [torch.randn(out, inner) * 1e-3 for _ in range(2)]
        self.pair = [
            self._projection(change, rank, mask_rank, 2 * layer + k)
            for k, change in enumerate(self.changes)
        ]
        self.dy = torch.randn(shape.tokens, 2 * out)

    @staticmethod
    def _projection(change: Tensor, rank: int, mask_rank: int, layer: int) -> MaskedProjection:
        out, inner = change.shape

        def factor(*size: int) -> Tensor:
            return (torch.randn(*size) * 0.1).requires_grad_()

        initial = torch.randn(out, inner) * inner**-0.5
        return MaskedProjection(
            weight=initial + change,
            weight_init=initial,
            A=factor(out, rank),
            B=factor(rank, inner),
            U=factor(out, mask_rank),
            V=factor(mask_rank, inner),
            b=torch.zeros((), requires_grad=True),
            layer_id=layer,
        )

    def _leaves(self) -> list[Tensor]:
        return [getattr(p, name) for p in self.pair for name in _FACTORS]

    def known(self) -> list[Tensor]:
        """Every tensor that lives anyway."""
        weights = [t for p in self.pair for t in (p.weight, p.weight_init) if t is not None]
        scalars = [self.scale, self.tau, self.seed, self.step]
        return [self.x, *weights, *self.changes, *self._leaves(), *scalars]

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        out = masked_linear(
            self.x, self.pair, scale=self.scale, tau=self.tau, seed=self.seed, step=self.step
        )
        return out.y, out.forget.sum(), out.sparse.sum()

    def eager(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            eager_masked_linear(self.x, p, change, self.scale, self.tau)
            for p, change in zip(self.pair, self.changes, strict=True)
        ]
        y, forget, sparse = zip(*parts, strict=True)
        return torch.cat(y, -1), torch.stack(forget).sum(), torch.stack(sparse).sum()

    def backward(self, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        for leaf in (self.x, *self._leaves()):
            leaf.grad = None
        torch.autograd.backward(
            outputs, [self.dy, self.weight_of_penalties, self.weight_of_penalties]
        )


class _Saved:
    """A tensor that autograd saves, for as long as its graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_mib(forward: Callable[[], object], known: Sequence[Tensor]) -> float:
    """MiB of unique storages, other than those of `known`, that autograd keeps after `forward`."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        handle = _Saved(tensor)
        saved.add(handle)
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        alive = forward()
    storages = {s.data_ptr(): s.nbytes() for s in (h.tensor.untyped_storage() for h in saved)}
    del alive
    return sum(size for start, size in storages.items() if start not in ignored) / 2**20


def _milliseconds(case: _Case, forward: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> float:
    start = time.perf_counter()
    case.backward(forward())
    return 1e3 * (time.perf_counter() - start)


def measure_projections(
    shapes: Sequence[KeyValueShape], rank: int, mask_rank: int, rounds: int = 9
) -> ProjectionCost:
    """Measure both ways on the CPU, interleaved, fp32; times are medians over `rounds`."""
    cases = [_Case(shape, rank, mask_rank, index) for index, shape in enumerate(shapes)]
    times: dict[str, list[float]] = {"ours": [], "eager": []}
    for _ in range(rounds + 1):
        for way, measured in times.items():
            measured.append(sum(_milliseconds(case, getattr(case, way)) for case in cases))
    # the first round warms caches and is left out
    median = {way: statistics.median(measured[1:]) for way, measured in times.items()}
    return ProjectionCost(
        saved_mib_ours=sum(saved_mib(case.ours, case.known()) for case in cases),
        saved_mib_eager=sum(saved_mib(case.eager, case.known()) for case in cases),
        step_ms_ours=median["ours"],
        step_ms_eager=median["eager"],
    )
