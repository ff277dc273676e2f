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

template <int kRows, int kVectors, bool kAccumulate>
inline void gemm_block(int inner, Left left, const float* right, int64_t right_stride, float* out,
                       int64_t out_stride) {
  F sums[kRows][kVectors];
  STAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = kAccumulate ? load(out + i * out_stride + v * kWidth) : set(0.0f);
    }
  }
  for (int k = 0; k < inner; ++k) {
    F row[kVectors];
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + k * right_stride + v * kWidth);
    STAMINA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const F factor = set(left.data[i * left.row + k * left.inner]);
      STAMINA_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(factor, row[v], sums[i][v]);
    }
  }
  STAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    STAMINA_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + i * out_stride + v * kWidth, sums[i][v]);
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
  for (; i < rows; ++i) {
    gemm_block<1, kVectors, kAccumulate>(inner, {left.data + i * left.row, left.row, left.inner},
                                         right, right_stride, out + i * out_stride, out_stride);
  }
}

// out (rows x columns) = or += left (rows x inner) right (inner x columns): one chain of fused
// multiply-adds per element over ascending k. columns is rounded up to whole vectors.
template <bool kAccumulate>
inline void gemm(int rows, int columns, int inner, Left left, const float* right,
                 int64_t right_stride, float* out, int64_t out_stride) {
  int j = 0;
  for (; j + kGemmVectors * kWidth <= columns; j += kGemmVectors * kWidth) {
    gemm_strip<kGemmVectors, kAccumulate>(rows, inner, left, right + j, right_stride, out + j,
                                          out_stride);
  }
  for (; j < columns; j += kWidth) {
    gemm_strip<1, kAccumulate>(rows, inner, left, right + j, right_stride, out + j, out_stride);
  }
}

}  // namespace
}  // namespace stamina::STAMINA_ISA
