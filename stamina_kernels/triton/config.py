# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and launch options, from which launches and the ahead-of-time budget read.

`configs/<device>.json` holds what `tune.py` measured on that device, `configs/default.json` what
serves every other. Of a kernel: BO x BI is the tile of the weight (BI a multiple of 32, the bits of
a word), BN the step over tokens or, of `mlp`, the embeddings of a program, `programs` how many
persistent programs a multiprocessor gets; num_warps and num_stages are Triton's. The environment
variable STAMINA_TRITON_CONFIGS names a folder that is searched before the package's.
"""

import json
import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).with_name("configs")
_FOLDER_VARIABLE = "STAMINA_TRITON_CONFIGS"
_MIN_RANK_STEP = 16  # the shortest side that tl.dot takes
# Ranks above it take several steps or passes: a tile's registers do not grow with the rank.
MAX_RANK_STEP = 32
Table = dict[str, dict[str, int]]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def rank_step(rank: int) -> int:
    """Padded step over ranks up to `rank`: a power of two that tl.dot takes."""
    return min(max(_MIN_RANK_STEP, 1 << (rank - 1).bit_length()), MAX_RANK_STEP)


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied when the result is rounded to `dtype`.

    IEEE for fp32 results. For 16-bit results three products of bf16 halves, which carry 16 bits of
    the operands, more than the result has, on the matrix units of every vendor.
    """
    return "ieee" if dtype == torch.float32 else "bf16x3"


def file_name(device_name: str) -> str:
    """Name of the file of a device: lower case, everything but letters and digits a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def default_table() -> Table:
    table: Table = json.loads((_FOLDER / "default.json").read_text())
    return table


@cache
def table(device_name: str) -> Table:
    """The options of every kernel on a device; those of an unknown device are the default's.

    Raises ValueError for a file that is no JSON, names a kernel or an option which the default does
    not have, or gives one no positive integer; NotADirectoryError where STAMINA_TRITON_CONFIGS
    names no folder.
    """
    found = default_table()
    for path in [folder / file_name(device_name) for folder in _folders()]:
        if path.is_file():
            for kernel, options in _read(path, found).items():
                found[kernel] |= options
            _log.info("launch options for %s from %s", device_name, path)
            return found
    _log.info("launch options for %s are the default ones", device_name)
    return found


def _folders() -> list[Path]:
    given = os.environ.get(_FOLDER_VARIABLE)
    if given and not Path(given).is_dir():
        raise NotADirectoryError(f"{_FOLDER_VARIABLE} must be a folder, got {given!r}")
    return [Path(given), _FOLDER] if given else [_FOLDER]


def _read(path: Path, known: Table) -> Table:
    """What the file holds; raises ValueError for what `table` refuses."""
    try:
        measured = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(measured, dict) or not all(isinstance(v, dict) for v in measured.values()):
        raise ValueError(f"{path} must hold an object of objects: options by kernel")
    for kernel, options in measured.items():
        if kernel not in known:
            raise ValueError(f"{path}: unknown kernel {kernel!r}, known are {', '.join(known)}")
        for option, value in options.items():
            if option not in known[kernel]:
                names = ", ".join(known[kernel])
                raise ValueError(f"{path}: {kernel!r} has no option {option!r}, only {names}")
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"{path}: {option!r} of {kernel!r} must be a positive integer, got {value!r}"
                )
    table: Table = measured
    return table


@cache
def device_name(device: torch.device) -> str:
    """What the files of tuned options are named after; "cpu" in Triton's interpreter."""
    if device.type == "cpu":
        return "cpu"
    name: str = torch.get_device_module(device).get_device_name(device)
    return name


def kernel_name(kernel: str, dtype: torch.dtype) -> str:
    """Of kernels with one entry for IEEE fp32 products and one for the matrix units'."""
    return f"{kernel}_{'fp32' if dtype == torch.float32 else 'half'}"


def backward_name(dtype: torch.dtype, rank: int) -> str:
    """Of the backward. Beside a rank step of 32 the tile of 16-bit tokens leaves too few registers:
    it is narrower there."""
    name = kernel_name("backward", dtype)
    return f"{name}_r32" if dtype != torch.float32 and rank > _MIN_RANK_STEP else name


def launch_options(options: dict[str, int]) -> dict[str, Any]:
    """What a kernel is launched with, out of its entry of a table.

    FP fusion is set because Triton's default is about to change: a fused multiply-add is part of
    the definition of L.
    """
    return {k: v for k, v in options.items() if k != "programs"} | {"enable_fp_fusion": True}
