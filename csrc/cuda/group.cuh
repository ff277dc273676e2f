// SPDX-License-Identifier: Apache-2.0
// A group of projections in a launch of the compose kernels, and the task of a block in it.
#pragma once

#include "statistics.cuh"
#include "tile.cuh"

namespace stamina::cuda {

constexpr int kComposeThreads = 128;
constexpr int kTaskRows = 128;
constexpr int kTileRows = 32;
constexpr int kLaneRows = kTileRows / 8;

struct Member {
  const void *weight, *initial;  // initial: null where there is none
  const float *A, *B, *U, *V, *b;
  int64_t first_row;  // in the stacked outputs
  int64_t col0;
  uint32_t row0, layer_id;
  int32_t rows, rank, mask_rank, first_task;
  DType dtype;
};

// What one launch serves, passed by value: no table to copy, and a CUDA graph keeps its own. 4 KiB
// of parameters hold the 32 cross-attention K and V of a Stable Diffusion 1.5.
constexpr int kMaxMembers = 38;

struct Group {
  int64_t in_features;
  int32_t members, task_rows, column_tasks;
  bool hard, relu;
  const int64_t *seed, *step;
  const float* scale;
  uint8_t* bits;
  void* effective;
  Sums* partials;  // one per task
  Member member[kMaxMembers];
};
static_assert(sizeof(Group) <= 4096 - 64, "kernel parameters, with those of statistics_kernel");

struct Task {
  int member, row, rows;  // rows of the task
  int column, columns;
};

__device__ inline Task task_of(const Group& group, int block) {
  Task task{0, 0, 0, 0, 0};
  int end = group.members;  // the member is in task.member .. end - 1
  while (task.member + 1 < end) {
    const int middle = (task.member + end) / 2;
    if (group.member[middle].first_task <= block) {
      task.member = middle;
    } else {
      end = middle;
    }
  }
  const Member& member = group.member[task.member];
  const int index = block - member.first_task;
  task.row = index / group.column_tasks * group.task_rows;
  task.column = index % group.column_tasks * kBlockColumns;
  task.rows = member.rows - task.row < group.task_rows ? member.rows - task.row : group.task_rows;
  const int64_t columns = group.in_features - task.column;
  task.columns = columns < kBlockColumns ? static_cast<int>(columns) : kBlockColumns;
  return task;
}

// Where a lane is: its first row and column of a tile, which moves down the task.
struct Position {
  int row;
  int64_t column;
  int64_t element;  // index in the member's matrices
  int64_t byte;     // and of its mask in the stacked bits
  Extent extent;    // of the task: what lies below is another's

  __device__ Position(const Group& group, const Member& member, const Task& task, const Lane& lane)
      : row(task.row + lane.row),
        column(task.column + lane.warp * kWarpColumns + kLaneColumns * lane.quad),
        element(row * group.in_features + column),
        byte((member.first_row + row) * row_bytes(group) + column / kLaneColumns),
        extent(task.rows - lane.row, group.in_features - column) {}

  // Bytes of a row of bits, which are little-endian words.
  __device__ static int64_t row_bytes(const Group& group) {
    return (group.in_features + 31) / 32 * 4;
  }

  __device__ void next_tile(const Group& group) {
    row += kTileRows;
    element += kTileRows * group.in_features;
    byte += kTileRows * row_bytes(group);
    extent.rows -= kTileRows;
  }
};

}  // namespace stamina::cuda
