# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and launch options: one table, from which launches and the ahead-of-time budget read.

BO x BI is the tile of the weight (BI a multiple of 32, the bits of a word), BR the step over a
rank, BN the step over tokens. FP fusion is set here because Triton's default is about to change:
a fused multiply-add is part of the definition of L.
"""

from typing import Any

import torch

_FUSION = {"enable_fp_fusion": True}

SAMPLE = {"BO": 16, "BI": 128, "num_warps": 4, "num_stages": 1, **_FUSION}
COMPOSE = {"BO": 16, "BI": 128, "num_warps": 4, "num_stages": 1, **_FUSION}
_BACKWARD_HALF = {"BO": 64, "BI": 64, "BN": 32, "num_warps": 8, "num_stages": 2, **_FUSION}
_BACKWARD_FP32 = {"BO": 32, "BI": 32, "BN": 32, "num_warps": 8, "num_stages": 2, **_FUSION}
FOLD = {"BO": 32, "BI": 128, "num_warps": 4, "num_stages": 1, **_FUSION}
_MIN_RANK_STEP = 16  # the shortest side that tl.dot takes
# Ranks above it take several steps or passes: a tile's registers do not grow with the rank.
_MAX_RANK_STEP = 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def rank_step(rank: int) -> int:
    """Padded step over ranks up to `rank`: a power of two that tl.dot takes."""
    return min(max(_MIN_RANK_STEP, 1 << (rank - 1).bit_length()), _MAX_RANK_STEP)


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied when the result is rounded to `dtype`.

    IEEE for fp32 results. For 16-bit results three products of bf16 halves, which carry 16 bits of
    the operands, more than the result has, on the matrix units of every vendor.
    """
    return "ieee" if dtype == torch.float32 else "bf16x3"


def backward(dtype: torch.dtype) -> dict[str, Any]:
    """Launch options of the backward: IEEE fp32 products keep their operands in registers."""
    return _BACKWARD_FP32 if dtype == torch.float32 else _BACKWARD_HALF
