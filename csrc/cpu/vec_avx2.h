// SPDX-License-Identifier: Apache-2.0
// The vector wrapper on AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace stamina::avx2 {
namespace {

constexpr int kWidth = 8;
constexpr int kGemmRows = 6;
constexpr int kGemmVectors = 2;
constexpr int kInnerRows = 256;
constexpr int kPhiloxChains = 2;

using F = __m256;
using U = __m256i;
using M = __m256;  // all ones or all zeros in each lane
using Q = __m256i;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
constexpr bool kFused = true;
inline F multiply_add(F a, F b, F c) { return fma(a, b, c); }
// The second operand is returned where it is NaN.
inline F maximum(F bound, F x) { return _mm256_max_ps(bound, x); }
inline F minimum(F bound, F x) { return _mm256_min_ps(bound, x); }
inline F reciprocal(F x) { return _mm256_div_ps(set(1.0f), x); }
inline double sum(F x) {
  const __m256d pairs = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                                      _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

inline U load_words(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline U set_word(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
template <int n>
inline U shift_right(U x) {
  return _mm256_srli_epi32(x, n);
}
template <int n>
inline U shift_left(U x) {
  return _mm256_slli_epi32(x, n);
}
inline U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
inline U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
inline U add_words(U a, U b) { return _mm256_add_epi32(a, b); }
inline U as_words(F x) { return _mm256_castps_si256(x); }
inline F as_floats(U x) { return _mm256_castsi256_ps(x); }
inline F to_floats(U x) { return _mm256_cvtepi32_ps(x); }

inline M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline M not_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
// A word of 32 mask bits, and the lanes of vector v of its columns.
using Word = __m256i;
alignas(32) constexpr uint32_t kBits[32] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
    1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
    1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};
inline Word word_of(uint32_t bits) { return set_word(bits); }
inline M lanes_of(Word word, int v) {
  const U select = load_words(kBits + v * kWidth);
  return as_floats(_mm256_cmpeq_epi32(bit_and(word, select), select));
}
inline uint32_t bits_of(M mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
inline F keep(M mask, F x) { return _mm256_and_ps(mask, x); }

inline F load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store_bf16(uint16_t* p, F x) {
  const U bits = as_words(x);
  const U high = _mm256_srli_epi32(bits, 16);
  const U odd = bit_and(high, set_word(1));
  const U rounded = _mm256_srli_epi32(add_words(bits, add_words(odd, set_word(0x7FFF))), 16);
  const U nan = as_words(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const U result = _mm256_blendv_epi8(rounded, bit_or(high, set_word(64)), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline F load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_half(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

constexpr int kCounters = 4;
inline Q counter_lanes() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline Q set_lane(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
inline Q add_lanes(Q a, Q b) { return _mm256_add_epi64(a, b); }
inline Q multiply_low_words(Q a, Q b) { return _mm256_mul_epu32(a, b); }
inline Q high_words(Q x) { return as_words(_mm256_movehdup_ps(as_floats(x))); }
inline Q xor3(Q a, Q b, Q c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void store_philox(uint32_t* p, Q w0, Q w1, Q w2, Q w3) {
  const Q first = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xAA);
  const Q second = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_unpackhi_epi64(first, second));
}

}  // namespace
}  // namespace stamina::avx2
