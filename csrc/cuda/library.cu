// SPDX-License-Identifier: Apache-2.0
// The C interface: checks, then launches.
#include <algorithm>
#include <vector>

#include "compose.cuh"
#include "fold_tables.h"

namespace stamina::cuda {
namespace {

// What an operation reads of its members.
struct Reads {
  bool weight, logits;
};

bool check_member(const stamina_member& m, int64_t index, int64_t in_features, Reads reads) {
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

bool check_group(const stamina_member* members, int64_t count, int64_t in_features, Reads reads) {
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

// Rows of a task: fewer where a group is small, so that every multiprocessor gets some. It does not
// depend on the machine, because sums are added task by task.
int64_t task_rows_of(const stamina_member* members, int64_t count, int64_t in_features) {
  constexpr int64_t kEnoughTasks = 512;
  for (int64_t rows = kTaskRows; rows > kTileRows; rows /= 2) {
    int64_t tasks = 0;
    for (int64_t k = 0; k < count; ++k) tasks += ceil_div(members[k].out_features, rows);
    if (tasks * ceil_div(in_features, kBlockColumns) >= kEnoughTasks) return rows;
  }
  return kTileRows;
}

int64_t tasks_of(const stamina_member& member, int64_t task_rows, int64_t in_features) {
  return ceil_div(member.out_features, task_rows) * ceil_div(in_features, kBlockColumns);
}

int64_t total_tasks(const stamina_member* members, int64_t count, int64_t in_features) {
  const int64_t task_rows = task_rows_of(members, count, in_features);
  int64_t tasks = 0;
  for (int64_t k = 0; k < count; ++k) tasks += tasks_of(members[k], task_rows, in_features);
  return tasks;
}

Member member_of(const stamina_member& m, int64_t first_row, int64_t first_task) {
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
int launch_group(Group group, const stamina_member* members, int64_t count, int64_t in_features,
                 const Launch& launch) {
  const int64_t task_rows = task_rows_of(members, count, in_features);
  const int64_t all_tasks = total_tasks(members, count, in_features);
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
bool is_regular(const Group& group, Reads reads, int64_t dtype) {
  const auto fits = [&](const Member& m) {
    const bool composes = m.rank == kRankStep && m.dtype == static_cast<DType>(dtype) &&
                          is_aligned(m.weight) && is_aligned(m.initial);
    const bool draws = m.mask_rank == kRankStep && m.col0 % 4 == 0;
    return m.rows % kTileRows == 0 && (composes || !reads.weight) && (draws || !reads.logits);
  };
  return group.in_features % kBlockColumns == 0 && is_aligned(group.effective) &&
         std::all_of(group.member, group.member + group.members, fits);
}

// call(output dtype, whether the group is regular), as template parameters, for a dtype that was
// checked. Only the 16-bit dtypes, in which models are trained on GPUs, have regular kernels.
template <typename Call>
const char* with_kernel(int64_t dtype, bool regular, const Call& call) {
  if (dtype == STAMINA_FLOAT32) return call.template operator()<DType::kFloat32, false>();
  if (dtype == STAMINA_BFLOAT16) {
    return regular ? call.template operator()<DType::kBFloat16, true>()
                   : call.template operator()<DType::kBFloat16, false>();
  }
  return regular ? call.template operator()<DType::kFloat16, true>()
                 : call.template operator()<DType::kFloat16, false>();
}

// A block for every task; where members differ in size, some have nothing to do.
Grid grid_of(const Group& group, int dynamic_bytes = 0) {
  return {group.most_tasks, kComposeThreads, dynamic_bytes, group.members};
}

struct LaunchCompose {
  const Group& group;
  void* stream;
  template <DType kOut, bool kRegular>
  const char* operator()() const {
    return launch(compose_kernel<kOut, kRegular>, grid_of(group), stream, group);
  }
};

struct LaunchSampleCompose {
  const Group& group;
  void* stream;
  template <DType kOut, bool kRegular>
  const char* operator()() const {
    return launch(sample_compose_kernel<kOut, kRegular>, grid_of(group, sizeof(TileInFlight)),
                  stream, group);
  }
};

template <typename T>
const char* copy_to_device(T* device, const std::vector<T>& host, void* stream) {
  return copy_bytes_to_device(device, host.data(), static_cast<int64_t>(host.size() * sizeof(T)),
                              stream);
}

}  // namespace
}  // namespace stamina::cuda

using namespace stamina::cuda;

int stamina_sample(const stamina_member* members, int64_t count, int64_t in_features,
                   const void* seed, const void* step, int64_t hard, void* bits, void* stream) {
  constexpr Reads kReads{false, true};
  if (!check_group(members, count, in_features, kReads) ||
      !Checks().pointer("seed", seed, 8).pointer("step", step, 8).pointer("bits", bits, 4).ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  Group group{};
  group.hard = hard != 0;
  group.seed = static_cast<const int64_t*>(seed);
  group.step = static_cast<const int64_t*>(step);
  group.bits = static_cast<uint32_t*>(bits);
  return launch_group(group, members, count, in_features, [&](const Group& part, int64_t, int64_t) {
    const bool regular = is_regular(part, kReads, STAMINA_FLOAT32);
    return launch(regular ? sample_kernel<true> : sample_kernel<false>, grid_of(part), stream,
                  part);
  });
}

int stamina_compose(const stamina_member* members, int64_t count, int64_t in_features,
                    const void* scale, const void* bits, int64_t dtype, void* effective,
                    void* stream) {
  constexpr Reads kReads{true, false};
  if (!check_group(members, count, in_features, kReads) ||
      !Checks()
           .pointer("scale", scale, 4)
           .pointer("bits", bits, 4)
           .dtype("dtype", dtype)
           .pointer("effective", effective, bytes_of(dtype))
           .ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  Group group{};
  group.scale = static_cast<const float*>(scale);
  group.bits = const_cast<uint32_t*>(static_cast<const uint32_t*>(bits));
  group.effective = effective;
  return launch_group(group, members, count, in_features, [&](const Group& part, int64_t, int64_t) {
    return with_kernel(dtype, is_regular(part, kReads, dtype), LaunchCompose{part, stream});
  });
}

int64_t stamina_scratch_bytes(const stamina_member* members, int64_t count, int64_t in_features) {
  if (!check_group(members, count, in_features, {false, false})) return -1;
  return total_tasks(members, count, in_features) * static_cast<int64_t>(sizeof(Sums));
}

int stamina_sample_compose(const stamina_member* members, int64_t count, int64_t in_features,
                           const void* scale, const void* seed, const void* step, int64_t hard,
                           int64_t relu, int64_t dtype, void* effective, void* bits, void* forget,
                           void* sparse, void* counts, void* scratch, int64_t scratch_bytes,
                           void* stream) {
  constexpr Reads kReads{true, true};
  if (!check_group(members, count, in_features, kReads) ||
      !Checks()
           .pointer("scale", scale, 4)
           .pointer("seed", seed, 8)
           .pointer("step", step, 8)
           .dtype("dtype", dtype)
           .pointer("effective", effective, bytes_of(dtype))
           .pointer("bits", bits, 4)
           .pointer("forget", forget, 4)
           .pointer("sparse", sparse, 4)
           .pointer("counts", counts, 8)
           .pointer("scratch", scratch, 4)
           .size("scratch_bytes", scratch_bytes, stamina_scratch_bytes(members, count, in_features),
                 INT64_MAX)
           .ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  Group group{};
  group.hard = hard != 0;
  group.relu = relu != 0;
  group.seed = static_cast<const int64_t*>(seed);
  group.step = static_cast<const int64_t*>(step);
  group.scale = static_cast<const float*>(scale);
  group.bits = static_cast<uint32_t*>(bits);
  group.effective = effective;
  return launch_group(group, members, count, in_features,
                      [&](Group part, int64_t first_member, int64_t first_task) {
                        part.partials = static_cast<Sums*>(scratch) + first_task;
                        const char* error = with_kernel(dtype, is_regular(part, kReads, dtype),
                                                        LaunchSampleCompose{part, stream});
                        if (error != nullptr) return error;
                        const Statistics out{static_cast<float*>(forget) + first_member,
                                             static_cast<float*>(sparse) + first_member,
                                             static_cast<int64_t*>(counts) + 2 * first_member};
                        return launch(statistics_kernel, {part.members, 32}, stream, part, out);
                      });
}

int64_t stamina_fold_scratch_bytes(int64_t layers, const stamina_adapter* adapters,
                                   int64_t adapter_count) {
  int64_t steps = 0;
  for (int64_t t = 0; t < adapter_count; ++t) steps += ceil_div(adapters[t].rank, kRankStep);
  return layers * static_cast<int64_t>(sizeof(FoldLayer)) +
         steps * static_cast<int64_t>(sizeof(FoldStep));
}

int stamina_fold(const stamina_layer* layers, int64_t layer_count, const stamina_adapter* adapters,
                 int64_t adapter_count, void* overflow, void* scratch, int64_t scratch_bytes,
                 void* stream) {
  FoldTables tables;
  if (!Checks()
           .pointer("layers", layers, 8)
           .size("layer_count", layer_count, 1)
           .pointer("adapters", adapters, 8)
           .size("adapter_count", adapter_count, 1)
           .pointer("overflow", overflow, 4)
           .pointer("scratch", scratch, alignof(FoldStep))
           .ok() ||
      !fold_tables(layers, layer_count, adapters, adapter_count, tables) ||
      !Checks()
           .size("scratch_bytes", scratch_bytes,
                 stamina_fold_scratch_bytes(layer_count, adapters, adapter_count), INT64_MAX)
           .ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  auto* device_layers = static_cast<FoldLayer*>(scratch);
  auto* device_steps = reinterpret_cast<FoldStep*>(device_layers + layer_count);
  const char* error = copy_to_device(device_layers, tables.layers, stream);
  if (error == nullptr) error = copy_to_device(device_steps, tables.steps, stream);
  const auto kernel = !tables.regular                       ? fold_kernel
                      : layers[0].dtype == STAMINA_BFLOAT16 ? fold_regular_kernel<DType::kBFloat16>
                                                            : fold_regular_kernel<DType::kFloat16>;
  constexpr int64_t kMostRows = 65535;  // of a grid
  for (int64_t first = 0; error == nullptr && first < layer_count; first += kMostRows) {
    const int rows = static_cast<int>(std::min(layer_count - first, kMostRows));
    error =
        launch(kernel, {tables.most_tasks, kFoldThreads, 0, rows}, stream,
               static_cast<const FoldLayer*>(device_layers) + first,
               static_cast<const FoldStep*>(device_steps), static_cast<int32_t*>(overflow) + first);
  }
  return status_of(error);
}

const char* stamina_error(void) { return last_error; }
