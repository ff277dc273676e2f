// SPDX-License-Identifier: Apache-2.0
// What tiles of the operator are made of. Formulas: stamina_kernels/reference.py.
//
// A warp owns blocks of 16 x 32 weights, of which a lane has rows g and g + 8 and the eight
// neighbouring columns 8t .. 8t + 7 (g = lane / 4, t = lane % 4): 16 bytes of a 16-bit weight, one
// byte of mask bits, two Philox blocks. The matrix units are given their operands in that order: in
// mma number j of a block, column n of the fragment is column 4n + j of the weight, and lane t
// holds k = 4t .. 4t + 3, two for each of two mma, the same in both operands. So no result is ever
// shuffled between lanes.
#pragma once

#include "../common/half.h"
#include "../common/philox.h"
#include "copies.cuh"

namespace stamina::cuda {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

STAMINA_HOST_DEVICE constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int kLaneColumns = 8;
constexpr int kWarpColumns = 32;
constexpr int kBlockColumns = 128;
constexpr int kRankStep = 16;  // of a rank, held in shared memory at a time
// 16 bytes beyond the columns: rows 4 apart then lie in different halves of the banks.
template <typename T>
constexpr int kRightStride = kBlockColumns + 16 / static_cast<int>(sizeof(T));

struct Lane {
  int warp, row, quad;

  __device__ explicit Lane(unsigned thread = threadIdx.x)
      : warp(static_cast<int>(thread / 32)),
        row(static_cast<int>(thread % 32 / 4)),
        quad(static_cast<int>(thread % 4)) {}
};

// kRankStep of the rank of a product left right: kRows of left and kBlockColumns of right.
template <typename T, int kRows>
struct Factors {
  alignas(16) T left[kRows * kRankStep];
  alignas(16) T right[kRankStep * kRightStride<T>];
};

// Copies `rows` rows of left and `columns` columns of right, up to kRankStep of the `left_over` of
// the rank that begins there, and pads with zeros. Rows and columns beyond are left as they are:
// they touch only results that are never used.
template <int kThreads, typename T, int kRows>
__device__ void stage_factors(Factors<T, kRows>& to, const T* left, const T* right, int rank,
                              int64_t in_features, int left_over, int rows, int columns) {
  using Left = Copies<kThreads, kRows, kRankStep>;
  using Right = Copies<kThreads, kRankStep, kBlockColumns>;
  const int depth = left_over < kRankStep ? left_over : kRankStep;
  Left::copy(to.left, kRankStep, left, rank, rows, depth);
  Right::copy(to.right, kRightStride<T>, right, in_features, depth, columns);
  if (depth == kRankStep) return;
  Left::clear(to.left + depth, kRankStep, rows, kRankStep - depth);
  Right::clear(to.right + depth * kRightStride<T>, kRightStride<T>, kRankStep - depth, columns);
}

// sum[i][j] += left[8i] right[.][j] over kRankStep: one chain of fused multiply-adds over ascending
// k. left, right: at the lane's first row and column.
template <int kRows>
__device__ void multiply_chain(float (&sum)[kRows][kLaneColumns], const float* left,
                               const float* right) {
#pragma unroll 2
  for (int k = 0; k < kRankStep; k += 4) {
    float a[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4 row = *reinterpret_cast<const float4*>(left + 8 * i * kRankStep + k);
      a[i][0] = row.x, a[i][1] = row.y, a[i][2] = row.z, a[i][3] = row.w;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float* row = right + (k + n) * kRightStride<float>;
      const float4 low = *reinterpret_cast<const float4*>(row);
      const float4 high = *reinterpret_cast<const float4*>(row + 4);
      const float b[kLaneColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) sum[i][j] = fmaf(a[i][n], b[j], sum[i][j]);
      }
    }
  }
}

// x as a tf32 number, which has 11 bits, and the rest, of which the matrix units take 11 bits more.
// Rounded to nearest: what they leave out has either sign, and sums of squares keep no trace of it.
struct Split {
  uint32_t high, low;
};

__device__ inline Split split(float x) {
  const uint32_t high = (float_bits(x) + 0x1000) & 0xFFFFE000;
  return {high, float_bits(x - bits_float(high))};
}

// The same sum on the matrix units, for results of 16 bits: three products of the parts of a split,
// 2^-21 from the fp32 product. (Three of bf16 would be 2^-16 from it: the sum of squares of D,
// which is fp32, would show it.) left, right: at the warp's first row and column.
template <int kRows>
__device__ void multiply_split(float (&sum)[kRows][kLaneColumns], const float* left,
                               const float* right, const Lane& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = 4 * lane.quad + 2 * half;
    const float* p_right = right + k * kRightStride<float> + 4 * lane.row;
    const float4 x = *reinterpret_cast<const float4*>(p_right);
    const float4 y = *reinterpret_cast<const float4*>(p_right + kRightStride<float>);
    const Split b[4][2] = {{split(x.x), split(y.x)},
                           {split(x.y), split(y.y)},
                           {split(x.z), split(y.z)},
                           {split(x.w), split(y.w)}};
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
      const float* p_left = left + (8 * i + lane.row) * kRankStep + k;
      const float2 u = *reinterpret_cast<const float2*>(p_left);
      const float2 v = *reinterpret_cast<const float2*>(p_left + 8 * kRankStep);
      const Split a[4] = {split(u.x), split(v.x), split(u.y), split(v.y)};
      const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
      const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t b_high[2] = {b[j][0].high, b[j][1].high};
        const uint32_t b_low[2] = {b[j][0].low, b[j][1].low};
        float d[4] = {sum[i][j], sum[i][4 + j], sum[i + 1][j], sum[i + 1][4 + j]};
        mma_tf32(d, low, b_high);
        mma_tf32(d, high, b_low);
        mma_tf32(d, high, b_high);
        sum[i][j] = d[0], sum[i][4 + j] = d[1], sum[i + 1][j] = d[2], sum[i + 1][4 + j] = d[3];
      }
    }
  }
}

// A lane's part of a tile of a matrix: eight neighbouring columns of its rows 0, 8, ... Byte: char
// or const char.
template <typename Byte>
struct LaneRows {
  Byte* first;
  int64_t step;  // bytes
  bool vectors;  // whether rows and base take 16-byte accesses

  // matrix: of rows of `columns`; element: index of the lane's first one; regular: `vectors` is
  // true.
  template <typename Pointer>
  __device__ LaneRows(Pointer matrix, DType dtype, int64_t columns, int64_t element,
                      bool regular = false)
      : first(static_cast<Byte*>(matrix) + element * size_of(dtype)),
        step(8 * columns * size_of(dtype)),
        vectors(regular || (columns % kLaneColumns == 0 && is_aligned(matrix))) {}

  __device__ Byte* row(int i) const { return first + i * step; }
  __device__ void go_down(int rows) { first += rows / 8 * step; }
};

// How much of its tile a lane has: rows of the matrix from its first one on, and of its columns.
struct Extent {
  int rows, columns;
  bool whole;  // a tile is all there if it is there

  __device__ Extent(int rows, int64_t columns, bool whole = false)
      : rows(rows),
        columns(whole || columns > kLaneColumns ? kLaneColumns
                : columns < 0                   ? 0
                                                : static_cast<int>(columns)),
        whole(whole) {}

  // Columns of row i of a tile that is there.
  __device__ int valid(int i) const { return whole || 8 * i < rows ? columns : 0; }
};

template <DType kDType>
__device__ inline float to_float(uint16_t x) {
  return kDType == DType::kBFloat16 ? bf16_to_float(x) : half_to_float(x);
}

template <DType kDType>
__device__ inline uint32_t pack_pair(float low, float high) {
  return kDType == DType::kBFloat16 ? pack_bf16(low, high) : pack_half(low, high);
}

// The four or eight elements of 16 bytes as fp32.
template <DType kDType>
__device__ inline void unpack_vector(float* to, const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kDType == DType::kFloat32) {
      to[w] = bits_float(words[w]);
    } else {
      to[2 * w] = to_float<kDType>(static_cast<uint16_t>(words[w]));
      to[2 * w + 1] = to_float<kDType>(static_cast<uint16_t>(words[w] >> 16));
    }
  }
}

// Calls rows x columns of a matrix into L2, by a block of kThreads.
template <int kThreads>
__device__ void prefetch_rows(const void* matrix, DType dtype, int64_t features, int row, int rows,
                              int column, int columns) {
  constexpr int kLineBytes = 128;
  const int in_line = kLineBytes / static_cast<int>(size_of(dtype));
  const int lines = kBlockColumns / in_line;
  for (int e = static_cast<int>(threadIdx.x); e < rows * lines; e += kThreads) {
    const int first = e % lines * in_line;
    const int64_t index = static_cast<int64_t>(row + e / lines) * features + column + first;
    if (first < columns) prefetch_line(static_cast<const char*>(matrix) + index * size_of(dtype));
  }
}

// Rows `first` to first + kRows - 1 of a lane as fp32, zero where nothing is.
template <DType kDType, int kRows>
__device__ void load_rows_as(float (&to)[kRows][kLaneColumns], const LaneRows<const char>& from,
                             int first, const Extent& extent) {
  if (!from.vectors) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        to[i][j] = 0.0f;
        if (j >= extent.valid(first + i)) continue;
        if constexpr (kDType == DType::kFloat32) {
          to[i][j] = reinterpret_cast<const float*>(from.row(first + i))[j];
        } else {
          to[i][j] = to_float<kDType>(reinterpret_cast<const uint16_t*>(from.row(first + i))[j]);
        }
      }
    }
    return;
  }
  // all loads first: as many in flight as there are rows
  constexpr int kVectors = kDType == DType::kFloat32 ? 2 : 1;
  uint4 raw[kRows][kVectors];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto* p = reinterpret_cast<const uint4*>(from.row(first + i));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      raw[i][v] = extent.valid(first + i) > 0 ? p[v] : uint4{0, 0, 0, 0};
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack_vector<kDType>(to[i] + 4 * v, raw[i][v]);
  }
}

template <int kRows>
__device__ void load_rows(float (&to)[kRows][kLaneColumns], const LaneRows<const char>& from,
                          DType dtype, int first, const Extent& extent) {
  if (dtype == DType::kFloat32) {
    load_rows_as<DType::kFloat32>(to, from, first, extent);
  } else if (dtype == DType::kBFloat16) {
    load_rows_as<DType::kBFloat16>(to, from, first, extent);
  } else {
    load_rows_as<DType::kFloat16>(to, from, first, extent);
  }
}

// One rounding to kDType, the first `valid` of eight elements of row i.
template <DType kDType>
__device__ void store_row(const LaneRows<char>& to, int i, int valid,
                          const float (&from)[kLaneColumns]) {
  if (valid == 0) return;
  if (!to.vectors) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      if (j >= valid) continue;
      if constexpr (kDType == DType::kFloat32) {
        reinterpret_cast<float*>(to.row(i))[j] = from[j];
      } else {
        reinterpret_cast<uint16_t*>(to.row(i))[j] =
            kDType == DType::kBFloat16 ? float_to_bf16(from[j]) : float_to_half(from[j]);
      }
    }
    return;
  }
  auto* p = reinterpret_cast<uint4*>(to.row(i));
  if constexpr (kDType == DType::kFloat32) {
    p[0] = {float_bits(from[0]), float_bits(from[1]), float_bits(from[2]), float_bits(from[3])};
    p[1] = {float_bits(from[4]), float_bits(from[5]), float_bits(from[6]), float_bits(from[7])};
  } else {
    p[0] = {pack_pair<kDType>(from[0], from[1]), pack_pair<kDType>(from[2], from[3]),
            pack_pair<kDType>(from[4], from[5]), pack_pair<kDType>(from[6], from[7])};
  }
}

}  // namespace stamina::cuda
