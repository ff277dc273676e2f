// SPDX-License-Identifier: Apache-2.0
// The statistics of sample_compose: a block's threads first, in a fixed order, so that two runs
// agree to the bit. `statistics_kernel` in compose.cuh adds the blocks of a member.
#pragma once

#include "primitives.cuh"

namespace stamina::cuda {

// Statistics of a task, or of a part of it.
struct Sums {
  float forget, sparse;
  int32_t kept, overlap;
};

// Adds the sums of a block of kThreads in a fixed order.
template <int kThreads>
__device__ void store_sums(Sums sums, Sums* out) {
  using WarpSums = Sums[kThreads / 32];
  STAMINA_SHARED(WarpSums, shared);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.forget += shuffle_xor(sums.forget, distance);
    sums.sparse += shuffle_xor(sums.sparse, distance);
    sums.kept += shuffle_xor(sums.kept, distance);
    sums.overlap += shuffle_xor(sums.overlap, distance);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sums;
  block_barrier();
  if (threadIdx.x != 0) return;
  Sums total{0.0f, 0.0f, 0, 0};
  for (const Sums& warp : shared) {
    total.forget += warp.forget;
    total.sparse += warp.sparse;
    total.kept += warp.kept;
    total.overlap += warp.overlap;
  }
  *out = total;
}

}  // namespace stamina::cuda
