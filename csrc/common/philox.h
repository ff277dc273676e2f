// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, the counter-based generator of every mask bit, in plain C++ for host and device.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//
//   key     = (seed low 32 bits, seed high 32 bits)
//   counter = (j >> 2, i, step mod 2^32, layer id)      i, j: global row and column
//   u       = (2 (w >> 9) + 1) 2^-24                    w = output word j & 3
#pragma once

#include <cstdint>

#include "target.h"

namespace stamina {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t low, high;
};

// counter is replaced by the four output words.
STAMINA_HOST_DEVICE inline void philox4x32(uint32_t counter[4], PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key.low;
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key.high;
    counter[3] = static_cast<uint32_t>(product0);
    key.low += kPhiloxWeyl0;
    key.high += kPhiloxWeyl1;
  }
}

// Exact in fp32, strictly inside (0, 1).
STAMINA_HOST_DEVICE inline float uniform_of_word(uint32_t word) {
  return static_cast<float>(2 * (word >> 9) + 1) * 0x1p-24f;
}

}  // namespace stamina
