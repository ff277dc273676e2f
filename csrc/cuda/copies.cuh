// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies of matrices into shared memory, 16 bytes a thread at a time. Bulk copies
// (cp.async.bulk of sm_90) of the same rows, 256 or 512 bytes, were measured and lost.
#pragma once

#include "../common/half.h"
#include "primitives.cuh"

namespace stamina::cuda {

STAMINA_HOST_DEVICE inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// What a block of kThreads threads does to a matrix of at most kRows x kColumns in shared memory.
// The copies are in the caller's open group (commit_async_copies).
template <int kThreads, int kRows, int kColumns>
struct Copies {
  // rows x columns, into rows of to_stride elements.
  template <typename T>
  __device__ static void copy(T* to, int to_stride, const T* from, int64_t from_stride, int rows,
                              int columns) {
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = columns % kVector == 0 && from_stride % kVector == 0 && is_aligned(from);
    if (!vectors) {
      for_elements<kColumns, false>(rows, columns, [&](int row, int column) {
        to[row * to_stride + column] = from[row * from_stride + column];
      });
      return;
    }
    for_elements<kColumns / kVector, true>(rows, columns / kVector, [&](int row, int v) {
      copy_vector_async(to + row * to_stride + v * kVector, from + row * from_stride + v * kVector);
    });
  }

  // Zeros in rows x columns.
  template <typename T>
  __device__ static void clear(T* to, int to_stride, int rows, int columns) {
    for_elements<kColumns, false>(rows, columns,
                                  [&](int row, int column) { to[row * to_stride + column] = 0; });
  }

 private:
  // Calls use(row, column) for every element of kInRow a row once. Divisions are by constants.
  template <int kInRow, bool kUnrolled, typename Use>
  __device__ static void for_elements(int rows, int columns, const Use& use) {
#pragma unroll(kUnrolled ? 4 : 1)
    for (unsigned e = threadIdx.x; e < kRows * kInRow; e += kThreads) {
      const int row = static_cast<int>(e / kInRow), column = static_cast<int>(e % kInRow);
      if (row < rows && column < columns) use(row, column);
    }
  }
};

}  // namespace stamina::cuda
