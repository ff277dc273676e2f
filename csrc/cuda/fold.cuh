// SPDX-License-Identifier: Apache-2.0
// W = round(W_init + sum_t c_t M_t (.) (A_t B_t)) for all layers in one launch.
//
// A block of eight warps keeps the fp32 sum of 128 x 128 weights in registers, 64 a thread, while
// the adapters of the layer stream through four stages of shared memory: 16 of a rank at a time,
// 10 KiB. Each thread makes two or three 16-byte copies of that; bulk copies, issued row by row by
// a few threads while the others wait, took half as long again. P of 16 x 32 weights comes
// from four mma on the committed fp16 factors, whose products are exact, and is added under the
// mask at once. That addition, one instruction to select and one to add for each weight and
// concept, is what binds, not the matrix units: a rank of 16 gives them one instruction for 128
// weights, so wgmma would not shorten anything.
#pragma once

#include "tile.cuh"

namespace stamina::cuda {

constexpr int kFoldThreads = 256;
constexpr int kFoldRows = 128;
constexpr int kFoldStages = 4;
constexpr int kFoldWarpRows = 64;
constexpr int kFoldLaneRows = kFoldWarpRows / 8;
constexpr int kBlockWords = kBlockColumns / 32;

// kRankStep of the rank of one adapter, from rank `first` on.
struct FoldStep {
  const uint16_t *A, *B;  // fp16, from that rank on
  const uint32_t* bits;
  int32_t rank, depth;  // of the adapter, and of that what is left
  float coefficient;
  bool regular;  // every row of the step and of a task is whole vectors, at their addresses
};

struct FoldLayer {
  void* weight;
  const void* initial;
  int64_t in_features;
  int32_t rows, first_step, steps;
  int32_t first_task;
  DType dtype;
  int32_t column_tasks;
};

struct FoldStage {
  Factors<uint16_t, kFoldRows> factors;
  alignas(16) uint32_t bits[kFoldRows * kBlockWords];
  float coefficient;
};

using FoldStages = FoldStage[kFoldStages];
// Steps of a layer that are in shared memory at a time: read from device memory one by one, each
// would keep its block waiting.
constexpr unsigned kStepsHeld = 64;
using HeldSteps = FoldStep[kStepsHeld];
using FoldCopies = Copies<kFoldThreads, kFoldStages, false>;

// In shared memory, where it takes no registers.
struct FoldTask {
  FoldLayer layer;
  int32_t layer_index;
  int32_t row, column, rows, columns;
};

// The last layer that begins at or before a task: found by a warp, every lane gets it.
__device__ inline int layer_of_task(const FoldLayer* layers, int count, int task) {
  int begun = 0;
  for (int k = static_cast<int>(threadIdx.x % 32); k < count; k += 32) {
    begun += layers[k].first_task <= task;
  }
  for (int distance = 16; distance > 0; distance /= 2) begun += shuffle_xor(begun, distance);
  return begun - 1;
}

__device__ inline FoldTask fold_task(const FoldLayer* layers, int number, int block) {
  const FoldLayer layer = layers[number];
  const int index = block - layer.first_task;
  const int row = index / layer.column_tasks * kFoldRows;
  const int column = index % layer.column_tasks * kBlockColumns;
  const int rows = layer.rows - row < kFoldRows ? layer.rows - row : kFoldRows;
  const int64_t columns = layer.in_features - column;
  return {layer,  number, row,
          column, rows,   columns < kBlockColumns ? static_cast<int>(columns) : kBlockColumns};
}

// Where a thread reads of a step whose copies need no case distinctions, and whether it does: three
// vectors of 16 bytes, counted in vectors from the step's pointers.
struct RegularCopies {
  uint32_t row, right, bits;
  bool has_row, has_bits;

  __device__ explicit RegularCopies(const FoldTask& task) {
    const auto thread = static_cast<unsigned>(threadIdx.x);
    const auto features = static_cast<uint32_t>(task.layer.in_features);
    row = task.row + thread / kLeft;
    right = thread / kRight * (features / 8) + task.column / 8 + thread % kRight;
    bits = (task.row + thread) * (features / kBlockColumns) + task.column / kBlockColumns;
    has_row = static_cast<int>(thread / kLeft) < task.rows;
    has_bits = static_cast<int>(thread) < task.rows;
  }

  __device__ void copy(FoldStage& to, const FoldStep& step) const {
    const auto thread = static_cast<unsigned>(threadIdx.x);
    const auto vectors = [](const void* p) { return static_cast<const uint4*>(p); };
    const auto left = static_cast<uint64_t>(row) * (static_cast<uint32_t>(step.rank) / 8);
    if (has_row) {
      copy_vector_async(to.factors.left + thread * 8, vectors(step.A) + left + thread % kLeft);
    }
    copy_vector_async(
        to.factors.right + thread / kRight * kRightStride<uint16_t> + thread % kRight * 8,
        vectors(step.B) + right);
    if (has_bits) copy_vector_async(to.bits + thread * kBlockWords, vectors(step.bits) + bits);
  }

  static constexpr unsigned kLeft = kRankStep / 8, kRight = kBlockColumns / 8;  // vectors of a row
  static_assert(kFoldThreads == kFoldRows * kLeft && kFoldThreads == kRankStep * kRight &&
                kBlockColumns == 8 * sizeof(uint4));
};

__device__ inline void copy_irregular(FoldCopies& copies, int stage, FoldStage& to,
                                      const FoldStep& step, const FoldTask& task) {
  const int64_t features = task.layer.in_features, words = (features + 31) / 32;
  stage_factors(copies, stage, to.factors, step.A + static_cast<int64_t>(task.row) * step.rank,
                step.B + task.column, step.rank, features, step.depth, task.rows, task.columns);
  copies.copy<kFoldRows, kBlockWords>(stage, to.bits, kBlockWords,
                                      step.bits + task.row * words + task.column / 32, words,
                                      task.rows, (task.columns + 31) / 32);
}

// The fragments of B for the four mma of a block: columns in the order of tile.cuh, k in that of
// ldmatrix, which loads A.
__device__ inline void load_right(uint32_t (&b)[4][2], const uint16_t* right, const Lane& lane) {
  const uint16_t* p_right = right + 2 * lane.quad * kRightStride<uint16_t> + 4 * lane.row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint16_t* row = p_right + 8 * half * kRightStride<uint16_t>;
    const uint2 x = *reinterpret_cast<const uint2*>(row);
    const uint2 y = *reinterpret_cast<const uint2*>(row + kRightStride<uint16_t>);
    b[0][half] = permute_bytes(x.x, y.x, 0x5410);
    b[1][half] = permute_bytes(x.x, y.x, 0x7632);
    b[2][half] = permute_bytes(x.y, y.y, 0x5410);
    b[3][half] = permute_bytes(x.y, y.y, 0x7632);
  }
}

// total += c M (.) P of one row of a lane.
__device__ inline void add_masked(float (&total)[kLaneColumns], uint32_t bits, float coefficient,
                                  const float (&product)[kLaneColumns]) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    if ((bits & (1u << j)) != 0) total[j] = fmaf(coefficient, product[j], total[j]);
  }
}

__device__ inline void add_stage(float (&total)[kFoldLaneRows][kLaneColumns],
                                 const FoldStage& stage, const Lane& lane) {
  const int warp_row = lane.warp / 4 * kFoldWarpRows, warp_word = lane.warp % 4;
  const auto* bytes = reinterpret_cast<const uint8_t*>(stage.bits);
  uint32_t b[4][2];
  load_right(b, stage.factors.right + kWarpColumns * warp_word, lane);
  // the address that ldmatrix wants of each lane: row lane % 16, its first or second 8 of the rank
  const int thread = static_cast<int>(threadIdx.x % 32);
  const uint16_t* p_left =
      stage.factors.left + (warp_row + thread % 16) * kRankStep + thread / 16 * 8;
#pragma unroll
  for (int i = 0; i < kFoldLaneRows; i += 2) {
    const int row = warp_row + 8 * i + lane.row;
    uint32_t a[4];
    load_matrices(a, p_left + 8 * i * kRankStep);
    float product[2][kLaneColumns];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma_half(d, a, b[j]);
      product[0][j] = d[0], product[0][4 + j] = d[1];
      product[1][j] = d[2], product[1][4 + j] = d[3];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t bits = bytes[(row + 8 * h) * kBlockWords * 4 + 4 * warp_word + lane.quad];
      add_masked(total[i + h], bits, stage.coefficient, product[h]);
    }
  }
}

// The least number that rounds to infinity: half a step above the largest.
template <DType kDType>
constexpr float kRoundsToInfinity = kDType == DType::kFloat16    ? 65520.0f
                                    : kDType == DType::kBFloat16 ? 0x1.FFp127f
                                                                 : INFINITY;

// W = round(W_init + total) for a lane's rows. Returns whether every result is finite.
template <DType kDType>
__device__ bool store_folded(const FoldTask& task,
                             const float (&total)[kFoldLaneRows][kLaneColumns], int row,
                             int64_t column) {
  const FoldLayer& layer = task.layer;
  const int64_t element = row * layer.in_features + column;
  const LaneRows<const char> from(layer.initial, kDType, layer.in_features, element);
  const LaneRows<char> weight(layer.weight, kDType, layer.in_features, element);
  const Extent extent(layer.rows - row, layer.in_features - column);
  bool finite = true;
  constexpr int kTogether = 2;  // rows: more do not fit the registers
#pragma unroll
  for (int first = 0; first < kFoldLaneRows; first += kTogether) {
    float initial[kTogether][kLaneColumns];
    load_rows_as<kDType>(initial, from, first, extent);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int valid = extent.valid(first + i);
      float sum[kLaneColumns];
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        sum[j] = initial[i][j] + total[first + i][j];
        if (j < valid && !(fabsf(sum[j]) < kRoundsToInfinity<kDType>)) finite = false;
      }
      store_row<kDType>(weight, first + i, valid, sum);
    }
  }
  return finite;
}

// overflow: one flag per layer, zero before.
__global__ void __launch_bounds__(kFoldThreads, 2)
    fold_kernel(const FoldLayer* layers, int32_t count, const FoldStep* all_steps,
                int32_t* overflow) {
  STAMINA_SHARED(FoldStages, stages);
  STAMINA_SHARED(HeldSteps, held);
  STAMINA_SHARED(FoldTask, task);
  if (threadIdx.x < 32) {
    const int block = static_cast<int>(blockIdx.x), number = layer_of_task(layers, count, block);
    if (threadIdx.x == 0) task = fold_task(layers, number, block);
  }
  block_barrier();
  const Lane lane;
  FoldCopies copies;
  const RegularCopies regular(task);
  constexpr unsigned kAhead = kFoldStages - 1;
  const auto steps = static_cast<unsigned>(task.layer.steps);
  float total[kFoldLaneRows][kLaneColumns] = {};
  // one step is added while those up to `copied` are on their way
#pragma unroll 1
  for (unsigned copied = 0; copied < steps + kAhead; ++copied) {
    const unsigned added = copied - kAhead, stage = added % kFoldStages;
    if (copied >= kAhead) {
      copies.wait<kAhead - 1>(stage, added / kFoldStages % 2);
      block_barrier();  // also: every thread is done with the stage that is copied into next
    }
    const unsigned next = copied % kFoldStages;
    if (copied < steps) {
      if (copied % kStepsHeld == 0) {
        block_barrier();
        const unsigned step = copied + threadIdx.x;
        if (threadIdx.x < kStepsHeld && step < steps) {
          held[threadIdx.x] = all_steps[task.layer.first_step + step];
        }
        block_barrier();
      }
      const FoldStep& step = held[copied % kStepsHeld];
      if (threadIdx.x == 0) stages[next].coefficient = step.coefficient;
      if (step.regular) {
        regular.copy(stages[next], step);
      } else {
        copy_irregular(copies, static_cast<int>(next), stages[next], step, task);
      }
    }
    copies.publish(next);
    if (copied == 0) {
      prefetch_rows<kFoldThreads>(task.layer.initial, task.layer.dtype, task.layer.in_features,
                                  task.row, task.rows, task.column, task.columns);
    }
    if (copied >= kAhead) add_stage(total, stages[stage], lane);
  }

  const int row = task.row + lane.warp / 4 * kFoldWarpRows + lane.row;
  const int64_t column = task.column + lane.warp % 4 * kWarpColumns + kLaneColumns * lane.quad;
  bool finite;
  if (task.layer.dtype == DType::kFloat32) {
    finite = store_folded<DType::kFloat32>(task, total, row, column);
  } else if (task.layer.dtype == DType::kBFloat16) {
    finite = store_folded<DType::kBFloat16>(task, total, row, column);
  } else {
    finite = store_folded<DType::kFloat16>(task, total, row, column);
  }
  if (!finite) overflow[task.layer_index] = 1;
}

}  // namespace stamina::cuda
