// SPDX-License-Identifier: Apache-2.0
// The mask bits of a group of projections, W_eff = W + s M (.) (A B) from its bits, and both in one
// pass with the statistics.
//
// A block of four warps serves a task: up to 128 rows x 128 columns of one member, 32 rows at a
// time. The strips of A, B, U and V that it needs are copied into shared memory once (ranks above
// 16: again for every 32 rows). L is a chain of fp32 multiply-adds, because its rounding decides
// bits. P is the same chain where W_eff is fp32, and three tf32 products on the matrix units where
// it has 16 bits. These products are far too thin (rank 16) to bind the matrix units: wgmma, which
// reads operands from shared memory to feed them faster, would only add waiting.
#pragma once

#include "statistics.cuh"
#include "tile.cuh"

namespace stamina::cuda {

constexpr int kComposeThreads = 128;
constexpr int kComposeBlocks =
    4;  // on a multiprocessor at a time, at least: 128 registers a thread
constexpr int kTaskRows = 128;
constexpr int kTileRows = 32;
constexpr int kLaneRows = kTileRows / 8;

struct Member {
  const void *weight, *initial;  // initial: null where there is none
  const float *A, *B, *U, *V, *b;
  int64_t first_row;  // in the stacked outputs
  int64_t col0;
  uint32_t row0, layer_id;
  int32_t rows, rank, mask_rank, first_task;
  DType dtype;
};

// What one launch serves, passed by value: no table to copy, and a CUDA graph keeps its own. 4 KiB
// of parameters hold the 32 cross-attention K and V of a Stable Diffusion 1.5.
constexpr int kMaxMembers = 38;

struct Group {
  int64_t in_features;
  int32_t members, task_rows, column_tasks;
  bool hard, relu;
  const int64_t *seed, *step;
  const float* scale;
  uint8_t* bits;
  void* effective;
  Sums* partials;  // one per task
  Member member[kMaxMembers];
};
static_assert(sizeof(Group) <= 4096 - 64, "kernel parameters, with those of statistics_kernel");

struct Task {
  int member, row, rows;  // rows of the task
  int column, columns;
};

__device__ inline Task task_of(const Group& group, int block) {
  Task task{0, 0, 0, 0, 0};
  while (task.member + 1 < group.members && group.member[task.member + 1].first_task <= block) {
    ++task.member;
  }
  const Member& member = group.member[task.member];
  const int index = block - member.first_task;
  task.row = index / group.column_tasks * group.task_rows;
  task.column = index % group.column_tasks * kBlockColumns;
  task.rows = member.rows - task.row < group.task_rows ? member.rows - task.row : group.task_rows;
  const int64_t columns = group.in_features - task.column;
  task.columns = columns < kBlockColumns ? static_cast<int>(columns) : kBlockColumns;
  return task;
}

using ComposeCopies = Copies<kComposeThreads, 1>;
using ComposeFactors = Factors<float, kTaskRows>;

// One low-rank product of the task and its place in shared memory.
struct LowRank {
  ComposeFactors& shared;
  const float *left, *right;  // at the task's first row and column
  int rank;

  __device__ LowRank(ComposeFactors& shared, const float* left, const float* right, int rank,
                     const Task& task)
      : shared(shared),
        left(left + static_cast<int64_t>(task.row) * rank),
        right(right + task.column),
        rank(rank) {}

  // Calls step(left, right) for every kRankStep of the rank, with the strips in shared memory at
  // row `row` of the task and its first column. Ranks up to kRankStep are copied for all rows of
  // the task at once, with row 0. parity: of the next stage.
  template <typename Step>
  __device__ void for_steps(ComposeCopies& copies, int& parity, const Task& task, int row,
                            int64_t in_features, const Step& step) const {
    const bool stays = rank <= kRankStep;
    const int first_row = stays ? 0 : row;
    const int rows = stays || task.rows - row < kTileRows ? task.rows - first_row : kTileRows;
#pragma unroll 1
    for (int first = 0; first < rank; first += kRankStep) {
      if (!stays || row == 0) {
        block_barrier();
        stage_factors(copies, 0, shared, left + static_cast<int64_t>(first_row) * rank, right, rank,
                      in_features, first, rows, task.columns);
        copies.publish(0);
        copies.wait<0>(0, parity);
        parity ^= 1;
        block_barrier();
      }
      step(shared.left + (row - first_row) * kRankStep, shared.right);
    }
  }
};

// The mask of a lane: byte i holds the bits of its columns in row 8i of its tile.
struct LaneMask {
  uint32_t bits;

  __device__ bool kept(int i, int j) const { return (bits >> (8 * i + j) & 1) != 0; }
};

// Eight neighbouring uniforms of global row `row`, from global column `column` on.
class UniformRow {
 public:
  __device__ UniformRow(const Group& group, const Member& member, int64_t column)
      : key_{static_cast<uint32_t>(*group.seed), static_cast<uint32_t>(*group.seed >> 32)},
        step_(static_cast<uint32_t>(*group.step)),
        layer_(member.layer_id),
        first_block_(static_cast<uint32_t>(column >> 2)),
        offset_(static_cast<int>(column & 3)) {}

  __device__ void draw(uint32_t row, float (&u)[kLaneColumns]) const {
    // shards may begin anywhere: then the lane needs words of a third block
    uint32_t words[12];
    philox(row, 0, words);
    philox(row, 1, words + 4);
    if (offset_ != 0) {
      philox(row, 2, words + 8);
      shift<1>(words);
      shift<2>(words);
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) u[j] = uniform_of_word(words[j]);
  }

 private:
  __device__ void philox(uint32_t row, uint32_t block, uint32_t* words) const {
    uint32_t counter[4] = {first_block_ + block, row, step_, layer_};
    philox4x32(counter, key_);
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = counter[k];
  }

  template <int kBy>
  __device__ void shift(uint32_t (&words)[12]) const {
    if ((offset_ & kBy) == 0) return;
#pragma unroll
    for (int k = 0; k + kBy < 12; ++k) words[k] = words[k + kBy];
  }

  PhiloxKey key_;
  uint32_t step_, layer_, first_block_;
  int offset_;
};

// Draws the tile's mask from its logits. The penalty of every element, sigmoid(L) or relu(L), is
// added to `sparse`, with kSums.
template <bool kSums>
__device__ LaneMask draw_mask(const Group& group, const Member& member,
                              const float (&logits)[kLaneRows][kLaneColumns], int row,
                              int64_t column, float& sparse) {
  const UniformRow uniforms(group, member, member.col0 + column);
  const float bias = *member.b;
  LaneMask mask{0};
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int valid = valid_columns(row + 8 * i, member.rows, column, group.in_features);
    float u[kLaneColumns];
    if (!group.hard) uniforms.draw(member.row0 + static_cast<uint32_t>(row + 8 * i), u);
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const float logit = logits[i][j] + bias;
      const float e = exp_approx(-logit);
      // u < sigmoid(L) without a division: u + u e^-L < 1; false where L is NaN
      const bool drawn = group.hard ? logit > 0.0f : fmaf(u[j], e, u[j]) < 1.0f;
      if (drawn && j < valid) mask.bits |= 1u << (8 * i + j);
      if constexpr (kSums) {
        const float penalty = group.relu ? fmaxf(logit, 0.0f) : reciprocal_approx(1.0f + e);
        if (j < valid) sparse += penalty;
      }
    }
  }
  return mask;
}

// Where a lane's bytes of bits are: byte j >> 3 of a row of little-endian words.
__device__ inline int64_t bits_index(const Group& group, const Member& member, int row,
                                     int64_t column) {
  return (member.first_row + row) * ((group.in_features + 31) / 32 * 4) + column / kLaneColumns;
}

// Also writes the zeros that fill the last word of a row.
__device__ inline void store_mask(const Group& group, const Member& member, LaneMask mask, int row,
                                  int64_t column) {
  if (column >= (group.in_features + 31) / 32 * 32) return;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    if (row + 8 * i >= member.rows) continue;
    group.bits[bits_index(group, member, row + 8 * i, column)] =
        static_cast<uint8_t>(mask.bits >> (8 * i));
  }
}

__device__ inline LaneMask load_mask(const Group& group, const Member& member, int row,
                                     int64_t column) {
  LaneMask mask{0};
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    if (valid_columns(row + 8 * i, member.rows, column, group.in_features) == 0) continue;
    mask.bits |= static_cast<uint32_t>(group.bits[bits_index(group, member, row + 8 * i, column)])
                 << (8 * i);
  }
  return mask;
}

// Rows of a tile that are loaded together: more do not fit the registers.
constexpr int kLoadRows = 2;

// The part of the statistics of rows `first`, first + 1 of a lane.
__device__ inline void add_forget(const Group& group, const Member& member, LaneMask mask,
                                  const float (&product)[kLaneRows][kLaneColumns],
                                  const float (&weight)[kLoadRows][kLaneColumns], int first,
                                  int row, int64_t column, Sums& sums) {
  const float scale = *group.scale;
  float initial[kLoadRows][kLaneColumns];
  load_rows(initial, {member.initial, group.in_features}, member.dtype, row, member.rows, column);
#pragma unroll
  for (int i = 0; i < kLoadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const float change = weight[i][j] - initial[i][j];
      const float harm = change * (scale * product[first + i][j]);
      if (!mask.kept(first + i, j)) continue;
      sums.forget = fmaf(harm, harm, sums.forget);
      sums.overlap += change != 0.0f;
    }
  }
}

// W_eff of a tile, rounded once, and with kSums its part of the statistics.
template <DType kOut, bool kSums>
__device__ void apply(const Group& group, const Member& member, LaneMask mask,
                      const float (&product)[kLaneRows][kLaneColumns], int tile_row, int64_t column,
                      Sums& sums) {
  const float scale = *group.scale;
  const Matrix<void*> effective(group.effective, group.in_features);
  if constexpr (kSums) sums.kept += __popc(mask.bits);
#pragma unroll
  for (int first = 0; first < kLaneRows; first += kLoadRows) {
    const int row = tile_row + 8 * first;
    float weight[kLoadRows][kLaneColumns];
    load_rows(weight, {member.weight, group.in_features}, member.dtype, row, member.rows, column);
    if constexpr (kSums) {
      if (member.initial != nullptr) {
        add_forget(group, member, mask, product, weight, first, row, column, sums);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      float sum[kLaneColumns];
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const float delta = scale * product[first + i][j];
        sum[j] = mask.kept(first + i, j) ? weight[i][j] + delta : weight[i][j];
      }
      store_row<kOut>(effective, (member.first_row + row + 8 * i) * group.in_features + column,
                      valid_columns(row + 8 * i, member.rows, column, group.in_features), sum);
    }
  }
}

template <DType kOut>
__device__ void add_product(float (&sum)[kLaneRows][kLaneColumns], const float* left,
                            const float* right, const Lane& lane) {
  if constexpr (kOut == DType::kFloat32) {
    multiply_chain(sum, left + lane.row * kRankStep, right + kLaneColumns * lane.quad);
  } else {
    multiply_split(sum, left, right, lane);
  }
}

// kDraws: the bits are drawn and written, else read. kComposes: W_eff is written.
template <bool kDraws, bool kComposes, DType kOut>
__device__ void serve_task(const Group& group) {
  STAMINA_SHARED(ComposeFactors, for_mask);
  STAMINA_SHARED(ComposeFactors, for_product);
  STAMINA_SHARED(uint64_t, barrier);
  const Task task = task_of(group, static_cast<int>(blockIdx.x));
  const Member& member = group.member[task.member];
  const Lane lane;
  const int64_t features = group.in_features;
  ComposeCopies copies(&barrier);
  int parity = 0;
  const LowRank logits(for_mask, member.U, member.V, member.mask_rank, task);
  const LowRank product(for_product, member.A, member.B, member.rank, task);

  const int warp_column = lane.warp * kWarpColumns;
  const int64_t column = task.column + warp_column + kLaneColumns * lane.quad;
  Sums sums{0.0f, 0.0f, 0, 0};
#pragma unroll 1
  for (int tile = 0; tile < task.rows; tile += kTileRows) {
    const int row = task.row + tile + lane.row;
    LaneMask mask{0};
    if constexpr (kDraws) {
      float sum[kLaneRows][kLaneColumns] = {};
      logits.for_steps(copies, parity, task, tile, features,
                       [&](const float* left, const float* right) {
                         multiply_chain(sum, left + lane.row * kRankStep,
                                        right + warp_column + kLaneColumns * lane.quad);
                       });
      mask = draw_mask<kComposes>(group, member, sum, row, column, sums.sparse);
      store_mask(group, member, mask, row, column);
    } else {
      mask = load_mask(group, member, row, column);
    }
    if constexpr (kComposes) {
      float sum[kLaneRows][kLaneColumns] = {};
      product.for_steps(copies, parity, task, tile, features,
                        [&](const float* left, const float* right) {
                          add_product<kOut>(sum, left, right + warp_column, lane);
                        });
      apply<kOut, kDraws>(group, member, mask, sum, row, column, sums);
    }
  }
  if constexpr (kDraws && kComposes) store_sums<kComposeThreads>(sums, group.partials + blockIdx.x);
}

__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_kernel(const __grid_constant__ Group group) {
  serve_task<true, false, DType::kFloat32>(group);
}

template <DType kOut>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    compose_kernel(const __grid_constant__ Group group) {
  serve_task<false, true, kOut>(group);
}

template <DType kOut>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_compose_kernel(const __grid_constant__ Group group) {
  serve_task<true, true, kOut>(group);
}

struct Statistics {
  float *forget, *sparse;
  int64_t* counts;  // M = 1, and M = 1 with S != 0, per member
};

// One block of 32 threads per member: adds its tasks' partials in a fixed order.
__global__ void __launch_bounds__(32)
    statistics_kernel(const __grid_constant__ Group group, Statistics out, int32_t tasks) {
  const int m = static_cast<int>(blockIdx.x);
  const int end = m + 1 < group.members ? group.member[m + 1].first_task : tasks;
  double forget = 0.0, sparse = 0.0;
  int64_t kept = 0, overlap = 0;
  for (int t = group.member[m].first_task + static_cast<int>(threadIdx.x); t < end; t += 32) {
    forget += static_cast<double>(group.partials[t].forget);
    sparse += static_cast<double>(group.partials[t].sparse);
    kept += group.partials[t].kept;
    overlap += group.partials[t].overlap;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    forget += shuffle_xor(forget, distance);
    sparse += shuffle_xor(sparse, distance);
    kept += shuffle_xor(kept, distance);
    overlap += shuffle_xor(overlap, distance);
  }
  if (threadIdx.x != 0) return;
  out.forget[m] = static_cast<float>(forget);
  out.sparse[m] = static_cast<float>(sparse);
  out.counts[2 * m] = kept;
  out.counts[2 * m + 1] = overlap;
}

}  // namespace stamina::cuda
