// SPDX-License-Identifier: Apache-2.0
// The mask of a tile: drawn from its logits and the random stream, stored and loaded as bits.
#pragma once

#include "group.cuh"

namespace stamina::cuda {

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
    penalty[j] = kRelu ? fmaxf(logit, 0.0f) : reciprocal_approx(1.0f + e);
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

// Draws the tile's mask from its logits; with kSums, adds every element's penalty to `sparse`.
template <bool kSums, bool kHard, bool kRelu>
__device__ LaneMask draw_mask_as(const Group& group, const Member& member,
                                 const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                                 float& sparse) {
  const UniformRow uniforms(group, member, member.col0 + at.column);
  const float bias = *member.b;
  LaneMask mask{0};
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    float u[kLaneColumns] = {};
    if constexpr (!kHard) uniforms.draw(member.row0 + static_cast<uint32_t>(at.row + 8 * i), u);
    const int valid = at.extent.valid(i);
    mask.bits |= draw_row<kSums, kHard, kRelu>(logits[i], bias, u, valid, sparse) << (8 * i);
  }
  return mask;
}

template <bool kSums, bool kHard>
__device__ LaneMask draw_mask_of(const Group& group, const Member& member,
                                 const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                                 float& sparse) {
  if constexpr (kSums) {
    if (group.relu) {
      return draw_mask_as<true, kHard, true>(group, member, logits, at, sparse);
    }
  }
  return draw_mask_as<kSums, kHard, false>(group, member, logits, at, sparse);
}

template <bool kSums>
__device__ LaneMask draw_mask(const Group& group, const Member& member,
                              const float (&logits)[kLaneRows][kLaneColumns], const Position& at,
                              float& sparse) {
  return group.hard ? draw_mask_of<kSums, true>(group, member, logits, at, sparse)
                    : draw_mask_of<kSums, false>(group, member, logits, at, sparse);
}

// Also writes the zeros that fill the last word of a row.
__device__ inline void store_mask(const Group& group, LaneMask mask, const Position& at) {
  if (at.column >= (group.in_features + 31) / 32 * 32) return;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    if (8 * i >= at.extent.rows) continue;
    group.bits[at.byte + 8 * i * Position::row_bytes(group)] =
        static_cast<uint8_t>(mask.bits >> (8 * i));
  }
}

// The bytes of a lane's mask, as they are in memory: to be loaded long before they are needed.
struct MaskBytes {
  uint8_t row[kLaneRows];

  __device__ LaneMask mask() const {
    LaneMask mask{0};
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) mask.bits |= static_cast<uint32_t>(row[i]) << (8 * i);
    return mask;
  }
};

__device__ inline MaskBytes load_mask(const Group& group, const Position& at) {
  MaskBytes bytes;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int64_t byte = at.byte + 8 * i * Position::row_bytes(group);
    bytes.row[i] = at.extent.valid(i) > 0 ? group.bits[byte] : 0;
  }
  return bytes;
}

}  // namespace stamina::cuda
