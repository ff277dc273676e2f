// SPDX-License-Identifier: Apache-2.0
// A group of projections in a launch, and the task of a block in it.
#pragma once

#include "statistics.cuh"
#include "tile.cuh"

namespace stamina::cuda {

constexpr int kComposeThreads = 128;
constexpr int kTaskRows = 128;
constexpr int kTileRows = 32;
constexpr int kTaskTiles = kTaskRows / kTileRows;
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
constexpr int kMaxMembers = 36;

struct Group {
  int64_t in_features;
  int32_t members, task_rows, column_tasks;
  int32_t tasks, most_tasks;  // of all members, of one
  bool hard, relu;
  const int64_t *seed, *step;
  const float* scale;
  uint32_t* bits;
  void* effective;
  Sums* partials;  // one per task
  Member member[kMaxMembers];
};
static_assert(sizeof(Group) <= 4096 - 128, "kernel parameters, with those of other kernels");

struct Task {
  int member, row, rows;  // rows of the task
  int column, columns;
};

// Of a block of a grid of Group::most_tasks x members. Without rows where the member has fewer
// tasks.
__device__ inline Task task_of(const Group& group) {
  const int number = static_cast<int>(blockIdx.y);
  const auto column_tasks = static_cast<unsigned>(group.column_tasks);
  Task task{number, static_cast<int>(blockIdx.x / column_tasks) * group.task_rows, 0,
            static_cast<int>(blockIdx.x % column_tasks) * kBlockColumns, 0};
  const int rows = group.member[number].rows - task.row;
  task.rows = rows < group.task_rows ? rows : group.task_rows;
  const int64_t columns = group.in_features - task.column;
  task.columns = columns < kBlockColumns ? static_cast<int>(columns) : kBlockColumns;
  return task;
}

// Where a lane is: its first row and column of a tile, which moves down the task.
struct Position {
  int row;
  int64_t column;
  Extent extent;  // of the task: what lies below is another's

  __device__ Position(const Group& group, const Task& task, const Lane& lane, bool regular)
      : row(task.row + lane.row),
        column(task.column + lane.warp * kWarpColumns + kLaneColumns * lane.quad),
        extent(task.rows - lane.row, group.in_features - column, regular) {}

  // Index in a member's matrices.
  __device__ int64_t element(const Group& group) const { return row * group.in_features + column; }

  __device__ void next_tile() {
    row += kTileRows;
    extent.rows -= kTileRows;
  }
};

}  // namespace stamina::cuda
