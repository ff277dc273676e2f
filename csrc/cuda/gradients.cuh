// SPDX-License-Identifier: Apache-2.0
// The gradients of 16 x 16 weights, as backward.cuh defines them, and their contractions. No bit is
// decided here: L has 16 bits of the factors, which is enough for slopes. (That of relu is off
// where |L| is below 2^-16 of the terms of its sum.)
#pragma once

#include "gradient_parts.cuh"
#include "mask.cuh"

namespace stamina::cuda {

// Where a thread is.
struct Place {
  int thread;
  Lane lane;
  int row, column;  // the warp's first, in its tile

  __device__ explicit Place(int thread)
      : thread(thread),
        lane(static_cast<unsigned>(thread)),
        row(lane.warp / kWarpsInRow * kWarpRows),
        column(lane.warp % kWarpsInRow * kWarpColumns) {}
};

// sigmoid'(t) = e / (1 + e)^2 with e = exp(-|t|), t in logits' units: no cancellation.
__device__ inline float sigmoid_slope(float t) {
  const float e = exp2_approx(-fabsf(t));
  const float r = reciprocal_approx(1.0f + e);
  return e * r * r;
}

// z (1 - z) at tau = 1: z = (1 - u) / ((1 - u) + u e^-L), without a logarithm.
__device__ inline float soft_slope_at_one(float u, float e) {
  const float below = 1.0f - u;
  const float z = below * reciprocal_approx(fmaf(u, e, below));
  return fmaf(-z, z, z);
}

// z (1 - z) / tau with z = sigmoid((L - logit u) / tau); hard: u = 1/2.
template <bool kHard>
__device__ inline float soft_slope(float logit, float u, float inverse_tau) {
  const float drawn = kHard ? 0.0f : log2_approx(u) - log2_approx(1.0f - u);
  return sigmoid_slope((logit + drawn) * inverse_tau) * inverse_tau;
}

// sigmoid'(L), or relu'(L).
template <bool kRelu>
__device__ inline float penalty_slope(float logit, float e) {
  if constexpr (kRelu) return logit < 0.0f ? 1.0f : 0.0f;
  const float sigmoid = reciprocal_approx(1.0f + e);
  return fmaf(-sigmoid, sigmoid, sigmoid);
}

// Uniform numbers as mma holds 16 x 8: of rows `row` and `row` + 8, columns 2t and 2t + 1 from
// block 2 block on. Two lanes share a block of the stream, and each draws one row of it.
__device__ inline void draw_tile(const RandomStream& stream, int row, uint32_t block, int quad,
                                 float (&u)[4]) {
  const bool even = quad % 2 == 0;
  uint32_t words[4];
  stream.words(even ? row : row + 8, block + static_cast<uint32_t>(quad / 2), words);
  const uint32_t first = shuffle_xor(even ? words[2] : words[0], 1);
  const uint32_t second = shuffle_xor(even ? words[3] : words[1], 1);
  u[0] = uniform_of(even ? words[0] : first);
  u[1] = uniform_of(even ? words[1] : second);
  u[2] = uniform_of(even ? first : words[2]);
  u[3] = uniform_of(even ? second : words[3]);
}

__device__ inline SplitTile split_tile(const float (&from)[2][4]) {
  SplitTile tile;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const SplitPair pair(from[m / 2][2 * (m % 2)], from[m / 2][2 * (m % 2) + 1]);
    tile.high[m] = pair.high, tile.low[m] = pair.low;
  }
  return tile;
}

using StagedLeft = SplitMatrix<kBackwardRows, kRankStep>;
using StagedRight = SplitMatrix<kRankStep, kBlockColumns>;

// The lane's places in the factors of 16 x 16 weights, as operands of their product (down) and of
// the contractions (across).
struct FactorPlace {
  int left, right, left_across, right_across;

  __device__ explicit FactorPlace(const Place& at) {
    const MatrixLane down = MatrixLane::down(at.thread), across = MatrixLane::across(at.thread);
    left = swizzled<kRankStep>(at.row + down.row, down.vector);
    left_across = swizzled<kRankStep>(at.row + across.row, across.vector);
    right = swizzled<kBlockColumns>(down.row, at.column / 8 + down.vector);
    right_across = swizzled<kBlockColumns>(across.row, at.column / 8 + across.vector);
  }

  // That of 16 rows and columns number i and j of the warp.
  __device__ FactorPlace of(int i, int j) const {
    FactorPlace place = *this;
    place.left += 16 * i * kRankStep, place.left_across += 16 * i * kRankStep;
    place.right ^= 16 * j, place.right_across ^= 16 * j;
    return place;
  }
};

// product += left right, of 16 x 16 weights.
__device__ inline void low_rank_tile(float (&product)[2][4], const StagedLeft& left,
                                     const StagedRight& right, FactorPlace at) {
  multiply_tiles(product, SplitTile::load(left, at.left),
                 SplitTile::load_transposed(right, at.right));
}

// left_sum += gradient right^T, right_sum += left^T gradient.
__device__ inline void contract(float (&left_sum)[2][4], float (&right_sum)[2][4],
                                const float (&gradient)[2][4], const StagedLeft& left,
                                const StagedRight& right, FactorPlace at) {
  SplitTile tile = split_tile(gradient);
  multiply_tiles(left_sum, tile, SplitTile::load(right, at.right_across));
  tile.transpose_each();
  multiply_tiles(right_sum, SplitTile::load_transposed(left, at.left_across), tile);
}

// What is the same for all weights of a task.
struct Coefficients {
  const float* tau;
  float forget, penalty;  // forget: 2 g_forget
  float bias;             // in logits' units
  bool is_tau_one, initial;

  __device__ Coefficients(const Backward& launch, const Member& member, int number)
      : tau(launch.tau),
        forget(2.0f * launch.g_forget[number]),
        penalty(launch.g_sparse[number]),
        bias(kLogitUnit * *member.b),
        is_tau_one(*tau == 1.0f),
        initial(member.initial != nullptr) {}
};

// grad += 2 g_forget S^2 (.) M (.) s P, of 16 x 16 weights; product: s P.
template <DType kDType>
__device__ void add_forget_gradient(float (&grad)[2][4], const float (&product)[2][4],
                                    const uint16_t* weight, const uint16_t* initial,
                                    const uint32_t (&kept)[2], float coefficient) {
  uint32_t w[4], w0[4];
  load_matrices(w, weight);
  load_matrices(w0, initial);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float now = to_float<kDType>(static_cast<uint16_t>(w[m] >> (16 * e)));
      const float change = now - to_float<kDType>(static_cast<uint16_t>(w0[m] >> (16 * e)));
      const bool is_kept = and_bits(kept[m % 2], 1u << (8 * (m / 2) + e)) != 0;
      float& to = grad[m / 2][2 * (m % 2) + e];
      to = fmaf(is_kept ? coefficient : 0.0f, (change * change) * product[m / 2][2 * (m % 2) + e],
                to);
    }
  }
}

// Turns logits into dL and G into M (.) G, of 16 x 8 weights; product: s P. Returns the sum of dL
// over the lane's first `rows` rows, which are 8 apart.
template <bool kRelu, typename SoftSlope>
__device__ float logit_gradients(float (&logits)[4], float (&grad)[4], const float (&product)[4],
                                 const float (&u)[4], const uint32_t (&kept)[2], float penalty,
                                 int rows, const SoftSlope& soft_slope_of) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float logit = logits[i], e = exp2_approx(logit);
    const float gradient = fmaf(product[i] * soft_slope_of(logit, u[i], e), grad[i],
                                penalty * penalty_slope<kRelu>(logit, e));
    logits[i] = gradient;
    sum += 8 * (i / 2) < rows ? gradient : 0.0f;
    if (and_bits(kept[i / 2], 1u << (i % 2)) == 0) grad[i] = 0.0f;
  }
  return sum;
}

template <bool kHard, bool kRelu>
__device__ float logit_gradients_at(float (&logits)[4], float (&grad)[4], const float (&product)[4],
                                    const float (&u)[4], const uint32_t (&kept)[2],
                                    const Coefficients& c, int rows) {
  const auto with = [&](const auto& soft_slope_of) {
    return logit_gradients<kRelu>(logits, grad, product, u, kept, c.penalty, rows, soft_slope_of);
  };
  if constexpr (!kHard) {
    if (c.is_tau_one) {
      return with([](float, float drawn, float e) { return soft_slope_at_one(drawn, e); });
    }
  }
  const float inverse_tau = 1.0f / *c.tau;
  return with([&](float logit, float drawn, float) {
    return soft_slope<kHard>(logit, drawn, inverse_tau);
  });
}

}  // namespace stamina::cuda
