// SPDX-License-Identifier: Apache-2.0
// The operations behind torch.ops.stamina_cpu; stamina_kernels/reference.py defines them.
#pragma once

#include <tuple>

#include "tensors.h"

namespace stamina {

Tensor sample(const Tensors& U, const Tensors& V, const Tensors& b, const Tensor& seed,
              const Tensor& step, const Integers& layer_id, const Integers& row0,
              const Integers& col0, bool hard);

Tensor compose(const Tensors& weight, const Tensors& A, const Tensors& B, const Tensor& bits,
               const Tensor& scale, ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_linear(
    const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& A, const Tensors& B,
    const Tensors& U, const Tensors& V, const Tensors& b, const Tensors& weight_init,
    const Tensor& scale, const Tensor& seed, const Tensor& step, const Integers& layer_id,
    const Integers& row0, const Integers& col0, bool hard, const std::string& sparse_kind);

std::tuple<Tensor, Tensor> masked_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensors& weight, const Tensors& A, const Tensors& B,
    const Tensors& U, const Tensors& V, const Tensors& b, const Tensors& weight_init,
    const Tensor& bits, const Tensor& scale, const Tensor& tau, const Tensor& seed,
    const Tensor& step, const Tensor& g_forget, const Tensor& g_sparse, const Integers& layer_id,
    const Integers& row0, const Integers& col0, bool hard, const std::string& sparse_kind,
    bool need_dx);

Tensor embedding_mlp(const Tensors& E, const Tensors& W1, const Tensors& b1, const Tensors& W2,
                     const Tensors& b2, const Integers& transposed);

std::tuple<Tensor, Tensor> embedding_mlp_backward(const Tensors& dY, const Tensors& E,
                                                  const Tensors& W1, const Tensors& b1,
                                                  const Tensors& W2, const Tensors& b2,
                                                  const Integers& transposed);

// Index of the first layer that overflows its dtype (everything is then restored), or -1.
int64_t fold_(const Tensors& weight, const Tensors& weight_init, const Tensors& A, const Tensors& B,
              const std::vector<double>& scale, const Tensors& bits, const Integers& first);

// Philox words behind the uniforms u(row0 + i, col0 + j), int32 [rows, columns].
Tensor philox_words(int64_t seed, int64_t step, int64_t layer_id, int64_t row0, int64_t col0,
                    int64_t rows, int64_t columns);

inline Sparse sparse_of(const std::string& kind) {
  STD_TORCH_CHECK(kind == "sigmoid" || kind == "relu", "sparse_kind must be 'sigmoid' or 'relu'");
  return kind == "relu" ? Sparse::kRelu : Sparse::kSigmoid;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty({shape.data(), shape.size()}, type);
}

}  // namespace stamina
