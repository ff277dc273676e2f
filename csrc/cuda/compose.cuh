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
//
// A launch is regular where every member is made of whole tiles at 16-byte addresses, in the 16-bit
// type of W_eff, with ranks of 16 and whole blocks of the random stream: then no tile needs a case
// distinction, which took two of five of compose's instructions. The kernels are compiled for
// either.
#pragma once

#include "mask.cuh"

namespace stamina::cuda {

// That the registers of a multiprocessor have room for: 128 a thread. On sm_80 shared memory has
// room for three of those that draw and compose.
constexpr int kComposeBlocks = 4;

using ComposeFactors = Factors<float, kTaskRows>;

// One low-rank product of the task and its place in shared memory.
struct LowRank {
  ComposeFactors& shared;
  const float *left, *right;  // at the task's first row and column
  int rank;
  // Whether the whole rank fits: then its strips are copied once, for all rows of the task.
  bool stays;

  __device__ LowRank(ComposeFactors& shared, const float* left, const float* right, int rank,
                     const Task& task, bool regular)
      : shared(shared),
        left(left + static_cast<int64_t>(task.row) * rank),
        right(right + task.column),
        rank(regular ? kRankStep : rank),
        stays(regular || rank <= kRankStep) {}

  // Starts to copy the strips of `rows` rows from row `row` of the task on, from rank `first` on.
  __device__ void stage(const Task& task, int64_t in_features, int row, int rows, int first) const {
    stage_factors<kComposeThreads>(shared, left + static_cast<int64_t>(row) * rank + first,
                                   right + first * in_features, rank, in_features, rank - first,
                                   rows, task.columns);
  }

  // Calls step(left, right) for every kRankStep of the rank, with the strips in shared memory at
  // row `row` of the task and its first column. Strips that stay are there.
  template <typename Step>
  __device__ void for_steps(const Task& task, int row, int64_t in_features,
                            const Step& step) const {
    if (stays) {
      step(shared.left + row * kRankStep, shared.right);
      return;
    }
    const int rows = task.rows - row < kTileRows ? task.rows - row : kTileRows;
#pragma unroll 1
    for (int first = 0; first < rank; first += kRankStep) {
      block_barrier();
      stage(task, in_features, row, rows, first);
      commit_async_copies();
      wait_async_copies<0>();
      block_barrier();
      step(shared.left, shared.right);
    }
  }
};

// Rows of a tile that are loaded together: more do not fit the registers.
constexpr int kLoadRows = 2;
// A lane's weights of a tile, 16 bits each.
using LaneTile = uint4[kLaneRows][kComposeThreads];

// A lane's part of W or W_init, tile by tile. A 16-bit one whose rows take 16-byte accesses comes
// through shared memory, requested kAhead tiles before it is read: every lane copies what it reads
// itself, so that no barrier is needed, and a tile's place is free once its lane has read it.
// Others are loaded where they are read, and called into L2 before.
template <int kAhead>
class Weights {
 public:
  // matrix: null where there is none; then nothing may be loaded.
  __device__ Weights(LaneTile* places, const void* matrix, DType dtype, const Group& group,
                     const Task& task, const Position& at)
      : places_(places),
        rows_(matrix, dtype, group.in_features, at.element(group), at.extent.whole),
        extent_(at.extent),
        dtype_(dtype),
        exist_(matrix != nullptr),
        ahead_(rows_.vectors && dtype != DType::kFloat32) {
    if (!exist_) extent_.rows = 0;
    if (exist_ && !ahead_) {
      prefetch_rows<kComposeThreads>(matrix, dtype, group.in_features, task.row, task.rows,
                                     task.column, task.columns);
    }
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) request(tile);
  }

  __device__ bool exist() const { return exist_; }

  // Rows `first` to first + kLoadRows - 1 of a lane's kLaneRows.
  __device__ void load(float (&to)[kLoadRows][kLaneColumns], int tile, int first) const {
    if (!ahead_) {
      load_rows(to, rows_, dtype_, first, extent_);
      return;
    }
    wait_async_copies<kAhead - 1>();
#pragma unroll
    for (int i = 0; i < kLoadRows; ++i) {
      if (dtype_ == DType::kBFloat16) {
        unpack_vector<DType::kBFloat16>(to[i], *place(tile, first + i));
      } else {
        unpack_vector<DType::kFloat16>(to[i], *place(tile, first + i));
      }
    }
  }

  // After the tile was loaded, whether or not there are more.
  __device__ void next_tile(int tile) {
    if (!ahead_) go_down();
    request(tile);
  }

 private:
  // Into the place of the tile. Always a group of copies, if an empty one: they are counted.
  __device__ void request(int tile) {
    if (ahead_) {
      const bool exists = extent_.rows > 0;
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        if (exists && extent_.valid(i) > 0) copy_vector_async(place(tile, i), rows_.row(i));
      }
      go_down();
    }
    commit_async_copies();
  }
  __device__ void go_down() {
    rows_.go_down(kTileRows);
    extent_.rows -= kTileRows;
  }
  __device__ uint4* place(int tile, int i) const { return &places_[tile % kAhead][i][threadIdx.x]; }

  LaneTile* places_;
  LaneRows<const char> rows_;  // of the tile that is requested next, or loaded where it is read
  Extent extent_;
  DType dtype_;
  bool exist_, ahead_;
};

// The part of the statistics of rows `first`, first + 1 of a lane.
__device__ inline void add_forget(LaneMask mask, const float (&product)[kLaneRows][kLaneColumns],
                                  const float (&weight)[kLoadRows][kLaneColumns],
                                  const float (&initial)[kLoadRows][kLaneColumns], int first,
                                  float scale, Sums& sums) {
  uint32_t changed = 0;
#pragma unroll
  for (int i = 0; i < kLoadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const float change = weight[i][j] - initial[i][j];
      const float harm = change * (scale * product[first + i][j]);
      // no branch: what is not kept adds nothing
      const float kept_harm = mask.kept(first + i, j) ? harm : 0.0f;
      sums.forget = fmaf(kept_harm, kept_harm, sums.forget);
      changed |= change != 0.0f ? LaneMask::bit(first + i, j) : 0;
    }
  }
  sums.overlap += __popc(mask.bits & changed);
}

// W_eff of a tile, rounded once. load(weight, first) gives rows `first`, first + 1 of a lane of W,
// and adds their part of the statistics where they are wanted.
template <DType kOut, typename Load>
__device__ void apply(const LaneRows<char>& effective, LaneMask mask,
                      const float (&product)[kLaneRows][kLaneColumns], float scale,
                      const Extent& extent, const Load& load) {
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
      store_row<kOut>(effective, first + i, extent.valid(first + i), sum);
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

// Two tiles are on their way while one is computed. All four of a task took longer.
constexpr int kTilesAhead = 2;
using TilesAhead = LaneTile[kTilesAhead];

template <DType kOut, bool kRegular>
__device__ void compose_task(const Group& group) {
  STAMINA_SHARED(ComposeFactors, for_product);
  STAMINA_SHARED(TilesAhead, places);
  const Task task = task_of(group);
  if (task.rows <= 0) return;
  const Member& member = group.member[task.member];
  const Lane lane;
  const int64_t features = group.in_features;
  const LowRank product(for_product, member.A, member.B, member.rank, task, kRegular);
  const int warp_column = lane.warp * kWarpColumns;
  Position at(group, task, lane, kRegular);

  if (product.stays) product.stage(task, features, 0, task.rows, 0);
  commit_async_copies();
  MaskRows masks(group, member, task, lane);
  uint32_t words[kTaskTiles];
#pragma unroll
  for (uint32_t& word : words) word = masks.load();
  Weights<kTilesAhead> weights(places, member.weight, kRegular ? kOut : member.dtype, group, task,
                               at);
  LaneRows<char> effective(group.effective, kOut, features,
                           member.first_row * features + at.element(group), kRegular);
  const float scale = *group.scale;
  wait_async_copies<kTilesAhead>();
  block_barrier();

#pragma unroll 1
  for (int tile = 0; tile * kTileRows < task.rows; ++tile) {
    float sum[kLaneRows][kLaneColumns] = {};
    product.for_steps(task, tile * kTileRows, features, [&](const float* left, const float* right) {
      add_product<kOut>(sum, left, right + warp_column, lane);
    });
    apply<kOut>(effective, masks.mask(words[0]), sum, scale, at.extent,
                [&](float (&weight)[kLoadRows][kLaneColumns], int first) {
                  weights.load(weight, tile, first);
                });
    at.next_tile();
    effective.go_down(kTileRows);
    weights.next_tile(tile);
#pragma unroll
    for (int k = 0; k + 1 < kTaskTiles; ++k) words[k] = words[k + 1];
  }
}

// The tile of W and of W_init that is on its way while its mask is drawn and its product computed.
using TileInFlight = LaneTile[2];

template <bool kComposes, DType kOut, bool kRegular>
__device__ void sample_task(const Group& group, LaneTile* places) {
  STAMINA_SHARED(ComposeFactors, for_mask);
  STAMINA_SHARED(ComposeFactors, for_product);
  const Task task = task_of(group);
  if (task.rows <= 0) return;
  const Member& member = group.member[task.member];
  const Lane lane;
  const int64_t features = group.in_features;
  const LowRank logits(for_mask, member.U, member.V, member.mask_rank, task, kRegular);
  const LowRank product(for_product, member.A, member.B, member.rank, task, kRegular);
  const int warp_column = lane.warp * kWarpColumns;
  Position at(group, task, lane, kRegular);

  if (logits.stays) logits.stage(task, features, 0, task.rows, 0);
  if (kComposes && product.stays) product.stage(task, features, 0, task.rows, 0);
  commit_async_copies();
  const DType dtype = kRegular ? kOut : member.dtype;
  Weights<1> weights(places, kComposes ? member.weight : nullptr, dtype, group, task, at);
  Weights<1> initials(places + 1, kComposes ? member.initial : nullptr, dtype, group, task, at);
  LaneRows<char> effective(group.effective, kOut, features,
                           member.first_row * features + at.element(group), kRegular);
  MaskRows masks(group, member, task, lane);
  const float scale = kComposes ? *group.scale : 0.0f;
  wait_async_copies<2>();
  block_barrier();

  Sums sums{0.0f, 0.0f, 0, 0};
#pragma unroll 1
  for (int tile = 0; tile * kTileRows < task.rows; ++tile) {
    float sum[kLaneRows][kLaneColumns] = {};
    logits.for_steps(task, tile * kTileRows, features, [&](const float* left, const float* right) {
      multiply_chain(sum, left + lane.row * kRankStep,
                     right + warp_column + kLaneColumns * lane.quad);
    });
    // here, not above: round keys kept from tile to tile would not leave enough registers
    const Uniforms uniforms(group, member, at);
    const LaneMask mask = draw_mask<kComposes>(group, uniforms, *member.b, sum, at, sums.sparse);
    masks.store(mask);
    if constexpr (kComposes) {
      float delta[kLaneRows][kLaneColumns] = {};
      product.for_steps(task, tile * kTileRows, features,
                        [&](const float* left, const float* right) {
                          add_product<kOut>(delta, left, right + warp_column, lane);
                        });
      sums.kept += __popc(mask.bits);
      apply<kOut>(effective, mask, delta, scale, at.extent,
                  [&](float (&weight)[kLoadRows][kLaneColumns], int first) {
                    weights.load(weight, tile, first);
                    if (!initials.exist()) return;
                    float initial[kLoadRows][kLaneColumns];
                    initials.load(initial, tile, first);
                    add_forget(mask, delta, weight, initial, first, scale, sums);
                  });
      effective.go_down(kTileRows);
      weights.next_tile(tile);
      initials.next_tile(tile);
    }
    at.next_tile();
  }
  if constexpr (kComposes) {
    store_sums<kComposeThreads>(sums, group.partials + member.first_task + blockIdx.x);
  }
}

template <bool kRegular>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_kernel(const __grid_constant__ Group group) {
  sample_task<false, DType::kFloat32, kRegular>(group, nullptr);
}

template <DType kOut, bool kRegular>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    compose_kernel(const __grid_constant__ Group group) {
  compose_task<kOut, kRegular>(group);
}

template <DType kOut, bool kRegular>
__global__ void __launch_bounds__(kComposeThreads, kComposeBlocks)
    sample_compose_kernel(const __grid_constant__ Group group) {
  STAMINA_DYNAMIC_SHARED(TileInFlight, places);
  sample_task<true, kOut, kRegular>(group, places);
}

struct Statistics {
  float *forget, *sparse;
  int64_t* counts;  // M = 1, and M = 1 with S != 0, per member
};

// One block of 32 threads per member: adds its tasks' partials in a fixed order.
__global__ void __launch_bounds__(32)
    statistics_kernel(const __grid_constant__ Group group, Statistics out) {
  const int m = static_cast<int>(blockIdx.x);
  const int end = m + 1 < group.members ? group.member[m + 1].first_task : group.tasks;
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
