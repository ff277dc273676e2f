// SPDX-License-Identifier: Apache-2.0
// Register-blocked product of small matrices that lie in L1 and L2.
#pragma once

#include "vec.h"

namespace stamina::STAMINA_ISA {
namespace {

// Small fixed loops must vanish early, or their arrays live in memory instead of registers.
#define STAMINA_UNROLL _Pragma("GCC unroll 16")

// The left operand with any strides: element (i, k) is data[i * row + k * inner].
struct Left {
  const float* data;
  int64_t row, inner;
};

// What it accumulates to is added last, so that a long sum is a sum of short chains.
template <int kRows, int kVectors, bool kAccumulate>
inline void gemm_block(int inner, Left left, const float* right, int64_t right_stride, float* out,
                       int64_t out_stride) {
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
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(factor, row[v], sums[i][v]);
    }
  }
  STAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* target = out + i * out_stride + v * kWidth;
      store(target, kAccumulate ? add(load(target), sums[i][v]) : sums[i][v]);
    }
  }
}

// Exactly `rows` < kRows rows.
template <int kRows, int kVectors, bool kAccumulate>
inline void gemm_rest(int rows, int inner, Left left, const float* right, int64_t right_stride,
                      float* out, int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows == kRows - 1) {
      gemm_block<kRows - 1, kVectors, kAccumulate>(inner, left, right, right_stride, out,
                                                   out_stride);
    } else {
      gemm_rest<kRows - 1, kVectors, kAccumulate>(rows, inner, left, right, right_stride, out,
                                                  out_stride);
    }
  }
}

template <int kVectors, bool kAccumulate>
inline void gemm_strip(int rows, int inner, Left left, const float* right, int64_t right_stride,
                       float* out, int64_t out_stride) {
  // a single vector wide, more rows keep as many independent chains in flight
  constexpr int kRows = kVectors == 1 ? 2 * kGemmRows : kGemmRows;
  int i = 0;
  for (; i + kRows <= rows; i += kRows) {
    gemm_block<kRows, kVectors, kAccumulate>(inner,
                                             {left.data + i * left.row, left.row, left.inner},
                                             right, right_stride, out + i * out_stride, out_stride);
  }
  gemm_rest<kRows, kVectors, kAccumulate>(rows - i, inner,
                                          {left.data + i * left.row, left.row, left.inner}, right,
                                          right_stride, out + i * out_stride, out_stride);
}

// out (rows x columns) = or += left (rows x inner) right (inner x columns): one chain of
// multiply-adds per element over ascending k. columns is a multiple of kLineFloats.
template <bool kAccumulate, int kVectors = kGemmVectors>
inline void gemm(int rows, int columns, int inner, Left left, const float* right,
                 int64_t right_stride, float* out, int64_t out_stride) {
  constexpr int kColumns = kVectors * kWidth;
  int j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    gemm_strip<kVectors, kAccumulate>(rows, inner, left, right + j, right_stride, out + j,
                                      out_stride);
  }
  if constexpr (kColumns > kLineFloats) {
    gemm<kAccumulate, kVectors / 2>(rows, columns - j, inner, left, right + j, right_stride,
                                    out + j, out_stride);
  }
}

constexpr int64_t kPanelColumns = kGemmVectors * kWidth;

// Nearly equal parts of at most kInnerRows rows of a panel stay in L1 while all rows of the left
// operand pass.
void block_product(const Product& p) {
  const int64_t parts = p.inner == 0 ? 1 : (p.inner + kInnerRows - 1) / kInnerRows;
  for (int64_t panel = 0; panel < p.columns; panel += kPanelColumns) {
    const int64_t rest = round_up(p.columns - panel, kLineFloats);
    const int columns = static_cast<int>(rest < kPanelColumns ? rest : kPanelColumns);
    const float* right = p.right + panel / kPanelColumns * p.right_panel;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = p.inner * part / parts;
      const auto product = part > 0 || p.accumulate ? gemm<true> : gemm<false>;
      product(static_cast<int>(p.rows), columns,
              static_cast<int>(p.inner * (part + 1) / parts - first),
              {p.left + first * p.left_inner, p.left_row, p.left_inner},
              right + first * p.right_row, p.right_row, p.out + panel, p.out_stride);
    }
  }
}

}  // namespace
}  // namespace stamina::STAMINA_ISA
