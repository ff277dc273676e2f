// SPDX-License-Identifier: Apache-2.0
// G = dY^T X of a tile of 64 x 128 weights, on the matrix units: tokens stream through shared
// memory, 32 at a time, for one tile of a strip after the other.
#pragma once

#include "split.cuh"

namespace stamina::cuda {

constexpr int kBackwardThreads = 256;
constexpr int kBackwardRows = 64;  // of a tile
constexpr int kWarpRows = 32;      // of a warp: two by four warps have a tile
constexpr int kWarpsInRow = kBlockColumns / kWarpColumns;
constexpr int kStepTokens = 32;

// Of shared memory, for a compute capability's major number: two blocks of a multiprocessor of 9.0
// have room for three stages each; the other GPUs get the smallest number, of which a block fits
// into the 99 KiB that the least of them has. The host asks the GPU, the code knows what it was
// compiled for: PTX of 9.0, which other GPUs would compile, would set them at odds.
constexpr int token_stages(int major) { return major == 9 ? 3 : 2; }
constexpr int kTokenStages = token_stages(kComputeMajor);

struct TokenStage {
  alignas(16) uint16_t dy[kStepTokens * kBackwardRows];
  alignas(16) uint16_t x[kStepTokens * kBlockColumns];
};

// A warp's 32 x 32 of a tile as mma holds them: [rows of 16][columns of 16][of 8][of a lane].
using WarpTile = float[2][2][2][4];

template <DType kDType>
__device__ inline void mma_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kDType == DType::kBFloat16) {
    mma_bf16(d, a, b);
  } else {
    mma_half(d, a, b);
  }
}

// dY and X of a strip: at its first row and column, of its rows and columns.
struct Tokens {
  const uint16_t *dy, *x;
  int64_t outputs, features;  // in a row of either
  int32_t tokens, rows, columns;
};

// What is copied next: all tokens of a tile, then of the tile below it, until the rows end.
struct TokenCursor {
  int token = 0, row = 0;
};

// The copies that a thread makes: one vector of dY and two of X in a step.
class TokenCopies {
 public:
  __device__ TokenCopies(const Tokens& all, TokenCursor& next, int thread)
      : all_(all),
        next_(next),
        dy_token_(thread / kRowVectors),
        x_token_(thread / kColumnVectors),
        dy_column_(thread % kRowVectors * 8),
        x_column_(thread % kColumnVectors * 8) {
    point();
  }

  __device__ void copy(TokenStage& to) {
    if (next_.row >= all_.rows) return;
    const int left = all_.tokens - next_.token;
    copy_vector_or_zeros_async(to.dy + swizzled<kBackwardRows>(dy_token_, dy_column_ / 8), dy_,
                               dy_token_ < left && next_.row + dy_column_ < all_.rows);
#pragma unroll
    for (int token = 0; token < kStepTokens; token += kAtOnce) {
      copy_vector_or_zeros_async(to.x + swizzled<kBlockColumns>(x_token_ + token, x_column_ / 8),
                                 x_ + token * all_.features,
                                 x_token_ + token < left && x_column_ < all_.columns);
    }
    dy_ += kStepTokens * all_.outputs;
    x_ += kStepTokens * all_.features;
    next_.token += kStepTokens;
    if (next_.token < all_.tokens) return;
    next_.token = 0;
    next_.row += kBackwardRows;
    point();
  }

 private:
  static constexpr int kRowVectors = kBackwardRows / 8, kColumnVectors = kBlockColumns / 8;
  static constexpr int kAtOnce = kBackwardThreads / kColumnVectors;
  static_assert(kBackwardThreads == kStepTokens * kRowVectors);

  __device__ void point() {
    dy_ = all_.dy + (next_.token + dy_token_) * all_.outputs + next_.row + dy_column_;
    x_ = all_.x + (next_.token + x_token_) * all_.features + x_column_;
  }

  const Tokens& all_;
  TokenCursor& next_;
  int dy_token_, x_token_, dy_column_, x_column_;
  const uint16_t *dy_, *x_;
};

// grad += dY^T X of a stage. dy_at, x_at: the lane's place at its warp's first row and column.
template <DType kDType>
__device__ void add_tokens(WarpTile& grad, const TokenStage& stage, int dy_at, int x_at) {
#pragma unroll
  for (int k = 0; k < kStepTokens; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices_transposed(a[i], stage.dy + k * kBackwardRows + (dy_at ^ (16 * i)));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t m[4];
      load_matrices_transposed(m, stage.x + k * kBlockColumns + (x_at ^ (16 * j)));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t b[2] = {m[2 * n], m[2 * n + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_pairs<kDType>(grad[i][j][n], a[i], b);
      }
    }
  }
}

}  // namespace stamina::cuda
