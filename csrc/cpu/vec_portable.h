// SPDX-License-Identifier: Apache-2.0
// The vector wrapper in plain C++: 4 floats, loops of fixed length that compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/half.h"

namespace stamina::portable {
namespace {

constexpr int kWidth = 4;
constexpr int kGemmRows = 4;
constexpr int kGemmVectors = 2;
constexpr int kInnerRows = 256;
constexpr int kPhiloxChains = 2;

struct F {
  float v[kWidth];
};
struct U {
  uint32_t v[kWidth];
};
using M = uint32_t;  // one bit per lane
using Q = uint64_t;

template <class R, class Function>
inline R lanes(Function function) {
  R result;
  for (int i = 0; i < kWidth; ++i) result.v[i] = function(i);
  return result;
}
template <class Function>
inline M lane_bits(Function function) {
  M mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= static_cast<M>(function(i)) << i;
  return mask;
}

inline F load(const float* p) {
  return lanes<F>([=](int i) { return p[i]; });
}
inline void store(float* p, F x) {
  for (int i = 0; i < kWidth; ++i) p[i] = x.v[i];
}
inline F set(float x) {
  return lanes<F>([=](int) { return x; });
}
inline F add(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F fma(F a, F b, F c) {
  return lanes<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// Where there is no such instruction, only mask bits are worth the price of one rounding.
#if defined(__FP_FAST_FMAF)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
inline F multiply_add(F a, F b, F c) { return kFused ? fma(a, b, c) : add(mul(a, b), c); }
inline F maximum(F bound, F x) {
  return lanes<F>([&](int i) { return bound.v[i] > x.v[i] ? bound.v[i] : x.v[i]; });
}
inline F minimum(F bound, F x) {
  return lanes<F>([&](int i) { return bound.v[i] < x.v[i] ? bound.v[i] : x.v[i]; });
}
inline F reciprocal(F x) {
  return lanes<F>([&](int i) { return 1.0f / x.v[i]; });
}
inline double sum(F x) {
  return (static_cast<double>(x.v[0]) + x.v[1]) + (static_cast<double>(x.v[2]) + x.v[3]);
}

inline U load_words(const uint32_t* p) {
  return lanes<U>([=](int i) { return p[i]; });
}
inline U set_word(uint32_t x) {
  return lanes<U>([=](int) { return x; });
}
template <int n>
inline U shift_right(U x) {
  return lanes<U>([&](int i) { return x.v[i] >> n; });
}
template <int n>
inline U shift_left(U x) {
  return lanes<U>([&](int i) { return x.v[i] << n; });
}
inline U bit_or(U a, U b) {
  return lanes<U>([&](int i) { return a.v[i] | b.v[i]; });
}
inline U bit_and(U a, U b) {
  return lanes<U>([&](int i) { return a.v[i] & b.v[i]; });
}
inline U add_words(U a, U b) {
  return lanes<U>([&](int i) { return a.v[i] + b.v[i]; });
}
inline U as_words(F x) {
  return lanes<U>([&](int i) { return float_bits(x.v[i]); });
}
inline F as_floats(U x) {
  return lanes<F>([&](int i) { return bits_float(x.v[i]); });
}
inline F to_floats(U x) {
  return lanes<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(x.v[i])); });
}

inline M less(F a, F b) {
  return lane_bits([&](int i) { return a.v[i] < b.v[i]; });
}
inline M not_equal(F a, F b) {
  return lane_bits([&](int i) { return a.v[i] != b.v[i]; });
}
// A word of 32 mask bits, and the lanes of vector v of its columns.
using Word = uint32_t;
inline Word word_of(uint32_t bits) { return bits; }
inline M lanes_of(Word word, int v) { return word >> (v * kWidth) & ((1u << kWidth) - 1); }
inline uint32_t bits_of(M mask) { return mask; }
inline F keep(M mask, F x) {
  return lanes<F>([&](int i) { return (mask >> i & 1) != 0 ? x.v[i] : 0.0f; });
}

inline F load_bf16(const uint16_t* p) {
  return lanes<F>([=](int i) { return bf16_to_float(p[i]); });
}
inline void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_bf16(x.v[i]);
}
inline F load_half(const uint16_t* p) {
  return lanes<F>([=](int i) { return half_to_float(p[i]); });
}
inline void store_half(uint16_t* p, F x) {
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_half(x.v[i]);
}

constexpr int kCounters = 1;
inline Q counter_lanes() { return 0; }
inline Q set_lane(uint64_t x) { return x; }
inline Q add_lanes(Q a, Q b) { return a + b; }
inline Q multiply_low_words(Q a, Q b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline Q high_words(Q x) { return x >> 32; }
inline Q xor3(Q a, Q b, Q c) { return a ^ b ^ c; }
inline void store_philox(uint32_t* p, Q w0, Q w1, Q w2, Q w3) {
  p[0] = static_cast<uint32_t>(w0);
  p[1] = static_cast<uint32_t>(w1);
  p[2] = static_cast<uint32_t>(w2);
  p[3] = static_cast<uint32_t>(w3);
}

}  // namespace
}  // namespace stamina::portable
