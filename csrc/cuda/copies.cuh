// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies into shared memory: cp.async everywhere, and cp.async.bulk with an mbarrier
// for long rows where the machine has it (sm_90).
#pragma once

#include "../common/half.h"
#include "primitives.cuh"

namespace stamina::cuda {

// Below it a bulk copy costs more than the 16-byte copies that it replaces: one engine of the
// multiprocessor issues them one by one.
constexpr int kLeastBulkBytes = 256;

STAMINA_HOST_DEVICE inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The asynchronous copies of a block of kThreads threads into kStages stages of shared memory. Per
// stage: copy any number of matrices, publish(), wait(), block_barrier(); before a stage is copied
// into again, another block_barrier(). kBulk: whether bulk copies may be used.
template <int kThreads, int kStages, bool kBulk>
class Copies {
 public:
  // barriers: kStages in shared memory, for bulk copies.
  __device__ explicit Copies(uint64_t* barriers = nullptr) : barriers_(barriers) {
    if (bulk()) {
      if (threadIdx.x < kStages) barrier_init(barriers + threadIdx.x, kThreads);
      block_barrier();
    }
  }

  // rows x columns, at most kRows x kColumns, into rows of to_stride elements.
  template <int kRows, int kColumns, typename T>
  __device__ void copy(int stage, T* to, int to_stride, const T* from, int64_t from_stride,
                       int rows, int columns) {
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = columns % kVector == 0 && from_stride % kVector == 0 && is_aligned(from);
    if (!vectors) {
      for_elements<kRows, kColumns, false>(rows, columns, [&](int row, int column) {
        to[row * to_stride + column] = from[row * from_stride + column];
      });
      return;
    }
    if (bulk() && copy_bulk(stage, to, to_stride, from, from_stride, rows, columns)) {
      return;
    }
    for_elements<kRows, kColumns / kVector, true>(rows, columns / kVector, [&](int row, int v) {
      copy_vector_async(to + row * to_stride + v * kVector, from + row * from_stride + v * kVector);
    });
  }

  // Zeros in rows x columns, at most kRows x kColumns.
  template <int kRows, int kColumns, typename T>
  __device__ void clear(T* to, int to_stride, int rows, int columns) {
    for_elements<kRows, kColumns, false>(
        rows, columns, [&](int row, int column) { to[row * to_stride + column] = 0; });
  }

  __device__ void publish(int stage) {
    commit_async_copies();
    if (bulk()) barrier_arrive(barriers_ + stage, announced_);
    announced_ = 0;
  }

  // Waits for the stage; kPending: stages that were published since. A stage's parity alternates
  // between 0 and 1 from use to use.
  template <int kPending>
  __device__ void wait(int stage, int parity) {
    wait_async_copies<kPending>();
    if (bulk()) barrier_wait(barriers_ + stage, parity);
  }

 private:
  __device__ static bool bulk() { return kBulk && kBulkCopies; }

  // Calls use(row, column) for every element once. Divisions are by constants.
  template <int kRows, int kColumns, bool kUnrolled, typename Use>
  __device__ static void for_elements(int rows, int columns, const Use& use) {
#pragma unroll(kUnrolled ? 2 : 1)
    for (unsigned e = threadIdx.x; e < kRows * kColumns; e += kThreads) {
      const int row = static_cast<int>(e / kColumns), column = static_cast<int>(e % kColumns);
      if (row < rows && column < columns) use(row, column);
    }
  }

  // Whether the matrix was worth bulk copies, of rows or of all of it where it has no gaps.
  template <typename T>
  __device__ bool copy_bulk(int stage, T* to, int to_stride, const T* from, int64_t from_stride,
                            int rows, int columns) {
    const bool whole = from_stride == columns && to_stride == columns;
    const int copies = whole ? 1 : rows;
    const int bytes = (whole ? rows : 1) * columns * static_cast<int>(sizeof(T));
    if (bytes < kLeastBulkBytes || copies > kThreads) return false;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < copies) {
      bulk_copy(to + thread * to_stride, from + thread * from_stride, bytes, barriers_ + stage);
      announced_ += bytes;
    }
    return true;
  }

  uint64_t* barriers_;
  uint32_t announced_ = 0;
};

}  // namespace stamina::cuda
