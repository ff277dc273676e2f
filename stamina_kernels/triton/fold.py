# SPDX-License-Identifier: Apache-2.0
"""W = round(W_init + sum_t s_t M_t (.) (A_t B_t)) for all layers of a dtype in one launch.

The committed factors are fp16, so their products run on the matrix units whatever W's dtype is.
"""

import triton
import triton.language as tl

from stamina_kernels.triton import tile

# Fields of one row of the layer table and of the adapter table: int64 each.
LAYER_WEIGHT = tl.constexpr(0)
LAYER_WEIGHT_INIT = tl.constexpr(1)
LAYER_OUT = tl.constexpr(2)
LAYER_IN = tl.constexpr(3)
LAYER_FIRST = tl.constexpr(4)
LAYER_END = tl.constexpr(5)
LAYER_FIELDS = tl.constexpr(6)
ADAPTER_A = tl.constexpr(0)
ADAPTER_B = tl.constexpr(1)
ADAPTER_BITS = tl.constexpr(2)
ADAPTER_RANK = tl.constexpr(3)
ADAPTER_FIELDS = tl.constexpr(4)


@triton.jit
def fold_kernel(
    p_tiles, p_layers, p_adapters, p_scale, p_overflow, tiles,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Any number of programs, which share the tiles of all layers; p_overflow int32 [tiles]."""
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        p_layer, this_tile = tile.locate(p_tiles, p_layers, index, LAYER_FIELDS)
        rows = tile.field(p_layer, LAYER_OUT)
        columns = tile.field(p_layer, LAYER_IN)
        row, col = tile.corner(this_tile, columns, BO, BI)
        o_row, m_row = tile.span(row, rows, BO)
        o_col, m_col = tile.span(col, columns, BI)
        first = tile.field(p_layer, LAYER_FIRST)
        end = tile.field(p_layer, LAYER_END)
        b_total = tl.zeros([BO, BI], tl.float32)
        for t in range(first, end):
            p_adapter = p_adapters + t * ADAPTER_FIELDS
            rank = tile.field(p_adapter, ADAPTER_RANK)
            b_product = tile.low_rank_tile(
                tl.load(p_adapter + ADAPTER_A).to(tl.pointer_type(tl.float16)) + row * rank,
                tl.load(p_adapter + ADAPTER_B).to(tl.pointer_type(tl.float16)) + col,
                rank, columns, o_row, m_row, o_col, m_col, BR, "ieee",
            )  # fmt: skip
            p_bits = tl.load(p_adapter + ADAPTER_BITS).to(tl.pointer_type(tl.int32))
            p_word, m_word = tile.bit_pointers(p_bits, row, col, columns, o_row, m_row, BI)
            b_mask = tile.load_bits(p_word, m_word, BO, BI)
            b_total += tl.load(p_scale + t) * tl.where(b_mask, b_product, 0.0)

        m_tile = m_row[:, None] & m_col[None, :]
        o_tile = o_row[:, None] * columns + o_col[None, :]
        p_initial = tile.weight_pointer(p_layer + LAYER_WEIGHT_INIT, DTYPE, ALIGNMENT)
        b_initial = tl.load(p_initial + (row * columns + col) + o_tile, mask=m_tile, other=0.0)
        b_folded = (b_initial.to(tl.float32) + b_total).to(DTYPE)
        # adding a zero delta would turn -0 into 0: without adapters the bits stay
        b_weight = tl.where(first < end, b_folded, b_initial)
        p_weight = tile.weight_pointer(p_layer + LAYER_WEIGHT, DTYPE, ALIGNMENT)
        tl.store(p_weight + (row * columns + col) + o_tile, b_weight, mask=m_tile)
        b_finite = tl.abs(b_folded.to(tl.float32)) < float("inf")
        overflow = (first < end) & (tl.min(b_finite.to(tl.int32)) == 0)
        tl.store(p_overflow + index, overflow.to(tl.int32))
