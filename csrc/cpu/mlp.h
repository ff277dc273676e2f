// SPDX-License-Identifier: Apache-2.0
// Small MLPs over embeddings, in blocks of rows whose arrays stay in L1 and L2. Every array of the
// scratch has rows of whole lines, zero beyond the last value.
#pragma once

#include "gemm.h"

namespace stamina::STAMINA_ISA {
namespace {

class MlpPass {
 public:
  explicit MlpPass(const Mlp& mlp)
      : mlp_(mlp),
        width_(padded_rank(mlp.width)),
        hidden_(padded_rank(mlp.hidden)),
        out_(padded_rank(mlp.out)),
        free_(mlp.scratch),
        weight1_transposed_(take(mlp.width * hidden_)),
        bias1_(take(hidden_)),
        linear_(take(kMlpRows * hidden_)),
        active_(take(kMlpRows * hidden_)),
        outputs_(take(kMlpRows * out_)) {
    transpose(mlp.weight1, mlp.hidden, mlp.width, weight1_transposed_, hidden_);
    pad(mlp.bias1, 1, mlp.hidden, bias1_, hidden_);
  }

  void forward() {
    float* weight2 = take(mlp_.hidden * out_);
    float* bias2 = take(out_);
    transpose(mlp_.weight2, mlp_.out, mlp_.hidden, weight2, out_);
    pad(mlp_.bias2, 1, mlp_.out, bias2, out_);
    for (int64_t first = 0; first < mlp_.count; first += kMlpRows) {
      const int rows = rows_from(first);
      activate(first, rows);
      gemm(rows, static_cast<int>(out_), mlp_.hidden, {active_, hidden_, 1}, weight2, out_,
           Out<false>{outputs_, out_});
      for (int i = 0; i < rows; ++i) {
        for (int k = 0; k < mlp_.out; ++k) {
          mlp_.y[position(first + i, k)] = outputs_[i * out_ + k] + bias2[k];
        }
      }
    }
  }

  void backward() {
    float *weight1 = take(mlp_.hidden * width_), *weight2 = take(mlp_.out * hidden_);
    float *slopes = take(kMlpRows * hidden_), *embeddings = take(kMlpRows * width_);
    float *d_weight1 = zeros(mlp_.hidden * width_), *d_bias1 = zeros(hidden_);
    float *d_weight2 = zeros(mlp_.out * hidden_), *d_bias2 = zeros(out_);
    pad(mlp_.weight1, mlp_.hidden, mlp_.width, weight1, width_);
    pad(mlp_.weight2, mlp_.out, mlp_.hidden, weight2, hidden_);
    for (int64_t first = 0; first < mlp_.count; first += kMlpRows) {
      const int rows = rows_from(first);
      activate(first, rows);
      for (int i = 0; i < rows; ++i) {
        for (int k = 0; k < out_; ++k) {
          outputs_[i * out_ + k] = k < mlp_.out ? mlp_.dy[position(first + i, k)] : 0.0f;
        }
      }
      gemm(mlp_.out, static_cast<int>(hidden_), rows, {outputs_, 1, out_}, active_, hidden_,
           Out<true>{d_weight2, hidden_});
      add_rows(outputs_, rows, out_, d_bias2);
      // active_ has served: from here on it holds the gradient of the linear layer
      slope(rows, slopes);
      gemm(rows, static_cast<int>(hidden_), mlp_.out, {outputs_, out_, 1}, weight2, hidden_,
           Out<false>{active_, hidden_});
      for (int64_t j = 0; j < rows * hidden_; j += kWidth) {
        store(active_ + j, mul(load(active_ + j), load(slopes + j)));
      }
      add_rows(active_, rows, hidden_, d_bias1);
      pad(mlp_.embedding + first * mlp_.width, rows, mlp_.width, embeddings, width_);
      gemm(mlp_.hidden, static_cast<int>(width_), rows, {active_, 1, hidden_}, embeddings, width_,
           Out<true>{d_weight1, width_});
      gemm(rows, static_cast<int>(width_), mlp_.hidden, {active_, hidden_, 1}, weight1, width_,
           Out<false>{embeddings, width_});
      crop(embeddings, rows, width_, mlp_.d_embedding + first * mlp_.width, mlp_.width);
    }
    crop(d_weight1, mlp_.hidden, width_, mlp_.d_weight1, mlp_.width);
    crop(d_bias1, 1, hidden_, mlp_.d_bias1, mlp_.hidden);
    crop(d_weight2, mlp_.out, hidden_, mlp_.d_weight2, mlp_.hidden);
    crop(d_bias2, 1, out_, mlp_.d_bias2, mlp_.out);
  }

 private:
  float* take(int64_t floats) {
    float* taken = free_;
    free_ += round_up(floats, kLineFloats);
    return taken;
  }
  float* zeros(int64_t floats) {
    float* taken = take(floats);
    for (int64_t j = 0; j < floats; ++j) taken[j] = 0.0f;
    return taken;
  }

  int rows_from(int64_t first) const {
    const int64_t left = mlp_.count - first;
    return static_cast<int>(left < kMlpRows ? left : kMlpRows);
  }
  // Of Y[row, k], or of Y^T[k, row].
  int64_t position(int64_t row, int64_t k) const {
    return mlp_.transposed ? k * mlp_.count + row : row * mlp_.out + k;
  }

  // linear_ = E W1^T + b1, active_ = silu of it; zero beyond the hidden layer, where b1 is.
  void activate(int64_t first, int rows) {
    gemm(rows, static_cast<int>(hidden_), mlp_.width,
         {mlp_.embedding + first * mlp_.width, mlp_.width, 1}, weight1_transposed_, hidden_,
         Out<false>{linear_, hidden_});
    for (int i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < hidden_; j += kWidth) {
        float* at = linear_ + i * hidden_ + j;
        const F z = add(load(at), load(bias1_ + j));
        store(at, z);
        store(active_ + i * hidden_ + j, mul(z, sigmoid(z)));
      }
    }
  }

  // silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
  void slope(int rows, float* slopes) const {
    const F one = set(1.0f);
    for (int64_t j = 0; j < rows * hidden_; j += kWidth) {
      const F z = load(linear_ + j), s = sigmoid(z);
      store(slopes + j, mul(s, fma(z, sub(one, s), one)));
    }
  }

  static F sigmoid(F z) { return reciprocal(add(set(1.0f), exp_negative(z))); }

  // A block's sum is added as a whole: a long sum is a sum of short chains.
  static void add_rows(const float* from, int rows, int64_t stride, float* sums) {
    for (int64_t j = 0; j < stride; j += kWidth) {
      F block = set(0.0f);
      for (int i = 0; i < rows; ++i) block = add(block, load(from + i * stride + j));
      store(sums + j, add(load(sums + j), block));
    }
  }
  static void pad(const float* from, int rows, int columns, float* to, int64_t stride) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < stride; ++j) {
        to[i * stride + j] = j < columns ? from[i * columns + j] : 0.0f;
      }
    }
  }
  static void crop(const float* from, int rows, int64_t stride, float* to, int columns) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) to[i * columns + j] = from[i * stride + j];
    }
  }
  static void transpose(const float* from, int rows, int columns, float* to, int64_t stride) {
    for (int j = 0; j < columns; ++j) {
      for (int i = 0; i < stride; ++i) {
        to[j * stride + i] = i < rows ? from[i * columns + j] : 0.0f;
      }
    }
  }

  const Mlp& mlp_;
  const int64_t width_, hidden_, out_;
  float* free_;
  float *weight1_transposed_, *bias1_, *linear_, *active_, *outputs_;
};

void mlp_forward(const Mlp& mlp) { MlpPass(mlp).forward(); }
void mlp_backward(const Mlp& mlp) { MlpPass(mlp).backward(); }

}  // namespace
}  // namespace stamina::STAMINA_ISA
