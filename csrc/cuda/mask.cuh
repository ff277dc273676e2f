// SPDX-License-Identifier: Apache-2.0
// The mask of a tile: drawn from its logits and the random stream, stored and loaded as bits.
#pragma once

#include "group.cuh"

namespace stamina::cuda {

// The mask of a lane: byte i holds the bits of its columns in row 8i of its tile.
struct LaneMask {
  uint32_t bits;

  __device__ static uint32_t bit(int i, int j) { return 1u << (8 * i + j); }
  __device__ bool kept(int i, int j) const { return (bits & bit(i, j)) != 0; }
};

// uniform_of_word of common/philox.h, in two instructions: 1 + (w >> 9) 2^-23, less 1 - 2^-24.
// Exact.
__device__ inline float uniform_of(uint32_t word) {
  return bits_float(shift_right(0x3F800000u >> 23, word, 9)) - 0x1.FFFFFEp-1f;
}

// The random stream of a member.
class RandomStream {
 public:
  // The key is of all lanes, which a broadcast tells the compiler: then the ten round keys are
  // computed once for the warp.
  __device__ RandomStream(const Group& group, const Member& member)
      : key_{broadcast(static_cast<uint32_t>(*group.seed)),
             broadcast(static_cast<uint32_t>(*group.seed >> 32))},
        step_(static_cast<uint32_t>(*group.step)),
        layer_(member.layer_id),
        row0_(member.row0) {}

  // The four words of columns 4 block .. 4 block + 3 of the whole matrix in a row of the member.
  __device__ void words(int member_row, uint32_t block, uint32_t* to) const {
    uint32_t counter[4] = {block, row0_ + static_cast<uint32_t>(member_row), step_, layer_};
    philox4x32(counter, key_);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = counter[k];
  }

 private:
  PhiloxKey key_;
  uint32_t step_, layer_, row0_;
};

// The uniform numbers of a lane's eight neighbouring columns.
class Uniforms {
 public:
  __device__ Uniforms(const Group& group, const Member& member, const Position& at)
      : stream_(group, member),
        first_block_(static_cast<uint32_t>((member.col0 + at.column) >> 2)),
        offset_(at.extent.whole ? 0 : static_cast<int>((member.col0 + at.column) & 3)) {}

  // Those of a row of the member.
  __device__ void draw(int member_row, float (&u)[kLaneColumns]) const {
    // shards may begin anywhere: then the lane needs words of a third block
    uint32_t words[12];
    stream_.words(member_row, first_block_, words);
    stream_.words(member_row, first_block_ + 1, words + 4);
    if (offset_ != 0) {
      stream_.words(member_row, first_block_ + 2, words + 8);
      shift<1>(words);
      shift<2>(words);
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) u[j] = uniform_of(words[j]);
  }

 private:
  template <int kBy>
  __device__ void shift(uint32_t (&words)[12]) const {
    if ((offset_ & kBy) == 0) return;
#pragma unroll
    for (int k = 0; k + kBy < 12; ++k) words[k] = words[k + kBy];
  }

  RandomStream stream_;
  uint32_t first_block_;
  int offset_;
};

// The mask of a lane's eight neighbouring logits, and with kSums the sum of their penalties,
// sigmoid(L) or relu(L), over the first `valid`.
template <bool kSums, bool kHard, bool kRelu>
__device__ uint32_t draw_row(const float (&logits)[kLaneColumns], float bias,
                             const float (&u)[kLaneColumns], int valid, float& sparse) {
  uint32_t bits = 0;
  float penalty[kLaneColumns];
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    const float logit = logits[j] + bias;
    const float e = exp_approx(-logit);
    // u < sigmoid(L) without a division: u + u e^-L < 1; false where L is NaN
    const bool drawn = kHard ? logit > 0.0f : fmaf(u[j], e, u[j]) < 1.0f;
    bits |= drawn ? 1u << j : 0;
    penalty[j] = kRelu ? max_or_nan(logit, 0.0f) : reciprocal_approx(1.0f + e);
  }
  if constexpr (kSums) {
    if (valid == kLaneColumns) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sparse += penalty[j];
    } else {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sparse += j < valid ? penalty[j] : 0.0f;
    }
  }
  return bits & ((1u << valid) - 1);
}

// Draws a tile's mask from its logits; with kSums, adds every element's penalty to `sparse`.
template <bool kSums, bool kHard, bool kRelu>
__device__ LaneMask draw_mask_as(const Uniforms& uniforms, float bias,
                                 const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                                 float& sparse) {
  LaneMask mask{0};
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    float u[kLaneColumns] = {};
    if constexpr (!kHard) uniforms.draw(at.row + 8 * i, u);
    const int valid = at.extent.valid(i);
    mask.bits |= draw_row<kSums, kHard, kRelu>(logits[i], bias, u, valid, sparse) << (8 * i);
  }
  return mask;
}

template <bool kSums, bool kHard>
__device__ LaneMask draw_mask_of(const Group& group, const Uniforms& uniforms, float bias,
                                 const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                                 float& sparse) {
  if constexpr (kSums) {
    if (group.relu) {
      return draw_mask_as<true, kHard, true>(uniforms, bias, logits, at, sparse);
    }
  }
  return draw_mask_as<kSums, kHard, false>(uniforms, bias, logits, at, sparse);
}

template <bool kSums>
__device__ LaneMask draw_mask(const Group& group, const Uniforms& uniforms, float bias,
                              const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                              float& sparse) {
  return group.hard ? draw_mask_of<kSums, true>(group, uniforms, bias, logits, at, sparse)
                    : draw_mask_of<kSums, false>(group, uniforms, bias, logits, at, sparse);
}

// Byte i of lane t and byte t of lane i change places among every four lanes t, by the whole warp.
__device__ inline uint32_t transpose_bytes(uint32_t word, int quad) {
  word = permute_bytes(word, shuffle_xor(word, 1), quad % 2 == 0 ? 0x6240 : 0x3715);
  return permute_bytes(word, shuffle_xor(word, 2), quad / 2 == 0 ? 0x5410 : 0x3276);
}

// Where a warp's mask is in the stacked bits, little-endian words of 32 columns. A tile takes one
// access a lane: lane t of a row g holds the word of row 8t + g, which is the mask transposed.
class MaskRows {
 public:
  __device__ MaskRows(const Group& group, const Member& member, const Task& task, const Lane& lane)
      : quad_(lane.quad) {
    const int64_t words = (group.in_features + 31) / 32;
    const int row = 8 * lane.quad + lane.row, first = task.column + lane.warp * kWarpColumns;
    first_ = group.bits + (member.first_row + task.row + row) * words + first / 32;
    step_ = kTileRows * words;
    rows_ = first < group.in_features ? task.rows - row : 0;
  }

  // Long before it is needed: the word of the next tile, zero where there is none.
  __device__ uint32_t load() {
    const uint32_t word = rows_ > 0 ? *first_ : 0;
    next_tile();
    return word;
  }
  __device__ LaneMask mask(uint32_t word) const { return {transpose_bytes(word, quad_)}; }

  // The mask of the next tile. Also writes the zeros that fill the last word of a row.
  __device__ void store(LaneMask mask) {
    const uint32_t word = transpose_bytes(mask.bits, quad_);
    if (rows_ > 0) *first_ = word;
    next_tile();
  }

 private:
  __device__ void next_tile() {
    first_ += step_;
    rows_ -= kTileRows;
  }

  uint32_t* first_;
  int64_t step_;
  int rows_, quad_;
};

}  // namespace stamina::cuda
