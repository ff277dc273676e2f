// SPDX-License-Identifier: Apache-2.0
// Every instruction that C++ does not spell, and the launch. Compiled by a host compiler, the same
// names come from emulation.h (tests/kernels/cuda), so that the kernels run, as they are, on a CPU.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulation.h"
#else

// A variable in shared memory.
#define STAMINA_SHARED(type, name) __shared__ type name
// One more, of the size that the launch gives: beyond 48 KiB in all a block has to ask for it.
#define STAMINA_DYNAMIC_SHARED(type, name)        \
  extern __shared__ __align__(16) char name##_[]; \
  type& name = *reinterpret_cast<type*>(name##_)

namespace stamina::cuda {

// Of the GPU that the code is compiled for, in device code.
#ifdef __CUDA_ARCH__
constexpr int kComputeMajor = __CUDA_ARCH__ / 100;
#else
constexpr int kComputeMajor = 0;
#endif

// Tasks that give every multiprocessor some to do, on the largest GPU there is.
constexpr int64_t kEnoughTasks = 512;

// Of the GPU that launches go to; 0 where there is none.
inline int compute_major() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major;
}

// threadIdx.x, which the compiler does not know to be what it was: what is computed from it is
// computed anew, instead of being kept in registers through a loop that needs them all.
__device__ inline int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}

// 2^x, relative error below 2^-22.
__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// e^x, relative error below 2^-22 + |x| 2^-24.
__device__ inline float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }

__device__ inline float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x), absolute error 2^-22 near 1.
__device__ inline float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// NaN where either is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// a & b, which the compiler does not look into: of eight such tests of one word it makes two
// instructions, of (word & 1) != 0 among them it would make four.
__device__ inline uint32_t and_bits(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("and.b32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Two values in one word, `low` in its low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ inline uint32_t pack_half(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Nibble i of the selector names byte i of the result: 0 to 3 of a, 4 to 7 of b.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// d += a b on one warp; a by rows, b by columns, d 16 x 8 fp32 (PTX ISA, "Matrix Fragments for
// mma.m16n8k8" and "for mma.m16n8k16"). a 16 x 8 and b 8 x 8, tf32:
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a 16 x 16 and b 16 x 8, fp16:
__device__ inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same, bf16.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An 8 x 8 matrix of 16-bit words in the warp, of which lane l holds two neighbours of row l / 4,
// transposed.
__device__ inline uint32_t transpose_matrix(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The four 8 x 8 parts of a 16 x 16 matrix of 16-bit words, as operand a of an mma. Lane l gives
// the address of row l % 16 of the first (l < 16) or the second 8 columns.
__device__ inline void load_matrices(uint32_t (&a)[4], const uint16_t* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same with each part transposed.
__device__ inline void load_matrices_transposed(uint32_t (&a)[4], const uint16_t* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(shared))
               : "memory");
}

// What lanes wrote to shared memory before is seen, and what they read is read.
__device__ inline void warp_barrier() { __syncwarp(); }

// Every warp of the block arrives, wherever it is in the code.
__device__ inline void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

template <typename T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

template <typename T>
__device__ inline T shuffle(T value, int from_lane) {
  return __shfl_sync(0xFFFFFFFFu, value, from_lane);
}

// Lane 0's value, which the compiler then knows to be the same in all lanes.
__device__ inline uint32_t broadcast(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// The low word of high : low >> by.
__device__ inline uint32_t shift_right(uint32_t high, uint32_t low, int by) {
  return __funnelshift_r(low, high, by);
}

// Calls the line of an address into L2.
__device__ inline void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

__device__ inline void copy_vector_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// 16 zeros where nothing is there to copy.
__device__ inline void copy_vector_or_zeros_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ inline void commit_async_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_async_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
struct Exactly {
  using Type = T;
};

// A grid of blocks x rows, and what a block takes beyond its static shared memory.
struct Grid {
  int64_t blocks;
  int threads;
  int dynamic_bytes = 0;
  int rows = 1;
};

// Null, or what went wrong.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), Grid grid, void* stream,
                   typename Exactly<Parameters>::Type... arguments) {
  void* pointers[] = {&arguments...};
  cudaError_t error = cudaSuccess;
  if (grid.dynamic_bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 grid.dynamic_bytes);
  }
  if (error == cudaSuccess) {
    const dim3 blocks(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.rows));
    error = cudaLaunchKernel(kernel, blocks, dim3(grid.threads), pointers,
                             static_cast<size_t>(grid.dynamic_bytes),
                             static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or why the current device cannot run a kernel.
template <typename... Parameters>
const char* why_not_launched(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* wait_for(void* stream) {
  const cudaError_t error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* copy_bytes_to_device(void* device, const void* host, int64_t bytes,
                                        void* stream) {
  const cudaError_t error =
      cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                      static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace stamina::cuda

#endif
