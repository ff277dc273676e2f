// SPDX-License-Identifier: Apache-2.0
// embedding_mlp and its backward. A thread takes whole MLPs: results do not depend on their number.
#include "ops.h"

namespace stamina {
namespace {

// Of both passes: what mlp.h takes, each array rounded up to a line.
int64_t scratch_floats(const Mlp& mlp) {
  const int64_t width = padded_rank(mlp.width), hidden = padded_rank(mlp.hidden);
  const int64_t out = padded_rank(mlp.out);
  const int64_t rows = kMlpRows * (3 * hidden + width + out);
  const int64_t weights = 2 * out * hidden + 3 * width * hidden;
  return rows + weights + 3 * hidden + 2 * out;
}

int side_of(const Tensor& tensor, const char* name, int dim, int64_t most) {
  const int64_t size = tensor.dim() > dim ? tensor.size(dim) : 0;
  STD_TORCH_CHECK(size > 0 && size <= most, name, " must have 1 to ", most, " of dimension ", dim);
  return static_cast<int>(size);
}

const float* row_of(const Tensor& tensor, const char* name, int64_t columns) {
  check_layout(tensor, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == columns,
      name, " must be of shape [", columns, "] in float32");
  return static_cast<const float*>(tensor.data_ptr());
}

std::vector<Mlp> mlps_of(const Tensors& E, const Tensors& W1, const Tensors& b1, const Tensors& W2,
                         const Tensors& b2, const Integers& transposed) {
  const size_t n = E.size();
  STD_TORCH_CHECK(n > 0 && W1.size() == n && b1.size() == n && W2.size() == n && b2.size() == n &&
                      transposed.size() == n,
                  "embedding_mlp needs one E, W1, b1, W2, b2 and transposed per MLP");
  std::vector<Mlp> mlps(n);
  for (size_t k = 0; k < n; ++k) {
    Mlp& mlp = mlps[k];
    mlp.embedding = floats_of(E[k], "E", -1, -1);
    mlp.count = side_of(E[k], "E", 0, kMaxMlpCount);
    mlp.width = side_of(E[k], "E", 1, kMaxMlpWidth);
    mlp.hidden = side_of(W1[k], "W1", 0, kMaxMlpHidden);
    mlp.out = side_of(W2[k], "W2", 0, kMaxMlpWidth);
    mlp.weight1 = floats_of(W1[k], "W1", mlp.hidden, mlp.width);
    mlp.weight2 = floats_of(W2[k], "W2", mlp.out, mlp.hidden);
    mlp.bias1 = row_of(b1[k], "b1", mlp.hidden);
    mlp.bias2 = row_of(b2[k], "b2", mlp.out);
    mlp.transposed = transposed[k] != 0;
  }
  return mlps;
}

void run(const std::vector<Mlp>& mlps, void (*pass)(const Mlp&)) {
  parallel(static_cast<int64_t>(mlps.size()), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Mlp mlp = mlps[static_cast<size_t>(k)];
      const Scratch<float> scratch(scratch_floats(mlp));
      mlp.scratch = scratch.get();
      pass(mlp);
    }
  });
}

}  // namespace

Tensor embedding_mlp(const Tensors& E, const Tensors& W1, const Tensors& b1, const Tensors& W2,
                     const Tensors& b2, const Integers& transposed) {
  std::vector<Mlp> mlps = mlps_of(E, W1, b1, W2, b2, transposed);
  int64_t total = 0;
  for (const Mlp& mlp : mlps) total += mlp.count * mlp.out;
  Tensor flat = empty({total}, ScalarType::Float);
  auto* y = static_cast<float*>(flat.data_ptr());
  for (Mlp& mlp : mlps) {
    mlp.y = y;
    y += mlp.count * mlp.out;
  }
  run(mlps, active_kernels().mlp_forward);
  return flat;
}

std::tuple<Tensor, Tensor> embedding_mlp_backward(const Tensors& dY, const Tensors& E,
                                                  const Tensors& W1, const Tensors& b1,
                                                  const Tensors& W2, const Tensors& b2,
                                                  const Integers& transposed) {
  std::vector<Mlp> mlps = mlps_of(E, W1, b1, W2, b2, transposed);
  STD_TORCH_CHECK(dY.size() == mlps.size(), "embedding_mlp_backward needs one dY per MLP");
  int64_t embeddings = 0, parameters = 0;
  for (const Mlp& mlp : mlps) {
    embeddings += mlp.count * mlp.width;
    parameters += mlp.hidden * (mlp.width + 1) + mlp.out * (mlp.hidden + 1);
  }
  Tensor d_embeddings = empty({embeddings}, ScalarType::Float);
  Tensor d_parameters = empty({parameters}, ScalarType::Float);
  auto* next_embedding = static_cast<float*>(d_embeddings.data_ptr());
  auto* next = static_cast<float*>(d_parameters.data_ptr());
  const auto take = [&next](int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  };
  for (size_t k = 0; k < mlps.size(); ++k) {
    Mlp& mlp = mlps[k];
    mlp.dy = mlp.transposed ? floats_of(dY[k], "dY", mlp.out, mlp.count)
                            : floats_of(dY[k], "dY", mlp.count, mlp.out);
    mlp.d_embedding = next_embedding;
    next_embedding += mlp.count * mlp.width;
    mlp.d_weight1 = take(mlp.hidden * mlp.width);
    mlp.d_bias1 = take(mlp.hidden);
    mlp.d_weight2 = take(mlp.out * mlp.hidden);
    mlp.d_bias2 = take(mlp.out);
  }
  run(mlps, active_kernels().mlp_backward);
  return {d_embeddings, d_parameters};
}

}  // namespace stamina
