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

// Adds the parts of a member's gradients in order, one number a thread. Grid: numbers x members.
__global__ void __launch_bounds__(kBackwardThreads)
    gradients_kernel(const __grid_constant__ Backward launch) {
  const Group& group = launch.group;
  const Member& member = group.member[blockIdx.y];
  const int64_t features = group.in_features, rows = member.rows;
  const int ranks[2] = {member.rank, member.mask_rank};
  const int row_tasks = (member.rows + group.task_rows - 1) / group.task_rows;
  const auto sum_of = [](const float* part, int64_t step, int parts) {
    float sum = 0.0f;
#pragma unroll 4
    for (int k = 0; k < parts; ++k) sum += part[k * step];
    return sum;
  };
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x;
  float* to = launch.gradients + (ranks[0] + ranks[1]) * member.first_row +
              (launch.first_member + blockIdx.y) * ((ranks[0] + ranks[1]) * features + 1) + number;
  int64_t e = number;
#pragma unroll
  for (int matrix = 0; matrix < 2; ++matrix) {
    const int rank = ranks[matrix];
    // the parts of dB have s already, those of dV the unit of the logits
    const float left_factor = matrix == 0 ? *group.scale : 1.0f;
    const float right_factor = matrix == 0 ? 1.0f : -kLn2;
    if (e < rows * rank) {
      const int64_t row = member.first_row + e / rank;
      const float* left = launch.left + row * kPartRanks + matrix * kRankStep + e % rank;
      *to = left_factor * sum_of(left, launch.outputs * kPartRanks, group.column_tasks);
      return;
    }
    e -= rows * rank;
    if (e < rank * features) {
      const float* right =
          launch.right + (blockIdx.y * kPartRanks + matrix * kRankStep) * features + e;
      *to = right_factor * sum_of(right, launch.members * kPartRanks * features, row_tasks);
      return;
    }
    e -= rank * features;
  }
  if (e == 0)
    *to = sum_of(launch.bias + blockIdx.y, launch.members, row_tasks * group.column_tasks);
}

}  // namespace stamina::cuda
