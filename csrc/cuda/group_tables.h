// SPDX-License-Identifier: Apache-2.0
// A group of projections as it comes through the C interface, and as the kernels take it.
#pragma once

#include <algorithm>

#include "checks.h"
#include "group.cuh"

namespace stamina::cuda {

// What an operation reads of its members.
struct Reads {
  bool weight, logits;
};

inline bool check_member(const stamina_member& m, int64_t index, int64_t in_features, Reads reads) {
  Checks check("members", index);
  check.size("out_features", m.out_features, 1);
  if (reads.weight) {
    check.dtype("dtype", m.dtype)
        .pointer("weight", m.weight, bytes_of(m.dtype))
        .optional_pointer("weight_init", m.weight_init, bytes_of(m.dtype))
        .pointer("A", m.A, 4)
        .pointer("B", m.B, 4)
        .size("rank", m.rank, 1);
  }
  if (reads.logits) {
    // the counter holds i in 32 bits and j >> 2 in 32 bits
    check.pointer("U", m.U, 4)
        .pointer("V", m.V, 4)
        .pointer("b", m.b, 4)
        .size("mask_rank", m.mask_rank, 1)
        .size("layer_id", m.layer_id, 0, (int64_t{1} << 32) - 1)
        .size("row0", m.row0, 0, (int64_t{1} << 32) - m.out_features)
        .size("col0", m.col0, 0, (int64_t{1} << 34) - in_features);
  }
  return check.ok();
}

inline bool check_group(const stamina_member* members, int64_t count, int64_t in_features,
                        Reads reads) {
  // a lane's column plus a block's stays an int32
  const bool whole = Checks()
                         .pointer("members", members, 8)
                         .size("count", count, 1)
                         .size("in_features", in_features, 1, kLargestInt32 - kBlockColumns)
                         .ok();
  for (int64_t k = 0; whole && k < count; ++k) {
    if (!check_member(members[k], k, in_features, reads)) return false;
  }
  return whole;
}

// Rows of a task, in steps of a factor of two.
struct TaskHeights {
  int64_t least, most;
};
constexpr TaskHeights kComposeHeights{kTileRows, kTaskRows};

// Fewer rows where a group is small, so that every multiprocessor gets some. It does not depend on
// the machine, because sums are added task by task.
inline int64_t task_rows_of(TaskHeights heights, const stamina_member* members, int64_t count,
                            int64_t in_features) {
  for (int64_t rows = heights.most; rows > heights.least; rows /= 2) {
    int64_t tasks = 0;
    for (int64_t k = 0; k < count; ++k) tasks += ceil_div(members[k].out_features, rows);
    if (tasks * ceil_div(in_features, kBlockColumns) >= kEnoughTasks) return rows;
  }
  return heights.least;
}

inline int64_t tasks_of(const stamina_member& member, int64_t task_rows, int64_t in_features) {
  return ceil_div(member.out_features, task_rows) * ceil_div(in_features, kBlockColumns);
}

inline int64_t total_tasks(TaskHeights heights, const stamina_member* members, int64_t count,
                           int64_t in_features) {
  const int64_t task_rows = task_rows_of(heights, members, count, in_features);
  int64_t tasks = 0;
  for (int64_t k = 0; k < count; ++k) tasks += tasks_of(members[k], task_rows, in_features);
  return tasks;
}

inline Member member_of(const stamina_member& m, int64_t first_row, int64_t first_task) {
  Member member{};
  member.weight = m.weight;
  member.initial = m.weight_init;
  member.A = static_cast<const float*>(m.A);
  member.B = static_cast<const float*>(m.B);
  member.U = static_cast<const float*>(m.U);
  member.V = static_cast<const float*>(m.V);
  member.b = static_cast<const float*>(m.b);
  member.first_row = first_row;
  member.col0 = m.col0;
  member.row0 = static_cast<uint32_t>(m.row0);
  member.layer_id = static_cast<uint32_t>(m.layer_id);
  member.rows = static_cast<int32_t>(m.out_features);
  member.rank = static_cast<int32_t>(m.rank);
  member.mask_rank = static_cast<int32_t>(m.mask_rank);
  member.first_task = static_cast<int32_t>(first_task);
  member.dtype = static_cast<DType>(m.dtype);
  return member;
}

// Calls launch(group, first_member, first_task) for up to kMaxMembers members at a time;
// `group` holds what is common to all. Returns a status.
template <typename Launch>
int launch_group(TaskHeights heights, Group group, const stamina_member* members, int64_t count,
                 int64_t in_features, const Launch& launch) {
  const int64_t task_rows = task_rows_of(heights, members, count, in_features);
  const int64_t all_tasks = total_tasks(heights, members, count, in_features);
  if (!Checks().size("the number of tasks of the group", all_tasks, 1).ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  group.in_features = in_features;
  group.task_rows = static_cast<int32_t>(task_rows);
  group.column_tasks = static_cast<int32_t>(ceil_div(in_features, kBlockColumns));
  int64_t first_row = 0, first_task = 0;
  for (int64_t begin = 0; begin < count; begin += kMaxMembers) {
    int64_t tasks = 0, most_tasks = 0;
    group.members = 0;
    for (int64_t k = begin; k < count && k < begin + kMaxMembers; ++k) {
      group.member[group.members++] = member_of(members[k], first_row, tasks);
      const int64_t member_tasks = tasks_of(members[k], task_rows, in_features);
      tasks += member_tasks;
      most_tasks = std::max(most_tasks, member_tasks);
      first_row += members[k].out_features;
    }
    group.tasks = static_cast<int32_t>(tasks);
    group.most_tasks = static_cast<int32_t>(most_tasks);
    const int status = status_of(launch(group, begin, first_task));
    if (status != STAMINA_OK) return status;
    first_task += tasks;
  }
  return STAMINA_OK;
}

// Whether the group is regular (compose.cuh) in what an operation reads, with W_eff of `dtype`.
inline bool is_regular(const Group& group, Reads reads, int64_t dtype) {
  const auto fits = [&](const Member& m) {
    const bool composes = m.rank == kRankStep && m.dtype == static_cast<DType>(dtype) &&
                          is_aligned(m.weight) && is_aligned(m.initial);
    const bool draws = m.mask_rank == kRankStep && m.col0 % 4 == 0;
    return m.rows % kTileRows == 0 && (composes || !reads.weight) && (draws || !reads.logits);
  };
  return group.in_features % kBlockColumns == 0 && is_aligned(group.effective) &&
         std::all_of(group.member, group.member + group.members, fits);
}

}  // namespace stamina::cuda
