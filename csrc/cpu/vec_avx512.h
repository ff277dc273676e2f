// SPDX-License-Identifier: Apache-2.0
// The vector wrapper on AVX-512 (F, BW, DQ, VL): 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace stamina::avx512 {
namespace {

constexpr int kWidth = 16;
constexpr int kGemmRows = 6;
constexpr int kGemmVectors = 4;
constexpr int kInnerRows = 160;
constexpr int kPhiloxChains = 4;

using F = __m512;
using U = __m512i;
using M = __mmask16;
using Q = __m512i;  // 64-bit lanes, each holding one 32-bit word of a Philox counter

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
constexpr bool kFused = true;
inline F multiply_add(F a, F b, F c) { return fma(a, b, c); }
// The second operand is returned where it is NaN.
inline F maximum(F bound, F x) { return _mm512_max_ps(bound, x); }
inline F minimum(F bound, F x) { return _mm512_min_ps(bound, x); }
// One Newton step on the 14-bit estimate: relative error below 2^-23.
inline F reciprocal(F x) {
  const F r = _mm512_rcp14_ps(x);
  return fma(r, _mm512_fnmadd_ps(x, r, set(1.0f)), r);
}
inline double sum(F x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

inline U load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline U set_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
template <int n>
inline U shift_right(U x) {
  return _mm512_srli_epi32(x, n);
}
template <int n>
inline U shift_left(U x) {
  return _mm512_slli_epi32(x, n);
}
inline U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
inline U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
inline U add_words(U a, U b) { return _mm512_add_epi32(a, b); }
inline U as_words(F x) { return _mm512_castps_si512(x); }
inline F as_floats(U x) { return _mm512_castsi512_ps(x); }
inline F to_floats(U x) { return _mm512_cvtepi32_ps(x); }

inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M not_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
// A word of 32 mask bits, and the lanes of vector v of its columns.
using Word = uint32_t;
inline Word word_of(uint32_t bits) { return bits; }
inline M lanes_of(Word word, int v) { return static_cast<M>(word >> (v * kWidth)); }
inline uint32_t bits_of(M mask) { return mask; }
inline F keep(M mask, F x) { return _mm512_maskz_mov_ps(mask, x); }

inline F load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_bf16(uint16_t* p, F x) {
  const U bits = as_words(x);
  const U odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_word(1));
  U rounded = _mm512_srli_epi32(add_words(bits, add_words(odd, set_word(0x7FFF))), 16);
  const M nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, bit_or(_mm512_srli_epi32(bits, 16), set_word(64)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

constexpr int kCounters = 8;
// The order makes the unpack instructions of store_philox write ascending counters.
inline Q counter_lanes() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline Q set_lane(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
inline Q add_lanes(Q a, Q b) { return _mm512_add_epi64(a, b); }
inline Q multiply_low_words(Q a, Q b) { return _mm512_mul_epu32(a, b); }
// The upper halves go to waste: a shuffle leaves the multiplier's port free, which a shift does
// not.
inline Q high_words(Q x) { return _mm512_castps_si512(_mm512_movehdup_ps(as_floats(x))); }
inline Q xor3(Q a, Q b, Q c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void store_philox(uint32_t* p, Q w0, Q w1, Q w2, Q w3) {
  const Q first = _mm512_mask_blend_epi32(0xAAAA, w0, _mm512_slli_epi64(w1, 32));
  const Q second = _mm512_mask_blend_epi32(0xAAAA, w2, _mm512_slli_epi64(w3, 32));
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(first, second));
}

}  // namespace
}  // namespace stamina::avx512
