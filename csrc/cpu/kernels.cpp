// SPDX-License-Identifier: Apache-2.0
// The tile kernels; compiled once per instruction set.
//
// A tile goes through short passes that keep their operands in L1: the two low-rank products (L and
// P), an element-wise pass that draws its uniforms row by row; the backward ends with four
// contractions.
#include "kernels.h"

#include "mlp.h"
#include "tile.h"

namespace stamina::STAMINA_ISA {
namespace {

// [u < sigmoid(L)] as u e^-L < 1 - u: no division, no logarithm.
inline M sample_mask(F u, F e) { return less(mul(u, e), sub(set(1.0f), u)); }

struct RowSums {
  F forget = set(0.0f);
  F sparse = set(0.0f);
  int64_t kept = 0, overlap = 0;
};

// What the forward does with W: nothing (bits only), W + D, or W + D and the sum of (S (.) D)^2.
enum class Update { kNone, kPlain, kForgets };

struct ForwardRow {
  const float *logits, *product;
  const uint32_t* words;
  const float *weight, *initial;
  float* effective;
  uint32_t* bits;
};

// kPartial: the row ends within the word.
template <bool kHard, Sparse kSparse, Update kUpdate, bool kPartial>
inline void forward_word(const ForwardTile& t, const ForwardRow& row, int j, RowSums& sums) {
  const F zero = set(0.0f), one = set(1.0f), bias = set(t.bias), scale = set(t.scale);
  const uint32_t valid = kPartial ? valid_bits(t.columns, j) : ~0u;
  uint32_t word = 0, changed = 0;
  STAMINA_UNROLL
  for (int v = 0; v < kVectorsPerWord; ++v) {
    const int at = j + v * kWidth;
    const F logit = add(load(row.logits + at), bias);
    F e = zero;
    if (!kHard || kSparse == Sparse::kSigmoid) e = exp_negative(logit);
    const M drawn = kHard ? less(zero, logit) : sample_mask(uniform(load_words(row.words + at)), e);
    word |= bits_of(drawn) << (v * kWidth);
    if (kUpdate == Update::kNone) continue;
    const F penalty = kSparse == Sparse::kSigmoid ? reciprocal(add(one, e)) : maximum(zero, logit);
    sums.sparse = add(sums.sparse, kPartial ? keep(lanes_of(word_of(valid), v), penalty) : penalty);
    const F w = load(row.weight + at);
    const F delta = keep(drawn, mul(scale, load(row.product + at)));
    store(row.effective + at, add(w, delta));
    if (kUpdate != Update::kForgets) continue;
    const F change = sub(w, load(row.initial + at));
    const F harm = mul(change, delta);
    sums.forget = fma(harm, harm, sums.forget);
    changed |= bits_of(not_equal(change, zero)) << (v * kWidth);
  }
  word &= valid;
  row.bits[j / kWordColumns] = word;
  sums.kept += __builtin_popcount(word);
  if (kUpdate == Update::kForgets) sums.overlap += __builtin_popcount(word & changed);
}

template <bool kHard, Sparse kSparse, Update kUpdate>
void forward_rows(const ForwardTile& t, Tile& logits, Tile& product) {
  constexpr bool kReads = kUpdate != Update::kNone;
  Row weight(t.weight, t.columns), initial(t.initial, t.columns);
  PhiloxRows words(t.stream, t.columns);
  RowSums sums;
  for (int i = 0; i < t.rows; ++i) {
    prefetch_below(t.weight, i, t.columns);
    prefetch_below(t.initial, i, t.columns);
    const ForwardRow row{logits.row(i),
                         product.row(i),
                         kHard ? nullptr : words.row(i),
                         kReads ? weight.read(i) : nullptr,
                         kUpdate == Update::kForgets ? initial.read(i) : nullptr,
                         kReads ? t.effective + i * kBlockStride : nullptr,
                         t.bits + i * t.bits_stride};
    int j = 0;
    for (; j + kWordColumns <= t.columns; j += kWordColumns) {
      forward_word<kHard, kSparse, kUpdate, false>(t, row, j, sums);
    }
    if (j < t.columns) forward_word<kHard, kSparse, kUpdate, true>(t, row, j, sums);
  }
  if (!kReads) return;
  t.sums->forget += sum(sums.forget);
  t.sums->sparse += sum(sums.sparse);
  t.sums->kept += sums.kept;
  t.sums->overlap += sums.overlap;
}

template <bool kHard, Sparse kSparse>
void forward_composed(const ForwardTile& t, Tile& logits) {
  Tile product;
  multiply(t.product, t.rows, t.columns, product);
  t.initial.data != nullptr ? forward_rows<kHard, kSparse, Update::kForgets>(t, logits, product)
                            : forward_rows<kHard, kSparse, Update::kPlain>(t, logits, product);
}

template <bool kHard>
void forward_drawn(const ForwardTile& t, Tile& logits) {
  if (t.sums == nullptr) {
    // the cheaper penalty where nobody asks for the sum
    forward_rows<kHard, Sparse::kRelu, Update::kNone>(t, logits, logits);
  } else if (t.sparse == Sparse::kRelu) {
    forward_composed<kHard, Sparse::kRelu>(t, logits);
  } else {
    forward_composed<kHard, Sparse::kSigmoid>(t, logits);
  }
}

void forward(const ForwardTile& t) {
  Tile logits;
  multiply_exactly(t.logits, t.rows, t.columns, logits);
  t.stream.hard ? forward_drawn<true>(t, logits) : forward_drawn<false>(t, logits);
}

void compose(const ComposeTile& t) {
  Tile product;
  multiply(t.product, t.rows, t.columns, product);
  Row weight(t.weight, t.columns), effective(t.effective, t.columns);
  const F scale = set(t.scale);
  for (int i = 0; i < t.rows; ++i) {
    const float *p = product.row(i), *w = weight.read(i);
    float* target = effective.target(i);
    for (int j = 0; j < whole_words(t.columns); j += kWidth) {
      const Word word = word_of(t.bits[i * t.bits_stride + j / kWordColumns]);
      const M kept = lanes_of(word, j % kWordColumns / kWidth);
      store(target + j, add(load(w + j), keep(kept, mul(scale, load(p + j)))));
    }
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
  float* gradient;  // replaced by W + D
  const float *weight, *initial;
};

template <bool kForgets, bool kComposes, bool kUnitTau, bool kPartial>
inline void backward_word(const BackwardTile& t, const BackwardRow& row, int j, F& d_bias) {
  const F scale = set(t.scale), bias = set(t.bias);
  const Word word = word_of(row.bits[j / kWordColumns]);
  STAMINA_UNROLL
  for (int v = 0; v < kVectorsPerWord; ++v) {
    const int at = j + v * kWidth;
    const M kept = lanes_of(word, v);
    const F p = load(row.product + at);
    const F logit = add(load(row.logits + at), bias);
    F g = load(row.gradient + at);
    if (kForgets || kComposes) {
      const F w = load(row.weight + at);
      const F delta = keep(kept, mul(scale, p));
      if (kForgets) {
        const F change = sub(w, load(row.initial + at));
        g = fma(mul(mul(set(2.0f * t.g_forget), change), change), delta, g);
      }
      if (kComposes) store(row.gradient + at, add(w, delta));
    }
    const F scaled = mul(scale, g);
    const F e = exp_negative(logit);
    const F u = t.stream.hard ? set(0.5f) : uniform(load_words(row.words + at));
    F d_logit = mul(mul(scaled, p), soft_slope<kUnitTau>(logit, e, u, set(1.0f / t.tau)));
    if (t.g_sparse != 0.0f) {
      d_logit = fma(set(t.g_sparse), sparse_slope(t.sparse, logit, e), d_logit);
    }
    if (kPartial) d_logit = keep(lanes_of(word_of(valid_bits(t.columns, j)), v), d_logit);
    store(row.product + at, keep(kept, scaled));
    store(row.logits + at, d_logit);
    d_bias = add(d_bias, d_logit);
  }
}

template <bool kForgets, bool kComposes, bool kUnitTau>
void backward_rows(const BackwardTile& t, Tile& product, Tile& logits) {
  Row weight(t.weight, t.columns), initial(t.initial, t.columns);
  PhiloxRows words(t.stream, t.columns);
  F d_bias = set(0.0f);
  for (int i = 0; i < t.rows; ++i) {
    if (kForgets || kComposes) prefetch_below(t.weight, i, t.columns);
    if (kForgets) prefetch_below(t.initial, i, t.columns);
    const BackwardRow row{product.row(i),
                          logits.row(i),
                          t.stream.hard ? nullptr : words.row(i),
                          t.bits + i * t.bits_stride,
                          t.gradient + i * kBlockStride,
                          kForgets || kComposes ? weight.read(i) : nullptr,
                          kForgets ? initial.read(i) : nullptr};
    int j = 0;
    for (; j + kWordColumns <= t.columns; j += kWordColumns) {
      backward_word<kForgets, kComposes, kUnitTau, false>(t, row, j, d_bias);
    }
    if (j < t.columns) backward_word<kForgets, kComposes, kUnitTau, true>(t, row, j, d_bias);
  }
  *t.d_bias += sum(d_bias);
}

inline void contract(const LowRank& factors, int rows, int columns, const Tile& grad,
                     const float* right_transposed, float* d_left, float* d_right) {
  const int64_t padded = padded_rank(factors.rank);
  gemm(rows, static_cast<int>(padded), columns, {grad.values, kTileColumns, 1}, right_transposed,
       padded, Out<true>{d_left, padded});
  gemm(factors.rank, whole_words(columns), rows, {factors.left, 1, factors.rank}, grad.values,
       kTileColumns, Out<true>{d_right, kTileColumns});
}

void backward(const BackwardTile& t) {
  Tile logits, product;
  const bool forgets = t.initial.data != nullptr;
  multiply_exactly(t.logits, t.rows, t.columns, logits);
  multiply(t.product, t.rows, t.columns, product);
  constexpr decltype(&backward_rows<true, true, true>) kPasses[2][2][2] = {
      {{backward_rows<false, false, false>, backward_rows<false, false, true>},
       {backward_rows<false, true, false>, backward_rows<false, true, true>}},
      {{backward_rows<true, false, false>, backward_rows<true, false, true>},
       {backward_rows<true, true, false>, backward_rows<true, true, true>}}};
  kPasses[forgets][t.composes][t.tau == 1.0f](t, product, logits);
  contract(t.product, t.rows, t.columns, product, t.right_transposed, t.d_left, t.d_right);
  contract(t.logits, t.rows, t.columns, logits, t.logits_right_transposed, t.d_logits_left,
           t.d_logits_right);
}

// Takes c times a product where bits are set. c is not put into a factor beforehand: products of
// the committed fp16 values are exact in fp32.
struct MaskedOut {
  float* total;
  const uint32_t* bits;
  int64_t bits_stride;
  int column;
  F coefficient;

  MaskedOut below(int rows) const {
    return {total + rows * kTileColumns, bits + rows * bits_stride, bits_stride, column,
            coefficient};
  }
  MaskedOut beside(int columns) const {
    return {total + columns, bits, bits_stride, column + columns, coefficient};
  }
  void put(int i, int v, F x) const {
    const int at = column + v * kWidth;
    const Word word = word_of(bits[i * bits_stride + at / kWordColumns]);
    const M kept = lanes_of(word, at % kWordColumns / kWidth);
    float* target = total + i * kTileColumns + v * kWidth;
    store(target, add(load(target), keep(kept, mul(coefficient, x))));
  }
};

void fold(const FoldTile& t) {
  gemm(t.rows, whole_words(t.columns), t.product.rank, {t.product.left, t.product.rank, 1},
       t.product.right, kTileColumns,
       MaskedOut{t.total, t.bits, t.bits_stride, 0, set(t.coefficient)});
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

void convert(const void* source, DType from, void* target, DType to, int64_t n) {
  copy_values({const_cast<void*>(source), 0, from}, {target, 0, to}, n);
}

void philox_words(const Stream& stream, int rows, int columns, uint32_t* out) {
  PhiloxRows words(stream, columns);
  for (int i = 0; i < rows; ++i) {
    const uint32_t* row = words.row(i);
    for (int j = 0; j < columns; ++j) out[i * columns + j] = row[j];
  }
}

}  // namespace

#define STAMINA_TEXT(x) #x
#define STAMINA_NAME(x) STAMINA_TEXT(x)
extern const Kernels kernels = {STAMINA_NAME(STAMINA_ISA),
                                kPanelColumns,
                                forward,
                                compose,
                                backward,
                                fold,
                                block_product<Left>,
                                mlp_forward,
                                mlp_backward,
                                round_sum,
                                convert,
                                philox_words,
                                nullptr};

}  // namespace stamina::STAMINA_ISA
