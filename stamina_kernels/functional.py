# SPDX-License-Identifier: Apache-2.0
"""Public functions: validation, autocast and backend choice around the operations of `ops.py`.

The formulas are in `reference.py`. Shapes: X [..., I]; of a projection, weight O x I, A O x r,
B r x I, U O x m, V m x I, b 0-dim. Several projections that share X form a group, which is stacked
along O. Every check reads metadata only, so that no call waits for a device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamina_kernels import dispatch, ops  # noqa: F401  (importing ops declares torch.ops.stamina)
from stamina_kernels.reference import unpack_bits

MAX_RANK = 256
SPARSE_KINDS = ("sigmoid", "relu")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FACTORS = ("A", "B", "U", "V", "b")


class MaskedProjection(NamedTuple):
    """One projection W + s M (.) (A B) with everything the operation needs to know of it.

    weight      O x I, fp32 / bf16 / fp16, frozen
    A, B        O x r and r x I, fp32: the low-rank update
    U, V, b     O x m, m x I and 0-dim, fp32: the mask logits L = U V + b
    layer_id    32-bit identity of the layer in the random stream
    bias        O, or None
    weight_init O x I, the weight before any concept, or None where nothing was learned yet
    row0, col0  global position of weight[0, 0] where weight is a shard
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    U: Tensor
    V: Tensor
    b: Tensor
    layer_id: int
    bias: Tensor | None = None
    weight_init: Tensor | None = None
    row0: int = 0
    col0: int = 0


class MaskedLinearOutput(NamedTuple):
    """y [..., sum O]; per projection: forget, sparse (unweighted), counts [n, 2]; packed bits.

    counts holds the number of kept weights and of kept weights that earlier concepts changed.
    """

    y: Tensor
    forget: Tensor
    sparse: Tensor
    counts: Tensor
    bits: Tensor


class CommittedAdapter(NamedTuple):
    """A finished concept's update of one projection: D = scale 2^(ea + eb) M (.) (A B).

    A O x r and B r x I are fp16, exponent = (ea, eb), bits int32 [O, ceil(I / 32)].
    """

    A: Tensor
    B: Tensor
    exponent: tuple[int, int]
    bits: Tensor
    scale: float


def _fail(name: str, got: object, expected: str, error: type[Exception] = ValueError) -> None:
    raise error(f"{name} must be {expected}, got {got}")


def _check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    wanted = f"[{'*' if rows is None else rows}, {'*' if columns is None else columns}]"
    fits = tensor.dim() == 2 and all(
        want is None or have == want
        for have, want in zip(tensor.shape, (rows, columns), strict=True)
    )
    if not fits:
        _fail(name, list(tensor.shape), f"of shape {wanted}")


def _check_rank(name: str, rank: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        _fail(f"the rank of {name}", rank, f"between 1 and {MAX_RANK}")


def _check_tensor(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        _fail(name, type(tensor).__name__, "a tensor", TypeError)
    if tensor.dtype not in dtypes:
        _fail(name, tensor.dtype, "of dtype " + " or ".join(map(str, dtypes)), TypeError)
    if tensor.device != device:
        _fail(name, tensor.device, f"on device {device}")


def _check_scalar(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    _check_tensor(name, tensor, dtypes, device)
    if tensor.dim() != 0:
        _fail(name, list(tensor.shape), "a 0-dim tensor")


def _factor_dtypes(projection: MaskedProjection) -> tuple[torch.dtype, ...]:
    # fp64 throughout is for gradient checks of the reference
    wide = isinstance(projection.A, Tensor) and projection.A.dtype == torch.float64
    return (torch.float64,) if wide else (torch.float32,)


def _check_logits(
    name: str, U: Tensor, V: Tensor, b: Tensor, rows: int, columns: int | None
) -> None:
    _check_matrix(f"{name}U", U, rows, None)
    _check_rank(f"{name}U and V", U.shape[1])
    _check_matrix(f"{name}V", V, U.shape[1], columns)
    if b.dim() != 0:
        _fail(f"{name}b", list(b.shape), "a 0-dim tensor")


def _check_projection(
    name: str, p: MaskedProjection, in_features: int, device: torch.device
) -> None:
    factor_dtypes = _factor_dtypes(p)
    weight_dtypes = (*_FLOATS, *factor_dtypes)
    _check_tensor(f"{name}weight", p.weight, weight_dtypes, device)
    if p.weight.requires_grad:
        _fail(f"{name}weight.requires_grad", True, "False: the base weight is frozen")
    _check_matrix(f"{name}weight", p.weight, None, in_features)
    rows, columns = p.weight.shape
    if rows == 0 or columns == 0:
        _fail(f"{name}weight", list(p.weight.shape), "of at least one row and one column")
    for factor in _FACTORS:
        _check_tensor(f"{name}{factor}", getattr(p, factor), factor_dtypes, device)
    _check_matrix(f"{name}A", p.A, rows, None)
    _check_rank(f"{name}A and B", p.A.shape[1])
    _check_matrix(f"{name}B", p.B, p.A.shape[1], columns)
    _check_logits(name, p.U, p.V, p.b, rows, columns)
    if p.bias is not None:
        _check_tensor(f"{name}bias", p.bias, weight_dtypes, device)
        if p.bias.requires_grad:
            _fail(f"{name}bias.requires_grad", True, "False: the base bias is frozen")
        if p.bias.shape != (rows,):
            _fail(f"{name}bias", list(p.bias.shape), f"of shape [{rows}]")
    if p.weight_init is not None:
        _check_tensor(f"{name}weight_init", p.weight_init, (p.weight.dtype,), device)
        _check_matrix(f"{name}weight_init", p.weight_init, rows, columns)
    if not 0 <= p.layer_id < 1 << 32:
        _fail(f"{name}layer_id", p.layer_id, "an integer in [0, 2^32)")
    if p.row0 < 0 or p.col0 < 0:
        _fail(f"{name}row0 and col0", (p.row0, p.col0), "non-negative")


def _check_group(group: Sequence[MaskedProjection], in_features: int, device: torch.device) -> None:
    if not group:
        _fail("projections", "none", "at least one projection")
    for k, projection in enumerate(group):
        _check_projection(f"projections[{k}].", projection, in_features, device)
    for field in ("bias", "weight_init"):
        if len({getattr(p, field) is None for p in group}) == 2:
            _fail(f"projections[*].{field}", "a mixture", "given for all of a group or for none")


def _as_group(
    projections: MaskedProjection | Sequence[MaskedProjection],
) -> Sequence[MaskedProjection]:
    return [projections] if isinstance(projections, MaskedProjection) else projections


def _column(group: Sequence[MaskedProjection], field: str) -> list[Any]:
    values = [getattr(p, field) for p in group]
    if values[0] is None:
        return []
    return [v.contiguous() for v in values] if isinstance(values[0], Tensor) else values


def _autocast(x: Tensor) -> Tensor:
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def masked_linear(
    x: Tensor,
    projections: MaskedProjection | Sequence[MaskedProjection],
    *,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    hard: bool = False,
    sparse_kind: str = "sigmoid",
    backend: str | None = None,
) -> MaskedLinearOutput:
    """Y = X (W + s M (.) (A B))^T + bias for a group of projections that share X.

    x [..., I] is fp32, bf16 or fp16 and sets the dtype of the computation; weights may be wider.
    Under autocast x is cast to autocast's dtype. scale, tau (fp32), seed, step (int64) are 0-dim
    tensors on x's device. hard selects M = [L > 0] instead of the sample [u < sigmoid(L)].
    Differentiable in x, A, B, U, V, b through y and both scalars (straight-through in the mask).
    One bit per weight is saved for the backward.

    Raises ValueError or TypeError naming the argument; RuntimeError where the backend cannot run.
    """
    group = _as_group(projections)
    if not isinstance(x, Tensor):
        _fail("x", type(x).__name__, "a tensor", TypeError)
    if x.dim() == 0:
        _fail("x", "a 0-dim tensor", "of shape [..., I]")
    _check_group(group, x.shape[-1], x.device)
    accumulate = group[0].A.dtype
    floats = (*_FLOATS, torch.float64) if accumulate == torch.float64 else _FLOATS
    _check_tensor("x", x, floats, x.device)
    for name, scalar in (("scale", scale), ("tau", tau)):
        _check_scalar(name, scalar, (accumulate,), x.device)
    for name, scalar in (("seed", seed), ("step", step)):
        _check_scalar(name, scalar, (torch.int64,), x.device)
    if sparse_kind not in SPARSE_KINDS:
        _fail("sparse_kind", repr(sparse_kind), " or ".join(map(repr, SPARSE_KINDS)))
    x = _autocast(x)
    for k, p in enumerate(group):
        if p.weight.dtype.itemsize < x.dtype.itemsize or (
            p.weight.dtype.itemsize == x.dtype.itemsize and p.weight.dtype != x.dtype
        ):
            _fail(
                f"projections[{k}].weight", p.weight.dtype, f"{x.dtype} as x, or wider", TypeError
            )
    output = torch.ops.stamina.masked_linear(
        x.contiguous(), *(_column(group, f) for f in ("weight", "bias", *_FACTORS, "weight_init")),
        scale, tau, seed, step, *(_column(group, f) for f in ("layer_id", "row0", "col0")),
        hard, sparse_kind, _resolve(backend, x, accumulate),
    )  # fmt: skip
    return MaskedLinearOutput(*output)


def _resolve(backend: str | None, tensor: Tensor, accumulate: torch.dtype) -> str:
    if accumulate == torch.float64:
        if backend not in (None, "reference"):
            _fail("backend", repr(backend), "'reference' for fp64 factors")
        return "reference"
    return dispatch.resolve(backend, tensor.device.type)


def sample_mask(
    projections: MaskedProjection | Sequence[MaskedProjection],
    *,
    seed: Tensor,
    step: Tensor,
    hard: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mask bits of the group, int32 [sum O, ceil(I / 32)]: bit j & 31 of word j >> 5.

    The same bits as `masked_linear` draws for this seed and step. Not differentiable.
    """
    group = _as_group(projections)
    if not group:
        _fail("projections", "none", "at least one projection")
    device = group[0].weight.device
    _check_group(group, group[0].weight.shape[-1], device)
    for name, scalar in (("seed", seed), ("step", step)):
        _check_scalar(name, scalar, (torch.int64,), device)
    factors = [[t.detach() for t in _column(group, f)] for f in ("U", "V", "b")]
    bits: Tensor = torch.ops.stamina.sample(
        *factors, seed, step, *(_column(group, f) for f in ("layer_id", "row0", "col0")), hard,
        _resolve(backend, group[0].weight, group[0].A.dtype),
    )  # fmt: skip
    return bits


def compose(
    projections: MaskedProjection | Sequence[MaskedProjection],
    bits: Tensor,
    *,
    scale: Tensor,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """W_eff = W + s M (.) (A B) of the group from its bits, [sum O, I], one rounding to `dtype`.

    dtype defaults to that of the first weight. Not differentiable.
    """
    group = _as_group(projections)
    if not group:
        _fail("projections", "none", "at least one projection")
    first = group[0].weight
    _check_group(group, first.shape[-1], first.device)
    accumulate = group[0].A.dtype
    _check_scalar("scale", scale, (accumulate,), first.device)
    _check_tensor("bits", bits, (torch.int32,), first.device)
    rows = sum(p.weight.shape[0] for p in group)
    _check_matrix("bits", bits, rows, (first.shape[1] + 31) // 32)
    dtype = first.dtype if dtype is None else dtype
    if dtype not in (*_FLOATS, accumulate):
        _fail("dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16", TypeError)
    lists = [[t.detach() for t in _column(group, f)] for f in ("weight", "A", "B")]
    effective: Tensor = torch.ops.stamina.compose(
        *lists, bits.contiguous(), scale, dtype, _resolve(backend, first, accumulate)
    )
    return effective


def commit(
    A: Tensor,
    B: Tensor,
    U: Tensor,
    V: Tensor,
    b: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> CommittedAdapter:
    """Round a finished adapter once: fp16 factors with power-of-two scales, bits = [L > 0].

    Fold, file and live model use only these values. Raises ValueError for a non-finite factor.
    """
    for name, tensor in zip(_FACTORS, (A, B, U, V, b), strict=True):
        _check_tensor(name, tensor, (torch.float32,), A.device)
    _check_matrix("A", A, None, None)
    _check_rank("A and B", A.shape[1])
    _check_matrix("B", B, A.shape[1], None)
    _check_logits("", U, V, b, A.shape[0], B.shape[1])
    if not torch.isfinite(torch.tensor(scale)):
        _fail("scale", scale, "finite")
    factors = [t.detach().contiguous() for t in (A, B, U, V, b)]
    A16, B16, exponent, bits = torch.ops.stamina.commit(
        *factors, dispatch.resolve(backend, A.device.type)
    )
    ea, eb = exponent.tolist()
    return CommittedAdapter(A16, B16, (ea, eb), bits, float(scale))


def _check_committed(name: str, adapter: CommittedAdapter, weight: Tensor) -> None:
    rows, columns = weight.shape
    for field, dtype in (("A", torch.float16), ("B", torch.float16), ("bits", torch.int32)):
        _check_tensor(f"{name}.{field}", getattr(adapter, field), (dtype,), weight.device)
    _check_matrix(f"{name}.A", adapter.A, rows, None)
    _check_rank(f"{name}.A and B", adapter.A.shape[1])
    _check_matrix(f"{name}.B", adapter.B, adapter.A.shape[1], columns)
    _check_matrix(f"{name}.bits", adapter.bits, rows, (columns + 31) // 32)


def fold_(
    weights: Sequence[Tensor],
    weights_init: Sequence[Tensor],
    adapters: Sequence[Sequence[CommittedAdapter]],
    *,
    backend: str | None = None,
) -> None:
    """W_k = round(W_init_k + sum_t D_kt) in place for every layer k, concepts t in ascending order.

    Deltas are summed in fp32 before the only rounding, so unfolding is folding the rest: the bits
    are the same. weights and weights_init hold fp32 / bf16 / fp16 matrices O x I that do not
    overlap. Raises before anything is written for a bad argument; OverflowError where a result
    does not fit W's dtype, with every weight set back to weights_init.
    """
    if not len(weights) == len(weights_init) == len(adapters):
        _fail(
            "weights, weights_init and adapters",
            (len(weights), len(weights_init), len(adapters)),
            "of equal length",
        )
    if not weights:
        _fail("weights", "none", "at least one weight")
    device = weights[0].device
    first = [0]
    for k, (weight, initial, layer) in enumerate(zip(weights, weights_init, adapters, strict=True)):
        _check_tensor(f"weights[{k}]", weight, _FLOATS, device)
        _check_matrix(f"weights[{k}]", weight, None, None)
        _check_tensor(f"weights_init[{k}]", initial, (weight.dtype,), device)
        _check_matrix(f"weights_init[{k}]", initial, *weight.shape)
        if not weight.is_contiguous():
            _fail(f"weights[{k}]", f"strides {weight.stride()}", "contiguous")
        if weight.untyped_storage().data_ptr() == initial.untyped_storage().data_ptr():
            _fail(f"weights_init[{k}]", "the storage of weights", "kept apart from the weight")
        for t, adapter in enumerate(layer):
            _check_committed(f"adapters[{k}][{t}]", adapter, weight)
        first.append(first[-1] + len(layer))
    flat = [adapter for layer in adapters for adapter in layer]
    with torch.no_grad():
        torch.ops.stamina.fold_(
            list(weights),
            [initial.contiguous() for initial in weights_init],
            [adapter.A.contiguous() for adapter in flat],
            [adapter.B.contiguous() for adapter in flat],
            [adapter.scale * 2.0 ** sum(adapter.exponent) for adapter in flat],
            [adapter.bits.contiguous() for adapter in flat],
            first,
            dispatch.resolve(backend, device.type),
        )


__all__ = [
    "MAX_RANK",
    "CommittedAdapter",
    "MaskedLinearOutput",
    "MaskedProjection",
    "commit",
    "compose",
    "fold_",
    "masked_linear",
    "sample_mask",
    "unpack_bits",
]
