// SPDX-License-Identifier: Apache-2.0
// Registers torch.ops.stamina_cpu through torch's stable ABI.
#include "ops.h"

namespace stamina {
namespace {

// Raised with every change of a schema below; cpu.py asks for the same.
int64_t interface_version() { return 1; }

// name "": only report. Returns the instruction set in use.
std::string instruction_set(const std::string& name) {
  if (!name.empty()) select_kernels(name.c_str());
  return active_kernels().name;
}

}  // namespace
}  // namespace stamina

STABLE_TORCH_LIBRARY(stamina_cpu, m) {
  m.def(
      "sample(Tensor[] U, Tensor[] V, Tensor[] b, Tensor seed, Tensor step, int[] layer_id,"
      " int[] row0, int[] col0, bool hard) -> Tensor");
  m.def(
      "compose(Tensor[] weight, Tensor[] A, Tensor[] B, Tensor bits, Tensor scale,"
      " ScalarType dtype) -> Tensor");
  m.def(
      "masked_linear(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] A, Tensor[] B, Tensor[] U,"
      " Tensor[] V, Tensor[] b, Tensor[] weight_init, Tensor scale, Tensor seed, Tensor step,"
      " int[] layer_id, int[] row0, int[] col0, bool hard, str sparse_kind)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "masked_linear_backward(Tensor dy, Tensor x, Tensor[] weight, Tensor[] A, Tensor[] B,"
      " Tensor[] U, Tensor[] V, Tensor[] b, Tensor[] weight_init, Tensor bits, Tensor scale,"
      " Tensor tau, Tensor seed, Tensor step, Tensor g_forget, Tensor g_sparse, int[] layer_id,"
      " int[] row0, int[] col0, bool hard, str sparse_kind, bool need_dx) -> (Tensor, Tensor)");
  m.def(
      "embedding_mlp(Tensor[] E, Tensor[] W1, Tensor[] b1, Tensor[] W2, Tensor[] b2,"
      " int[] transposed) -> Tensor");
  m.def(
      "embedding_mlp_backward(Tensor[] dY, Tensor[] E, Tensor[] W1, Tensor[] b1, Tensor[] W2,"
      " Tensor[] b2, int[] transposed) -> (Tensor, Tensor)");
  m.def(
      "fold_(Tensor(a!)[] weight, Tensor[] weight_init, Tensor[] A, Tensor[] B, float[] scale,"
      " Tensor[] bits, int[] first) -> int");
  m.def(
      "philox_words(int seed, int step, int layer_id, int row0, int col0, int rows, int columns)"
      " -> Tensor");
  m.def("instruction_set(str name) -> str");
  m.def("interface_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(stamina_cpu, CompositeExplicitAutograd, m) {
  m.impl("sample", TORCH_BOX(&stamina::sample));
  m.impl("compose", TORCH_BOX(&stamina::compose));
  m.impl("masked_linear", TORCH_BOX(&stamina::masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&stamina::masked_linear_backward));
  m.impl("embedding_mlp", TORCH_BOX(&stamina::embedding_mlp));
  m.impl("embedding_mlp_backward", TORCH_BOX(&stamina::embedding_mlp_backward));
  m.impl("fold_", TORCH_BOX(&stamina::fold_));
  m.impl("philox_words", TORCH_BOX(&stamina::philox_words));
  m.impl("instruction_set", TORCH_BOX(&stamina::instruction_set));
  m.impl("interface_version", TORCH_BOX(&stamina::interface_version));
}
