# SPDX-License-Identifier: Apache-2.0
"""Random inputs of a case, at the scales of a real layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, RANK, FoldCase, LinearCase
from stamina_kernels import CommittedAdapter, MaskedProjection

FACTORS = ("A", "B", "U", "V", "b")


@dataclass(frozen=True)
class Problem:
    """A group of projections with X, upstream gradients and the scalars of the operator.

    The penalty weights g_forget and g_sparse are such that each penalty moves the gradients by
    some per cent: an implementation that forgot one would fail its check.
    """

    x: Tensor
    group: list[MaskedProjection]
    dy: Tensor
    g_forget: Tensor
    g_sparse: Tensor
    scale: Tensor
    tau: Tensor
    seed: Tensor
    step: Tensor

    def dy_parts(self) -> list[Tensor]:
        """dY of each projection."""
        return [part.contiguous() for part in self.dy.split([len(p.weight) for p in self.group], 1)]

    def leaves(self) -> list[Tensor]:
        """X and every factor."""
        return [self.x, *(getattr(p, name) for p in self.group for name in FACTORS)]

    def known(self) -> list[Tensor]:
        """Every tensor that lives anyway, whatever a rival saves."""
        weights = [t for p in self.group for t in (p.weight, p.weight_init) if t is not None]
        return [*self.leaves(), *weights, self.scale, self.tau, self.seed, self.step]


def _projection(case: LinearCase, out: int, layer: int, device: str) -> MaskedProjection:
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std)

    def factor(*shape: int, std: float) -> Tensor:
        return normal(*shape, std=std).requires_grad_()

    initial = normal(out, case.inner, std=case.inner**-0.5)
    weight = torch.add(initial, normal(out, case.inner, std=case.inner**-0.5), alpha=0.1)
    return MaskedProjection(
        weight=weight.to(dtype),
        weight_init=initial.to(dtype),
        A=factor(out, case.rank, std=case.rank**-0.5),
        B=factor(case.rank, case.inner, std=case.inner**-0.5),
        U=factor(out, case.rank, std=case.rank**-0.5),
        V=factor(case.rank, case.inner, std=1.0),
        b=torch.full((), 0.3, device=device, requires_grad=True),
        layer_id=layer,
    )


def make_input(case: LinearCase, device: str) -> Tensor:
    """X [tokens, inner], which requires a gradient."""
    x = torch.randn(case.tokens, case.inner, device=device).to(DTYPES[case.dtype])
    return x.requires_grad_()


def make_problem(
    case: LinearCase, device: str, *, x: Tensor | None = None, layer: int = 0
) -> Problem:
    """Inputs of a case; several groups may share one x."""
    return Problem(
        x=make_input(case, device) if x is None else x,
        group=[_projection(case, out, layer + k, device) for k, out in enumerate(case.outs)],
        dy=torch.randn(case.tokens, sum(case.outs), device=device).to(DTYPES[case.dtype]),
        g_forget=torch.tensor(1e6, device=device),
        g_sparse=torch.tensor(0.1, device=device),
        scale=torch.tensor(0.5, device=device),
        tau=torch.tensor(1.0, device=device),
        seed=torch.tensor(0x5EED, device=device),
        step=torch.tensor(7, device=device),
    )


def random_bits(inner: int, out: int, device: str | torch.device) -> Tensor:
    """Packed masks that keep half of the weights."""
    if inner % 32:
        raise ValueError(f"inner must be a multiple of 32 (padding bits are zero), got {inner}")
    return torch.randint(-(2**31), 2**31, (out, inner // 32), dtype=torch.int32, device=device)


def committed(inner: int, out: int, device: str, rank: int = RANK) -> CommittedAdapter:
    """A finished concept: fp16 factors of order one, half of the mask kept, updates of 1e-3."""
    return CommittedAdapter(
        A=torch.randn(out, rank, device=device).half(),
        B=torch.randn(rank, inner, device=device).half(),
        exponent=(-5, -5),
        bits=random_bits(inner, out, device),
        scale=1.0 / rank,
    )


def fold_inputs(case: FoldCase, device: str) -> tuple[list[Tensor], list[list[CommittedAdapter]]]:
    """W_init (fp32) of every layer and its committed adapters."""
    initial = [torch.randn(out, inner, device=device) * inner**-0.5 for inner, out in case.layers]
    adapters = [
        [committed(inner, out, device) for _ in range(case.adapters)] for inner, out in case.layers
    ]
    return initial, adapters
