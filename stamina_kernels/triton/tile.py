# SPDX-License-Identifier: Apache-2.0
"""What one BO x BI tile of the operator is made of; every kernel is built from these.

Formulas: `stamina_kernels/reference.py`. Names: p_ pointer, b_ tile, o_ offset, m_ mask. A pointer
that is handed to a function is already advanced, in int64, to the tile's first row or column;
offsets inside a tile are int32, which halves the registers that addresses take. The functions are
inlined into the kernels that call them.

Loops over tiles disable the hoisting of what does not change from tile to tile: kept in registers
for a whole tile, it costs more than computing it again (sample on sm_90: 70 registers, then 55).
"""

import triton
import triton.language as tl

# Fields of one row of the member table (`group.py`): int64 each.
WEIGHT = tl.constexpr(0)
WEIGHT_INIT = tl.constexpr(1)
OUT_FEATURES = tl.constexpr(2)
FIRST_ROW = tl.constexpr(3)
OFFSET_A = tl.constexpr(4)
OFFSET_U = tl.constexpr(5)
OFFSET_B = tl.constexpr(6)
OFFSET_V = tl.constexpr(7)
OFFSET_LOGIT = tl.constexpr(8)
RANK = tl.constexpr(9)
MASK_RANK = tl.constexpr(10)
LAYER_ID = tl.constexpr(11)
ROW0 = tl.constexpr(12)
COL0 = tl.constexpr(13)
MEMBER = tl.constexpr(14)
FIELDS = tl.constexpr(15)


@triton.jit
def locate(p_tiles, p_table, index, FIELDS: tl.constexpr):
    """Of the flat tile `index`: the table's row that it belongs to, and its number among its tiles.

    p_tiles int32 [tiles, 2] lists the tiles that exist (`group.tile_list`).
    """
    p_tile = p_tiles + 2 * tl.cast(index, tl.int64)
    return p_table + tl.load(p_tile).to(tl.int64) * FIELDS, tl.load(p_tile + 1)


@triton.jit
def corner(this_tile, columns, BO: tl.constexpr, BI: tl.constexpr):
    """First row (int64) and column of a member's tile; those of a row come one after another."""
    column_tiles = (columns + BI - 1) // BI
    return (this_tile // column_tiles * BO).to(tl.int64), this_tile % column_tiles * BI


@triton.jit
def field(p_member, NAME: tl.constexpr):
    """A field that fits 32 bits: sizes and ranks, which multiply offsets inside a tile."""
    return tl.load(p_member + NAME).to(tl.int32)


@triton.jit
def span(start, limit, BLOCK: tl.constexpr):
    """Offsets 0 .. BLOCK - 1 and which of them are below limit, counted from start."""
    o_span = tl.arange(0, BLOCK)
    return o_span, o_span < limit - start


@triton.jit
def logits_tile(
    p_U, p_V, p_b, mask_rank, in_features, o_row, m_row, o_col, m_col, BM: tl.constexpr
):
    """L = U V + b in IEEE fp32: a chain of multiply-adds over ascending k, b last."""
    return low_rank_tile(
        p_U, p_V, mask_rank, in_features, o_row, m_row, o_col, m_col, BM, "ieee"
    ) + tl.load(p_b)


@triton.jit
def uniform_tile(p_seed, p_step, p_member, row, col, o_row, BI: tl.constexpr, QUADS: tl.constexpr):
    """u(i, j) of Philox4x32-10 for the member's rows row + o_row and BI columns from col.

    One Philox block serves four neighbouring columns. QUADS: the tile's first global column is a
    multiple of 4, so it holds whole blocks; otherwise every column draws its block and takes one
    word of it.
    """
    seed = tl.load(p_seed)
    c_step = tl.load(p_step).to(tl.uint32)
    c_layer = tl.load(p_member + LAYER_ID).to(tl.uint32)
    c_row = ((tl.load(p_member + ROW0) + row).to(tl.uint32) + o_row.to(tl.uint32))[:, None]
    global_col = tl.load(p_member + COL0) + col
    if QUADS:
        c_block = (global_col >> 2).to(tl.uint32) + tl.arange(0, BI // 4).to(tl.uint32)
        b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, c_block[None, :], c_row, c_step, c_layer, 10)
        b_word = tl.interleave(tl.interleave(b_w0, b_w2), tl.interleave(b_w1, b_w3))
    else:
        o_col = (global_col + tl.arange(0, BI))[None, :]
        c_block = (o_col >> 2).to(tl.uint32)
        b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, c_block, c_row, c_step, c_layer, 10)
        b_low = tl.where((o_col & 1) == 0, b_w0, b_w1)
        b_high = tl.where((o_col & 1) == 0, b_w2, b_w3)
        b_word = tl.where((o_col & 2) == 0, b_low, b_high)
    return (2 * (b_word >> 9) + 1).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def low_rank_tile(
    p_left, p_right, rank, in_features, o_row, m_row, o_col, m_col,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left right, accumulated in fp32 over the rank in steps of BR (padded with zeros)."""
    b_product = tl.zeros([o_row.shape[0], o_col.shape[0]], tl.float32)
    for start in range(0, rank, BR):
        o_rank, m_rank = span(start, rank, BR)
        b_left = tl.load(
            p_left + o_row[:, None] * rank + o_rank[None, :],
            mask=m_row[:, None] & m_rank[None, :],
            other=0.0,
        )
        b_right = tl.load(
            p_right + o_rank[:, None] * in_features + o_col[None, :],
            mask=m_rank[:, None] & m_col[None, :],
            other=0.0,
        )
        b_product = tl.dot(b_left, b_right, b_product, input_precision=PRECISION)
        p_left += BR
        p_right += BR * tl.cast(in_features, tl.int64)
    return b_product


@triton.jit
def bit_pointers(p_bits, row, col, in_features, o_row, m_row, BI: tl.constexpr):
    """Pointers to the words of rows row + o_row and BI columns from col, and which exist."""
    words = (in_features + 31) // 32
    o_word, m_word = span(col // 32, words, BI // 32)
    p_word = p_bits + row.to(tl.int64) * words + col // 32
    return p_word + o_row[:, None] * words + o_word[None, :], m_row[:, None] & m_word[None, :]


@triton.jit
def store_bits(b_mask, p_word, m_word, BO: tl.constexpr, BI: tl.constexpr):
    """Pack a boolean tile: bit j & 31 of word j >> 5."""
    b_bit = tl.reshape(b_mask.to(tl.int32), [BO, BI // 32, 32])
    b_word = tl.sum(b_bit << tl.arange(0, 32)[None, None, :], axis=2)
    tl.store(p_word, b_word, mask=m_word)


@triton.jit
def load_bits(p_word, m_word, BO: tl.constexpr, BI: tl.constexpr):
    """The inverse of `store_bits`."""
    b_word = tl.load(p_word, mask=m_word, other=0)
    b_bit = (b_word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(b_bit, [BO, BI]) != 0


@triton.jit
def weight_pointer(p_field, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A weight's address from the member table; ALIGNMENT (bytes) is what all of a launch share."""
    return tl.multiple_of(tl.load(p_field).to(tl.pointer_type(DTYPE)), ALIGNMENT)
