// SPDX-License-Identifier: Apache-2.0
// The C interface of the CUDA backend: all that the library exports, bound by
// stamina_kernels/cuda.py.
//
// Every function returns a status; stamina_error() tells what was wrong, in words that name the
// argument. Matrices are contiguous, row by row; sizes are int64; pointers are device pointers
// unless said otherwise; `stream` is a raw cudaStream_t. Nothing is launched where an argument is
// wrong.
#pragma once

#include <stdint.h>

#define STAMINA_EXPORT __attribute__((visibility("default")))

extern "C" {

// Raised with every change of what is declared here; cuda_interface.py asks for the same.
enum { STAMINA_INTERFACE_VERSION = 2 };

enum { STAMINA_OK = 0, STAMINA_INVALID_ARGUMENT = 1, STAMINA_CUDA_ERROR = 2 };

enum { STAMINA_FLOAT32 = 0, STAMINA_BFLOAT16 = 1, STAMINA_FLOAT16 = 2 };

// One projection of a group; an operation reads what its formula names.
typedef struct {
  const void* weight;       // out_features x in_features, of dtype
  const void* weight_init;  // the same, or null
  const void *A, *B;        // fp32, out_features x rank and rank x in_features
  const void *U, *V, *b;    // fp32, out_features x mask_rank, mask_rank x in_features, 1
  int64_t out_features, rank, mask_rank;
  int64_t dtype;
  int64_t layer_id, row0, col0;
} stamina_member;

// members: on the host. bits: int32 [sum O, ceil(I / 32)]. seed, step: int64.
STAMINA_EXPORT int stamina_sample(const stamina_member* members, int64_t count, int64_t in_features,
                                  const void* seed, const void* step, int64_t hard, void* bits,
                                  void* stream);

// effective: [sum O, I] of `dtype`. scale: fp32.
STAMINA_EXPORT int stamina_compose(const stamina_member* members, int64_t count,
                                   int64_t in_features, const void* scale, const void* bits,
                                   int64_t dtype, void* effective, void* stream);

// Bytes of scratch memory that stamina_sample_compose needs, or -1 where an argument is wrong.
STAMINA_EXPORT int64_t stamina_scratch_bytes(const stamina_member* members, int64_t count,
                                             int64_t in_features);

// forget, sparse: fp32 [count]; counts: int64 [count, 2].
STAMINA_EXPORT int stamina_sample_compose(const stamina_member* members, int64_t count,
                                          int64_t in_features, const void* scale, const void* seed,
                                          const void* step, int64_t hard, int64_t relu,
                                          int64_t dtype, void* effective, void* bits, void* forget,
                                          void* sparse, void* counts, void* scratch,
                                          int64_t scratch_bytes, void* stream);

// Bytes of scratch memory, aligned to 16 bytes, that stamina_backward needs; 0 where it does not
// serve the group, -1 where an argument is wrong.
STAMINA_EXPORT int64_t stamina_backward_scratch_bytes(const stamina_member* members, int64_t count,
                                                      int64_t in_features, const void* dy,
                                                      const void* x, int64_t dtype);

// dy: [tokens, sum O], x: [tokens, I], of `dtype`. scale, tau, g_forget [count], g_sparse [count]:
// fp32. gradients: fp32, dA, dB, dU, dV, db of every member, one after another.
STAMINA_EXPORT int stamina_backward(const stamina_member* members, int64_t count,
                                    int64_t in_features, const void* dy, const void* x,
                                    int64_t tokens, const void* scale, const void* tau,
                                    const void* seed, const void* step, const void* g_forget,
                                    const void* g_sparse, int64_t hard, int64_t relu, int64_t dtype,
                                    const void* bits, void* gradients, void* scratch,
                                    int64_t scratch_bytes, void* stream);

// A committed adapter: fp16 factors, int32 bits [O, ceil(I / 32)], D = coefficient M (.) (A B).
typedef struct {
  const void *A, *B, *bits;
  int64_t rank;
  double coefficient;
} stamina_adapter;

// A layer and how many of the adapters, which follow each other, are its own; at least one.
typedef struct {
  void* weight;
  const void* weight_init;
  int64_t out_features, in_features, dtype, adapters;
} stamina_layer;

// Bytes of scratch memory, aligned to 16 bytes, that stamina_fold needs; reads the adapters' ranks.
STAMINA_EXPORT int64_t stamina_fold_scratch_bytes(int64_t layers, const stamina_adapter* adapters,
                                                  int64_t adapter_count);

// layers, adapters: on the host. overflow: int32 [layer_count], zero before; 1 where a result is
// not finite. Returns when it is done: the tables are copied from the host, which rules out graph
// capture too.
STAMINA_EXPORT int stamina_fold(const stamina_layer* layers, int64_t layer_count,
                                const stamina_adapter* adapters, int64_t adapter_count,
                                void* overflow, void* scratch, int64_t scratch_bytes, void* stream);

// Whether the current device and its driver run these kernels: a driver may be older than what the
// library was built with, whatever torch was built with.
STAMINA_EXPORT int stamina_usable(void);

// What the last call of this thread that failed found wrong.
STAMINA_EXPORT const char* stamina_error(void);

STAMINA_EXPORT int64_t stamina_interface_version(void);
}
