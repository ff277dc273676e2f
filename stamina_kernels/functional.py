# SPDX-License-Identifier: Apache-2.0
"""Public functions: validation, autocast and backend choice around the operations of `ops.py`.

The formulas are in `reference.py`. Shapes: X [..., I]; of a projection, weight O x I, A O x r,
B r x I, U O x m, V m x I, b 0-dim. Several projections that share X form a group, which is stacked
along O. Every check reads metadata only, so that no call waits for a device.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stamina_kernels import dispatch, ops
from stamina_kernels.checks import (
    FACTORS,
    FLOATS,
    MAX_RANK,
    SPARSE_KINDS,
    check_filled,
    check_finite,
    check_flag,
    check_fold,
    check_group,
    check_integer,
    check_logits,
    check_matrix,
    check_members,
    check_mlp,
    check_number,
    check_rank,
    check_scalar,
    check_sequence,
    check_streams,
    check_tensor,
    fail,
)
from stamina_kernels.projection import (
    CommittedAdapter,
    EmbeddingMLP,
    MaskedLinearOutput,
    MaskedProjection,
)
from stamina_kernels.reference import round_factors, word_count
from stamina_kernels.reference import unpack_bits as _unpack_bits

_COORDINATES = ("layer_id", "row0", "col0")


def _as_group(
    projections: MaskedProjection | Sequence[MaskedProjection],
) -> Sequence[MaskedProjection]:
    group = [projections] if isinstance(projections, MaskedProjection) else projections
    check_members(group)
    return group


def _columns(group: Sequence[MaskedProjection], *fields: str) -> Iterator[list[Any]]:
    """Field by field of all projections; [] for one that is not given."""
    columns = dict(zip(MaskedProjection._fields, zip(*group, strict=True), strict=True))
    for field in fields:
        column = columns[field]
        yield [] if column[0] is None else list(column)


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

    x [..., I] is fp32, bf16 or fp16 and sets the dtype of the computation; weights have the same
    dtype or a wider one. Under autocast x is cast to autocast's dtype. scale, tau (fp32), seed,
    step (int64) are 0-dim tensors on x's device; tau is above 0, which is not checked: no check
    waits for a device. Where masks are sampled, projections of one layer_id are shards of a layer,
    apart in row0 or col0. hard selects M = [L > 0] instead of the sample
    [u < sigmoid(L)].
    Differentiable in x, A, B, U, V, b through y and both scalars (straight-through in the mask).
    One bit per weight is saved for the backward. Strided tensors are copied in every call. To
    torch.compile every layer_id is a constant: a model compiled as a whole is one graph, compiled
    block by block a graph for each, of which torch keeps eight.

    Raises ValueError or TypeError naming the argument; RuntimeError where the backend cannot run;
    NotImplementedError for derivatives in forward mode and second ones.
    """
    group = _as_group(projections)
    if not isinstance(x, Tensor):
        fail("x", type(x).__name__, "a tensor", TypeError)
    if x.dim() == 0:
        fail("x", "a 0-dim tensor", "of shape [..., I]")
    width = group[0].weight.shape[1]
    # where the projections agree among themselves, x is what is wrong
    if x.shape[-1] != width and all(getattr(p.B, "shape", ())[-1:] == (width,) for p in group):
        fail("x", list(x.shape), f"of shape [..., {width}]")
    home = group[0].weight.device
    if x.device != home and all(p.weight.device == home for p in group):
        fail("x", x.device, f"on device {home} as the weights")
    check_group(group, x.shape[-1], x.device)
    accumulate = group[0].A.dtype
    floats = (*FLOATS, torch.float64) if accumulate == torch.float64 else FLOATS
    check_tensor("x", x, floats, x.device)
    for name, scalar in (("scale", scale), ("tau", tau)):
        check_scalar(name, scalar, (accumulate,), x.device)
    for name, scalar in (("seed", seed), ("step", step)):
        check_scalar(name, scalar, (torch.int64,), x.device)
    check_flag("hard", hard)
    if not hard:
        check_streams(group)
    if sparse_kind not in SPARSE_KINDS:
        fail("sparse_kind", repr(sparse_kind), " or ".join(map(repr, SPARSE_KINDS)))
    computed = _autocast(x)
    for k, p in enumerate(group):
        room = p.weight.dtype.itemsize - computed.dtype.itemsize
        if room < 0 or (room == 0 and p.weight.dtype != computed.dtype):
            as_x = f"{computed.dtype} as x{'' if computed is x else ' under autocast'}, or wider"
            fail(f"projections[{k}].weight", p.weight.dtype, as_x, TypeError)
    output = ops.masked_linear(
        computed,
        list(_columns(group, "weight", "bias", *FACTORS, "weight_init")),
        scale, tau, seed, step, *_columns(group, *_COORDINATES),
        hard, sparse_kind, _resolve(backend, x, accumulate),
    )  # fmt: skip
    return MaskedLinearOutput(*output)


def _resolve(backend: str | None, tensor: Tensor, accumulate: torch.dtype) -> str:
    if accumulate != torch.float64:
        return dispatch.resolve(backend, tensor.device.type)
    asked, origin = dispatch.asked_for(backend)
    if asked not in (None, "reference"):
        fail("backend", repr(asked) + origin, "'reference' for fp64 factors")
    return "reference"


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
    device = group[0].weight.device
    check_group(group, group[0].weight.shape[-1], device)
    for name, scalar in (("seed", seed), ("step", step)):
        check_scalar(name, scalar, (torch.int64,), device)
    check_flag("hard", hard)
    if not hard:
        check_streams(group)
    factors = [[t.detach() for t in column] for column in _columns(group, "U", "V", "b")]
    bits: Tensor = torch.ops.stamina.sample(
        *factors, seed, step, *_columns(group, *_COORDINATES), hard,
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
    first = group[0].weight
    check_group(group, first.shape[-1], first.device)
    accumulate = group[0].A.dtype
    check_scalar("scale", scale, (accumulate,), first.device)
    check_tensor("bits", bits, (torch.int32,), first.device)
    rows = sum(p.weight.shape[0] for p in group)
    check_matrix("bits", bits, rows, word_count(first.shape[1]))
    dtype = first.dtype if dtype is None else dtype
    if dtype not in (*FLOATS, accumulate):
        fail("dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16", TypeError)
    lists = [[t.detach() for t in column] for column in _columns(group, "weight", "A", "B")]
    effective: Tensor = torch.ops.stamina.compose(
        *lists, bits, scale, dtype, _resolve(backend, first, accumulate)
    )
    return effective


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    """bool [O, I] of mask bits int32 [O, ceil(I / 32)].

    Raises ValueError or TypeError naming the argument.
    """
    device = bits.device if isinstance(bits, Tensor) else None
    check_tensor("bits", bits, (torch.int32,), device)
    check_integer("in_features", in_features, range(1, 1 << 34))
    check_matrix("bits", bits, None, word_count(in_features))
    return _unpack_bits(bits, in_features)


def embedding_mlp(mlps: Sequence[EmbeddingMLP], *, backend: str | None = None) -> Sequence[Tensor]:
    """Y = silu(E W1^T + b1) W2^T + b2 of every MLP, or Y^T where it is `transposed`.

    Serves the factors of the mask logits: those of a whole group of projections in one launch, in
    the layout that `masked_linear` takes. E [n, d], W1 [h, d], b1 [h], W2 [m, h], b2 [m] are fp32;
    d and m are at most 256, h at most 32. Differentiable in all of them; nothing but them is saved
    for the backward, which forms the hidden layer again. Autocast has no effect.

    Raises ValueError or TypeError naming the argument; RuntimeError where the backend cannot run.
    """
    if isinstance(mlps, EmbeddingMLP):  # itself a tuple
        fail("mlps", "one EmbeddingMLP", "a list of them", TypeError)
    if not check_sequence("mlps", mlps):
        fail("mlps", "none", "at least one MLP")
    first: Any = getattr(mlps[0], "E", None)
    if not isinstance(first, Tensor):
        fail("mlps[0].E", type(first).__name__, "a tensor", TypeError)
    accumulate = torch.float64 if first.dtype == torch.float64 else torch.float32
    for k, mlp in enumerate(mlps):
        check_mlp(f"mlps[{k}]", mlp, (accumulate,), first.device)
    lists = [[getattr(mlp, f) for mlp in mlps] for f in ("E", "W1", "b1", "W2", "b2")]
    flipped = [mlp.transposed for mlp in mlps]
    return ops.embedding_mlp(lists, flipped, _resolve(backend, first, accumulate))


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
    if not isinstance(A, Tensor):
        fail("A", type(A).__name__, "a tensor", TypeError)
    for name, tensor in zip(FACTORS, (A, B, U, V, b), strict=True):
        check_tensor(name, tensor, (torch.float32,), A.device)
    check_matrix("A", A, None, None)
    check_rank("A and B", A.shape[1])
    check_matrix("B", B, A.shape[1], None)
    check_filled("A", A)
    check_filled("B", B)
    check_logits("", U, V, b, A.shape[0], B.shape[1])
    check_number("scale", scale)
    for name, tensor in zip(FACTORS, (A, B, U, V, b), strict=True):
        check_finite(name, tensor)
    U, V, b = (t.detach() for t in (U, V, b))
    zero = torch.zeros((), dtype=torch.int64, device=A.device)
    # the backend's own logits: its hard masks are those that the live model has been seen with
    bits = torch.ops.stamina.sample(
        [U], [V], [b], zero, zero, [0], [0], [0], True, dispatch.resolve(backend, A.device.type)
    )
    return CommittedAdapter(*round_factors(A.detach(), B.detach()), bits, float(scale))


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
    overlap. Raises before anything is written for a bad argument, the values apart, which are not
    read beforehand: where a result is not finite every weight is set back to weights_init, and
    ValueError names the input that is not finite or OverflowError the layer whose dtype is too
    narrow.
    """
    check_fold(weights, weights_init, adapters)
    flat = [adapter for layer in adapters for adapter in layer]
    first = list(accumulate((len(layer) for layer in adapters), initial=0))
    name = dispatch.resolve(backend, weights[0].device.type)
    try:
        with torch.no_grad():
            torch.ops.stamina.fold_(
                list(weights),
                list(weights_init),
                [adapter.A for adapter in flat],
                [adapter.B for adapter in flat],
                [adapter.scale * 2.0 ** sum(adapter.exponent) for adapter in flat],
                [adapter.bits for adapter in flat],
                first,
                name,
            )
    except OverflowError:
        for k, (initial, layer) in enumerate(zip(weights_init, adapters, strict=True)):
            check_finite(f"weights_init[{k}]", initial)
            for t, adapter in enumerate(layer):
                for field in ("A", "B"):
                    check_finite(f"adapters[{k}][{t}].{field}", getattr(adapter, field))
        raise


__all__ = [
    "MAX_RANK",
    "CommittedAdapter",
    "EmbeddingMLP",
    "MaskedLinearOutput",
    "MaskedProjection",
    "commit",
    "compose",
    "embedding_mlp",
    "fold_",
    "masked_linear",
    "sample_mask",
    "unpack_bits",
]
