# SPDX-License-Identifier: Apache-2.0
"""sample: the mask bits of a group, M = [u < sigmoid(L)] or [L > 0]."""

import triton
import triton.language as tl

from stamina_kernels.triton import tile


@triton.jit
def member_logits(
    p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BM: tl.constexpr
):
    """L of the tile of a member that begins at (row, col)."""
    mask_rank = tile.field(p_member, tile.MASK_RANK)
    return tile.logits_tile(
        p_factors + tl.load(p_member + tile.OFFSET_U) + row * mask_rank,
        p_factors + tl.load(p_member + tile.OFFSET_V) + col,
        p_factors + tl.load(p_member + tile.OFFSET_LOGIT),
        mask_rank, in_features, o_row, m_row, o_col, m_col, BM,
    )  # fmt: skip


@triton.jit
def mask_tile(
    p_seed, p_step, p_member, b_logit, row, col, o_row,
    HARD: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """M of a tile of logits."""
    if HARD:
        return b_logit > 0
    else:
        b_u = tile.uniform_tile(p_seed, p_step, p_member, row, col, o_row, b_logit.shape[1], QUADS)
        # u < sigmoid(L) without a division: u + u e^-L < 1; false where L is NaN
        return tl.fma(b_u, tl.exp(-b_logit), b_u) < 1.0


@triton.jit
def sample_kernel(
    p_tiles, p_members, p_factors, p_seed, p_step, p_bits, tiles, in_features,
    HARD: tl.constexpr, QUADS: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Any number of programs, which share the tiles of all members out among themselves."""
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        p_member, this_tile = tile.locate(p_tiles, p_members, index, tile.FIELDS)
        row, col = tile.corner(this_tile, in_features, BO, BI)
        o_row, m_row = tile.span(row, tile.field(p_member, tile.OUT_FEATURES), BO)
        o_col, m_col = tile.span(col, in_features, BI)
        b_logit = member_logits(
            p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BM
        )
        b_mask = mask_tile(p_seed, p_step, p_member, b_logit, row, col, o_row, HARD, QUADS)
        p_word, m_word = tile.bit_pointers(
            p_bits, tl.load(p_member + tile.FIRST_ROW) + row, col, in_features, o_row, m_row, BI
        )
        tile.store_bits(b_mask & m_col[None, :], p_word, m_word, BO, BI)
