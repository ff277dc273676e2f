# SPDX-License-Identifier: Apache-2.0
"""Checks of the public functions' arguments: metadata only, so that none waits for a device.

Each raises ValueError or TypeError naming the argument, what it was and what it should be.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stamina_kernels.projection import CommittedAdapter, MaskedProjection

MAX_RANK = 256
SPARSE_KINDS = ("sigmoid", "relu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FACTORS = ("A", "B", "U", "V", "b")


def fail(name: str, got: object, expected: str, error: type[Exception] = ValueError) -> None:
    raise error(f"{name} must be {expected}, got {got}")


def check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None) -> None:
    wanted = f"[{'*' if rows is None else rows}, {'*' if columns is None else columns}]"
    fits = tensor.dim() == 2 and all(
        want is None or have == want
        for have, want in zip(tensor.shape, (rows, columns), strict=True)
    )
    if not fits:
        fail(name, list(tensor.shape), f"of shape {wanted}")


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


def check_projection(
    name: str, p: MaskedProjection, in_features: int, device: torch.device
) -> None:
    factor_dtypes = _factor_dtypes(p)
    weight_dtypes = tuple(dict.fromkeys((*FLOATS, *factor_dtypes)))
    check_tensor(f"{name}weight", p.weight, weight_dtypes, device)
    if p.weight.requires_grad:
        fail(f"{name}weight.requires_grad", True, "False: the base weight is frozen")
    check_matrix(f"{name}weight", p.weight, None, in_features)
    rows, columns = p.weight.shape
    if rows == 0 or columns == 0:
        fail(f"{name}weight", list(p.weight.shape), "of at least one row and one column")
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
        check_matrix(f"{name}weight_init", p.weight_init, rows, columns)
    if not 0 <= p.layer_id < 1 << 32:
        fail(f"{name}layer_id", p.layer_id, "an integer in [0, 2^32)")
    # the counter of the random stream holds i in 32 bits and j >> 2 in 32 bits
    if not (0 <= p.row0 <= (1 << 32) - rows and 0 <= p.col0 <= (1 << 34) - columns):
        fail(f"{name}row0 and col0", (p.row0, p.col0), "rows below 2^32, columns below 2^34")


def check_group(group: Sequence[MaskedProjection], in_features: int, device: torch.device) -> None:
    if not group:
        fail("projections", "none", "at least one projection")
    for k, projection in enumerate(group):
        check_projection(f"projections[{k}].", projection, in_features, device)
    for field in ("bias", "weight_init"):
        if len({getattr(p, field) is None for p in group}) == 2:
            fail(f"projections[*].{field}", "a mixture", "given for all of a group or for none")


def check_committed(name: str, adapter: CommittedAdapter, weight: Tensor) -> None:
    rows, columns = weight.shape
    for field, dtype in (("A", torch.float16), ("B", torch.float16), ("bits", torch.int32)):
        check_tensor(f"{name}.{field}", getattr(adapter, field), (dtype,), weight.device)
    check_matrix(f"{name}.A", adapter.A, rows, None)
    check_rank(f"{name}.A and B", adapter.A.shape[1])
    check_matrix(f"{name}.B", adapter.B, adapter.A.shape[1], columns)
    check_matrix(f"{name}.bits", adapter.bits, rows, (columns + 31) // 32)
