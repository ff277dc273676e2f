// SPDX-License-Identifier: Apache-2.0
// Which groups the backward serves, where its parts lie in scratch memory, and its launches.
#pragma once

#include "backward.cuh"
#include "group_tables.h"

namespace stamina::cuda {

constexpr Reads kBackwardReads{true, true};
constexpr TaskHeights kBackwardHeights{kBackwardRows, 4 * kBackwardRows};
constexpr int64_t kVectorBytes = 16;

// One 16-bit type, ranks up to 16 that are the same for all members, vectors of 16 bytes, whole
// blocks of the random stream: what models are trained with. Tiles need not be whole.
inline bool serves_backward(const stamina_member* members, int64_t count, int64_t in_features,
                            const void* dy, const void* x, int64_t dtype) {
  constexpr int64_t kVector = kVectorBytes / 2;
  const auto fits = [&](const stamina_member& m) {
    return m.dtype == dtype && m.rank <= kRankStep && m.mask_rank <= kRankStep &&
           m.rank == members->rank && m.mask_rank == members->mask_rank &&
           m.out_features % kVector == 0 && m.col0 % 4 == 0 && is_aligned(m.weight) &&
           is_aligned(m.weight_init);
  };
  return dtype != STAMINA_FLOAT32 && in_features % kVector == 0 && is_aligned(dy) &&
         is_aligned(x) && std::all_of(members, members + count, fits);
}

struct BackwardParts {
  int64_t outputs, column_tasks, row_tasks, members, in_features;

  // Numbers of each kind (backward.cuh).
  int64_t left() const { return column_tasks * outputs * kPartRanks; }
  int64_t right() const { return row_tasks * members * kPartRanks * in_features; }
  int64_t bias() const { return row_tasks * column_tasks * members; }
  int64_t floats() const { return left() + right() + bias(); }
};

inline BackwardParts backward_parts(const stamina_member* members, int64_t count,
                                    int64_t in_features) {
  const int64_t task_rows = task_rows_of(kBackwardHeights, members, count, in_features);
  BackwardParts parts{0, ceil_div(in_features, kBlockColumns), 0, count, in_features};
  for (int64_t k = 0; k < count; ++k) {
    parts.outputs += members[k].out_features;
    parts.row_tasks = std::max(parts.row_tasks, ceil_div(members[k].out_features, task_rows));
  }
  return parts;
}

template <DType kDType>
const char* launch_backward_as(const Backward& launch_of, Grid grid, void* stream) {
  const bool hard = launch_of.group.hard, relu = launch_of.group.relu;
  const auto kernel =
      hard   ? relu ? backward_kernel<kDType, true, true> : backward_kernel<kDType, true, false>
      : relu ? backward_kernel<kDType, false, true>
             : backward_kernel<kDType, false, false>;
  return launch(kernel, grid, stream, launch_of);
}

inline const char* launch_backward(const Backward& launch_of, int64_t dtype, void* stream) {
  const Group& group = launch_of.group;
  const size_t bytes =
      token_stages(compute_major()) == 3 ? sizeof(BackwardShared<3>) : sizeof(BackwardShared<2>);
  const Grid grid{group.most_tasks, kBackwardThreads, static_cast<int>(bytes), group.members};
  const char* error = dtype == STAMINA_BFLOAT16
                          ? launch_backward_as<DType::kBFloat16>(launch_of, grid, stream)
                          : launch_backward_as<DType::kFloat16>(launch_of, grid, stream);
  if (error != nullptr) return error;
  int64_t most = 0;
  for (int k = 0; k < group.members; ++k) {
    most = std::max(most, gradient_numbers(group.member[k], group.in_features));
  }
  return launch(gradients_kernel,
                {ceil_div(most, kBackwardThreads), kBackwardThreads, 0, group.members}, stream,
                launch_of);
}

}  // namespace stamina::cuda
