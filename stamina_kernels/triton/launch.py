# SPDX-License-Identifier: Apache-2.0
"""What every launch needs: the device, its options, the tiles that exist, how many programs."""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamina_kernels.triton import config
from stamina_kernels.triton.config import ceil_div
from stamina_kernels.triton.group import Launch
from stamina_kernels.triton.mask import sample_kernel

ELEMENT = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
INTERPRETED = not isinstance(sample_kernel, triton.JITFunction)
_INTERPRETED_PROGRAMS = 3  # more than one, so that the programs' shares are tested


class Tiles(NamedTuple):
    """The tiles of several matrices as one flat list."""

    table: Tensor  # int32 [tiles, 2]: row of the launch's table, number within that row's tiles
    most: int  # tiles of the largest matrix

    @property
    def number(self) -> int:
        """Tiles of all matrices."""
        return len(self.table)


def refuse_interpreted_bfloat16(tensors: Sequence[Tensor]) -> None:
    if INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise NotImplementedError(
            "Triton's interpreter (TRITON_INTERPRET=1) multiplies the bit patterns of bfloat16 "
            "(triton issue 11584); it serves torch.float32 and torch.float16"
        )


def options(kernel: str, device: torch.device) -> dict[str, int]:
    """The entry of a kernel in the device's table."""
    return config.table(config.device_name(device))[kernel]


def tile_list(
    shapes: Sequence[tuple[int, int]], rows: int, columns: int, device: torch.device
) -> Tiles:
    """The rows x columns tiles of matrices of the given shapes, row by row of tiles."""
    counts = tuple(ceil_div(o, rows) * ceil_div(i, columns) for o, i in shapes)
    return Tiles(_tile_table(counts, device), max(counts))


@lru_cache(maxsize=256)
def _tile_table(counts: tuple[int, ...], device: torch.device) -> Tensor:
    lengths = torch.tensor(counts, device="cpu")  # whatever the default device
    owner = torch.arange(len(counts), device="cpu").repeat_interleave(lengths)
    number = torch.arange(len(owner), device="cpu") - (lengths.cumsum(0) - lengths)[owner]
    return torch.stack([owner, number], 1).to(device, torch.int32)


def part_maker(heights: Sequence[int], step: int) -> Callable[..., Tensor]:
    """torch.empty for what every tile writes a part of; zeros where some matrix has fewer rows of
    tiles than another: parts are added up later, and those that it lacks must add nothing."""
    return torch.empty if len({ceil_div(h, step) for h in heights}) == 1 else torch.zeros


@cache
def multiprocessors(device: torch.device) -> int:
    """What runs programs side by side: NVIDIA's SMs, AMD's compute units, Intel's Xe cores."""
    properties = torch.get_device_module(device).get_device_properties(device)
    count = getattr(properties, "multi_processor_count", None)
    return int(count if count is not None else properties.gpu_subslice_count)


def programs(tiles: int, entry: dict[str, int], device: torch.device) -> tuple[int]:
    """Grid of a persistent kernel: what the device holds at once, at most one program a tile."""
    held = _INTERPRETED_PROGRAMS if INTERPRETED else multiprocessors(device) * entry["programs"]
    return (max(1, min(tiles, held)),)


def weight_options(launch: Launch, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "DTYPE": ELEMENT[launch.dtype],
        "ALIGNMENT": launch.alignment,
        "PRECISION": "ieee" if INTERPRETED else config.dot_precision(dtype),
    }


def mask_options(hard: bool, col0: Sequence[int]) -> dict[str, bool]:
    return {"HARD": hard, "QUADS": all(column % 4 == 0 for column in col0)}
