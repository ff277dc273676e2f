# SPDX-License-Identifier: Apache-2.0
"""How a group of projections of different heights and ranks reaches one launch.

All factors of the group are packed into one fp32 vector; a table of int64 rows tells the kernel
where a member's parts are and what it is. The table holds only what stays the same from step to
step (weights do not move, shapes do not change), so it is copied to the device once and reused.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_VECTOR_BYTES = 16


class Launch(NamedTuple):
    """The members that one launch serves: those whose weights have one dtype."""

    dtype: torch.dtype
    alignment: int  # bytes that divide every weight's address
    rows: list[int]  # of every member
    members: Tensor  # int64 [members, FIELDS], fields as in tile.py


class Group(NamedTuple):
    """Projections that share X, as the kernels see them."""

    rows: list[int]
    columns: int
    ranks: list[int]
    mask_ranks: list[int]
    factors: Tensor  # A of all members, then U (left factors), B, V (right factors), b
    left_size: int
    right_size: int
    launches: list[Launch]


def gather(
    A: Sequence[Tensor] = (),
    B: Sequence[Tensor] = (),
    U: Sequence[Tensor] = (),
    V: Sequence[Tensor] = (),
    b: Sequence[Tensor] = (),
    weight: Sequence[Tensor] = (),
    weight_init: Sequence[Tensor] = (),
    coordinates: Sequence[tuple[int, int, int]] = (),
) -> Group:
    """Pack the factors that an operation has; coordinates are (layer_id, row0, col0)."""
    left, right = A or U, B or V
    rows, members = [factor.shape[0] for factor in left], len(left)
    nothing = [0] * members
    ranks = [a.shape[1] for a in A] or nothing
    mask_ranks = [u.shape[1] for u in U] or nothing
    offsets, ends = _offsets((A, U, B, V, b), members)
    factors = torch.cat([tensor.reshape(-1) for tensor in (*A, *U, *B, *V, *b)])
    columns = zip(
        [w.data_ptr() for w in weight] or nothing,
        [w.data_ptr() for w in weight_init] or nothing,
        rows,
        [sum(rows[:k]) for k in range(members)],
        *offsets,
        ranks,
        mask_ranks,
        coordinates or [(0, 0, 0)] * members,
        range(members),
        strict=True,
    )
    fields = [(*head, *place, member) for *head, place, member in columns]
    dtypes = [w.dtype for w in weight] or [factors.dtype] * members
    launches = []
    for dtype in dict.fromkeys(dtypes):
        chosen = [k for k in range(members) if dtypes[k] == dtype]
        launches.append(
            Launch(
                dtype,
                alignment(
                    [tensors[k] for tensors in (weight, weight_init) if tensors for k in chosen]
                ),
                [rows[k] for k in chosen],
                device_table(tuple(fields[k] for k in chosen), factors.device),
            )
        )
    return Group(
        rows, right[0].shape[1], ranks, mask_ranks, factors, ends[1], ends[3] - ends[1], launches
    )


def _offsets(packed: Sequence[Sequence[Tensor]], members: int) -> tuple[list[list[int]], list[int]]:
    """Where every tensor of every list begins (a missing list: at 0) and where every list ends."""
    offsets, ends, end = [], [], 0
    for tensors in packed:
        starts = []
        for tensor in tensors:
            starts.append(end)
            end += tensor.numel()
        offsets.append(starts or [0] * members)
        ends.append(end)
    return offsets, ends


@lru_cache(maxsize=4096)
def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def alignment(tensors: Sequence[Tensor]) -> int:
    """Bytes that divide the address of every tensor: enough for vector accesses, or one element."""
    if all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in tensors):
        return _VECTOR_BYTES
    return min(tensor.element_size() for tensor in tensors)


def unpack_gradients(
    group: Group, left_sums: Tensor, right_sums: Tensor, logit_sums: Tensor
) -> Tensor:
    """Packed sums -> dA, dB, dU, dV, db per member, flat."""
    members, ranks = len(group.rows), group.ranks + group.mask_ranks
    left = left_sums.split([o * r for o, r in zip(group.rows * 2, ranks, strict=True)])
    right = right_sums.split([r * group.columns for r in ranks])
    dA, dB, dU, dV = left[:members], right[:members], left[members:], right[members:]
    parts = zip(dA, dB, dU, dV, logit_sums.split(1), strict=True)
    return torch.cat([part for member in parts for part in member])
