# SPDX-License-Identifier: Apache-2.0
"""The operations on projections; `stamina_kernels/reference.py` defines what they compute.

masked_linear draws the bits of the whole group in one launch. By the strategy that
`stamina_kernels/cost.py` chooses, the same launch also writes W_eff and Y = X W_eff^T is left to
the vendor's GEMM (compose), or our GEMM makes W_eff from the bits in its main loop (generate).
W_eff is a transient: the backward composes it from the bits for dX. Reductions run over per-tile
parts in a fixed order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stamina_kernels import cost, reference
from stamina_kernels.device import on
from stamina_kernels.reference import word_count
from stamina_kernels.triton import config
from stamina_kernels.triton.backward import backward_kernel
from stamina_kernels.triton.composition import compose_kernel, sample_compose_kernel
from stamina_kernels.triton.config import ceil_div, launch_options, rank_step
from stamina_kernels.triton.fold import fold_kernel
from stamina_kernels.triton.generate import generate_kernel
from stamina_kernels.triton.group import Group, alignment, device_table, gather, unpack_gradients
from stamina_kernels.triton.launch import (
    ELEMENT,
    Tiles,
    mask_options,
    options,
    part_maker,
    programs,
    refuse_interpreted_bfloat16,
    tile_list,
    weight_options,
)
from stamina_kernels.triton.mask import sample_kernel


def _tiles(rows: Sequence[int], columns: int, entry: dict[str, int], device: torch.device) -> Tiles:
    return tile_list([(o, columns) for o in rows], entry["BO"], entry["BI"], device)


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
        sum(group.rows), word_count(group.columns), dtype=torch.int32, device=seed.device
    )
    entry = options("sample", seed.device)
    with on(seed.device):
        for launch in group.launches:
            tiles = _tiles(launch.rows, group.columns, entry, seed.device)
            sample_kernel[programs(tiles.number, entry, seed.device)](
                tiles.table,
                launch.members,
                group.factors,
                seed,
                step,
                bits,
                tiles.number,
                group.columns,
                BM=rank_step(max(group.mask_ranks)),
                **mask_options(hard, col0),
                **launch_options(entry),
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
    refuse_interpreted_bfloat16([*weight, torch.empty(0, dtype=dtype)])
    group = gather(A, B, weight=weight)
    effective = torch.empty(sum(group.rows), group.columns, dtype=dtype, device=bits.device)
    entry = options("compose", bits.device)
    with on(bits.device):
        for launch in group.launches:
            tiles = _tiles(launch.rows, group.columns, entry, bits.device)
            compose_kernel[programs(tiles.number, entry, bits.device)](
                tiles.table,
                launch.members,
                group.factors,
                scale,
                bits,
                effective,
                tiles.number,
                group.columns,
                BR=rank_step(max(group.ranks)),
                **weight_options(launch, dtype),
                **launch_options(entry),
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
    refuse_interpreted_bfloat16([x, *weight])
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = gather(A, B, U, V, b, weight, weight_init, coordinates)
    rows, columns, n = sum(group.rows), group.columns, len(weight)
    problem = cost.Problem(
        out_features=rows,
        in_features=columns,
        tokens=x.numel() // columns,
        rank=max(group.ranks),
        mask_rank=max(group.mask_ranks),
        weight_bytes=weight[0].element_size(),
        x_bytes=x.element_size(),
        sampled=not hard,
        has_initial=bool(weight_init),
    )
    effective = None
    if cost.choose(config.device_name(x.device), problem).strategy == "compose":
        effective = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    bits = torch.empty(rows, word_count(columns), dtype=torch.int32, device=x.device)
    entry = options("statistics" if effective is None else "sample_compose", x.device)
    most = _tiles(group.rows, columns, entry, x.device).most
    parts = part_maker(group.rows, entry["BO"])
    sums = parts(2, n, most, dtype=torch.float32, device=x.device)
    counts = parts(n, 2, most, dtype=torch.int32, device=x.device)
    if not weight_init:  # nothing is added to what W shares with earlier concepts
        sums[0] = 0
        counts[:, 1] = 0
    joined = torch.cat([t.to(x.dtype) for t in bias]) if bias else None
    with on(x.device):
        for launch in group.launches:
            tiles = _tiles(launch.rows, columns, entry, x.device)
            sample_compose_kernel[programs(tiles.number, entry, x.device)](
                tiles.table,
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
                tiles.number,
                most,
                columns,
                RELU=sparse_kind == "relu",
                HAS_INITIAL=bool(weight_init),
                BR=rank_step(max(group.ranks)),
                BM=rank_step(max(group.mask_ranks)),
                **mask_options(hard, col0),
                **weight_options(launch, x.dtype),
                **launch_options(entry),
            )
        if effective is None:
            y = _generated_linear(x, group, bits, scale, joined)
        else:
            y = F.linear(x, effective, joined)
    return y, sums[0].sum(-1), sums[1].sum(-1), counts.sum(-1), bits


def _generated_linear(
    x: Tensor, group: Group, bits: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Y = X W_eff^T + bias with W_eff made from the bits in the main loop."""
    rows, tokens = sum(group.rows), x.numel() // group.columns
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    entry = options(config.kernel_name("generate", x.dtype), x.device)
    rank = max(group.ranks)
    for launch in group.launches:
        shapes = [(o, tokens) for o in launch.rows]
        tiles = tile_list(shapes, entry["BO"], entry["BN"], x.device)
        generate_kernel[(tiles.number,)](
            tiles.table,
            launch.members,
            group.factors,
            scale,
            bits,
            x,
            bias,
            y,
            tokens,
            rows,
            group.columns,
            ONE_STEP=rank <= config.MAX_RANK_STEP,
            BR=rank_step(rank),
            **weight_options(launch, x.dtype),
            **launch_options(entry),
        )
    return y


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
    refuse_interpreted_bfloat16([x, *weight])
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = gather(A, B, U, V, b, weight, weight_init, coordinates)
    largest = max(*group.ranks, *group.mask_ranks)
    entry = options(config.backward_name(x.dtype, largest), x.device)
    passes = ceil_div(largest, rank_step(largest))
    parts = part_maker(group.rows, entry["BO"])
    left_parts = torch.empty(
        ceil_div(group.columns, entry["BI"]), group.left_size, dtype=torch.float32, device=x.device
    )
    right_parts = parts(
        ceil_div(max(group.rows), entry["BO"]),
        group.right_size,
        dtype=torch.float32,
        device=x.device,
    )
    most = len(left_parts) * len(right_parts)
    logit_parts = parts(len(weight), most, dtype=torch.float32, device=x.device)
    with on(x.device):
        for launch in group.launches:
            tiles = _tiles(launch.rows, group.columns, entry, x.device)
            backward_kernel[(tiles.number * passes,)](
                tiles.table,
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
                most,
                x.numel() // group.columns,
                sum(group.rows),
                group.columns,
                group.left_size,
                group.right_size,
                RELU=sparse_kind == "relu",
                HAS_INITIAL=bool(weight_init),
                PASSES=passes,
                BR=rank_step(largest),
                **mask_options(hard, col0),
                **weight_options(launch, x.dtype),
                **launch_options(entry),
            )
        grads = unpack_gradients(group, left_parts.sum(0), right_parts.sum(0), logit_parts.sum(-1))
    if not need_dx:
        return x.new_empty(0), grads
    return dy @ compose(weight, A, B, bits, scale, x.dtype), grads


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
    refuse_interpreted_bfloat16(weight)
    device = weight[0].device
    adapters = tuple(
        (A[t].data_ptr(), B[t].data_ptr(), bits[t].data_ptr(), A[t].shape[1]) for t in range(len(A))
    )
    adapter_table = torch.tensor(adapters, dtype=torch.int64, device=device)
    scales = torch.tensor(scale, dtype=torch.float32, device=device)
    entry = options("fold", device)
    overflowing: list[int] = []
    with on(device):
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
            shapes = [(weight[k].shape[0], weight[k].shape[1]) for k in layers]
            tiles = tile_list(shapes, entry["BO"], entry["BI"], device)
            overflow = torch.empty(tiles.number, dtype=torch.int32, device=device)
            fold_kernel[programs(tiles.number, entry, device)](
                tiles.table,
                device_table(table, device),
                adapter_table,
                scales,
                overflow,
                tiles.number,
                DTYPE=ELEMENT[dtype],
                ALIGNMENT=alignment([w[k] for w in (weight, weight_init) for k in layers]),
                BR=rank_step(max((a.shape[1] for a in A), default=1)),
                **launch_options(entry),
            )
            overflowing += [layers[k] for k in tiles.table[overflow != 0, 0].unique().tolist()]
    if not overflowing:
        return
    for w, initial in zip(weight, weight_init, strict=True):
        w.copy_(initial)
    layer = min(overflowing)
    raise reference.fold_overflow(layer, weight[layer].dtype)
