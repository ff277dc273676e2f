// SPDX-License-Identifier: Apache-2.0
// Products of fp32 matrices on the matrix units: every number is split into two of bf16, which
// carry 16 bits of it, and a b is a_low b_high + a_high b_low + a_high b_high, 2^-16 from the fp32
// product.
//
// Matrices of 16-bit words lie in shared memory by rows; the vectors of 16 bytes of a row have
// changed places (`vector ^ row`) so that the eight rows of an ldmatrix lie in different banks.
#pragma once

#include "tile.cuh"

namespace stamina::cuda {

// Where lane l points for the 16 x 16 matrix that begins at its warp's first row and column, so
// that ldmatrix loads its four parts of 8 x 8 in the order in which mma takes them: the lower after
// the upper, then to the right; or the right after the left, then below. The former serves operand
// a by rows and b by columns, the latter serves either transposed.
struct MatrixLane {
  int row, vector;

  __device__ static MatrixLane down(int thread) { return {thread % 16, thread % 32 / 16}; }
  __device__ static MatrixLane across(int thread) {
    return {thread % 8 + thread % 32 / 16 * 8, thread % 16 / 8};
  }
};

// Index of an element in a matrix of kColumns whose vectors have changed places.
template <int kColumns>
__device__ inline int swizzled(int row, int vector) {
  // eight rows cover the banks once, or several times
  constexpr int kVectors = kColumns / 8, kRowsInBanks = kVectors < 8 ? 8 / kVectors : 1;
  constexpr int kChanging = kVectors < 8 ? kVectors : 8;
  return row * kColumns + (vector ^ (row / kRowsInBanks % kChanging)) * 8;
}

// Two neighbours; x is in the low half of a word.
struct SplitPair {
  uint32_t high, low;

  __device__ SplitPair(float x, float y)
      : high(pack_bf16(x, y)),
        low(pack_bf16(x - bits_float(high << 16), y - bits_float(high & 0xFFFF0000u))) {}
};

// kRows x kColumns of fp32 numbers in shared memory, split.
template <int kRows, int kColumns>
struct SplitMatrix {
  alignas(16) uint16_t high[kRows * kColumns];
  alignas(16) uint16_t low[kRows * kColumns];

  // A vector of four neighbours, number e of all.
  __device__ void store(int e, const float4& x, float factor) {
    const int row = e / kVectors, column = e % kVectors * 4;
    const SplitPair first(factor * x.x, factor * x.y), second(factor * x.z, factor * x.w);
    const int at = swizzled<kColumns>(row, column / 8) + column % 8;
    *reinterpret_cast<uint2*>(high + at) = {first.high, second.high};
    *reinterpret_cast<uint2*>(low + at) = {first.low, second.low};
  }

  // The same vector of a matrix of rows x columns, zeros beyond it. Columns are all of a row, or
  // whole vectors.
  __device__ static float4 load(int e, const float* from, int64_t stride, int rows, int columns) {
    const int row = e / kVectors, column = e % kVectors * 4;
    const int left = row < rows ? columns - column : 0;
    from += row * stride + column;
    if (stride % 4 == 0 && is_aligned(from)) {
      return left > 0 ? *reinterpret_cast<const float4*>(from) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    return {left > 0 ? from[0] : 0.0f, left > 1 ? from[1] : 0.0f, left > 2 ? from[2] : 0.0f,
            left > 3 ? from[3] : 0.0f};
  }

  static constexpr int kVectors = kColumns / 4;  // of a row
};

// Four 8 x 8 matrices, split, as ldmatrix loads them.
struct SplitTile {
  uint32_t high[4], low[4];

  template <int kRows, int kColumns>
  __device__ static SplitTile load(const SplitMatrix<kRows, kColumns>& from, int at) {
    SplitTile tile;
    load_matrices(tile.high, from.high + at);
    load_matrices(tile.low, from.low + at);
    return tile;
  }
  template <int kRows, int kColumns>
  __device__ static SplitTile load_transposed(const SplitMatrix<kRows, kColumns>& from, int at) {
    SplitTile tile;
    load_matrices_transposed(tile.high, from.high + at);
    load_matrices_transposed(tile.low, from.low + at);
    return tile;
  }

  __device__ void transpose_each() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
      high[m] = transpose_matrix(high[m]), low[m] = transpose_matrix(low[m]);
  }
};

// d += a b of 16 x 16 matrices, in an order in which two of the four are enough at a time.
__device__ inline void multiply_tiles(float (&d)[2][4], const SplitTile& a, const SplitTile& b) {
  const uint32_t high[2][2] = {{b.high[0], b.high[1]}, {b.high[2], b.high[3]}};
  const uint32_t low[2][2] = {{b.low[0], b.low[1]}, {b.low[2], b.low[3]}};
#pragma unroll
  for (int n = 0; n < 2; ++n) mma_bf16(d[n], a.low, high[n]);
#pragma unroll
  for (int n = 0; n < 2; ++n) mma_bf16(d[n], a.high, high[n]);
#pragma unroll
  for (int n = 0; n < 2; ++n) mma_bf16(d[n], a.high, low[n]);
}

}  // namespace stamina::cuda
