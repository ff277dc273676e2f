// SPDX-License-Identifier: Apache-2.0
// W = round(W_init + sum_t c_t M_t (.) (A_t B_t)) for all layers in one launch.
//
// A block of eight warps keeps the fp32 sum of 128 x 128 weights in registers, 64 a thread, while
// the adapters of the layer stream through four stages of shared memory: 16 of a rank at a time,
// 10 KiB, two or three 16-byte copies a thread. P of 16 x 32 weights comes from four mma on the
// committed fp16 factors, whose products are exact, and is added under the mask at once.
//
// What binds is shared memory, through which all of that goes in and out again, and the issue of
// instructions: one to add for each weight of a lane and concept, and two to select eight of them.
// The matrix units wait, so wgmma would not shorten anything. Where a whole launch is regular (one
// 16-bit dtype; rows, columns and ranks that fill the tiles; vectors at their addresses) a kernel
// of its own has every case distinction decided and every address in a stage a constant.
#pragma once

#include "tile.cuh"

namespace stamina::cuda {

constexpr int kFoldThreads = 256;
constexpr int kFoldRows = 128;
constexpr unsigned kFoldStages = 4;
constexpr int kFoldWarpRows = 64;
constexpr int kFoldLaneRows = kFoldWarpRows / 8;
constexpr int kBlockWords = kBlockColumns / 32;

// kRankStep of the rank of one adapter, from rank `first` on.
struct alignas(16) FoldStep {
  const uint16_t *A, *B;  // fp16, from that rank on
  const uint32_t* bits;
  float coefficient;
  int32_t rank, depth;  // of the adapter, and of that what is left
  bool regular;         // every row of the step and of a task is whole vectors, at their addresses
};

struct FoldLayer {
  void* weight;
  const void* initial;
  int64_t in_features;
  int32_t rows, first_step, steps;
  DType dtype;
  int32_t column_tasks;
};

struct FoldStage {
  Factors<uint16_t, kFoldRows> factors;
  alignas(16) uint32_t bits[kFoldRows * kBlockWords];
};

using FoldStages = FoldStage[kFoldStages];
// Steps of a layer that are in shared memory at a time: read from device memory one by one, each
// would keep its block waiting. Those that are copied ahead of the last one added are among them.
constexpr unsigned kStepsHeld = 64;
constexpr unsigned kStepsAdded = kStepsHeld - kFoldStages;
static_assert(kStepsAdded % kFoldStages == 0);
using HeldSteps = FoldStep[kStepsHeld];

// In shared memory, where it takes no registers.
struct FoldTask {
  FoldLayer layer;
  int32_t row, column, rows, columns;
};

// Of a block of a grid of tasks x layers. Without rows where the layer has fewer tasks.
__device__ inline FoldTask fold_task(const FoldLayer* layers) {
  const FoldLayer layer = layers[blockIdx.y];
  const auto column_tasks = static_cast<unsigned>(layer.column_tasks);
  const int row = static_cast<int>(blockIdx.x / column_tasks) * kFoldRows;
  const int column = static_cast<int>(blockIdx.x % column_tasks) * kBlockColumns;
  const int rows = layer.rows - row < kFoldRows ? layer.rows - row : kFoldRows;
  const int64_t columns = layer.in_features - column;
  return {layer, row, column, rows,
          columns < kBlockColumns ? static_cast<int>(columns) : kBlockColumns};
}

// A lane's first row and column.
struct FoldPosition {
  int row, column;

  __device__ FoldPosition(const FoldTask& task, const Lane& lane)
      : row(task.row + lane.warp / 4 * kFoldWarpRows + lane.row),
        column(task.column + lane.warp % 4 * kWarpColumns + kLaneColumns * lane.quad) {}
};

// Called by all threads, between barriers.
__device__ inline void hold_steps(HeldSteps& held, const FoldStep* steps, unsigned count) {
  constexpr unsigned kWords = sizeof(FoldStep) / sizeof(uint64_t);
  const auto* from = reinterpret_cast<const uint64_t*>(steps);
  auto* to = reinterpret_cast<uint64_t*>(held);
#pragma unroll 1
  for (unsigned w = threadIdx.x; w < count * kWords; w += kFoldThreads) to[w] = from[w];
}

// Where a stage has the vectors of 16 bytes of its factors. Regular steps have no gaps, so that a
// thread's copies all go to its own vector; vectors change places within a row instead, so that
// what a warp reads at once lies in different banks.
template <bool kRegular>
struct Placed {
  static constexpr unsigned kLeft = kRankStep / 8, kRight = kBlockColumns / 8;  // vectors of a row
  static constexpr int kStride = kRegular ? kBlockColumns : kRightStride<uint16_t>;

  __device__ static unsigned left(unsigned row, unsigned vector) {
    return kRegular ? vector ^ (row / 4 % 2) : vector;
  }
  __device__ static unsigned right(unsigned row, unsigned vector) {
    return kRegular ? vector ^ (row / 2 % 4 * 2) : vector;
  }
};

// Where a thread reads of a step whose copies need no case distinctions: three vectors of 16 bytes,
// counted in elements of A and in vectors from the step's other pointers. Instead of rows beyond
// the last it reads the last again: they touch only results that are never used.
template <bool kRegular>
struct RegularCopies {
  using Place = Placed<kRegular>;
  uint32_t row, left, right, bits;

  __device__ explicit RegularCopies(const FoldTask& task) {
    const auto thread = static_cast<unsigned>(threadIdx.x);
    const auto features = static_cast<uint32_t>(task.layer.in_features);
    const auto last = static_cast<unsigned>(task.rows - 1);
    const auto row_of = [&](unsigned r) { return task.row + (r < last ? r : last); };
    const unsigned left_row = thread / Place::kLeft, right_row = thread / Place::kRight;
    row = row_of(left_row);
    left = 8 * Place::left(left_row, thread % Place::kLeft);
    right = right_row * (features / 8) + task.column / 8 +
            Place::right(right_row, thread % Place::kRight);
    bits = row_of(thread) * (features / kBlockColumns) + task.column / kBlockColumns;
  }

  __device__ void copy(FoldStage& to, const FoldStep& step) const {
    const auto thread = static_cast<unsigned>(threadIdx.x);
    // addresses first: copies that follow each other are issued without a pause
    const uint16_t* from_left = step.A + (row * static_cast<uint32_t>(step.rank) + left);
    const auto* from_right = reinterpret_cast<const uint4*>(step.B) + right;
    const auto* from_bits = reinterpret_cast<const uint4*>(step.bits) + bits;
    uint16_t* to_right =
        to.factors.right + thread / Place::kRight * Place::kStride + thread % Place::kRight * 8;
    copy_vector_async(to.factors.left + thread * 8, from_left);
    copy_vector_async(to_right, from_right);
    if (thread < kFoldRows) copy_vector_async(to.bits + thread * kBlockWords, from_bits);
  }

  // Calls the task's rows of a 16-bit matrix into L2, a line for each thread.
  __device__ void prefetch(const void* matrix, const FoldTask& task) const {
    const int64_t element = row * task.layer.in_features + task.column +
                            threadIdx.x % Place::kLeft * (kBlockColumns / Place::kLeft);
    prefetch_line(static_cast<const uint16_t*>(matrix) + element);
  }

  static_assert(kFoldThreads == kFoldRows * Place::kLeft &&
                kFoldThreads == kRankStep * Place::kRight && kBlockColumns == 8 * sizeof(uint4));
};

__device__ inline void copy_irregular(FoldStage& to, const FoldStep& step, const FoldTask& task) {
  using Bits = Copies<kFoldThreads, kFoldRows, kBlockWords>;
  const int64_t features = task.layer.in_features, words = (features + 31) / 32;
  stage_factors<kFoldThreads>(to.factors, step.A + static_cast<int64_t>(task.row) * step.rank,
                              step.B + task.column, step.rank, features, step.depth, task.rows,
                              task.columns);
  Bits::copy(to.bits, kBlockWords, step.bits + task.row * words + task.column / 32, words,
             task.rows, (task.columns + 31) / 32);
}

// Where a lane reads of a stage, in elements of the factors and in bytes of the bits.
template <bool kRegular>
struct StageReads {
  using Place = Placed<kRegular>;
  uint32_t left, right, bits;

  __device__ explicit StageReads(const Lane& lane) {
    const unsigned first_row = lane.warp / 4 * kFoldWarpRows, word = lane.warp % 4;
    // ldmatrix wants of each lane the address of row lane % 16, its first or second 8 of the rank
    const unsigned row = threadIdx.x % 16, half = threadIdx.x % 32 / 16;
    left = (first_row + row) * kRankStep + 8 * Place::left(row, half);
    // rows k, k + 1, k + 8 and k + 9 have their vectors in the same places
    const unsigned k = 2 * lane.quad, column = word * kWarpColumns + 4 * lane.row;
    right = k * Place::kStride + 8 * Place::right(k, column / 8) + column % 8;
    bits = (first_row + lane.row) * kBlockWords * 4 + 4 * word + lane.quad;
  }
};

// The fragments of B for the four mma of a block: columns in the order of tile.cuh, k in that of
// ldmatrix, which loads A.
template <int kStride>
__device__ void load_right(uint32_t (&b)[4][2], const uint16_t* right) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint16_t* row = right + 8 * half * kStride;
    const uint2 x = *reinterpret_cast<const uint2*>(row);
    const uint2 y = *reinterpret_cast<const uint2*>(row + kStride);
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
    if (and_bits(bits, 1u << j) != 0) total[j] = fmaf(coefficient, product[j], total[j]);
  }
}

template <bool kRegular>
__device__ void add_stage(float (&total)[kFoldLaneRows][kLaneColumns], const FoldStage& stage,
                          float coefficient, const StageReads<kRegular>& at) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(stage.bits) + at.bits;
  uint32_t b[4][2];
  load_right<Placed<kRegular>::kStride>(b, stage.factors.right + at.right);
#pragma unroll
  for (int i = 0; i < kFoldLaneRows; i += 2) {
    uint32_t a[4];
    load_matrices(a, stage.factors.left + at.left + 8 * i * kRankStep);
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
      add_masked(total[i + h], bytes[8 * (i + h) * kBlockWords * 4], coefficient, product[h]);
    }
  }
}

// The least number that rounds to infinity: half a step above the largest.
template <DType kDType>
constexpr float kRoundsToInfinity = kDType == DType::kFloat16    ? 65520.0f
                                    : kDType == DType::kBFloat16 ? 0x1.FFp127f
                                                                 : INFINITY;

// W = round(W_init + total) for a lane's rows. Returns whether every result is finite.
template <bool kRegular, DType kDType>
__device__ bool store_folded(const FoldTask& task,
                             const float (&total)[kFoldLaneRows][kLaneColumns],
                             const FoldPosition& at) {
  const FoldLayer& layer = task.layer;
  if (kRegular && at.row >= layer.rows) return true;
  const int64_t element = at.row * layer.in_features + at.column;
  LaneRows<const char> from(layer.initial, kDType, layer.in_features, element, kRegular);
  LaneRows<char> weight(layer.weight, kDType, layer.in_features, element, kRegular);
  const Extent extent(layer.rows - at.row, layer.in_features - at.column, kRegular);
  // from row to row takes one addition
  if (kRegular) from.step = weight.step = static_cast<uint32_t>(from.step);
  // a maximum that keeps a NaN, in several chains
  constexpr int kChains = 4;
  float largest[kChains] = {};
  constexpr int kTogether = kRegular ? kFoldLaneRows : 2;  // rows: more do not fit the registers
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
        float& l = largest[j % kChains];
        if (j < valid) l = max_or_nan(l, fabsf(sum[j]));
      }
      store_row<kDType>(weight, first + i, valid, sum);
    }
  }
  const float all =
      max_or_nan(max_or_nan(largest[0], largest[1]), max_or_nan(largest[2], largest[3]));
  return all < kRoundsToInfinity<kDType>;
}

// overflow: one flag per layer, zero before. kRegular: every step is regular, every layer is of
// kDType, and a warp has all of its rows or none, whole vectors at their addresses.
template <bool kRegular, DType kDType>
__device__ void fold_block(const FoldLayer* layers, const FoldStep* all_steps, int32_t* overflow) {
  STAMINA_SHARED(FoldStages, stages);
  STAMINA_SHARED(HeldSteps, held);
  STAMINA_SHARED(FoldTask, task);
  const FoldTask own = fold_task(layers);
  if (own.rows <= 0) return;
  if (threadIdx.x == 0) task = own;
  const RegularCopies<kRegular> regular(own);
  const auto steps = static_cast<unsigned>(own.layer.steps);
  const FoldStep* const layer_steps = all_steps + own.layer.first_step;
  if constexpr (kRegular) {
    regular.prefetch(own.layer.initial, own);
  } else {
    prefetch_rows<kFoldThreads>(own.layer.initial, own.layer.dtype, own.layer.in_features, own.row,
                                own.rows, own.column, own.columns);
  }
  const auto copy = [&](FoldStage& stage, const FoldStep& step) {
    if (kRegular || step.regular) {
      regular.copy(stage, step);
    } else {
      copy_irregular(stage, step, task);
    }
  };
  const Lane lane;
  const StageReads<kRegular> at(lane);
  constexpr unsigned kAhead = kFoldStages - 1;
  float total[kFoldLaneRows][kLaneColumns] = {};
#pragma unroll 1
  for (unsigned first = 0; first < steps; first += kStepsAdded) {
    const unsigned left = steps - first;
    if (first > 0) block_barrier();
    hold_steps(held, layer_steps + first, left < kStepsHeld ? left : kStepsHeld);
    block_barrier();
    if (first == 0) {
#pragma unroll(kRegular ? kAhead : 1)
      for (unsigned k = 0; k < kAhead; ++k) {
        if (k < steps) copy(stages[k], held[k]);
        commit_async_copies();
      }
    }
    const auto add = [&](unsigned k, unsigned stage) {
      wait_async_copies<kAhead - 1>();
      block_barrier();  // also: every thread is done with the stage that is copied into next
      const unsigned next = k + kAhead;
      if (next < left) copy(stages[(stage + kAhead) % kFoldStages], held[next]);
      commit_async_copies();
      add_stage<kRegular>(total, stages[stage], held[k].coefficient, at);
    };
    const unsigned added = left < kStepsAdded ? left : kStepsAdded;
    // unrolled, all addresses in the stages are constants from the thread's own
#pragma unroll(kRegular ? kFoldStages : 1)
    for (unsigned k = 0; k < added; ++k) add(k, k % kFoldStages);
  }

  const FoldPosition place(task, lane);
  bool finite;
  if constexpr (kRegular) {
    finite = store_folded<true, kDType>(task, total, place);
  } else if (task.layer.dtype == DType::kFloat32) {
    finite = store_folded<false, DType::kFloat32>(task, total, place);
  } else if (task.layer.dtype == DType::kBFloat16) {
    finite = store_folded<false, DType::kBFloat16>(task, total, place);
  } else {
    finite = store_folded<false, DType::kFloat16>(task, total, place);
  }
  if (!finite) overflow[blockIdx.y] = 1;
}

__global__ void __launch_bounds__(kFoldThreads, 2)
    fold_kernel(const FoldLayer* layers, const FoldStep* steps, int32_t* overflow) {
  fold_block<false, DType::kFloat32>(layers, steps, overflow);
}

template <DType kDType>
__global__ void __launch_bounds__(kFoldThreads, 2)
    fold_regular_kernel(const FoldLayer* layers, const FoldStep* steps, int32_t* overflow) {
  fold_block<true, kDType>(layers, steps, overflow);
}

}  // namespace stamina::cuda
