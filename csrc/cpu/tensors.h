// SPDX-License-Identifier: Apache-2.0
// What the operations need from torch, through its stable ABI: checked views of tensors, threads,
// scratch memory.
#pragma once

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
  Scratch() = default;
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

inline void* offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

// Runs body(begin, end) over [0, count) on torch's threads.
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
  if (count > 0) torch::stable::parallel_for(0, count, 1, body);
}
#endif

}  // namespace stamina
