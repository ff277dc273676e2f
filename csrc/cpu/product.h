// SPDX-License-Identifier: Apache-2.0
// Operands of the products with X and dY, packed for the tile kernels. All are fp32, in which
// products of 16-bit values are exact.
#pragma once

#include <cstring>

#include "group.h"

namespace stamina {

inline int64_t panel_columns() { return active_kernels().panel_columns; }

// Rows of the scratch outputs: whole lines, and off the strides that collide in the cache.
inline int64_t scratch_stride(int64_t columns) {
  return round_up(columns, kLineFloats) + kLineFloats;
}

// The values of a contiguous matrix as fp32: the matrix itself where it is, else a copy.
class Floats {
 public:
  Floats(void* data, int64_t rows, int64_t columns, DType dtype)
      : copy_(dtype == DType::kFloat32 ? 0 : rows * columns),
        data_(dtype == DType::kFloat32 ? static_cast<float*>(data) : copy_.get()) {
    if (dtype == DType::kFloat32) return;
    parallel(rows, [&](int64_t begin, int64_t end) {
      active_kernels().convert(offset(data, begin * columns, dtype), dtype, data_ + begin * columns,
                               DType::kFloat32, (end - begin) * columns);
    });
  }
  const float* get() const { return data_; }

 private:
  Scratch<float> copy_;
  float* data_;
};

// X^T as a right operand: panels of tokens, zero beyond the last.
class TokenPanels {
 public:
  TokenPanels(const float* x, int64_t tokens, int64_t columns)
      : tokens_(tokens),
        columns_(columns),
        width_(panel_columns()),
        panels_(round_up(tokens, width_) * columns) {
    const int64_t lines = count_of(columns, kLineFloats);
    parallel(count_of(tokens, width_) * lines, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack(x, p / lines * width_, p % lines * kLineFloats);
    });
  }

  // out [rows, tokens] = or += left [rows, columns] X[:, first : first + columns]^T
  void multiply(const float* left, int64_t rows, int64_t first, int64_t columns, float* out) const {
    active_kernels().multiply({rows, tokens_, columns, left, kBlockStride, 1,
                               panels_.get() + first * width_, width_ * columns_, width_, out,
                               scratch_stride(tokens_), first > 0});
  }

 private:
  void pack(const float* x, int64_t token, int64_t first) {
    const int64_t last = least(first + kLineFloats, columns_);
    float* out = panels_.get() + token * columns_;
    for (int64_t t = 0; t < width_; ++t) {
      const bool inside = token + t < tokens_;
      const float* row = x + (inside ? token + t : 0) * columns_;
      for (int64_t k = first; k < last; ++k) out[k * width_ + t] = inside ? row[k] : 0.0f;
    }
  }

  int64_t tokens_, columns_, width_;
  Scratch<float> panels_;
};

// dY as a left operand, both ways: G = dY^T X and dX = dY W_eff. Packed by blocks of rows of W: the
// values of a token in a block are contiguous, and so are the tokens.
class OutputGradients {
 public:
  OutputGradients(const Matrix& dy, int64_t tokens, const Group& group,
                  const std::vector<RowBlock>& blocks)
      : tokens_(tokens), values_(tokens * group.rows) {
    parallel(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = first_row(group, blocks[p]), rows = blocks[p].end - blocks[p].begin;
        for (int64_t t = 0; t < tokens; ++t) {
          active_kernels().convert(matrix_at(dy, t, row).data, dy.dtype,
                                   values_.get() + row * tokens + t * rows, DType::kFloat32, rows);
        }
      }
    });
  }

  // gradient [rows, columns] = dY[:, row : row + rows]^T X for a strip of X in panels.
  void multiply_inputs(int64_t row, int64_t rows, const float* x_panels, int64_t columns,
                       float* gradient) const {
    const int64_t width = panel_columns();
    active_kernels().multiply({rows, columns, tokens_, values_.get() + row * tokens_, 1, rows,
                               x_panels, width * tokens_, width, gradient, kBlockStride, false});
  }

  // dx [tokens, columns] = or += dY[:, row : row + rows] effective
  void multiply_effective(int64_t row, int64_t rows, const float* effective, int64_t columns,
                          float* dx) const {
    active_kernels().multiply({tokens_, columns, rows, values_.get() + row * tokens_, rows, 1,
                               effective, panel_columns(), kBlockStride, dx, kBlockStride,
                               row > 0});
  }

 private:
  int64_t tokens_;
  Scratch<float> values_;
};

// A strip of X as a right operand: panels of its columns, zero beyond the last.
class InputStrip {
 public:
  explicit InputStrip(int64_t tokens) : tokens_(tokens), panels_(tokens * kTileColumns) {}

  void pack(const Matrix& x, int64_t columns) {
    const int64_t width = panel_columns();
    float row[kTileColumns] = {};
    for (int64_t t = 0; t < tokens_; ++t) {
      active_kernels().convert(matrix_at(x, t, 0).data, x.dtype, row, DType::kFloat32, columns);
      for (int64_t j = 0; j < columns; j += width) {
        std::memcpy(panels_.get() + (j / width * tokens_ + t) * width, row + j,
                    sizeof(float) * static_cast<size_t>(width));
      }
    }
  }
  const float* get() const { return panels_.get(); }

 private:
  int64_t tokens_;
  Scratch<float> panels_;
};

// Outputs of a block of rows, [rows, tokens], stored as columns of Y. bias: a value a row, or null.
inline void store_outputs(const float* outputs, int64_t rows, int64_t tokens, const float* bias,
                          const Matrix& y) {
  const int64_t stride = scratch_stride(tokens);
  Scratch<float> columns(kLineFloats * rows);
  for (int64_t first = 0; first < tokens; first += kLineFloats) {
    const int64_t count = least(kLineFloats, tokens - first);
    for (int64_t i = 0; i < rows; ++i) {
      const float addend = bias == nullptr ? 0.0f : bias[i];
      for (int64_t t = 0; t < count; ++t) {
        columns[t * rows + i] = outputs[i * stride + first + t] + addend;
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      active_kernels().convert(columns.get() + t * rows, DType::kFloat32,
                               matrix_at(y, first + t, 0).data, y.dtype, rows);
    }
  }
}

}  // namespace stamina
