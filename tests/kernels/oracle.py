# SPDX-License-Identifier: Apache-2.0
"""The operator in fp64 through autograd, and random problems to hold backends against it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stamina_kernels import MaskedProjection, sample_mask, unpack_bits
from stamina_kernels.philox import uniform

FACTORS = ("A", "B", "U", "V", "b")


@dataclass(frozen=True)
class Problem:
    """A group of projections with X, upstream gradients and the scalars of the operator."""

    x: Tensor
    group: list[MaskedProjection]
    dy: Tensor
    g_forget: Tensor
    g_sparse: Tensor
    scale: Tensor
    tau: Tensor
    seed: Tensor
    step: Tensor

    def scalars(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "tau": self.tau, "seed": self.seed, "step": self.step}

    def leaves(self) -> list[Tensor]:
        """X and every factor, in the order of `gradients`."""
        return [self.x, *(getattr(p, f) for p in self.group for f in FACTORS)]

    def with_grad(self) -> "Problem":
        """A copy whose X and factors are leaves that require a gradient."""
        group = [
            p._replace(**{f: getattr(p, f).detach().clone().requires_grad_() for f in FACTORS})
            for p in self.group
        ]
        return replace(self, x=self.x.detach().clone().requires_grad_(), group=group)


def shifted(tensor: Tensor) -> Tensor:
    """A copy at an address that takes no 16-byte accesses."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)


def make_problem(
    out_features: list[int],
    in_features: int,
    batch: tuple[int, ...],
    *,
    rank: int = 4,
    mask_rank: int = 3,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    factor_dtype: torch.dtype = torch.float32,
    bias: bool = False,
    initial: bool = True,
    tau: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Random inputs at realistic scales; everything is reproducible from `seed`."""
    g = torch.Generator().manual_seed(seed)
    weight_dtype = weight_dtype or dtype

    def normal(*shape: int, std: float = 1.0, to: torch.dtype = factor_dtype) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * std).to(to)

    group = []
    for k, rows in enumerate(out_features):
        weight = normal(rows, in_features, std=in_features**-0.5, to=weight_dtype)
        change = normal(rows, in_features, std=0.1 * in_features**-0.5, to=weight_dtype)
        untouched = torch.rand(rows, in_features, generator=g) < 0.5
        group.append(
            MaskedProjection(
                weight=weight,
                A=normal(rows, rank, std=rank**-0.5),
                B=normal(rank, in_features, std=in_features**-0.5),
                U=normal(rows, mask_rank, std=mask_rank**-0.5),
                V=normal(mask_rank, in_features),
                b=torch.tensor(0.3, dtype=factor_dtype),
                layer_id=0x9E3779B9 + k,
                bias=normal(rows, to=weight_dtype) if bias else None,
                weight_init=torch.where(untouched, weight, weight - change) if initial else None,
            )
        )
    return Problem(
        x=normal(*batch, in_features, to=dtype),
        group=group,
        dy=normal(*batch, sum(out_features), to=dtype),
        g_forget=normal(len(out_features)),
        g_sparse=normal(len(out_features), std=1e-2),
        scale=torch.tensor(0.5, dtype=factor_dtype),
        tau=torch.tensor(tau, dtype=factor_dtype),
        seed=torch.tensor(-0x123456789ABCDEF),
        step=torch.tensor(7),
    )


def _mask(
    p: MaskedProjection, bits: Tensor, logits: Tensor, problem: Problem, hard: bool
) -> Tensor:
    """M in the forward, the soft value z in the backward."""
    rows, columns = p.weight.shape
    bit = unpack_bits(bits, columns).to(logits.dtype)
    shift: Tensor | float = 0.0
    if not hard:
        u = uniform(
            problem.seed, problem.step, p.layer_id,
            range(p.row0, p.row0 + rows), range(p.col0, p.col0 + columns),
        )  # fmt: skip
        shift = torch.logit(u.to(logits.dtype))
    z = torch.sigmoid((logits - shift) / problem.tau.to(logits.dtype))
    return bit + z - z.detach()


def oracle(
    problem: Problem,
    *,
    bits: Tensor | None = None,
    hard: bool = False,
    sparse_kind: str = "sigmoid",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """y, forget, sparse and the gradients of X and all factors, dense, at precision `dtype`.

    With dtype = fp32 it is what eager code computes: weights and activations keep their own dtype,
    factors are fp32.
    """
    eager = dtype == torch.float32
    p = problem.with_grad()
    if bits is None:
        bits = sample_mask(p.group, seed=p.seed, step=p.step, hard=hard, backend="reference")
    outputs, forget, sparse, first = [], [], [], 0
    for member in p.group:
        rows = member.weight.shape[0]
        A, B, U, V, b = (getattr(member, f).to(dtype) for f in FACTORS)
        logits = U @ V + b
        mask = _mask(member, bits[first : first + rows], logits, p, hard)
        delta = p.scale.to(dtype) * mask * (A @ B)
        effective = member.weight.to(dtype) + delta
        x = p.x if eager else p.x.to(dtype)
        y = x @ (effective.to(x.dtype) if eager else effective).t()
        outputs.append(y if member.bias is None else y + member.bias.to(y.dtype))
        change = torch.zeros_like(delta)
        if member.weight_init is not None:
            change = member.weight.to(dtype) - member.weight_init.to(dtype)
        forget.append((change * delta).square().sum())
        sparse.append((logits.sigmoid() if sparse_kind == "sigmoid" else logits.relu()).sum())
        first += rows
    y, forget_all, sparse_all = torch.cat(outputs, -1), torch.stack(forget), torch.stack(sparse)
    gradients = torch.autograd.grad(
        [y, forget_all, sparse_all],
        p.leaves(),
        [p.dy.to(y.dtype), p.g_forget.to(dtype), p.g_sparse.to(dtype)],
        allow_unused=True,
        materialize_grads=True,
    )
    return y.detach(), forget_all.detach(), sparse_all.detach(), list(gradients)


def run(
    problem: Problem, backend: str, *, hard: bool = False, sparse_kind: str = "sigmoid"
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """The same through the library: y, forget, sparse, gradients and the bits it drew."""
    from stamina_kernels import masked_linear

    p = problem.with_grad()
    out = masked_linear(
        p.x, p.group, **p.scalars(), hard=hard, sparse_kind=sparse_kind, backend=backend
    )
    gradients = torch.autograd.grad(
        [out.y, out.forget, out.sparse], p.leaves(), [p.dy, p.g_forget, p.g_sparse]
    )
    return out.y.detach(), out.forget.detach(), out.sparse.detach(), list(gradients), out.bits


def product_eps(dtype: torch.dtype, device: str) -> float:
    """What the product of two fp32 factors may be rounded to where X has `dtype`.

    Matrix units of GPUs multiply for 16-bit results: with 16 bits of the operands, and sums cut
    off instead of rounded. What is fp32 all the same, the regularisers and gradients, shows it.
    """
    return 2.0**-16 if device == "cuda" and dtype != torch.float32 else 0.0


def assert_as_accurate(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, product_eps: float = 0.0
) -> None:
    """Relative RMS error <= 1.05 x eager's and maximum error <= 2 x eager's, plus a few eps.

    The allowance is four units in the last place of the result's dtype, or four times product_eps,
    relative to the RMS and to the largest exact value: where eager happens to be exact, rounding
    once is allowed.
    """
    eps = max(torch.finfo(got.dtype).eps, product_eps)
    got, eager = got.double(), eager.double()
    if exact.numel() == 0:
        assert got.shape == exact.shape, name
        return
    assert torch.isfinite(got).all(), f"{name}: non-finite"
    rms = exact.square().mean().sqrt() + 1e-300
    error, base = (got - exact).square().mean().sqrt(), (eager - exact).square().mean().sqrt()
    assert error <= 1.05 * base + 4 * eps * rms, (
        f"{name}: RMS {error / rms:.3e}, eager {base / rms:.3e}"
    )
    worst, base = (got - exact).abs().max(), (eager - exact).abs().max()
    limit = 2 * base + 4 * eps * exact.abs().max()
    assert worst <= limit, f"{name}: max {worst:.3e}, eager {base:.3e}"
