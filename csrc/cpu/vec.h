// SPDX-License-Identifier: Apache-2.0
// The vector wrapper of the instruction set that this file is compiled for, and the maths on it.
// Every step is an explicit operation (contraction is off), so that all instruction sets decide the
// same mask bits.
#pragma once

#if defined(STAMINA_ISA_AVX512)
#include "vec_avx512.h"
#define STAMINA_ISA avx512
#elif defined(STAMINA_ISA_AVX2)
#include "vec_avx2.h"
#define STAMINA_ISA avx2
#else
#include "vec_portable.h"
#define STAMINA_ISA portable
#endif

#include "kernels.h"

namespace stamina::STAMINA_ISA {
namespace {

constexpr float kLn2High = 0x1.62e4p-1f;  // 14 bits: n * kLn2High is exact for |n| < 2^10
constexpr float kLn2Low = 0x1.7f7d1cp-20f;

// e^-x for |x| <= 87, clamped there (NaN stays): relative error below 9e-8, measured on 4 10^7 x.
// e^-x = 2^n e^-q with q = x + n ln 2, |q| <= ln(2)/2, and a polynomial in q (Cephes' expf).
inline F exp_negative(F x) {
  const F shift = set(0x1.8p23f);  // adding it rounds to an integer in the low mantissa bits
  const F clamped = minimum(set(87.0f), maximum(set(-87.0f), x));
  const F shifted = fma(clamped, set(-1.44269504f), shift);
  const F n = sub(shifted, shift);
  const F q = fma(n, set(kLn2Low), fma(n, set(kLn2High), clamped));
  F p = fma(set(1.9875691500e-4f), q, set(-1.3981999507e-3f));
  p = fma(p, q, set(8.3334519073e-3f));
  p = fma(p, q, set(-4.1665795894e-2f));
  p = fma(p, q, set(1.6666665459e-1f));
  p = fma(p, q, set(-5.0000001201e-1f));
  const F e = sub(set(1.0f), fma(mul(p, q), q, q));
  return as_floats(add_words(shift_left<23>(as_words(shifted)), as_words(e)));
}

// log x for normal x > 0: relative error below 9e-8, measured on every u (Cephes' logf).
inline F log_positive(F x) {
  // x = 2^n y with y in [sqrt(1/2), sqrt(2))
  const U offset = add_words(as_words(x), set_word(0x3F800000u - 0x3F3504F3u));
  const F n = sub(to_floats(shift_right<23>(offset)), set(127.0f));
  const U mantissa = add_words(bit_and(offset, set_word(0x007FFFFFu)), set_word(0x3F3504F3u));
  const F y = sub(as_floats(mantissa), set(1.0f));
  F p = fma(set(7.0376836292e-2f), y, set(-1.1514610310e-1f));
  p = fma(p, y, set(1.1676998740e-1f));
  p = fma(p, y, set(-1.2420140846e-1f));
  p = fma(p, y, set(1.4249322787e-1f));
  p = fma(p, y, set(-1.6668057665e-1f));
  p = fma(p, y, set(2.0000714765e-1f));
  p = fma(p, y, set(-2.4999993993e-1f));
  p = fma(p, y, set(3.3333331174e-1f));
  const F square = mul(y, y);
  const F tail = fma(mul(p, y), square, mul(set(-0.5f), square));
  return fma(n, set(0x1.62e43p-1f), add(y, fma(n, set(-0x1.05c61p-29f), tail)));
}

// u = (2 (w >> 9) + 1) 2^-24, exactly: 1 + (w >> 9) 2^-23 as a bit pattern, less 1 - 2^-24.
inline F uniform(U word) {
  const U one_to_two = bit_or(shift_right<9>(word), set_word(0x3F800000u));
  return sub(as_floats(one_to_two), set(1.0f - 0x1p-24f));
}

inline F load_as(const Matrix& m, int64_t index) {
  if (m.dtype == DType::kFloat32) return load(static_cast<const float*>(m.data) + index);
  const uint16_t* p = static_cast<const uint16_t*>(m.data) + index;
  return m.dtype == DType::kBFloat16 ? load_bf16(p) : load_half(p);
}

inline void store_as(const Matrix& m, int64_t index, F x) {
  if (m.dtype == DType::kFloat32) return store(static_cast<float*>(m.data) + index, x);
  uint16_t* p = static_cast<uint16_t*>(m.data) + index;
  return m.dtype == DType::kBFloat16 ? store_bf16(p, x) : store_half(p, x);
}

inline void copy_bytes(const char* source, char* target, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) target[i] = source[i];
}

// n values from one dtype to another, rounded to nearest even; touches nothing beyond them.
inline void copy_values(const Matrix& from, const Matrix& to, int64_t n) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) store_as(to, j, load_as(from, j));
  if (j == n) return;
  float in[kWidth] = {}, out[kWidth];
  const int64_t from_size = size_of(from.dtype), to_size = size_of(to.dtype);
  copy_bytes(static_cast<const char*>(from.data) + j * from_size, reinterpret_cast<char*>(in),
             (n - j) * from_size);
  store_as({out, 0, to.dtype}, 0, load_as({in, 0, from.dtype}, 0));
  copy_bytes(reinterpret_cast<const char*>(out), static_cast<char*>(to.data) + j * to_size,
             (n - j) * to_size);
}

}  // namespace
}  // namespace stamina::STAMINA_ISA
