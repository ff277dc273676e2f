# SPDX-License-Identifier: Apache-2.0
"""embedding_mlp and its backward; `stamina_kernels/reference.py` defines what they compute."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamina_kernels.checks import MAX_HIDDEN
from stamina_kernels.device import on
from stamina_kernels.reference import Tensors
from stamina_kernels.triton.config import launch_options, rank_step
from stamina_kernels.triton.group import device_table
from stamina_kernels.triton.launch import Tiles, options, part_maker, tile_list
from stamina_kernels.triton.mlp import mlp_backward_kernel, mlp_kernel

# The step over width and outputs: with 32, the backward's products fill the registers.
RANK_STEP = 16


class _Launch(NamedTuple):
    """MLPs as the kernels see them."""

    outputs: int  # elements of all Y
    parameters: int  # elements of all W1, b1, W2 and b2
    table: Tensor
    tiles: Tiles
    make_parts: Callable[..., Tensor]
    constants: dict[str, Any]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _launch(
    E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors, transposed: Sequence[bool]
) -> _Launch:
    device = E[0].device
    counts, widths = [e.shape[0] for e in E], [e.shape[1] for e in E]
    hiddens, outs = [w.shape[0] for w in W1], [w.shape[0] for w in W2]
    outputs = [n * m for n, m in zip(counts, outs, strict=True)]
    sizes = zip(widths, hiddens, outs, strict=True)
    parameters = [h * d + h + m * h + m for d, h, m in sizes]
    rows = zip(
        *([t.data_ptr() for t in tensors] for tensors in (E, W1, b1, W2, b2)),
        counts, widths, hiddens, outs, map(int, transposed),
        _starts(outputs), _starts([e.numel() for e in E]), _starts(parameters),
        strict=True,
    )  # fmt: skip
    entry = options("mlp", device)
    height = entry["BN"]
    return _Launch(
        outputs=sum(outputs),
        parameters=sum(parameters),
        table=device_table(tuple(rows), device),
        tiles=tile_list([(n, 1) for n in counts], height, 1, device),
        make_parts=part_maker(counts, height),
        # not the widest of the group: an MLP's bits must not depend on its neighbours
        constants=launch_options(entry) | {"BH": rank_step(MAX_HIDDEN), "BR": RANK_STEP},
    )


def embedding_mlp(
    E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors, transposed: Sequence[bool]
) -> Tensor:
    """Y [n, m] of every MLP, or Y^T [m, n] where it is `transposed`: flat, one after another."""
    launch = _launch(E, W1, b1, W2, b2, transposed)
    out = torch.empty(launch.outputs, dtype=torch.float32, device=E[0].device)
    with on(out.device):
        mlp_kernel[(launch.tiles.number,)](
            launch.tiles.table, launch.table, out, **launch.constants
        )
    return out


def embedding_mlp_backward(
    dY: Tensors, E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors,
    transposed: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dE of every MLP, and dW1, db1, dW2, db2 of every MLP: flat, one after another."""
    launch = _launch(E, W1, b1, W2, b2, transposed)
    device, size = E[0].device, launch.parameters
    dout = torch.cat([d.reshape(-1) for d in dY])
    dembedding = torch.empty(sum(e.numel() for e in E), dtype=torch.float32, device=device)
    parts = launch.make_parts(launch.tiles.most, size, dtype=torch.float32, device=device)
    with on(device):
        mlp_backward_kernel[(launch.tiles.number,)](
            launch.tiles.table, launch.table, dout, dembedding, parts, size, **launch.constants
        )
    return dembedding, parts.sum(0)
