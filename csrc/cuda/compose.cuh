// SPDX-License-Identifier: Apache-2.0
// The mask bits of a group of projections, W_eff = W + s M (.) (A B) from its bits, and both in one
// pass with the statistics.
//
// A block of four warps serves a task: up to 128 rows x 128 columns of one member, 32 rows at a
// time. The strips of A, B, U and V that it needs are copied into shared memory once (ranks above
// 16: again for every 32 rows); W and W_init travel through shared memory ahead of their use. L is
// a chain of fp32 multiply-adds, because its rounding decides bits. P is the same chain where W_eff
// is fp32, and three tf32 products on the matrix units where it has 16 bits. These products are far
// too thin (rank 16) to bind the matrix units: wgmma, which reads operands from shared memory to
// feed them faster, would only add waiting.
#pragma once

#include "mask.cuh"

namespace stamina::cuda {

// That the registers of a multiprocessor have room for: 128 a thread. On sm_80 shared memory has
// room for three of those that draw and compose.
constexpr int kComposeBlocks = 4;

using ComposeCopies = Copies<kComposeThreads, 1, true>;
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

  // Whether the whole rank fits: then its strips are copied once, for all rows of the task.
  __device__ bool stays() const { return rank <= kRankStep; }

  // Starts to copy the strips of `rows` rows from row `row` of the task on, from rank `first` on.
  __device__ void stage(ComposeCopies& copies, const Task& task, int64_t in_features, int row,
                        int rows, int first) const {
    stage_factors(copies, 0, shared, left + static_cast<int64_t>(row) * rank + first,
                  right + first * in_features, rank, in_features, rank - first, rows, task.columns);
  }

  // Calls step(left, right) for every kRankStep of the rank, with the strips in shared memory at
  // row `row` of the task and its first column. Strips that stay are there. parity: of the next
  // stage.
  template <typename Step>
  __device__ void for_steps(ComposeCopies& copies, int& parity, const Task& task, int row,
                            int64_t in_features, const Step& step) const {
    if (stays()) {
      step(shared.left + row * kRankStep, shared.right);
      return;
    }
    const int rows = task.rows - row < kTileRows ? task.rows - row : kTileRows;
#pragma unroll 1
    for (int first = 0; first < rank; first += kRankStep) {
      block_barrier();
      stage(copies, task, in_features, row, rows, first);
      copies.publish(0);
      copies.wait<0>(0, parity);
      parity ^= 1;
      block_barrier();
      step(shared.left, shared.right);
    }
  }
};

// Rows of a tile that are loaded together: more do not fit the registers.
constexpr int kLoadRows = 2;
// A lane's weights of a tile, 16 bits each.
using LaneTile = uint4[kLaneRows][kComposeThreads];

// A lane's part of W or W_init. A 16-bit one whose rows take 16-byte accesses comes through shared
// memory, requested kAhead tiles before it is read: every lane copies what it reads itself, so that
// no barrier is needed, and a tile's place is free once its lane has read it. Others are loaded
// where they are read, and called into L2 before.
template <int kAhead, bool kInitial>
class Weights {
 public:
  __device__ Weights(LaneTile* places, const Group& group, const Member& member, const Task& task)
      : places_(places),
        group_(group),
        member_(member),
        ahead_(rows(0).vectors && member.dtype != DType::kFloat32) {
    if (!exist() || ahead_) return;
    prefetch_rows<kComposeThreads>(pointer(), member.dtype, group.in_features, task.row, task.rows,
                                   task.column, task.columns);
  }

  // Where not, nothing is requested and nothing may be loaded.
  __device__ bool exist() const { return pointer() != nullptr; }

  // Once for every tile, in their order, before it is loaded; also for tiles that do not exist.
  // The tile is `below` tiles below `at`.
  __device__ void request(int tile, const Position& at, int below) {
    const int skipped = below * kTileRows;
    const LaneRows<const char> from = rows(at.element + skipped * group_.in_features);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const bool exists = at.extent.valid(i + skipped / 8) > 0;
      if (ahead_ && exist() && exists) copy_vector_async(place(tile, i), from.row(i));
    }
    commit_async_copies();
  }

  // Rows `first` to first + kLoadRows - 1 of a lane's kLaneRows.
  __device__ void load(float (&to)[kLoadRows][kLaneColumns], int tile, int first,
                       const Position& at) const {
    if (!ahead_) {
      load_rows(to, rows(at.element), member_.dtype, first, at.extent);
      return;
    }
    wait_async_copies<kAhead - 1>();
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      if (member_.dtype == DType::kBFloat16) {
        unpack_vector<DType::kBFloat16>(to[i], *place(tile, first + i));
      } else {
        unpack_vector<DType::kFloat16>(to[i], *place(tile, first + i));
      }
    }
  }

 private:
  __device__ const void* pointer() const { return kInitial ? member_.initial : member_.weight; }
  __device__ LaneRows<const char> rows(int64_t element) const {
    return {pointer(), member_.dtype, group_.in_features, element};
  }
  __device__ uint4* place(int tile, int i) const { return &places_[tile % kAhead][i][threadIdx.x]; }

  LaneTile* places_;
  const Group& group_;
  const Member& member_;
  bool ahead_;
};

// The part of the statistics of rows `first`, first + 1 of a lane.
__device__ inline void add_forget(LaneMask mask, const float (&product)[kLaneRows][kLaneColumns],
                                  const float (&weight)[kLoadRows][kLaneColumns],
                                  const float (&initial)[kLoadRows][kLaneColumns], int first,
                                  float scale, Sums& sums) {
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

// W_eff of a tile, rounded once. load(weight, first) gives rows `first`, first + 1 of a lane of W,
// and adds their part of the statistics where they are wanted.
template <DType kOut, typename Load>
__device__ void apply(const Group& group, const Member& member, LaneMask mask,
                      const float (&product)[kLaneRows][kLaneColumns], float scale,
                      const Position& at, const Load& load) {
  const LaneRows<char> effective(group.effective, kOut, group.in_features,
                                 at.element + member.first_row * group.in_features);
#pragma unroll
  for (int first = 0; first < kLaneRows; first += kLoadRows) {
    float weight[kLoadRows][kLaneColumns];
    load(weight, first);
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      float sum[kLaneColumns];
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const float delta = scale * product[first + i][j];
        sum[j] = mask.kept(first + i, j) ? weight[i][j] + delta : weight[i][j];
      }
      store_row<kOut>(effective, first + i, at.extent.valid(first + i), sum);
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

// Calls the bits of a task into L2: 16 bytes a row, and so a line a thread.
__device__ inline void prefetch_bits(const Group& group, const Member& member, const Task& task) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= task.rows) return;
  prefetch_line(group.bits + (member.first_row + task.row + row) * Position::row_bytes(group) +
                task.column / kLaneColumns);
}
static_assert(kComposeThreads == kTaskRows);

constexpr int kTilesAhead = 2;
using TilesAhead = LaneTile[kTilesAhead];

template <DType kOut>
__device__ void compose_task(const Group& group) {
  STAMINA_SHARED(ComposeFactors, for_product);
  STAMINA_SHARED(TilesAhead, places);
  STAMINA_SHARED(uint64_t, barrier);
  const Task task = task_of(group, static_cast<int>(blockIdx.x));
  const Member& member = group.member[task.member];
  const Lane lane;
  const int64_t features = group.in_features;
  ComposeCopies copies(&barrier);
  int parity = 0;
  const LowRank product(for_product, member.A, member.B, member.rank, task);
  const int warp_column = lane.warp * kWarpColumns;
  Position at(group, member, task, lane);

  if (product.stays()) product.stage(copies, task, features, 0, task.rows, 0);
  copies.publish(0);
  prefetch_bits(group, member, task);
  Weights<kTilesAhead, false> weights(places, group, member, task);
  for (int tile = 0; tile < kTilesAhead; ++tile) weights.request(tile, at, tile);
  const float scale = *group.scale;
  MaskBytes bytes = load_mask(group, at);
  copies.wait<kTilesAhead>(0, parity);
  parity ^= 1;
  block_barrier();

#pragma unroll 1
  for (int tile = 0; tile * kTileRows < task.rows; ++tile) {
    float sum[kLaneRows][kLaneColumns] = {};
    product.for_steps(copies, parity, task, tile * kTileRows, features,
                      [&](const float* left, const float* right) {
                        add_product<kOut>(sum, left, right + warp_column, lane);
                      });
    apply<kOut>(group, member, bytes.mask(), sum, scale, at,
                [&](float (&weight)[kLoadRows][kLaneColumns], int first) {
                  weights.load(weight, tile, first, at);
                });
    at.next_tile(group);
    weights.request(tile + kTilesAhead, at, kTilesAhead - 1);
    bytes = load_mask(group, at);
  }
}

// The tile of W and W_init that is on its way while the one before it is computed.
using TileInFlight = LaneTile[2];

template <bool kComposes, DType kOut>
__device__ void sample_task(const Group& group, LaneTile* places) {
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
  Position at(group, member, task, lane);

  if (logits.stays()) logits.stage(copies, task, features, 0, task.rows, 0);
  if (kComposes && product.stays()) product.stage(copies, task, features, 0, task.rows, 0);
  copies.publish(0);
  Weights<1, false> weights(places, group, member, task);
  Weights<1, true> initials(places + 1, group, member, task);
  if constexpr (kComposes) {
    weights.request(0, at, 0);
    initials.request(0, at, 0);
  }
  const float scale = kComposes ? *group.scale : 0.0f;
  copies.wait<kComposes ? 2 : 0>(0, parity);
  parity ^= 1;
  block_barrier();

  Sums sums{0.0f, 0.0f, 0, 0};
#pragma unroll 1
  for (int tile = 0; tile * kTileRows < task.rows; ++tile) {
    float sum[kLaneRows][kLaneColumns] = {};
    logits.for_steps(copies, parity, task, tile * kTileRows, features,
                     [&](const float* left, const float* right) {
                       multiply_chain(sum, left + lane.row * kRankStep,
                                      right + warp_column + kLaneColumns * lane.quad);
                     });
    const LaneMask mask = draw_mask<kComposes>(group, member, sum, at, sums.sparse);
    store_mask(group, mask, at);
    if constexpr (kComposes) {
      float delta[kLaneRows][kLaneColumns] = {};
      product.for_steps(copies, parity, task, tile * kTileRows, features,
                        [&](const float* left, const float* right) {
                          add_product<kOut>(delta, left, right + warp_column, lane);
                        });
      sums.kept += __popc(mask.bits);
      apply<kOut>(group, member, mask, delta, scale, at,
                  [&](float (&weight)[kLoadRows][kLaneColumns], int first) {
                    weights.load(weight, tile, first, at);
                    if (!initials.exist()) return;
                    float initial[kLoadRows][kLaneColumns];
                    initials.load(initial, tile, first, at);
                    add_forget(mask, delta, weight, initial, first, scale, sums);
                  });
    }
    at.next_tile(group);
    if constexpr (kComposes) {
      weights.request(tile + 1, at, 0);
      initials.request(tile + 1, at, 0);
    }
  }
  if constexpr (kComposes) store_sums<kComposeThreads>(sums, group.partials + blockIdx.x);
}

__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_kernel(const __grid_constant__ Group group) {
  sample_task<false, DType::kFloat32>(group, nullptr);
}

template <DType kOut>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    compose_kernel(const __grid_constant__ Group group) {
  compose_task<kOut>(group);
}

template <DType kOut>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_compose_kernel(const __grid_constant__ Group group) {
  STAMINA_DYNAMIC_SHARED(TileInFlight, places);
  sample_task<true, kOut>(group, places);
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
