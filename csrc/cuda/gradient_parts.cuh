// SPDX-License-Identifier: Apache-2.0
// What the backward is launched with, and the sum of the parts that its blocks leave.
#pragma once

#include "group.cuh"
#include "outer.cuh"

namespace stamina::cuda {

// Logits are in units of -ln 2, so that 2^ is e^-L.
constexpr float kLogitUnit = -1.44269504f, kLn2 = 0.693147181f;

constexpr int kPartRanks = 2 * kRankStep;  // of A or B, then of U or V

struct Backward {
  Group group;
  const void *dy, *x;  // [tokens, outputs], [tokens, in_features]
  int64_t outputs;
  int32_t tokens;
  const float *tau, *g_forget, *g_sparse;  // the last two: of the launch's members
  // Parts, of this launch's first member: left [column tasks, outputs, kPartRanks], of rows of the
  // stacked group; right [row tasks, members, kPartRanks, in_features]; bias [tasks, members].
  float *left, *right, *bias;
  float* gradients;               // dA, dB, dU, dV, db of every member of the group
  int32_t members, first_member;  // of the group, of this launch
};
static_assert(sizeof(Backward) <= 4096, "kernel parameters");

// What a thread of gradients_kernel adds. A member's numbers: 32 for db, which a warp adds; then dA
// with kRankStep to a row, dB, dU likewise, dV.
STAMINA_HOST_DEVICE inline int64_t gradient_numbers(const Member& member, int64_t features) {
  return 32 + int64_t{2} * kRankStep * member.rows + (member.rank + member.mask_rank) * features;
}

// Adds `parts` parts that are `step` apart, in order.
__device__ inline float sum_of_parts(const float* part, int64_t step, int parts) {
  float sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < parts; ++k) sum += part[k * step];
  return sum;
}

// Adds the parts of a member's gradients, one number a thread. Grid: numbers x members.
__global__ void __launch_bounds__(kBackwardThreads)
    gradients_kernel(const __grid_constant__ Backward launch) {
  const Group& group = launch.group;
  const Member& member = group.member[blockIdx.y];
  const int64_t features = group.in_features, rows = member.rows;
  const int ranks[2] = {member.rank, member.mask_rank};
  const int row_tasks = (member.rows + group.task_rows - 1) / group.task_rows;
  float* to = launch.gradients + (ranks[0] + ranks[1]) * member.first_row +
              (launch.first_member + blockIdx.y) * ((ranks[0] + ranks[1]) * features + 1);
  int64_t e = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x;
  if (e < 32) {
    const int tasks = row_tasks * group.column_tasks, lane = static_cast<int>(e);
    const int mine = tasks > lane ? (tasks - lane + 31) / 32 : 0;
    float sum = sum_of_parts(launch.bias + static_cast<int64_t>(lane) * launch.members + blockIdx.y,
                             32 * launch.members, mine);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
    if (lane == 0) to[(ranks[0] + ranks[1]) * (rows + features)] = sum;
    return;
  }
  e -= 32;
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
    // the parts of dB have s already, those of dV the unit of the logits
    const float left_factor = matrix == 0 ? *group.scale : 1.0f;
    const float right_factor = matrix == 0 ? 1.0f : -kLn2;
    const int rank = ranks[matrix];
    if (e < rows * kRankStep) {
      const int64_t row = e / kRankStep;
      const int k = static_cast<int>(e % kRankStep);
      if (k >= rank) return;
      const float* left =
          launch.left + (member.first_row + row) * kPartRanks + matrix * kRankStep + k;
      to[row * rank + k] =
          left_factor * sum_of_parts(left, launch.outputs * kPartRanks, group.column_tasks);
      return;
    }
    e -= rows * kRankStep;
    to += rows * rank;
    if (e < rank * features) {
      const float* right =
          launch.right + (blockIdx.y * kPartRanks + matrix * kRankStep) * features + e;
      to[e] = right_factor * sum_of_parts(right, launch.members * kPartRanks * features, row_tasks);
      return;
    }
    e -= rank * features;
    to += rank * features;
  }
}

}  // namespace stamina::cuda
