// SPDX-License-Identifier: Apache-2.0
// What the operations need from torch, through its stable ABI: checked views of tensors, matrix
// products on raw memory, scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#ifdef __SANITIZE_THREAD__
#include <thread>
#endif
#include <vector>

#include "kernels.h"

namespace stamina {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

inline ScalarType scalar_type(DType dtype) {
  if (dtype == DType::kFloat32) return ScalarType::Float;
  return dtype == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

inline DType dtype_of(ScalarType type, const char* name) {
  if (type == ScalarType::Float) return DType::kFloat32;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return DType::kFloat16;
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  return dtype_of(tensor.scalar_type(), name);
}

inline void check_layout(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Data of a contiguous CPU tensor of the given type; a negative size matches any.
template <class T>
inline T* data_of(const Tensor& tensor, const char* name, ScalarType type, int64_t rows,
                  int64_t columns) {
  check_layout(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 2 && (rows < 0 || tensor.size(0) == rows) &&
                      (columns < 0 || tensor.size(1) == columns),
                  name, " must be of shape [", rows, ", ", columns, "]");
  return static_cast<T*>(tensor.data_ptr());
}

inline float* floats_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  return data_of<float>(tensor, name, ScalarType::Float, rows, columns);
}

template <class T>
inline T scalar_of(const Tensor& tensor, const char* name, ScalarType type) {
  check_layout(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == type, name,
                  " must be one value of the right dtype");
  return *static_cast<const T*>(tensor.data_ptr());
}

inline float float_of(const Tensor& tensor, const char* name) {
  return scalar_of<float>(tensor, name, ScalarType::Float);
}

inline Matrix matrix_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  const DType dtype = dtype_of(tensor, name);
  return {data_of<void>(tensor, name, tensor.scalar_type(), rows, columns), tensor.size(1), dtype};
}

// Uninitialised memory on cache lines, freed with the block that holds it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, static_cast<size_t>(round_up(count * sizeof(T) + 1, 64))))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// A strided matrix in raw memory for the vendor's matrix product.
struct Operand {
  void* data;
  int64_t rows, columns, row_stride, column_stride;

  Operand transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

inline void* offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

inline Tensor view_of(const Operand& m, DType dtype) {
  const int64_t sizes[] = {m.rows, m.columns};
  const int64_t strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type(dtype));
}

// out = left right (+ bias, a row repeated). The shim calls the CPU kernel itself: no dispatcher,
// hence no thread-local mode (autocast, inference, gradients) can interfere from a pool thread.
inline void product_of(const Operand& out, const Operand& left, const Operand& right, DType dtype,
                       void* bias = nullptr) {
  if (out.rows == 0 || out.columns == 0) return;
  Tensor target = view_of(out, dtype), a = view_of(left, dtype), b = view_of(right, dtype);
  if (bias == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), a.get(), b.get()));
    return;
  }
  Tensor row = view_of({bias, out.rows, out.columns, 0, 1}, dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target.get(), row.get(), a.get(), b.get(), 1.0, 1.0));
}

// Runs body(begin, end) over [0, count) on torch's threads. Always inside a parallel region where
// there are several threads, so that the vendor's products within use one thread each and round
// alike for every number of threads.
#ifdef __SANITIZE_THREAD__
// The sanitizer cannot see how torch's pool synchronises: threads that it can see.
template <class Body>
inline void parallel(int64_t count, const Body& body) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < kThreads; ++k) {
    const int64_t begin = count * k / kThreads, end = count * (k + 1) / kThreads;
    if (begin < end) threads.emplace_back([=, &body] { body(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}
#else
template <class Body>
inline void parallel(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count < 2 ? 2 : count, 1, [&](int64_t begin, int64_t end) {
    if (begin < count) body(begin, end < count ? end : count);
  });
}
#endif

}  // namespace stamina
