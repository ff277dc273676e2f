# SPDX-License-Identifier: Apache-2.0
"""Checks of the public functions' arguments: metadata only, so that none waits for a device, but
for `check_finite`.

Each raises ValueError or TypeError naming the argument, what it was and what it should be.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from stamina_kernels.projection import CommittedAdapter, EmbeddingMLP, MaskedProjection
from stamina_kernels.reference import word_count

MAX_RANK = 256
MAX_HIDDEN = 32  # of an embedding MLP: one tile of the GPU's kernels
SPARSE_KINDS = ("sigmoid", "relu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = range(-148, 129)  # of fp32 numbers in [1/2, 1)
_LARGEST = torch.finfo(torch.float32).max
FACTORS = ("A", "B", "U", "V", "b")
PLAIN = {Tensor, torch.nn.Parameter}  # no subclass with behaviour of its own


def fail(name: str, got: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name} must be {expected}, got {got}")


def check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    shape = tensor.shape
    if (
        len(shape) == 2
        and (rows is None or shape[0] == rows)
        and (columns is None or shape[1] == columns)
    ):
        return
    wanted = f"[{'*' if rows is None else rows}, {'*' if columns is None else columns}]"
    fail(name, list(shape), f"of shape {wanted}")


def check_filled(name: str, matrix: Tensor) -> None:
    if 0 in matrix.shape:
        fail(name, list(matrix.shape), "of at least one row and one column")


def check_finite(name: str, tensor: Tensor) -> None:
    """Reads the values."""
    if wrong := int((~torch.isfinite(tensor)).sum()):
        fail(name, f"{wrong} non-finite values", "finite")


def check_rank(name: str, rank: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        fail(f"the rank of {name}", rank, f"between 1 and {MAX_RANK}")


def check_tensor(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        fail(name, type(tensor).__name__, "a tensor", TypeError)
    if tensor.dtype not in dtypes:
        fail(name, tensor.dtype, "of dtype " + " or ".join(map(str, dtypes)), TypeError)
    if tensor.device != device:
        fail(name, tensor.device, f"on device {device}")
    if tensor.layout != torch.strided:
        fail(name, tensor.layout, "a dense tensor")
    if tensor.is_meta:
        fail(name, "a meta tensor", "a tensor with data")


def check_integer(name: str, value: Any, allowed: range) -> None:
    if not isinstance(value, int):
        fail(name, repr(value), "an integer", TypeError)
    if not allowed.start <= value < allowed.stop:
        fail(name, value, f"an integer in [{allowed.start}, {allowed.stop})")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)):
        fail(name, repr(value), "a number", TypeError)
    if not abs(value) <= _LARGEST:
        fail(name, value, "finite")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(name, repr(value), "True or False", TypeError)


def check_sequence(name: str, value: Any, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        fail(name, type(value).__name__, "a list", TypeError)
    if length is not None and len(value) != length:
        fail(name, f"{len(value)} elements", f"of {length} elements")
    return value


def check_scalar(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    check_tensor(name, tensor, dtypes, device)
    if tensor.dim() != 0:
        fail(name, list(tensor.shape), "a 0-dim tensor")
    if tensor.requires_grad:
        fail(f"{name}.requires_grad", True, "False: it gets no gradient")


def _factor_dtypes(projection: MaskedProjection) -> tuple[torch.dtype, ...]:
    # fp64 throughout is for gradient checks of the reference
    wide = isinstance(projection.A, Tensor) and projection.A.dtype == torch.float64
    return (torch.float64,) if wide else (torch.float32,)


def check_logits(
    name: str, U: Tensor, V: Tensor, b: Tensor, rows: int, columns: int | None
) -> None:
    check_matrix(f"{name}U", U, rows, None)
    check_rank(f"{name}U and V", U.shape[1])
    check_matrix(f"{name}V", V, U.shape[1], columns)
    if b.dim() != 0:
        fail(f"{name}b", list(b.shape), "a 0-dim tensor")


def _fits_projection(p: MaskedProjection, in_features: int, device: torch.device) -> bool:
    """Enough for `_check_projection` to pass, in a fraction of its time: a layer calls it in every
    step."""
    weight, A, B, U, V, b, layer_id, bias, initial, row0, col0 = p
    factors = (A, B, U, V, b)
    frozen = [weight, *(t for t in (bias, initial) if t is not None)]
    if not {*map(type, factors), *map(type, frozen)} <= PLAIN or weight.dim() != 2:
        return False
    rows, columns = weight.shape
    return (
        {t.dtype for t in factors} == {torch.float32}
        and {t.dtype for t in frozen} <= {weight.dtype}
        and weight.dtype in FLOATS
        and {(t.device, t.layout) for t in (*factors, *frozen)} == {(device, torch.strided)}
        and device.type != "meta"
        and True not in {t.requires_grad for t in frozen}
        and columns == in_features
        and rows > 0 < columns
        and A.dim() == U.dim() == 2
        and A.shape == (rows, rank := A.shape[1])
        and U.shape == (rows, mask_rank := U.shape[1])
        and 1 <= rank <= MAX_RANK
        and 1 <= mask_rank <= MAX_RANK
        and B.shape == (rank, columns)
        and V.shape == (mask_rank, columns)
        and b.dim() == 0
        and (bias is None or bias.shape == (rows,))
        and (initial is None or initial.shape == (rows, columns))
        and type(layer_id) is type(row0) is type(col0) is int
        and 0 <= layer_id < 1 << 32
        and 0 <= row0 <= (1 << 32) - rows
        and 0 <= col0 <= (1 << 34) - columns
    )


def _check_projection(
    name: str, p: MaskedProjection, in_features: int, device: torch.device
) -> None:
    factor_dtypes = _factor_dtypes(p)
    weight_dtypes = tuple(dict.fromkeys((*FLOATS, *factor_dtypes)))
    check_tensor(f"{name}weight", p.weight, weight_dtypes, device)
    if p.weight.requires_grad:
        fail(f"{name}weight.requires_grad", True, "False: the base weight is frozen")
    check_matrix(f"{name}weight", p.weight, None, in_features)
    rows, columns = p.weight.shape
    check_filled(f"{name}weight", p.weight)
    for factor in FACTORS:
        check_tensor(f"{name}{factor}", getattr(p, factor), factor_dtypes, device)
    check_matrix(f"{name}A", p.A, rows, None)
    check_rank(f"{name}A and B", p.A.shape[1])
    check_matrix(f"{name}B", p.B, p.A.shape[1], columns)
    check_logits(name, p.U, p.V, p.b, rows, columns)
    if p.bias is not None:
        check_tensor(f"{name}bias", p.bias, weight_dtypes, device)
        if p.bias.requires_grad:
            fail(f"{name}bias.requires_grad", True, "False: the base bias is frozen")
        if p.bias.shape != (rows,):
            fail(f"{name}bias", list(p.bias.shape), f"of shape [{rows}]")
    if p.weight_init is not None:
        check_tensor(f"{name}weight_init", p.weight_init, (p.weight.dtype,), device)
        if p.weight_init.requires_grad:
            fail(f"{name}weight_init.requires_grad", True, "False: it gets no gradient")
        check_matrix(f"{name}weight_init", p.weight_init, rows, columns)
    for field in ("layer_id", "row0", "col0"):
        if not isinstance(getattr(p, field), int):
            fail(f"{name}{field}", repr(getattr(p, field)), "an integer", TypeError)
    if not 0 <= p.layer_id < 1 << 32:
        fail(f"{name}layer_id", p.layer_id, "an integer in [0, 2^32)")
    # the counter of the random stream holds i in 32 bits and j >> 2 in 32 bits
    if not (0 <= p.row0 <= (1 << 32) - rows and 0 <= p.col0 <= (1 << 34) - columns):
        fail(f"{name}row0 and col0", (p.row0, p.col0), "rows below 2^32, columns below 2^34")


def check_members(projections: Any) -> None:
    """A non-empty list of projections; the weight of the first is a matrix."""
    if not check_sequence("projections", projections):
        fail("projections", "none", "at least one projection")
    for k, projection in enumerate(projections):
        if not isinstance(projection, MaskedProjection):
            fail(f"projections[{k}]", type(projection).__name__, "a MaskedProjection", TypeError)
    weight = projections[0].weight
    if not isinstance(weight, Tensor):
        fail("projections[0].weight", type(weight).__name__, "a tensor", TypeError)
    check_matrix("projections[0].weight", weight, None, None)


def check_streams(group: Sequence[MaskedProjection]) -> None:
    """No two projections draw the same numbers: those of one layer_id are shards, apart."""
    if len(group) == 1:
        return
    by_layer: dict[int, list[int]] = {}
    for k, p in enumerate(group):
        rows, columns = p.weight.shape
        for j in by_layer.setdefault(p.layer_id, []):
            q = group[j]
            if (
                p.row0 < q.row0 + q.weight.shape[0]
                and q.row0 < p.row0 + rows
                and p.col0 < q.col0 + columns
                and q.col0 < p.col0 + columns
            ):
                wanted = (
                    f"another than that of projections[{j}], whose random numbers it would draw"
                )
                fail(f"projections[{k}].layer_id", p.layer_id, wanted)
        by_layer[p.layer_id].append(k)


def check_group(group: Sequence[MaskedProjection], in_features: int, device: torch.device) -> None:
    for k, projection in enumerate(group):
        if not _fits_projection(projection, in_features, device):
            _check_projection(f"projections[{k}].", projection, in_features, device)
    for field in ("bias", "weight_init") if len(group) > 1 else ():
        if len({getattr(p, field) is None for p in group}) == 2:
            fail(f"projections[*].{field}", "a mixture", "given for all of a group or for none")


def check_mlp(
    name: str, mlp: EmbeddingMLP, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if not isinstance(mlp, EmbeddingMLP):
        fail(name, type(mlp).__name__, "an EmbeddingMLP", TypeError)
    for field in ("E", "W1", "b1", "W2", "b2"):
        check_tensor(f"{name}.{field}", getattr(mlp, field), dtypes, device)
    check_matrix(f"{name}.E", mlp.E, None, None)
    if mlp.E.shape[0] == 0:
        fail(f"{name}.E", list(mlp.E.shape), "of at least one row")
    check_matrix(f"{name}.W1", mlp.W1, None, mlp.E.shape[1])
    hidden = mlp.W1.shape[0]
    check_matrix(f"{name}.W2", mlp.W2, None, hidden)
    for field, size in (("E", mlp.E.shape[1]), ("W2", mlp.W2.shape[0])):
        check_rank(f"{name}.{field}", size)
    if not 1 <= hidden <= MAX_HIDDEN:
        fail(f"{name}.W1", list(mlp.W1.shape), f"of 1 to {MAX_HIDDEN} rows")
    for field, size in (("b1", hidden), ("b2", mlp.W2.shape[0])):
        if getattr(mlp, field).shape != (size,):
            fail(f"{name}.{field}", list(getattr(mlp, field).shape), f"of shape [{size}]")
    check_flag(f"{name}.transposed", mlp.transposed)


def _fits(adapter: Any, rows: int, columns: int, words: int, device: torch.device) -> bool:
    """Enough for `_check_committed` to pass, in half of its time: a fold takes thousands."""
    if type(adapter) is not CommittedAdapter:
        return False
    A, B, exponent, bits, scale = adapter
    return (
        type(A) is type(B) is type(bits) is Tensor
        and A.dtype is B.dtype is torch.float16
        and bits.dtype is torch.int32
        and A.device == B.device == bits.device == device
        and A.layout == B.layout == bits.layout == torch.strided
        and A.dim() == 2
        and A.shape == (rows, rank := A.shape[1])
        and 1 <= rank <= MAX_RANK
        and B.shape == (rank, columns)
        and bits.shape == (rows, words)
        and type(scale) is float
        and abs(scale) <= _LARGEST
        and type(exponent) is tuple
        and len(exponent) == 2
        and all(type(e) is int and e in EXPONENTS for e in exponent)
    )


def _check_committed(name: str, adapter: Any, weight: Tensor) -> None:
    if not isinstance(adapter, CommittedAdapter):
        fail(name, type(adapter).__name__, "a CommittedAdapter", TypeError)
    rows, columns = weight.shape
    for field, dtype in (("A", torch.float16), ("B", torch.float16), ("bits", torch.int32)):
        check_tensor(f"{name}.{field}", getattr(adapter, field), (dtype,), weight.device)
    check_matrix(f"{name}.A", adapter.A, rows, None)
    check_rank(f"{name}.A and B", adapter.A.shape[1])
    check_matrix(f"{name}.B", adapter.B, adapter.A.shape[1], columns)
    check_matrix(f"{name}.bits", adapter.bits, rows, word_count(columns))
    check_number(f"{name}.scale", adapter.scale)
    for exponent in check_sequence(f"{name}.exponent", adapter.exponent, length=2):
        check_integer(f"{name}.exponent", exponent, EXPONENTS)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first address of the tensor's elements, and the first behind them."""
    start, size = tensor.data_ptr(), tensor.nbytes
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = (1 + sum((n - 1) * stride for n, stride in steps)) * tensor.element_size()
    return start, start + size


def _inputs(
    weights_init: Sequence[Tensor], adapters: Sequence[Sequence[CommittedAdapter]]
) -> Iterator[tuple[Tensor, str, int, int]]:
    """Every tensor that a fold reads, and the format of its name with the numbers in it."""
    for k, (initial, layer) in enumerate(zip(weights_init, adapters, strict=True)):
        yield initial, "weights_init[{}]", k, 0
        for t, adapter in enumerate(layer):
            yield adapter.A, "adapters[{}][{}].A", k, t
            yield adapter.B, "adapters[{}][{}].B", k, t
            yield adapter.bits, "adapters[{}][{}].bits", k, t


def _check_apart(
    weights: Sequence[Tensor],
    weights_init: Sequence[Tensor],
    adapters: Sequence[Sequence[CommittedAdapter]],
) -> None:
    """No weight, which is written, shares memory with another weight or with what is read. Tensors
    that stand for others, as in compilation, have no address to tell by."""
    if torch.compiler.is_compiling() or any(isinstance(w, FakeTensor) for w in weights):
        return
    spans = sorted((*_span(weight), f"weights[{k}]") for k, weight in enumerate(weights))
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            fail(other, f"memory of {name}", "kept apart from the other weights")
    starts = [start for start, _, _ in spans]
    for tensor, name, k, t in _inputs(weights_init, adapters):
        start, end = _span(tensor)
        # weights do not overlap: only the last of those that start before the input ends can
        before = bisect_left(starts, end) - 1
        if before >= 0 and spans[before][1] > start:
            fail(name.format(k, t), f"memory of {spans[before][2]}", "kept apart from the weights")


def check_fold(
    weights: Sequence[Tensor],
    weights_init: Sequence[Tensor],
    adapters: Sequence[Sequence[CommittedAdapter]],
) -> None:
    """The arguments of `fold_`, whose values are not read."""
    lists = {"weights": weights, "weights_init": weights_init, "adapters": adapters}
    lengths = tuple(len(check_sequence(name, value)) for name, value in lists.items())
    if len(set(lengths)) != 1:
        fail("weights, weights_init and adapters", lengths, "of equal length")
    if not weights:
        fail("weights", "none", "at least one weight")
    if not isinstance(weights[0], Tensor):
        fail("weights[0]", type(weights[0]).__name__, "a tensor", TypeError)
    device = weights[0].device
    for k, (weight, initial, layer) in enumerate(zip(weights, weights_init, adapters, strict=True)):
        check_tensor(f"weights[{k}]", weight, FLOATS, device)
        check_matrix(f"weights[{k}]", weight, None, None)
        check_filled(f"weights[{k}]", weight)
        check_tensor(f"weights_init[{k}]", initial, (weight.dtype,), device)
        check_matrix(f"weights_init[{k}]", initial, *weight.shape)
        if not weight.is_contiguous():
            fail(f"weights[{k}]", f"strides {weight.stride()}", "contiguous")
        rows, columns = weight.shape
        words = word_count(columns)
        for t, adapter in enumerate(check_sequence(f"adapters[{k}]", layer)):
            if not _fits(adapter, rows, columns, words, device):
                _check_committed(f"adapters[{k}][{t}]", adapter, weight)
    _check_apart(weights, weights_init, adapters)
