// SPDX-License-Identifier: Apache-2.0
// Operands of the products with X and dY, packed for the tile kernels.
#pragma once

#include <cstring>

#include "group.h"

namespace stamina {

inline int64_t panel_columns() { return active_kernels().panel_columns; }

// Rows of the scratch outputs: whole lines, and off the strides that collide in the cache.
inline int64_t scratch_stride(int64_t columns) {
  return round_up(columns, kLineFloats) + kLineFloats;
}

// How the products with X and dY take their operands: as fp32, in which products of 16-bit values
// are exact, or bf16 in words of two values of neighbouring inner index, where the CPU multiplies
// those. Words travel in arrays of floats.
class Format {
 public:
  explicit Format(DType dtype)
      : kernels_(active_kernels()), pairs_(dtype == DType::kBFloat16 ? kernels_.pairs : nullptr) {}

  bool is_pairs() const { return pairs_ != nullptr; }
  int64_t words(int64_t inner) const { return is_pairs() ? count_of(inner, 2) : inner; }
  void multiply(const Product& product) const {
    (is_pairs() ? pairs_->multiply : kernels_.multiply)(product);
  }
  // A block of W_eff as the left operand, inner index along its rows,
  void pack_left(float* block, int64_t rows, int64_t columns) const {
    if (is_pairs()) pairs_->pair_columns(block, rows, columns);
  }
  // and as the right one, inner index along its columns.
  void pack_right(float* block, int64_t rows, int64_t columns) const {
    if (is_pairs()) pairs_->pair_rows(block, rows, columns);
  }
  // n values as words along the row.
  void pack_row(const void* values, DType dtype, int64_t n, float* words) const {
    if (!is_pairs()) return kernels_.convert(values, dtype, words, DType::kFloat32, n);
    if (n % 2 != 0) words[n / 2] = 0.0f;
    std::memcpy(words, values, sizeof(uint16_t) * static_cast<size_t>(n));
  }
  // Word w along the columns of a matrix: of row w, or of rows 2 w and 2 w + 1 of `rows`.
  void pack_rows(const Matrix& m, int64_t w, int64_t rows, int64_t columns, float* words) const {
    if (!is_pairs()) return pack_row(matrix_at(m, w, 0).data, m.dtype, columns, words);
    const auto* low = static_cast<const uint16_t*>(matrix_at(m, 2 * w, 0).data);
    const bool last = 2 * w + 1 == rows;
    const uint16_t* high = low + (last ? 0 : m.stride);
    const uint32_t kept = last ? 0 : 0xFFFF;
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t word = low[j] | (high[j] & kept) << 16;
      std::memcpy(words + j, &word, sizeof word);
    }
  }

 private:
  const Kernels& kernels_;
  const PairProducts* pairs_;
};

// The rows of a contiguous matrix as words: the matrix itself where it has that form, else a copy.
class Words {
 public:
  Words(void* data, int64_t rows, int64_t columns, DType dtype, const Format& format)
      : direct_(dtype == DType::kFloat32), copy_(direct_ ? 0 : rows * format.words(columns)) {
    data_ = direct_ ? static_cast<float*>(data) : copy_.get();
    if (direct_) return;
    parallel(rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        format.pack_row(offset(data, i * columns, dtype), dtype, columns,
                        data_ + i * format.words(columns));
      }
    });
  }
  const float* get() const { return data_; }

 private:
  bool direct_;
  Scratch<float> copy_;
  float* data_;
};

// X^T as a right operand: panels of tokens, zero beyond the last.
class TokenPanels {
 public:
  TokenPanels(void* x, int64_t tokens, int64_t columns, DType dtype, const Format& format)
      : format_(format),
        tokens_(tokens),
        words_(format.words(columns)),
        width_(panel_columns()),
        panels_(round_up(tokens, width_) * words_) {
    const Words words(x, tokens, columns, dtype, format);
    const int64_t lines = count_of(words_, kLineFloats);
    parallel(count_of(tokens, width_) * lines, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        pack(words.get(), p / lines * width_, p % lines * kLineFloats);
      }
    });
  }

  // out [rows, tokens] = or += left [rows, columns] X[:, first : first + columns]^T. left turns
  // into words.
  void multiply(float* left, int64_t rows, int64_t first, int64_t columns, float* out) const {
    format_.pack_left(left, rows, columns);
    format_.multiply({rows, tokens_, format_.words(columns), left, kBlockStride, 1,
                      panels_.get() + format_.words(first) * width_, width_ * words_, width_, out,
                      scratch_stride(tokens_), first > 0});
  }

 private:
  void pack(const float* x, int64_t token, int64_t first) {
    const int64_t last = least(first + kLineFloats, words_);
    float* out = panels_.get() + token * words_;
    for (int64_t t = 0; t < width_; ++t) {
      const bool inside = token + t < tokens_;
      const float* row = x + (inside ? token + t : 0) * words_;
      for (int64_t k = first; k < last; ++k) out[k * width_ + t] = inside ? row[k] : 0.0f;
    }
  }

  Format format_;
  int64_t tokens_, words_, width_;
  Scratch<float> panels_;
};

// dY as a left operand, both ways: G = dY^T X and dX = dY W_eff. Packed by blocks of rows of W: the
// values of a token in a block are contiguous, and so are the tokens. Pairs of tokens are not pairs
// of rows: these lie in a copy of their own.
class OutputGradients {
 public:
  OutputGradients(const Matrix& dy, int64_t tokens, const Group& group,
                  const std::vector<RowBlock>& blocks, const Format& format)
      : format_(format), tokens_(tokens), by_token_(format.words(tokens) * group.rows) {
    int64_t words = 0;
    for (const RowBlock& block : blocks) {
      const int64_t rows = block.end - block.begin;
      places_.push_back({first_row(group, block), rows, words * tokens});
      words += format.words(rows);
    }
    if (format.is_pairs()) by_row_ = Scratch<float>(words * tokens);
    parallel(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack(dy, places_[static_cast<size_t>(p)]);
    });
  }

  // gradient [rows, columns] = dY^T X of a block for a strip of X in panels.
  void multiply_inputs(size_t block, const float* x_panels, int64_t columns,
                       float* gradient) const {
    const Place& at = places_[block];
    const int64_t width = panel_columns(), words = format_.words(tokens_);
    format_.multiply({at.rows, columns, words, tokens_of(at), 1, at.rows, x_panels, width * words,
                      width, gradient, kBlockStride, false});
  }

  // dx [tokens, columns] = or += dY effective of a block. effective turns into words.
  void multiply_effective(size_t block, float* effective, int64_t columns, float* dx) const {
    const Place& at = places_[block];
    const int64_t words = format_.words(at.rows);
    format_.pack_right(effective, at.rows, columns);
    format_.multiply({tokens_, columns, words, rows_of(at), words, 1, effective, panel_columns(),
                      kBlockStride, dx, kBlockStride, at.row > 0});
  }

 private:
  struct Place {
    int64_t row, rows;   // row: in the group
    int64_t first_word;  // in by_row_
  };

  float* tokens_of(const Place& at) const {
    return by_token_.get() + at.row * format_.words(tokens_);
  }
  float* rows_of(const Place& at) const {
    return format_.is_pairs() ? by_row_.get() + at.first_word : tokens_of(at);
  }

  void pack(const Matrix& dy, const Place& at) const {
    const Matrix block = matrix_at(dy, 0, at.row);
    for (int64_t w = 0; w < format_.words(tokens_); ++w) {
      format_.pack_rows(block, w, tokens_, at.rows, tokens_of(at) + w * at.rows);
    }
    if (!format_.is_pairs()) return;
    for (int64_t t = 0; t < tokens_; ++t) {
      format_.pack_row(matrix_at(block, t, 0).data, dy.dtype, at.rows,
                       rows_of(at) + t * format_.words(at.rows));
    }
  }

  Format format_;
  int64_t tokens_;
  std::vector<Place> places_;
  Scratch<float> by_token_, by_row_;
};

// A strip of X as a right operand: panels of its columns, zero beyond the last.
class InputStrip {
 public:
  InputStrip(int64_t tokens, const Format& format)
      : format_(format), tokens_(tokens), panels_(format.words(tokens) * kTileColumns) {}

  void pack(const Matrix& x, int64_t columns) {
    const int64_t width = panel_columns(), words = format_.words(tokens_);
    float row[kTileColumns] = {};
    for (int64_t w = 0; w < words; ++w) {
      format_.pack_rows(x, w, tokens_, columns, row);
      for (int64_t j = 0; j < columns; j += width) {
        std::memcpy(panels_.get() + (j / width * words + w) * width, row + j,
                    sizeof(float) * static_cast<size_t>(width));
      }
    }
  }
  const float* get() const { return panels_.get(); }

 private:
  Format format_;
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
