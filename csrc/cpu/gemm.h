// SPDX-License-Identifier: Apache-2.0
// Register-blocked product of small matrices that lie in L1 and L2.
#pragma once

#include "vec.h"

namespace stamina::STAMINA_ISA {
namespace {

// Small fixed loops must vanish early, or their arrays live in memory instead of registers.
#define STAMINA_UNROLL _Pragma("GCC unroll 16")

// The left operand with any strides: element (i, k) is data[i * row + k * inner]. It also says how
// its elements are multiplied with those of the right one.
struct Left {
  const float* data;
  int64_t row, inner;

  Left below(int rows) const { return {data + rows * row, row, inner}; }
  static F accumulate(F factor, F row, F sum) { return multiply_add(factor, row, sum); }
};

// Where a product goes: put(i, v, x) takes vector v of row i. What a product is added to is added
// last, so that a long sum is a sum of short chains.
template <bool kAccumulate>
struct Out {
  float* data;
  int64_t stride;

  Out below(int rows) const { return {data + rows * stride, stride}; }
  Out beside(int columns) const { return {data + columns, stride}; }
  void put(int i, int v, F x) const {
    float* target = data + i * stride + v * kWidth;
    store(target, kAccumulate ? add(load(target), x) : x);
  }
};

template <int kRows, int kVectors, class LeftType, class Target>
inline void gemm_block(int inner, LeftType left, const float* right, int64_t right_stride,
                       const Target& target) {
  F sums[kRows][kVectors];
  STAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[i][v] = set(0.0f);
  }
#pragma GCC unroll 4
  for (int k = 0; k < inner; ++k) {
    F row[kVectors];
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + k * right_stride + v * kWidth);
    STAMINA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const F factor = set(left.data[i * left.row + k * left.inner]);
      STAMINA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = LeftType::accumulate(factor, row[v], sums[i][v]);
      }
    }
  }
  STAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) target.put(i, v, sums[i][v]);
  }
}

// Exactly `rows` < kRows rows.
template <int kRows, int kVectors, class LeftType, class Target>
inline void gemm_rest(int rows, int inner, LeftType left, const float* right, int64_t right_stride,
                      const Target& target) {
  if constexpr (kRows > 1) {
    if (rows == kRows - 1) {
      gemm_block<kRows - 1, kVectors>(inner, left, right, right_stride, target);
    } else {
      gemm_rest<kRows - 1, kVectors>(rows, inner, left, right, right_stride, target);
    }
  }
}

template <int kVectors, class LeftType, class Target>
inline void gemm_strip(int rows, int inner, LeftType left, const float* right, int64_t right_stride,
                       const Target& target) {
  // a single vector wide, more rows keep as many independent chains in flight
  constexpr int kRows = kVectors == 1 ? 2 * kGemmRows : kGemmRows;
  int i = 0;
  for (; i + kRows <= rows; i += kRows) {
    gemm_block<kRows, kVectors>(inner, left.below(i), right, right_stride, target.below(i));
  }
  gemm_rest<kRows, kVectors>(rows - i, inner, left.below(i), right, right_stride, target.below(i));
}

// target (rows x columns) takes left (rows x inner) right (inner x columns): one chain of
// multiply-adds per element over ascending k. columns is a multiple of kLineFloats.
template <int kVectors = kGemmVectors, class LeftType = Left, class Target>
inline void gemm(int rows, int columns, int inner, LeftType left, const float* right,
                 int64_t right_stride, const Target& target) {
  constexpr int kColumns = kVectors * kWidth;
  int j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    gemm_strip<kVectors>(rows, inner, left, right + j, right_stride, target.beside(j));
  }
  if constexpr (kColumns > kLineFloats) {
    gemm<kVectors / 2>(rows, columns - j, inner, left, right + j, right_stride, target.beside(j));
  }
}

constexpr int64_t kPanelColumns = kGemmVectors * kWidth;

// Nearly equal parts of at most kInnerRows rows of a panel stay in L1 while all rows of the left
// operand pass.
template <class LeftType>
void block_product(const Product& p) {
  const int64_t parts = p.inner == 0 ? 1 : (p.inner + kInnerRows - 1) / kInnerRows;
  for (int64_t panel = 0; panel < p.columns; panel += kPanelColumns) {
    const int64_t rest = round_up(p.columns - panel, kLineFloats);
    const int columns = static_cast<int>(rest < kPanelColumns ? rest : kPanelColumns);
    const float* right = p.right + panel / kPanelColumns * p.right_panel;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = p.inner * part / parts;
      const int inner = static_cast<int>(p.inner * (part + 1) / parts - first);
      const LeftType left{p.left + first * p.left_inner, p.left_row, p.left_inner};
      const float* rows = right + first * p.right_row;
      const Out<false> out{p.out + panel, p.out_stride};
      if (part > 0 || p.accumulate) {
        gemm(static_cast<int>(p.rows), columns, inner, left, rows, p.right_row,
             Out<true>{out.data, out.stride});
      } else {
        gemm(static_cast<int>(p.rows), columns, inner, left, rows, p.right_row, out);
      }
    }
  }
}

}  // namespace
}  // namespace stamina::STAMINA_ISA
