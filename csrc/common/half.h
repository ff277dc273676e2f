// SPDX-License-Identifier: Apache-2.0
// fp16 and bf16 as raw 16-bit words: conversions with round-to-nearest-even, exact on subnormals.
// Devices have instructions for all but bf16 to fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "target.h"

namespace stamina {

STAMINA_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

STAMINA_HOST_DEVICE inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

STAMINA_HOST_DEVICE inline float bf16_to_float(uint16_t x) {
  return bits_float(static_cast<uint32_t>(x) << 16);
}

STAMINA_HOST_DEVICE inline uint16_t float_to_bf16(float x) {
#ifdef __CUDA_ARCH__
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
#else
  const uint32_t bits = float_bits(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}

STAMINA_HOST_DEVICE inline float half_to_float(uint16_t x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7FFF;
  // below 2^-14 the value is a whole number of 2^-24; no fp32 subnormal ever appears, because a
  // program may have made the processor flush those to zero
  if (magnitude < 0x400) {
    return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  if (magnitude < 0x7C00) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  return bits_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
#endif
}

STAMINA_HOST_DEVICE inline uint16_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
#else
  const uint16_t sign = static_cast<uint16_t>((float_bits(x) >> 16) & 0x8000);
  const uint32_t magnitude = float_bits(x) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {
    // below 2^-14 the grid is 2^-24: adding 1/2 makes the hardware round to it
    return static_cast<uint16_t>(sign |
                                 (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
#endif
}

}  // namespace stamina
