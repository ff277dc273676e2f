// SPDX-License-Identifier: Apache-2.0
// Products of pairs of bf16 values by AVX-512's extension for them (VDPBF16PS).
#include "gemm.h"
#include "kernels.h"

namespace stamina::avx512 {
namespace {

struct PairLeft : Left {
  PairLeft below(int rows) const { return {Left::below(rows)}; }
  static F accumulate(F factor, F row, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(factor),
                            reinterpret_cast<__m512bh>(row));
  }
};

// Subnormal numbers become zero, as which the product takes them anyway.
inline __m256i round_to_bf16(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline U in_low_halves(F x) { return _mm512_cvtepu16_epi32(round_to_bf16(x)); }

void pair_columns(float* block, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = block + i * kBlockStride;
    if (columns % 2 != 0) row[columns] = 0.0f;
    for (int64_t j = 0; j < columns; j += kWidth) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j / 2), round_to_bf16(load(row + j)));
    }
  }
}

void pair_rows(float* block, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float* row = block + i * kBlockStride;
    float* target = block + i / 2 * kBlockStride;
    const bool last = i + 1 == rows;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const U low = in_low_halves(load(row + j));
      const U high = last ? set_word(0) : in_low_halves(load(row + kBlockStride + j));
      store(target + j, as_floats(bit_or(low, shift_left<16>(high))));
    }
  }
}

}  // namespace

extern const PairProducts pairs = {block_product<PairLeft>, pair_columns, pair_rows};

}  // namespace stamina::avx512
