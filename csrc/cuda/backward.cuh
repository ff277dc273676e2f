// SPDX-License-Identifier: Apache-2.0
// The gradients of the factors of a group:
//
//   G  = dY^T X + 2 g_forget S^2 (.) D          S = W - W_init,  D = s M (.) P,  P = A B
//   dL = s G (.) P (.) z(1 - z) / tau + g_sparse penalty'(L)     L = U V + b
//   dA = s (M (.) G) B^T    dB = s A^T (M (.) G)    dU = dL V^T    dV = U^T dL    db = sum dL
//
// A block of eight warps serves a strip of 128 columns of one member, 64 rows at a time: G in
// registers, then L, P and the two gradients of 16 x 16 weights, contracted at once. What a strip
// has of dB and dV stays with its block; dA and dU of its rows are one part for every strip. Parts
// are added by another kernel in a fixed order: nothing is atomic, two runs agree to the bit.
//
// Registers bind: of the 128 that two blocks leave a thread, G takes 32, dB 16, and what 16 x 16
// weights need most of the rest. Therefore thread_again, dV in shared memory, and a loop that is
// not unrolled.
#pragma once

#include "gradients.cuh"

namespace stamina::cuda {

// A warp's W and W_init of a tile: of each 16 rows first the one, then the other. Later what the
// warp adds to dA and dU of these rows, which takes the same room.
union WarpWeights {
  uint16_t weights[2][2][16 * kWarpColumns];
  float left[2][16 * kPartRanks];
  float4 B_sums[4][32];  // at last: what a lane has of dB
};

template <int kStages>
struct BackwardShared {
  alignas(16) TokenStage stages[kStages];
  SplitMatrix<kBackwardRows, kRankStep> A, U;
  SplitMatrix<kRankStep, kBlockColumns> B, V;
  alignas(16) WarpWeights warps[kBackwardThreads / 32];
  // What a lane has of dV: the registers have no room for it.
  float4 V_sums[2][2][kBackwardThreads];
};

// Index of the pair of ranks (2 pair, 2 pair + 1) of a row in WarpWeights::left: neighbouring rows
// lie in different banks.
__device__ inline int left_pair(int row, int pair) {
  return row * kPartRanks + 2 * (pair ^ (row % 4 * 4));
}

// Starts to copy the warp's W and W_init, of which nothing is read where there is no W_init.
__device__ inline void request_weights(WarpWeights& to, const Member& member, const Task& task,
                                       int64_t features, int tile_row, const Place& at) {
  if (member.initial == nullptr) return;
  const int column = at.column + 8 * at.lane.quad;
#pragma unroll
  for (int part = 0; part < kWarpRows / 8; ++part) {
    const int row = 8 * part + at.lane.row, task_row = tile_row + at.row + row;
    const bool exists = task_row < task.rows && column < task.columns;
    const int64_t from = (task.row + task_row) * features + task.column + column;
    uint16_t (&place)[2][16 * kWarpColumns] = to.weights[part / 2];
    const int index = swizzled<kWarpColumns>(row % 16, at.lane.quad);
    copy_vector_or_zeros_async(place[0] + index, static_cast<const uint16_t*>(member.weight) + from,
                               exists);
    copy_vector_or_zeros_async(place[1] + index,
                               static_cast<const uint16_t*>(member.initial) + from, exists);
  }
}

template <DType kDType, bool kHard, bool kRelu>
class StripOfGradients {
 public:
  using Shared = BackwardShared<kTokenStages>;

  __device__ StripOfGradients(const Backward& launch, Shared& shared, const Task& task)
      : launch_(launch),
        shared_(shared),
        task_(task),
        member_(launch.group.member[task.member]),
        c_(launch, member_, task.member),
        stream_(launch.group, member_),
        tokens_{static_cast<const uint16_t*>(launch.dy) + member_.first_row + task.row,
                static_cast<const uint16_t*>(launch.x) + task.column,
                launch.outputs,
                launch.group.in_features,
                launch.tokens,
                task.rows,
                task.columns} {}

  __device__ void run() {
    fill_right();
    {
      TokenCopies copies(tokens_, next_, thread_again());
#pragma unroll
      for (int stage = 0; stage + 1 < kTokenStages; ++stage) request_tokens(copies, stage);
    }
#pragma unroll 1
    for (int tile_row = 0; tile_row < task_.rows; tile_row += kBackwardRows) {
      const uint32_t word = mask_word(tile_row);
      WarpTile grad = {};
      outer_product(grad, tile_row);
      differentiate(grad, word, tile_row);
      block_barrier();
      store_left(tile_row);
    }
    store_right();
    store_bias();
  }

 private:
  // s A and B, U in logits' units and V: their products are what is needed, and what the
  // contractions get too much is taken off where parts are added. One vector of A and U a thread:
  static_assert(StagedLeft::kVectors * kBackwardRows == kBackwardThreads);
  __device__ float4 load_left(const float* from, int rank, int tile_row, int thread) const {
    const int64_t row = task_.row + tile_row;
    return StagedLeft::load(thread, from + row * rank, rank, task_.rows - tile_row, rank);
  }

  __device__ void fill_right() {
    const int thread = thread_again();
    const int64_t features = launch_.group.in_features;
#pragma unroll
    for (int e = thread; e < kRankStep * StagedRight::kVectors; e += kBackwardThreads) {
      const auto load = [&](const float* from, int rank) {
        return StagedRight::load(e, from + task_.column, features, rank, task_.columns);
      };
      const float4 B = load(member_.B, member_.rank), V = load(member_.V, member_.mask_rank);
      shared_.B.store(e, B, 1.0f);
      shared_.V.store(e, V, 1.0f);
    }
    const float zeros[2][4] = {};
    store_V_sums(zeros, 0, thread);
    store_V_sums(zeros, 1, thread);
  }

  __device__ void request_tokens(TokenCopies& copies, int stage) {
    copies.copy(shared_.stages[stage]);
    commit_async_copies();
  }

  // Also copies the warp's W and W_init, A and U of the tile.
  __device__ void outer_product(WarpTile& grad, int tile_row) {
    const Place at(thread_again());
    const MatrixLane down = MatrixLane::down(at.thread), across = MatrixLane::across(at.thread);
    const int dy_at = swizzled<kBackwardRows>(across.row, at.row / 8 + across.vector);
    const int x_at = swizzled<kBlockColumns>(down.row, at.column / 8 + down.vector);
    TokenCopies copies(tokens_, next_, at.thread);
    const float4 A = load_left(member_.A, member_.rank, tile_row, at.thread);
    const float4 U = load_left(member_.U, member_.mask_rank, tile_row, at.thread);
    int steps = 0;
#pragma unroll 1
    for (int token = 0; token == 0 || token < launch_.tokens; token += kStepTokens, ++steps) {
      wait_async_copies<kTokenStages - 2>();
      block_barrier();
      if (steps == 0) {
        request_weights(shared_.warps[at.lane.warp], member_, task_, launch_.group.in_features,
                        tile_row, at);
      }
      const int next = stage_ == 0 ? kTokenStages - 1 : stage_ - 1;
      request_tokens(copies, next);
      add_tokens<kDType>(grad, shared_.stages[stage_], dy_at, x_at);
      if (steps == 0) {
        shared_.A.store(at.thread, A, *launch_.group.scale);
        shared_.U.store(at.thread, U, kLogitUnit);
      }
      stage_ = stage_ + 1 == kTokenStages ? 0 : stage_ + 1;
    }
    // the weights were requested before the tokens of kTokenStages - 1 steps later; the barrier of
    // the second step is also the one after A and U
    if (steps < kTokenStages) {
      wait_async_copies<0>();
      block_barrier();
    }
  }

  __device__ void differentiate(WarpTile& grad, uint32_t word, int tile_row) {
    const Place at(thread_again());
    WarpWeights& mine = shared_.warps[at.lane.warp];
    const int first_row = tile_row + at.row, column = task_.column + at.column;
    const auto block = static_cast<uint32_t>((member_.col0 + column) >> 2);
    const MatrixLane down = MatrixLane::down(at.thread);
    const int weight_at = swizzled<kWarpColumns>(down.row, down.vector);
    const FactorPlace factors(at);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 16 * i + at.lane.row;
      const uint32_t words[2] = {shuffle(word, 16 * i + at.lane.row) >> (2 * at.lane.quad),
                                 shuffle(word, 16 * i + 8 + at.lane.row) >> (2 * at.lane.quad)};
      float left_sums[2][2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const FactorPlace place = factors.of(i, j);
        float (&g)[2][4] = grad[0][j];
        const uint32_t kept[2] = {words[0] >> (16 * j), words[1] >> (16 * j)};
        float product[2][4] = {};
        float logits[2][4] = {{c_.bias, c_.bias, c_.bias, c_.bias},
                              {c_.bias, c_.bias, c_.bias, c_.bias}};
        low_rank_tile(product, shared_.A, shared_.B, place);
        low_rank_tile(logits, shared_.U, shared_.V, place);
        if (c_.initial) {
          const uint16_t* weights = mine.weights[i][0] + (weight_at ^ (16 * j));
          add_forget_gradient<kDType>(g, product, weights, weights + 16 * kWarpColumns, kept,
                                      c_.forget);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int part = 16 * j + 8 * n;
          const uint32_t kept_part[2] = {words[0] >> part, words[1] >> part};
          float u[4] = {};
          if constexpr (!kHard) {
            draw_tile(stream_, task_.row + row, block + part / 4, at.lane.quad, u);
          }
          const int rows = at.column + part < task_.columns ? task_.rows - row : 0;
          bias_sum_ +=
              logit_gradients_at<kHard, kRelu>(logits[n], g[n], product[n], u, kept_part, c_, rows);
        }
        float V_sums[2][4];
        load_V_sums(V_sums, j, at.thread);
        contract(left_sums[1], V_sums, logits, shared_.U, shared_.V, place);
        store_V_sums(V_sums, j, at.thread);
        contract(left_sums[0], B_sums_[j], g, shared_.A, shared_.B, place);
      }
      warp_barrier();  // the sums take the place of the weights, which other lanes have read
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        const float* sum = left_sums[p / 4][p / 2 % 2] + 2 * (p % 2);
        float* to = mine.left[i] + left_pair(at.lane.row + 8 * (p % 2), p / 2 * 4 + at.lane.quad);
        *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
      }
      // the next 16 rows, as registers have no index
#pragma unroll
      for (int e = 0; e < 16; ++e)
        grad[0][e / 8][e / 4 % 2][e % 4] = grad[1][e / 8][e / 4 % 2][e % 4];
    }
  }

  __device__ void load_V_sums(float (&to)[2][4], int j, int thread) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 sum = shared_.V_sums[j][n][thread];
      to[n][0] = sum.x, to[n][1] = sum.y, to[n][2] = sum.z, to[n][3] = sum.w;
    }
  }
  __device__ void store_V_sums(const float (&from)[2][4], int j, int thread) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      shared_.V_sums[j][n][thread] = {from[n][0], from[n][1], from[n][2], from[n][3]};
    }
  }

  // The bits of a row of the warp, whose number is the lane's, in its columns.
  __device__ uint32_t mask_word(int tile_row) const {
    const Place at(thread_again());
    const int row = tile_row + at.row + at.thread % 32, column = task_.column + at.column;
    if (row >= task_.rows || at.column >= task_.columns) return 0;
    const int64_t words = (launch_.group.in_features + 31) / 32;
    return launch_.group.bits[(member_.first_row + task_.row + row) * words + column / 32];
  }

  // Adds what the warps of a row have of dA and dU; between barriers.
  __device__ void store_left(int tile_row) {
    constexpr int kVectors = kPartRanks / 4;
#pragma unroll
    for (int v = thread_again(); v < kBackwardRows * kVectors; v += kBackwardThreads) {
      const int row = v / kVectors, vector = v % kVectors;
      if (tile_row + row >= task_.rows) continue;
      const int in_warp = row % kWarpRows, first_warp = row / kWarpRows * kWarpsInRow;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int warp = 0; warp < kWarpsInRow; ++warp) {
        const float* left = shared_.warps[first_warp + warp].left[in_warp / 16];
        const auto part =
            *reinterpret_cast<const float4*>(left + left_pair(in_warp % 16, 2 * vector));
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const int64_t to = task_.column / kBlockColumns * launch_.outputs + member_.first_row +
                         task_.row + tile_row + row;
      reinterpret_cast<float4*>(launch_.left)[to * kVectors + vector] = sum;
    }
  }

  // Adds what the upper and the lower warps have of dB and dV.
  __device__ void store_right() {
    constexpr int kHalf = kBackwardThreads / 2;
    const Place at(thread_again());
    const int thread = at.thread, lane = thread % 32;
    block_barrier();
    if (thread >= kHalf) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float (&sum)[4] = B_sums_[p / 2][p % 2];
        shared_.warps[at.lane.warp].B_sums[p][lane] = {sum[0], sum[1], sum[2], sum[3]};
      }
    }
    block_barrier();
    if (thread >= kHalf) return;
    const int64_t features = launch_.group.in_features;
    const int64_t part = task_.row / launch_.group.task_rows * launch_.members + task_.member;
    float* to = launch_.right + part * kPartRanks * features + task_.column + at.column;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int column = 8 * p + 2 * at.lane.quad;
      if (at.column + column >= task_.columns) continue;
      const float (&sum)[4] = B_sums_[p / 2][p % 2];
      const float4 below = shared_.warps[at.lane.warp + kWarpsInRow].B_sums[p][lane];
      const auto& V_sums = shared_.V_sums[p / 2][p % 2];
      float* first = to + at.lane.row * features + column;
      store_pairs(first, features, {sum[0], sum[1], sum[2], sum[3]}, below);
      store_pairs(first + kRankStep * features, features, V_sums[thread], V_sums[thread + kHalf]);
    }
  }

  // Two neighbours of a rank, and of that eight below it.
  __device__ static void store_pairs(float* to, int64_t features, float4 a, float4 b) {
    *reinterpret_cast<float2*>(to) = {a.x + b.x, a.y + b.y};
    *reinterpret_cast<float2*>(to + 8 * features) = {a.z + b.z, a.w + b.w};
  }

  __device__ void store_bias() {
    using WarpSums = float[kBackwardThreads / 32];
    STAMINA_SHARED(WarpSums, sums);
    float sum = bias_sum_;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    block_barrier();
    if (threadIdx.x != 0) return;
    sum = 0.0f;
    for (const float warp : sums) sum += warp;
    launch_.bias[static_cast<int64_t>(blockIdx.x) * launch_.members + task_.member] = sum;
  }

  const Backward& launch_;
  Shared& shared_;
  const Task& task_;
  const Member& member_;
  const Coefficients c_;
  const RandomStream stream_;
  const Tokens tokens_;
  TokenCursor next_;
  int stage_ = 0;
  float B_sums_[2][2][4] = {};  // what the lane has of dB: [columns of 16][columns of 8][of a lane]
  float bias_sum_ = 0.0f;
};

// 128 registers a thread where shared memory has room for two blocks.
constexpr int kBackwardBlocks = kComputeMajor == 9 ? 2 : 1;

template <DType kDType, bool kHard, bool kRelu>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    backward_kernel(const __grid_constant__ Backward launch) {
  STAMINA_DYNAMIC_SHARED(BackwardShared<kTokenStages>, shared);
  const Task task = task_of(launch.group);
  if (task.rows <= 0) return;
  StripOfGradients<kDType, kHard, kRelu>(launch, shared, task).run();
}

}  // namespace stamina::cuda
