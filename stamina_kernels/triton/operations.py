# SPDX-License-Identifier: Apache-2.0
"""The six operations of the backend; `stamina_kernels/reference.py` defines what they compute.

masked_linear composes W_eff once for the whole group, in one launch that also draws the bits, and
leaves Y = X W_eff^T to the vendor's GEMM. W_eff is a transient: the backward composes it again from
the bits for dX. Reductions run over per-tile parts in a fixed order.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stamina_kernels import reference
from stamina_kernels.triton import config
from stamina_kernels.triton.backward import backward_kernel
from stamina_kernels.triton.composition import compose_kernel, sample_compose_kernel
from stamina_kernels.triton.config import ceil_div
from stamina_kernels.triton.fold import fold_kernel
from stamina_kernels.triton.group import (
    Group,
    Launch,
    alignment,
    device_table,
    gather,
    unpack_gradients,
)
from stamina_kernels.triton.mask import sample_kernel

ELEMENT = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_INTERPRETED = not isinstance(sample_kernel, triton.JITFunction)


def _refuse_interpreted_bfloat16(tensors: Sequence[Tensor]) -> None:
    if _INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise NotImplementedError(
            "Triton's interpreter (TRITON_INTERPRET=1) multiplies the bit patterns of bfloat16 "
            "(triton issue 11584); it serves torch.float32 and torch.float16"
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def _words(columns: int) -> int:
    return ceil_div(columns, 32)


def _grid(group: Group, launch: Launch, options: dict[str, Any]) -> tuple[int, int, int]:
    return (
        ceil_div(max(group.rows), options["BO"]),
        ceil_div(group.columns, options["BI"]),
        len(launch.members),
    )


def _tiles(rows: int, columns: int, options: dict[str, Any]) -> int:
    return ceil_div(rows, options["BO"]) * ceil_div(columns, options["BI"])


def _weight_options(launch: Launch, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "DTYPE": ELEMENT[launch.dtype],
        "ALIGNMENT": launch.alignment,
        "PRECISION": "ieee" if _INTERPRETED else config.dot_precision(dtype),
    }


def _mask_options(hard: bool, col0: Sequence[int]) -> dict[str, bool]:
    return {"HARD": hard, "QUADS": all(column % 4 == 0 for column in col0)}


def sample(
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
) -> Tensor:
    """Mask bits of the group, int32 [sum O, ceil(I / 32)]."""
    group = gather(U=U, V=V, b=b, coordinates=list(zip(layer_id, row0, col0, strict=True)))
    bits = torch.empty(
        sum(group.rows), _words(group.columns), dtype=torch.int32, device=seed.device
    )
    with _on(seed.device):
        for launch in group.launches:
            sample_kernel[_grid(group, launch, config.SAMPLE)](
                launch.members,
                group.factors,
                seed,
                step,
                bits,
                group.columns,
                **_mask_options(hard, col0),
                **config.SAMPLE,
            )
    return bits


def compose(
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """W_eff = W + s M (.) (A B) of the group from its bits, [sum O, I] in `dtype`, one rounding."""
    _refuse_interpreted_bfloat16([*weight, torch.empty(0, dtype=dtype)])
    group = gather(A, B, weight=weight)
    effective = torch.empty(sum(group.rows), group.columns, dtype=dtype, device=bits.device)
    with _on(bits.device):
        for launch in group.launches:
            compose_kernel[_grid(group, launch, config.COMPOSE)](
                launch.members,
                group.factors,
                scale,
                bits,
                effective,
                group.columns,
                BR=config.rank_step(max(group.ranks)),
                **_weight_options(launch, dtype),
                **config.COMPOSE,
            )
    return effective


def masked_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y [..., sum O], forget [n], sparse [n], counts int64 [n, 2] and bits of the group."""
    _refuse_interpreted_bfloat16([x, *weight])
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = gather(A, B, U, V, b, weight, weight_init, coordinates)
    rows, columns, n = sum(group.rows), group.columns, len(weight)
    effective = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    bits = torch.empty(rows, _words(columns), dtype=torch.int32, device=x.device)
    tiles = _tiles(max(group.rows), columns, config.COMPOSE)
    sums = torch.zeros(2, n, tiles, device=x.device)
    counts = torch.zeros(n, 2, tiles, dtype=torch.int32, device=x.device)
    with _on(x.device):
        for launch in group.launches:
            sample_compose_kernel[_grid(group, launch, config.COMPOSE)](
                launch.members,
                group.factors,
                scale,
                seed,
                step,
                effective,
                bits,
                sums[0],
                sums[1],
                counts,
                columns,
                RELU=sparse_kind == "relu",
                HAS_INITIAL=bool(weight_init),
                BR=config.rank_step(max(group.ranks)),
                **_mask_options(hard, col0),
                **_weight_options(launch, x.dtype),
                **config.COMPOSE,
            )
        y = F.linear(x, effective, torch.cat([t.to(x.dtype) for t in bias]) if bias else None)
    return y, sums[0].sum(-1), sums[1].sum(-1), counts.sum(-1), bits


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    g_forget: Tensor,
    g_sparse: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dX (empty unless need_dx) and the flat gradients dA, dB, dU, dV, db of every member."""
    _refuse_interpreted_bfloat16([x, *weight])
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = gather(A, B, U, V, b, weight, weight_init, coordinates)
    options = config.backward(x.dtype)
    largest = max(*group.ranks, *group.mask_ranks)
    rank_step = config.rank_step(largest)
    passes = ceil_div(largest, rank_step)
    left_parts = torch.zeros(
        ceil_div(group.columns, options["BI"]), group.left_size, device=x.device
    )
    right_parts = torch.zeros(
        ceil_div(max(group.rows), options["BO"]), group.right_size, device=x.device
    )
    logit_parts = torch.zeros(len(weight), len(right_parts) * len(left_parts), device=x.device)
    with _on(x.device):
        for launch in group.launches:
            grid = (len(right_parts), len(left_parts) * passes, len(launch.members))
            backward_kernel[grid](
                launch.members,
                group.factors,
                dy,
                x,
                bits,
                scale,
                tau,
                seed,
                step,
                g_forget,
                g_sparse,
                left_parts,
                right_parts,
                logit_parts,
                x.numel() // group.columns,
                sum(group.rows),
                group.columns,
                group.left_size,
                group.right_size,
                RELU=sparse_kind == "relu",
                HAS_INITIAL=bool(weight_init),
                PASSES=passes,
                BR=rank_step,
                **_mask_options(hard, col0),
                **_weight_options(launch, x.dtype),
                **options,
            )
        grads = unpack_gradients(group, left_parts.sum(0), right_parts.sum(0), logit_parts.sum(-1))
    if not need_dx:
        return x.new_empty(0), grads
    return dy @ compose(weight, A, B, bits, scale, x.dtype), grads


def commit(
    A: Tensor, B: Tensor, U: Tensor, V: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round a finished adapter once: A, B -> fp16 with power-of-two scales, bits = [L > 0]."""
    A16, B16, exponent = reference.commit_factors(A, B, U, V, b)
    # the kernel's bits, because the live model has been seen with the kernel's hard masks
    zero = torch.zeros((), dtype=torch.int64, device=A.device)
    return A16, B16, exponent, sample([U], [V], [b], zero, zero, [0], [0], [0], hard=True)


def fold_(
    weight: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    bits: Sequence[Tensor],
    first: Sequence[int],
) -> None:
    """W_k = round(W_init_k + sum_t s_t M_t (.) (A_t B_t)) in place, t = first[k] .. first[k+1]-1.

    Raises OverflowError naming the layer, with every weight set back to W_init, where a result is
    not finite in W's dtype.
    """
    _refuse_interpreted_bfloat16(weight)
    device = weight[0].device
    adapters = tuple(
        (A[t].data_ptr(), B[t].data_ptr(), bits[t].data_ptr(), A[t].shape[1]) for t in range(len(A))
    )
    adapter_table = torch.tensor(adapters, dtype=torch.int64, device=device)
    scales = torch.tensor(scale, dtype=torch.float32, device=device)
    BR = config.rank_step(max((a.shape[1] for a in A), default=1))
    overflowing: list[int] = []
    with _on(device):
        for dtype in dict.fromkeys(w.dtype for w in weight):
            layers = [k for k, w in enumerate(weight) if w.dtype == dtype]
            table = tuple(
                (
                    weight[k].data_ptr(),
                    weight_init[k].data_ptr(),
                    *weight[k].shape,
                    first[k],
                    first[k + 1],
                )
                for k in layers
            )
            tiles = max(_tiles(weight[k].shape[0], weight[k].shape[1], config.FOLD) for k in layers)
            overflow = torch.zeros(len(layers), tiles, dtype=torch.int32, device=device)
            fold_kernel[(tiles, len(layers))](
                device_table(table, device),
                adapter_table,
                scales,
                overflow,
                DTYPE=ELEMENT[dtype],
                ALIGNMENT=alignment([w[k] for w in (weight, weight_init) for k in layers]),
                BR=BR,
                **config.FOLD,
            )
            overflowing += [
                k for k, bad in zip(layers, overflow.any(1).tolist(), strict=True) if bad
            ]
    if not overflowing:
        return
    for w, initial in zip(weight, weight_init, strict=True):
        w.copy_(initial)
    layer = min(overflowing)
    raise reference.fold_overflow(layer, weight[layer].dtype)
