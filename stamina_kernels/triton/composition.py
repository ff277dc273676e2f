# SPDX-License-Identifier: Apache-2.0
"""W_eff = W + s M (.) (A B) of a group: from stored bits, or together with drawing them."""

import triton
import triton.language as tl

from stamina_kernels.triton import tile
from stamina_kernels.triton.mask import mask_tile, member_logits


@triton.jit
def member_product(
    p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of the tile of a member that begins at (row, col)."""
    rank = tile.field(p_member, tile.RANK)
    return tile.low_rank_tile(
        p_factors + tl.load(p_member + tile.OFFSET_A) + row * rank,
        p_factors + tl.load(p_member + tile.OFFSET_B) + col,
        rank, in_features, o_row, m_row, o_col, m_col, BR, PRECISION,
    )  # fmt: skip


@triton.jit
def compose_kernel(
    p_tiles, p_members, p_factors, p_scale, p_bits, p_effective, tiles, in_features,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Any number of programs, which share the tiles of all members out among themselves."""
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        p_member, this_tile = tile.locate(p_tiles, p_members, index, tile.FIELDS)
        row, col = tile.corner(this_tile, in_features, BO, BI)
        o_row, m_row = tile.span(row, tile.field(p_member, tile.OUT_FEATURES), BO)
        o_col, m_col = tile.span(col, in_features, BI)
        b_product = member_product(
            p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BR, PRECISION
        )
        stacked = tl.load(p_member + tile.FIRST_ROW) + row
        p_word, m_word = tile.bit_pointers(p_bits, stacked, col, in_features, o_row, m_row, BI)
        b_mask = tile.load_bits(p_word, m_word, BO, BI)
        b_delta = tl.load(p_scale) * tl.where(b_mask, b_product, 0.0)
        m_tile = m_row[:, None] & m_col[None, :]
        o_tile = o_row[:, None] * in_features + o_col[None, :]
        p_weight = tile.weight_pointer(p_member + tile.WEIGHT, DTYPE, ALIGNMENT)
        b_weight = tl.load(p_weight + (row * in_features + col) + o_tile, mask=m_tile)
        tl.store(
            p_effective + (stacked * in_features + col) + o_tile,
            (b_weight.to(tl.float32) + b_delta).to(p_effective.dtype.element_ty),
            mask=m_tile,
        )


@triton.jit
def sample_compose_kernel(
    p_tiles, p_members, p_factors, p_scale, p_seed, p_step, p_effective, p_bits,
    p_forget, p_sparse, p_counts, tiles, most_tiles, in_features,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, PRECISION: tl.constexpr,
    HARD: tl.constexpr, QUADS: tl.constexpr, RELU: tl.constexpr, HAS_INITIAL: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """As `compose_kernel`; also draws the bits and writes every tile's part of the statistics.

    p_forget and p_sparse fp32 are [members, most_tiles], p_counts int32 [members, 2, most_tiles]
    holds M = 1, then M = 1 and S != 0; all are zero where a member has no such tile. p_effective
    may be None: bits and statistics alone.
    """
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        p_member, this_tile = tile.locate(p_tiles, p_members, index, tile.FIELDS)
        row, col = tile.corner(this_tile, in_features, BO, BI)
        o_row, m_row = tile.span(row, tile.field(p_member, tile.OUT_FEATURES), BO)
        o_col, m_col = tile.span(col, in_features, BI)
        m_tile = m_row[:, None] & m_col[None, :]
        b_logit = member_logits(
            p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BM
        )
        b_mask = mask_tile(p_seed, p_step, p_member, b_logit, row, col, o_row, HARD, QUADS)
        b_mask = b_mask & m_tile
        stacked = tl.load(p_member + tile.FIRST_ROW) + row
        p_word, m_word = tile.bit_pointers(p_bits, stacked, col, in_features, o_row, m_row, BI)
        tile.store_bits(b_mask, p_word, m_word, BO, BI)

        member = tl.load(p_member + tile.MEMBER)
        o_sum = member * most_tiles + this_tile
        o_count = member * 2 * most_tiles + this_tile
        if RELU:
            b_positive = tl.maximum(b_logit, 0.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            b_positive = tl.sigmoid(b_logit)
        tl.store(p_sparse + o_sum, tl.sum(tl.where(m_tile, b_positive, 0.0)))
        tl.store(p_counts + o_count, tl.sum(b_mask.to(tl.int32)))

        if HAS_INITIAL or p_effective is not None:
            b_product = member_product(
                p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col,
                BR, PRECISION,
            )  # fmt: skip
            b_delta = tl.load(p_scale) * tl.where(b_mask, b_product, 0.0)
            o_tile = o_row[:, None] * in_features + o_col[None, :]
            o_weight = row * in_features + col
            p_weight = tile.weight_pointer(p_member + tile.WEIGHT, DTYPE, ALIGNMENT)
            b_weight = tl.load(p_weight + o_weight + o_tile, mask=m_tile, other=0.0)
            b_weight = b_weight.to(tl.float32)
            if p_effective is not None:
                tl.store(
                    p_effective + (stacked * in_features + col) + o_tile,
                    (b_weight + b_delta).to(p_effective.dtype.element_ty),
                    mask=m_tile,
                )
            if HAS_INITIAL:
                p_initial = tile.weight_pointer(p_member + tile.WEIGHT_INIT, DTYPE, ALIGNMENT)
                b_initial = tl.load(p_initial + o_weight + o_tile, mask=m_tile, other=0.0)
                b_change = b_weight - b_initial.to(tl.float32)
                b_overlap = b_change * b_delta
                b_shared = b_mask & (b_change != 0)
                tl.store(p_forget + o_sum, tl.sum(b_overlap * b_overlap))
                tl.store(p_counts + o_count + most_tiles, tl.sum(b_shared.to(tl.int32)))
