# SPDX-License-Identifier: Apache-2.0
"""Small MLPs over embeddings, Y = silu(E W1^T + b1) W2^T + b2: any number of them in one launch.

One program takes BN embeddings of one MLP and goes through their width and the outputs in steps of
BR; the hidden layer is one tile of BH. The backward forms that layer again, writes dE, and one part
of the other gradients per program; parts are summed afterwards in a fixed order. All products are
IEEE fp32: masks are drawn from what comes out.
"""

import triton
import triton.language as tl

from stamina_kernels.triton import tile

# Fields of one row of the table of MLPs: int64 each.
EMBEDDING = tl.constexpr(0)
WEIGHT1 = tl.constexpr(1)
BIAS1 = tl.constexpr(2)
WEIGHT2 = tl.constexpr(3)
BIAS2 = tl.constexpr(4)
COUNT = tl.constexpr(5)
WIDTH = tl.constexpr(6)
HIDDEN = tl.constexpr(7)
OUT = tl.constexpr(8)
TRANSPOSED = tl.constexpr(9)
FIRST_OUTPUT = tl.constexpr(10)
FIRST_EMBEDDING = tl.constexpr(11)
FIRST_PARAMETER = tl.constexpr(12)
FIELDS = tl.constexpr(13)


@triton.jit
def matrix_tile(p_matrix, o_row, m_row, o_col, m_col, row_stride, col_stride):
    """matrix[o_row, o_col], zero where it has no such element."""
    return tl.load(
        p_matrix + o_row[:, None] * row_stride + o_col[None, :] * col_stride,
        mask=m_row[:, None] & m_col[None, :],
        other=0.0,
    )


@triton.jit
def input_pointer(p_mlp, NAME: tl.constexpr):
    return tl.load(p_mlp + NAME).to(tl.pointer_type(tl.float32))


@triton.jit
def output_strides(p_mlp):
    """Of Y [count, out], or of Y^T where the MLP is TRANSPOSED."""
    transposed = tile.field(p_mlp, TRANSPOSED) != 0
    count, out = tile.field(p_mlp, COUNT), tile.field(p_mlp, OUT)
    return tl.where(transposed, 1, out), tl.where(transposed, count, 1)


@triton.jit
def hidden_tile(
    p_mlp, row, o_row, m_row, o_hidden, m_hidden, BN: tl.constexpr, BH: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Z = E W1^T + b1, before the activation."""
    width = tile.field(p_mlp, WIDTH)
    p_embedding = input_pointer(p_mlp, EMBEDDING) + row * width
    p_weight = input_pointer(p_mlp, WEIGHT1)
    b_hidden = tl.zeros([BN, BH], tl.float32)
    for start in range(0, width, BR):
        o_width, m_width = tile.span(start, width, BR)
        b_embedding = matrix_tile(p_embedding + start, o_row, m_row, o_width, m_width, width, 1)
        b_weight = matrix_tile(p_weight + start, o_width, m_width, o_hidden, m_hidden, 1, width)
        b_hidden = tl.dot(b_embedding, b_weight, b_hidden, input_precision="ieee")
    b_bias = tl.load(input_pointer(p_mlp, BIAS1) + o_hidden, mask=m_hidden, other=0.0)
    return b_hidden + b_bias[None, :]


@triton.jit
def mlp_kernel(
    p_tiles, p_mlps, p_out, BN: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    p_mlp, block = tile.locate(p_tiles, p_mlps, tl.program_id(0), FIELDS)
    hidden, out = tile.field(p_mlp, HIDDEN), tile.field(p_mlp, OUT)
    row = (block * BN).to(tl.int64)
    o_row, m_row = tile.span(row, tile.field(p_mlp, COUNT), BN)
    o_hidden, m_hidden = tile.span(0, hidden, BH)
    b_hidden = hidden_tile(p_mlp, row, o_row, m_row, o_hidden, m_hidden, BN, BH, BR)
    b_active = b_hidden * tl.sigmoid(b_hidden)

    row_stride, col_stride = output_strides(p_mlp)
    p_tile = p_out + tl.load(p_mlp + FIRST_OUTPUT) + row * row_stride
    p_weight, p_bias = input_pointer(p_mlp, WEIGHT2), input_pointer(p_mlp, BIAS2)
    for start in range(0, out, BR):
        o_out, m_out = tile.span(start, out, BR)
        b_weight = matrix_tile(
            p_weight + start * hidden, o_hidden, m_hidden, o_out, m_out, 1, hidden
        )
        b_out = tl.dot(b_active, b_weight, input_precision="ieee")
        b_out += tl.load(p_bias + start + o_out, mask=m_out, other=0.0)[None, :]
        o_tile = o_row[:, None] * row_stride + o_out[None, :] * col_stride
        p_step = p_tile + start * tl.cast(col_stride, tl.int64)
        tl.store(p_step + o_tile, b_out, mask=m_row[:, None] & m_out[None, :])


@triton.jit
def mlp_backward_kernel(
    p_tiles, p_mlps, p_dout, p_dembedding, p_parts, parameters,
    BN: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """p_dout is laid out as Y, p_dembedding as the embeddings one after another; p_parts
    [blocks of the longest MLP, parameters] holds dW1, db1, dW2, db2 of every MLP: zero where an MLP
    has no such block."""
    p_mlp, block = tile.locate(p_tiles, p_mlps, tl.program_id(0), FIELDS)
    width, hidden = tile.field(p_mlp, WIDTH), tile.field(p_mlp, HIDDEN)
    out = tile.field(p_mlp, OUT)
    row = (block * BN).to(tl.int64)
    o_row, m_row = tile.span(row, tile.field(p_mlp, COUNT), BN)
    o_hidden, m_hidden = tile.span(0, hidden, BH)
    b_hidden = hidden_tile(p_mlp, row, o_row, m_row, o_hidden, m_hidden, BN, BH, BR)
    b_sigmoid = tl.sigmoid(b_hidden)

    p_dweight1 = p_parts + block.to(tl.int64) * parameters + tl.load(p_mlp + FIRST_PARAMETER)
    p_dbias1 = p_dweight1 + hidden * width
    p_dweight2 = p_dbias1 + hidden
    p_dbias2 = p_dweight2 + out * hidden

    row_stride, col_stride = output_strides(p_mlp)
    p_dout += tl.load(p_mlp + FIRST_OUTPUT) + row * row_stride
    p_weight2 = input_pointer(p_mlp, WEIGHT2)
    b_dactive = tl.zeros([BN, BH], tl.float32)
    for start in range(0, out, BR):
        o_out, m_out = tile.span(start, out, BR)
        b_dout = matrix_tile(
            p_dout + start * tl.cast(col_stride, tl.int64),
            o_row,
            m_row,
            o_out,
            m_out,
            row_stride,
            col_stride,
        )
        b_weight = matrix_tile(
            p_weight2 + start * hidden, o_out, m_out, o_hidden, m_hidden, hidden, 1
        )
        b_dactive = tl.dot(b_dout, b_weight, b_dactive, input_precision="ieee")
        tl.store(
            p_dweight2 + start * hidden + o_out[:, None] * hidden + o_hidden[None, :],
            tl.dot(tl.trans(b_dout), b_hidden * b_sigmoid, input_precision="ieee"),
            mask=m_out[:, None] & m_hidden[None, :],
        )
        tl.store(p_dbias2 + start + o_out, tl.sum(b_dout, 0), mask=m_out)

    b_dhidden = b_dactive * b_sigmoid * (1.0 + b_hidden * (1.0 - b_sigmoid))
    tl.store(p_dbias1 + o_hidden, tl.sum(b_dhidden, 0), mask=m_hidden)
    p_weight1 = input_pointer(p_mlp, WEIGHT1)
    p_embedding = input_pointer(p_mlp, EMBEDDING) + row * width
    p_dembedding += tl.load(p_mlp + FIRST_EMBEDDING) + row * width
    for start in range(0, width, BR):
        o_width, m_width = tile.span(start, width, BR)
        o_tile = start + o_row[:, None] * width + o_width[None, :]
        m_tile = m_row[:, None] & m_width[None, :]
        b_weight = matrix_tile(p_weight1 + start, o_hidden, m_hidden, o_width, m_width, width, 1)
        b_dembedding = tl.dot(b_dhidden, b_weight, input_precision="ieee")
        tl.store(p_dembedding + o_tile, b_dembedding, mask=m_tile)
        b_embedding = tl.load(p_embedding + o_tile, mask=m_tile, other=0.0)
        tl.store(
            p_dweight1 + start + o_hidden[:, None] * width + o_width[None, :],
            tl.dot(tl.trans(b_dhidden), b_embedding, input_precision="ieee"),
            mask=m_hidden[:, None] & m_width[None, :],
        )
