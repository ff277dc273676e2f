// SPDX-License-Identifier: Apache-2.0
// The tile kernels; compiled once per instruction set.
//
// A tile goes through short passes that each keep their operands in L1: the two low-rank products
// (L and P), the Philox words, then element-wise passes; the backward ends with four contractions.
#include "kernels.h"

#include "tile.h"

namespace stamina::STAMINA_ISA {
namespace {

// [u < sigmoid(L)] as u e^-L < 1 - u: no division, no logarithm.
inline M sample_mask(F u, F e) { return less(mul(u, e), sub(set(1.0f), u)); }

struct VectorSums {
  F forget = set(0.0f);
  F sparse = set(0.0f);
};

template <bool kHard, Sparse kSparse>
inline void draw_row(const ForwardTile& t, float* logits, const uint32_t* words, uint32_t* bits,
                     VectorSums& sums) {
  const F zero = set(0.0f), one = set(1.0f), bias = set(t.bias);
  F sparse = sums.sparse;
  for (int j = 0; j < t.columns; j += kWordColumns) {
    const uint32_t valid = valid_bits(t.columns, j);
    uint32_t word = 0;
    for (int v = 0; v < kVectorsPerWord; ++v) {
      const F logit = add(load(logits + j + v * kWidth), bias);
      F e = zero;
      if (!kHard || kSparse == Sparse::kSigmoid) e = exp_negative(logit);
      const M drawn =
          kHard ? less(zero, logit) : sample_mask(uniform(load_words(words + j + v * kWidth)), e);
      word |= bits_of(drawn) << (v * kWidth);
      const F penalty =
          kSparse == Sparse::kSigmoid ? reciprocal(add(one, e)) : maximum(zero, logit);
      sparse = add(sparse, keep(lane_mask(valid, v), penalty));
    }
    bits[j / kWordColumns] = word & valid;
  }
  sums.sparse = sparse;
}

// W + s M (.) P on a row; with kForgets also the sum of (S (.) D)^2 and the count of kept weights
// that had changed.
template <bool kForgets>
inline int compose_row(int columns, float scale, const float* product, const uint32_t* bits,
                       const float* weight, const float* initial, float* effective,
                       VectorSums& sums) {
  const F zero = set(0.0f), factor = set(scale);
  F forget = sums.forget;
  int overlap = 0;
  for (int j = 0; j < columns; j += kWordColumns) {
    const uint32_t word = bits[j / kWordColumns];
    uint32_t changed = 0;
    for (int v = 0; v < kVectorsPerWord; ++v) {
      const int at = j + v * kWidth;
      const F w = load(weight + at);
      const F delta = keep(lane_mask(word, v), mul(factor, load(product + at)));
      store(effective + at, add(w, delta));
      if (!kForgets) continue;
      const F change = sub(w, load(initial + at));
      const F harm = mul(change, delta);
      forget = fma(harm, harm, forget);
      changed |= bits_of(not_equal(change, zero)) << (v * kWidth);
    }
    overlap += __builtin_popcount(changed & word);
  }
  sums.forget = forget;
  return overlap;
}

template <bool kHard, Sparse kSparse>
void draw_tile(const ForwardTile& t, Tile& logits, const PhiloxTile& words, VectorSums& sums) {
  for (int i = 0; i < t.rows; ++i) {
    draw_row<kHard, kSparse>(t, logits.row(i), words.row(i), t.bits + i * t.bits_stride, sums);
  }
}

template <bool kForgets>
void compose_tile(const ForwardTile& t, Tile& product, VectorSums& sums) {
  Row weight(t.weight, t.columns), initial(t.initial, t.columns), effective(t.effective, t.columns);
  for (int i = 0; i < t.rows; ++i) {
    prefetch_row(t.initial, i + kTileRows, t.columns);
    const uint32_t* bits = t.bits + i * t.bits_stride;
    t.sums->overlap +=
        compose_row<kForgets>(t.columns, t.scale, product.row(i), bits, weight.read(i),
                              kForgets ? initial.read(i) : nullptr, effective.target(i), sums);
    effective.write(i);
    for (int j = 0; j < t.columns; j += kWordColumns) {
      t.sums->kept += __builtin_popcount(bits[j / kWordColumns]);
    }
  }
}

void forward(const ForwardTile& t) {
  Tile values;
  PhiloxTile words;
  VectorSums sums;
  multiply(t.logits, t.rows, t.columns, values);
  philox_tile(t.stream, t.rows, t.columns, t.weight, words);
  // the cheaper penalty where nobody asks for the sum
  const bool relu = t.sums == nullptr || t.sparse == Sparse::kRelu;
  if (t.stream.hard) {
    relu ? draw_tile<true, Sparse::kRelu>(t, values, words, sums)
         : draw_tile<true, Sparse::kSigmoid>(t, values, words, sums);
  } else {
    relu ? draw_tile<false, Sparse::kRelu>(t, values, words, sums)
         : draw_tile<false, Sparse::kSigmoid>(t, values, words, sums);
  }
  if (t.sums == nullptr) return;
  multiply(t.product, t.rows, t.columns, values);
  t.initial.data != nullptr ? compose_tile<true>(t, values, sums)
                            : compose_tile<false>(t, values, sums);
  t.sums->forget += sum(sums.forget);
  t.sums->sparse += sum(sums.sparse);
}

void compose(const ComposeTile& t) {
  Tile product;
  VectorSums unused;
  multiply(t.product, t.rows, t.columns, product);
  Row weight(t.weight, t.columns), effective(t.effective, t.columns);
  for (int i = 0; i < t.rows; ++i) {
    compose_row<false>(t.columns, t.scale, product.row(i), t.bits + i * t.bits_stride,
                       weight.read(i), nullptr, effective.target(i), unused);
    effective.write(i);
  }
}

// z (1 - z) / tau with z = sigmoid((L - logit u) / tau). At tau = 1, z = (1-u) / ((1-u) + u e^-L).
template <bool kUnitTau>
inline F soft_slope(F logit, F e, F u, F inverse_tau) {
  const F rest = sub(set(1.0f), u);
  if (kUnitTau) {
    const F against = mul(u, e);
    const F r = reciprocal(add(rest, against));
    return mul(mul(rest, r), mul(against, r));
  }
  const F noise = sub(log_positive(u), log_positive(rest));
  const F odds = exp_negative(mul(sub(logit, noise), inverse_tau));
  const F z = reciprocal(add(set(1.0f), odds));
  return mul(mul(mul(odds, z), z), inverse_tau);
}

inline F sparse_slope(Sparse kind, F logit, F e) {
  if (kind == Sparse::kRelu) return keep(less(set(0.0f), logit), set(1.0f));
  const F r = reciprocal(add(set(1.0f), e));
  return mul(mul(e, r), r);
}

// The rows that the element-wise pass of the backward reads and writes.
struct BackwardRow {
  float *product, *logits;  // replaced by s M (.) G and dL
  const uint32_t *words, *bits;
  const float *gradient, *weight, *initial;
  float* effective;
};

template <bool kForgets, bool kComposes, bool kUnitTau>
inline F backward_row(const BackwardTile& t, const BackwardRow& row) {
  const F scale = set(t.scale), bias = set(t.bias), g_sparse = set(t.g_sparse);
  const F inverse_tau = set(1.0f / t.tau);
  const F twice_g_forget = set(2.0f * t.g_forget);
  const bool hard = t.stream.hard, penalised = t.g_sparse != 0.0f;
  const Sparse kind = t.sparse;
  F d_bias = set(0.0f);
  for (int j = 0; j < t.columns; j += kWordColumns) {
    const uint32_t inside = valid_bits(t.columns, j);
    const uint32_t word = row.bits[j / kWordColumns];
    for (int v = 0; v < kVectorsPerWord; ++v) {
      const int at = j + v * kWidth;
      const M kept = lane_mask(word, v);
      const F p = load(row.product + at);
      const F logit = add(load(row.logits + at), bias);
      F g = load(row.gradient + at);
      if (kForgets || kComposes) {
        const F w = load(row.weight + at);
        const F delta = keep(kept, mul(scale, p));
        if (kForgets) {
          const F change = sub(w, load(row.initial + at));
          g = fma(mul(mul(twice_g_forget, change), change), delta, g);
        }
        if (kComposes) store(row.effective + at, add(w, delta));
      }
      const F scaled = mul(scale, g);
      const F e = exp_negative(logit);
      const F u = hard ? set(0.5f) : uniform(load_words(row.words + at));
      F d_logit = mul(mul(scaled, p), soft_slope<kUnitTau>(logit, e, u, inverse_tau));
      if (penalised) d_logit = fma(g_sparse, sparse_slope(kind, logit, e), d_logit);
      d_logit = keep(lane_mask(inside, v), d_logit);
      store(row.product + at, keep(kept, scaled));
      store(row.logits + at, d_logit);
      d_bias = add(d_bias, d_logit);
    }
  }
  return d_bias;
}

template <bool kForgets, bool kComposes, bool kUnitTau>
void backward_rows(const BackwardTile& t, Tile& product, Tile& logits, const PhiloxTile& words) {
  Row weight(t.weight, t.columns), initial(t.initial, t.columns), effective(t.effective, t.columns),
      gradient(t.gradient, t.columns);
  F d_bias = set(0.0f);
  for (int i = 0; i < t.rows; ++i) {
    prefetch_row(t.initial, i + kTileRows, t.columns);
    const BackwardRow row{product.row(i),
                          logits.row(i),
                          words.row(i),
                          t.bits + i * t.bits_stride,
                          gradient.read(i),
                          kForgets || kComposes ? weight.read(i) : nullptr,
                          kForgets ? initial.read(i) : nullptr,
                          kComposes ? effective.target(i) : nullptr};
    d_bias = add(d_bias, backward_row<kForgets, kComposes, kUnitTau>(t, row));
    if (kComposes) effective.write(i);
  }
  *t.d_bias += sum(d_bias);
}

inline void contract(const LowRank& factors, int rows, int columns, const Tile& grad,
                     const float* right_transposed, float* d_left, float* d_right) {
  const int64_t padded = padded_rank(factors.rank);
  gemm<true>(rows, static_cast<int>(padded), columns, {grad.values, kTileColumns, 1},
             right_transposed, padded, d_left, padded);
  gemm<true>(factors.rank, columns, rows, {factors.left, 1, factors.rank}, grad.values,
             kTileColumns, d_right, kTileColumns);
}

void backward(const BackwardTile& t) {
  Tile logits, product;
  PhiloxTile words;
  multiply(t.logits, t.rows, t.columns, logits);
  multiply(t.product, t.rows, t.columns, product);
  philox_tile(t.stream, t.rows, t.columns, t.weight, words);
  constexpr decltype(&backward_rows<true, true, true>) kPasses[2][2][2] = {
      {{backward_rows<false, false, false>, backward_rows<false, false, true>},
       {backward_rows<false, true, false>, backward_rows<false, true, true>}},
      {{backward_rows<true, false, false>, backward_rows<true, false, true>},
       {backward_rows<true, true, false>, backward_rows<true, true, true>}}};
  kPasses[t.initial.data != nullptr][t.effective.data != nullptr][t.tau == 1.0f](t, product, logits,
                                                                                 words);
  contract(t.product, t.rows, t.columns, product, t.right_transposed, t.d_left, t.d_right);
  contract(t.logits, t.rows, t.columns, logits, t.logits_right_transposed, t.d_logits_left,
           t.d_logits_right);
}

void fold(const FoldTile& t) {
  Tile product;
  multiply(t.product, t.rows, t.columns, product);
  const F coefficient = set(t.coefficient);
  for (int i = 0; i < t.rows; ++i) {
    for (int j = 0; j < t.columns; j += kWordColumns) {
      const uint32_t bits = t.bits[i * t.bits_stride + j / kWordColumns];
      for (int v = 0; v < kVectorsPerWord; ++v) {
        float* total = t.total + i * kTileColumns + j + v * kWidth;
        const F delta = mul(coefficient, load(product.row(i) + j + v * kWidth));
        store(total, add(load(total), keep(lane_mask(bits, v), delta)));
      }
    }
  }
}

bool round_sum(const float* total, const void* source, void* target, int columns, DType dtype) {
  Row in({const_cast<void*>(source), 0, dtype}, columns), out({target, 0, dtype}, columns);
  const float* values = in.read(0);
  float* results = out.target(0);
  for (int j = 0; j < columns; j += kWidth) {
    store(results + j, add(load(values + j), load(total + j)));
  }
  out.write(0);
  values = out.read(0);
  uint32_t broken = 0;
  for (int j = 0; j < columns; j += kWidth) {
    const F rounded = load(values + j);
    // x - x is 0 exactly where x is finite
    broken |= bits_of(not_equal(sub(rounded, rounded), set(0.0f)));
  }
  return broken == 0;
}

void to_float(const void* source, float* target, int64_t n, DType dtype) {
  copy_values({const_cast<void*>(source), 0, dtype}, {target, 0, DType::kFloat32}, n);
}

void philox_words(const Stream& stream, int rows, int columns, uint32_t* out) {
  PhiloxTile words;
  philox_tile(stream, rows, columns, {}, words);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out[i * columns + j] = words.row(i)[j];
  }
}

}  // namespace

#define STAMINA_TEXT(x) #x
#define STAMINA_NAME(x) STAMINA_TEXT(x)
extern const Kernels kernels = {
    STAMINA_NAME(STAMINA_ISA), forward, compose, backward, fold, round_sum, to_float, philox_words};

}  // namespace stamina::STAMINA_ISA
