# SPDX-License-Identifier: Apache-2.0
"""Y = X W_eff^T with every tile of W_eff made in the GEMM's main loop, from stored bits.

W_eff never reaches memory. The loop over I is the only loop, so that Triton pipelines the loads of
X, W, B and the bits; W_eff is the left operand (Y^T = W_eff X^T), which the matrix units of newer
GPUs take from registers.
"""

import triton
import triton.language as tl

from stamina_kernels.triton import tile
from stamina_kernels.triton.composition import member_product


@triton.jit
def generate_kernel(
    p_tiles, p_members, p_factors, p_scale, p_bits, p_x, p_bias, p_y,
    tokens, total_out, in_features,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, PRECISION: tl.constexpr, ONE_STEP: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Grid: BO x BN tiles of Y, those of a member's rows one after another.

    p_bias (in the dtype of Y) may be None. ONE_STEP: every rank is at most BR; otherwise the loop
    over the rank is inside the main loop, which then is not pipelined.
    """
    p_member, this_tile = tile.locate(p_tiles, p_members, tl.program_id(0), tile.FIELDS)
    row, token = tile.corner(this_tile, tokens, BO, BN)
    o_row, m_row = tile.span(row, tile.field(p_member, tile.OUT_FEATURES), BO)
    o_token, m_token = tile.span(token, tokens, BN)
    stacked = tl.load(p_member + tile.FIRST_ROW) + row
    scale = tl.load(p_scale)
    rank = tile.field(p_member, tile.RANK)
    o_rank, m_rank = tile.span(0, rank, BR)
    b_a = tl.load(
        p_factors + tl.load(p_member + tile.OFFSET_A) + row * rank
        + o_row[:, None] * rank + o_rank[None, :],
        mask=m_row[:, None] & m_rank[None, :],
        other=0.0,
    )  # fmt: skip
    p_b = p_factors + tl.load(p_member + tile.OFFSET_B)
    p_weight = tile.weight_pointer(p_member + tile.WEIGHT, DTYPE, ALIGNMENT) + row * in_features
    p_token = p_x + token.to(tl.int64) * in_features
    b_y = tl.zeros([BO, BN], tl.float32)
    for col in range(0, in_features, BI):
        o_col, m_col = tile.span(col, in_features, BI)
        if ONE_STEP:
            b_b = tl.load(
                p_b + col + o_rank[:, None] * in_features + o_col[None, :],
                mask=m_rank[:, None] & m_col[None, :],
                other=0.0,
            )
            b_product = tl.dot(b_a, b_b, input_precision=PRECISION)
        else:
            b_product = member_product(
                p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col,
                BR, PRECISION,
            )  # fmt: skip
        p_word, m_word = tile.bit_pointers(p_bits, stacked, col, in_features, o_row, m_row, BI)
        b_mask = tile.load_bits(p_word, m_word, BO, BI)
        b_weight = tl.load(
            p_weight + col + o_row[:, None] * in_features + o_col[None, :],
            mask=m_row[:, None] & m_col[None, :],
            other=0.0,
        )
        b_x = tl.load(
            p_token + col + o_token[:, None] * in_features + o_col[None, :],
            mask=m_token[:, None] & m_col[None, :],
            other=0.0,
        )
        b_effective = b_weight.to(tl.float32) + scale * tl.where(b_mask, b_product, 0.0)
        b_y = tl.dot(
            b_effective.to(b_x.dtype), tl.trans(b_x), b_y,
            input_precision="ieee",
        )  # fmt: skip
    if p_bias is not None:
        b_y += tl.load(p_bias + stacked + o_row, mask=m_row, other=0.0).to(tl.float32)[:, None]
    tl.store(
        p_y + (token.to(tl.int64) * total_out + stacked)
        + o_token[:, None] * total_out + o_row[None, :],
        tl.trans(b_y).to(p_y.dtype.element_ty),
        mask=m_token[:, None] & m_row[None, :],
    )  # fmt: skip
