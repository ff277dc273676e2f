// SPDX-License-Identifier: Apache-2.0
// What all tile kernels share: scratch tiles, their Philox words, masks of lanes, rows as fp32.
#pragma once

#include "gemm.h"
#include "vec.h"

namespace stamina::STAMINA_ISA {
namespace {

constexpr int kVectorsPerWord = kWordColumns / kWidth;
// room for the columns before the tile that share its first counter
constexpr int kPhiloxWords = kTileColumns + 4 * kCounters * kPhiloxChains;

struct alignas(64) Tile {
  float values[kTileRows * kTileColumns];
  float* row(int i) { return values + i * kTileColumns; }
};

inline int whole_words(int columns) { return static_cast<int>(round_up(columns, kWordColumns)); }

inline void multiply(const LowRank& product, int rows, int columns, Tile& out) {
  gemm(rows, whole_words(columns), product.rank, {product.left, product.rank, 1}, product.right,
       kTileColumns, Out<false>{out.values, kTileColumns});
}

// The product behind mask bits: fused on every instruction set.
inline void multiply_exactly(const LowRank& product, int rows, int columns, Tile& out) {
  if constexpr (kFused) return multiply(product, rows, columns, out);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < whole_words(columns); j += kWidth) {
      F sum = set(0.0f);
      for (int k = 0; k < product.rank; ++k) {
        sum = fma(set(product.left[i * product.rank + k]),
                  load(product.right + k * kTileColumns + j), sum);
      }
      store(out.row(i) + j, sum);
    }
  }
}

// Philox in vectors. Lanes hold 32-bit words; what their upper halves carry never matters, since
// only low words enter a product. After two of the ten rounds the state still splits into a part
// that depends on the column alone and one that depends on the row alone:
//   round 1: (hi(m1 step) ^ row ^ k,  lo(m1 step),  hi(m0 c) ^ layer ^ k',  lo(m0 c))
// so those two are done once per tile and once per row, and the other eight per element, on
// kPhiloxChains vectors of counters at once, whose chains of multiplications overlap.
constexpr int kSharedRounds = 2;
constexpr int kCounterGroups = kPhiloxWords / 4 / kCounters;

inline uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
inline PhiloxKey next_key(PhiloxKey key) {
  return {key.low + kPhiloxWeyl0, key.high + kPhiloxWeyl1};
}

class PhiloxVectors {
 public:
  PhiloxVectors(const Stream& stream, int groups) : key_(stream.key) {
    step_product_ = static_cast<uint64_t>(kPhiloxMultiplier1) * stream.step;
    const PhiloxKey second = next_key(key_);
    Q counter = add_lanes(set_lane(static_cast<uint64_t>(stream.column >> 2)), counter_lanes());
    for (int g = 0; g < groups; ++g) {
      const Q product0 = multiply_low_words(counter, set_lane(kPhiloxMultiplier0));
      const Q c2 = xor3(high_words(product0), set_lane(stream.layer), set_lane(key_.high));
      const Q product1 = multiply_low_words(c2, set_lane(kPhiloxMultiplier1));
      c0_[g] = xor3(high_words(product1), set_lane(static_cast<uint32_t>(step_product_)),
                    set_lane(second.low));
      c1_[g] = product1;
      c2_[g] = product0;
      counter = add_lanes(counter, set_lane(kCounters));
    }
    // in memory, where they do not compete with the shuffles for a port
    PhiloxKey key = next_key(second);
    for (int round = kSharedRounds; round < kPhiloxRounds; ++round, key = next_key(key)) {
      low_[round] = set_lane(key.low);
      high_[round] = set_lane(key.high);
    }
  }

  void write_row(uint32_t row, int groups, uint32_t* out) const {
    const uint64_t row_product =
        static_cast<uint64_t>(kPhiloxMultiplier0) * (high_word(step_product_) ^ row ^ key_.low);
    const Q row_high = set_lane(high_word(row_product));
    const Q row_low = set_lane(static_cast<uint32_t>(row_product));
    const Q key = set_lane(next_key(key_).high);
    const Q multiplier0 = set_lane(kPhiloxMultiplier0);
    const Q multiplier1 = set_lane(kPhiloxMultiplier1);
    for (int g = 0; g < groups; g += kPhiloxChains) {
      Q c0[kPhiloxChains], c1[kPhiloxChains], c2[kPhiloxChains], c3[kPhiloxChains];
      STAMINA_UNROLL
      for (int n = 0; n < kPhiloxChains; ++n) {
        c0[n] = c0_[g + n];
        c1[n] = c1_[g + n];
        c2[n] = xor3(row_high, c2_[g + n], key);
        c3[n] = row_low;
      }
      STAMINA_UNROLL
      for (int round = kSharedRounds; round < kPhiloxRounds; ++round) {
        STAMINA_UNROLL
        for (int n = 0; n < kPhiloxChains; ++n) {
          const Q product0 = multiply_low_words(c0[n], multiplier0);
          const Q product1 = multiply_low_words(c2[n], multiplier1);
          c0[n] = xor3(high_words(product1), c1[n], low_[round]);
          c1[n] = product1;
          c2[n] = xor3(high_words(product0), c3[n], high_[round]);
          c3[n] = product0;
        }
      }
      STAMINA_UNROLL
      for (int n = 0; n < kPhiloxChains; ++n) {
        store_philox(out + 4 * kCounters * (g + n), c0[n], c1[n], c2[n], c3[n]);
      }
    }
  }

 private:
  PhiloxKey key_;
  uint64_t step_product_;
  Q c0_[kCounterGroups], c1_[kCounterGroups], c2_[kCounterGroups];
  Q low_[kPhiloxRounds], high_[kPhiloxRounds];
};

inline char* address(const Matrix& m, int64_t row) {
  return static_cast<char*>(m.data) + row * m.stride * size_of(m.dtype);
}

// Asks for the row a tile below. Rows of a strip are short and far apart, which defeats the
// hardware's prefetcher; beyond the matrix the request is void.
inline void prefetch_below(const Matrix& m, int64_t row, int columns) {
  if (m.data == nullptr) return;
  const auto begin = reinterpret_cast<uintptr_t>(address(m, row)) +
                     static_cast<uintptr_t>(kTileRows * m.stride * size_of(m.dtype));
  const auto bytes = static_cast<uintptr_t>(columns * size_of(m.dtype));
  for (uintptr_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + at), 0, 2);
  }
}

// The words behind the uniforms of a tile, a row at a time.
class PhiloxRows {
 public:
  PhiloxRows(const Stream& stream, int columns)
      : first_row_(static_cast<uint32_t>(stream.row)),
        offset_(static_cast<int>(stream.column & 3)),
        groups_(static_cast<int>(
            round_up(offset_ + whole_words(columns), 4 * kCounters * kPhiloxChains) /
            (4 * kCounters))),
        vectors_(stream, groups_) {}

  const uint32_t* row(int i) {
    vectors_.write_row(first_row_ + static_cast<uint32_t>(i), groups_, words_);
    return words_ + offset_;
  }

 private:
  uint32_t first_row_;
  int offset_, groups_;
  PhiloxVectors vectors_;
  alignas(64) uint32_t words_[kPhiloxWords];
};

inline uint32_t valid_bits(int columns, int j) {
  const int valid = columns - j;
  return valid >= kWordColumns ? ~0u : (1u << valid) - 1;
}

// A row of a tile as fp32 in whole words of columns: the matrix itself where it has that form, else
// a copy, so that no vector reads or writes beyond the row.
class Row {
 public:
  Row(const Matrix& matrix, int columns)
      : matrix_(matrix),
        columns_(columns),
        direct_(matrix.dtype == DType::kFloat32 && columns % kWordColumns == 0) {}

  const float* read(int i) {
    if (direct_) return reinterpret_cast<const float*>(address(matrix_, i));
    for (int j = columns_; j < round_up(columns_, kWordColumns); ++j) buffer_[j] = 0.0f;
    copy_values({address(matrix_, i), 0, matrix_.dtype}, {buffer_, 0, DType::kFloat32}, columns_);
    return buffer_;
  }
  float* target(int i) { return direct_ ? reinterpret_cast<float*>(address(matrix_, i)) : buffer_; }
  void write(int i) {
    if (direct_) return;
    copy_values({buffer_, 0, DType::kFloat32}, {address(matrix_, i), 0, matrix_.dtype}, columns_);
  }

 private:
  Matrix matrix_;
  int columns_;
  bool direct_;
  alignas(64) float buffer_[kTileColumns];
};

}  // namespace
}  // namespace stamina::STAMINA_ISA
