# SPDX-License-Identifier: Apache-2.0
"""The factors' gradients: G = dY^T X + 2 g_f S^2 (.) D lives in registers, one tile at a time.

Each program forms one BO x BI tile of G and contracts it at once:

    dA = s (M (.) G) B^T        dB = s A^T (M (.) G)        left = A, right = B
    dU = dL V^T                 dV = U^T dL                 left = U, right = V

The left gradients get one part per column tile, the right ones one part per row tile; parts are
summed afterwards in a fixed order, so the gradients are the same from run to run. Ranks above BR
are served in passes of BR that form G again: a tile's registers do not grow with the rank.
"""

import triton
import triton.language as tl

from stamina_kernels.triton import tile
from stamina_kernels.triton.composition import member_product
from stamina_kernels.triton.mask import member_logits


@triton.jit
def forget_tile(
    p_member, p_bits, b_product, stacked, row, col, in_features, o_row, m_row, o_col, m_col,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """S^2 (.) M (.) P with S = W - W_init."""
    b_mask = stored_mask(p_bits, stacked, col, in_features, o_row, m_row, o_col)
    m_tile = m_row[:, None] & m_col[None, :]
    o_tile = (row * in_features + col) + o_row[:, None] * in_features + o_col[None, :]
    p_weight = tile.weight_pointer(p_member + tile.WEIGHT, DTYPE, ALIGNMENT)
    p_initial = tile.weight_pointer(p_member + tile.WEIGHT_INIT, DTYPE, ALIGNMENT)
    b_weight = tl.load(p_weight + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_change = b_weight - tl.load(p_initial + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    return b_change * b_change * tl.where(b_mask, b_product, 0.0)


@triton.jit
def stored_mask(p_bits, stacked, col, in_features, o_row, m_row, o_col):
    p_word, m_word = tile.bit_pointers(
        p_bits, stacked, col, in_features, o_row, m_row, o_col.shape[0]
    )
    return tile.load_bits(p_word, m_word, o_row.shape[0], o_col.shape[0])


@triton.jit
def outer_tile(
    b_outer, p_dy, p_x, tokens, out_features, in_features, o_row, m_row, o_col, m_col,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_outer + dY^T X of one tile, in steps of BN tokens."""
    for start in range(0, tokens, BN):
        o_token, m_token = tile.span(start, tokens, BN)
        b_dy = tl.load(
            p_dy + o_token[:, None] * out_features + o_row[None, :],
            mask=m_token[:, None] & m_row[None, :],
            other=0.0,
        )
        b_x = tl.load(
            p_x + o_token[:, None] * in_features + o_col[None, :],
            mask=m_token[:, None] & m_col[None, :],
            other=0.0,
        )
        b_outer = tl.dot(tl.trans(b_dy), b_x, b_outer, input_precision=PRECISION)
        p_dy += BN * tl.cast(out_features, tl.int64)
        p_x += BN * tl.cast(in_features, tl.int64)
    return b_outer


@triton.jit
def sigmoid_slope(b_t):
    """sigmoid'(t) = e / (1 + e)^2 with e = exp(-|t|): no cancellation."""
    b_e = tl.exp(-tl.abs(b_t))
    return b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def soft_slope_tile(
    p_seed, p_step, p_member, p_tau, b_logit, row, col, o_row,
    HARD: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """z (1 - z) / tau with z = sigmoid((L - logit u) / tau); hard: u = 1/2.

    At tau = 1, z = (1 - u) / ((1 - u) + u e^-L): no logarithm.
    """
    inverse = 1.0 / tl.load(p_tau)
    if HARD:
        return sigmoid_slope(b_logit * inverse) * inverse
    else:
        b_u = tile.uniform_tile(p_seed, p_step, p_member, row, col, o_row, b_logit.shape[1], QUADS)
        if inverse == 1.0:
            # beyond e^41 the slope is below 2^-34, and the square below would overflow
            b_power = tl.minimum(-b_logit, 41.0, propagate_nan=tl.PropagateNan.ALL)
            b_odds = b_u * tl.exp(b_power)
            b_below = 1.0 - b_u
            b_whole = b_below + b_odds
            b_slope = b_below * b_odds / (b_whole * b_whole)
        else:
            b_slope = sigmoid_slope((b_logit - tl.log(b_u / (1.0 - b_u))) * inverse) * inverse
        return b_slope


@triton.jit
def contract(
    b_tile, p_left, p_right, p_left_part, p_right_part, rank, first_rank, in_features,
    o_row, m_row, o_col, m_col, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store tile right^T [rows, BR] and left^T tile [BR, columns]; left [rows, rank]."""
    o_rank, m_rank = tile.span(first_rank, rank, BR)
    o_left = o_row[:, None] * rank + o_rank[None, :]
    m_left = m_row[:, None] & m_rank[None, :]
    o_right = o_rank[None, :] * in_features + o_col[:, None]
    m_right = m_rank[None, :] & m_col[:, None]
    b_right = tl.load(p_right + o_right, mask=m_right, other=0.0)
    tl.store(p_left_part + o_left, tl.dot(b_tile, b_right, input_precision=PRECISION), mask=m_left)
    b_left = tl.load(p_left + o_left, mask=m_left, other=0.0)
    b_part = tl.dot(tl.trans(b_tile), b_left, input_precision=PRECISION)
    tl.store(p_right_part + o_right, b_part, mask=m_right)


@triton.jit
def backward_kernel(
    p_tiles, p_members, p_factors, p_dy, p_x, p_bits, p_scale, p_tau, p_seed, p_step,
    p_g_forget, p_g_sparse, p_left_parts, p_right_parts, p_logit_parts,
    most_tiles, tokens, total_out, in_features, left_size, right_size,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, PRECISION: tl.constexpr,
    HARD: tl.constexpr, QUADS: tl.constexpr, RELU: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PASSES: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of all members x PASSES.

    p_left_parts [column tiles, left_size]: dA of all members, then dU, as packed in the factors.
    p_right_parts [row tiles, right_size]: dB, then dV. p_logit_parts [members, most_tiles]: db.
    Zero where a member has no such tile.
    """
    first_rank = tl.program_id(0) % PASSES * BR
    p_member, this_tile = tile.locate(p_tiles, p_members, tl.program_id(0) // PASSES, tile.FIELDS)
    row, col = tile.corner(this_tile, in_features, BO, BI)
    o_row, m_row = tile.span(row, tile.field(p_member, tile.OUT_FEATURES), BO)
    o_col, m_col = tile.span(col, in_features, BI)
    stacked = tl.load(p_member + tile.FIRST_ROW) + row
    member = tl.load(p_member + tile.MEMBER)
    scale = tl.load(p_scale)

    b_logit = member_logits(
        p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BR
    )
    b_slope = soft_slope_tile(
        p_seed, p_step, p_member, p_tau, b_logit, row, col, o_row, HARD, QUADS
    )
    b_sparse = (b_logit > 0).to(tl.float32) if RELU else sigmoid_slope(b_logit)
    b_sparse = tl.load(p_g_sparse + member) * b_sparse
    b_sparse = tl.where(m_row[:, None] & m_col[None, :], b_sparse, 0.0)
    b_product = member_product(
        p_member, p_factors, row, col, in_features, o_row, m_row, o_col, m_col, BR, PRECISION
    )
    b_grad = tl.zeros([BO, BI], tl.float32)
    if HAS_INITIAL:
        b_grad = 2.0 * tl.load(p_g_forget + member) * scale * forget_tile(
            p_member, p_bits, b_product, stacked, row, col, in_features,
            o_row, m_row, o_col, m_col, DTYPE, ALIGNMENT,
        )  # fmt: skip
    b_grad = outer_tile(
        b_grad, p_dy + stacked, p_x + col, tokens, total_out, in_features,
        o_row, m_row, o_col, m_col, BN, PRECISION,
    )  # fmt: skip
    b_mask = stored_mask(p_bits, stacked, col, in_features, o_row, m_row, o_col)
    b_masked = scale * tl.where(b_mask, b_grad, 0.0)
    b_dL = scale * b_product * b_slope * b_grad + b_sparse

    rank = tile.field(p_member, tile.RANK)
    mask_rank = tile.field(p_member, tile.MASK_RANK)
    o_A = tl.load(p_member + tile.OFFSET_A) + row * rank + first_rank
    o_U = tl.load(p_member + tile.OFFSET_U) + row * mask_rank + first_rank
    corner = first_rank.to(tl.int64) * in_features + col
    o_B = tl.load(p_member + tile.OFFSET_B) + corner
    o_V = tl.load(p_member + tile.OFFSET_V) + corner
    p_left_part = p_left_parts + (col // BI).to(tl.int64) * left_size
    p_right_part = p_right_parts + row // BO * right_size - left_size
    # a loop, because both contractions in one block of code would not fit the registers
    for side in range(2):
        logits = side == 1
        o_left = tl.where(logits, o_U, o_A)
        o_right = tl.where(logits, o_V, o_B)
        contract(
            tl.where(logits, b_dL, b_masked),
            p_factors + o_left, p_factors + o_right,
            p_left_part + o_left, p_right_part + o_right,
            tl.where(logits, mask_rank, rank), first_rank, in_features,
            o_row, m_row, o_col, m_col, BR, PRECISION,
        )  # fmt: skip
    if first_rank == 0:
        tl.store(p_logit_parts + member * most_tiles + this_tile, tl.sum(b_dL))
