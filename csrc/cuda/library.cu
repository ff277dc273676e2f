// SPDX-License-Identifier: Apache-2.0
// The C interface: checks, then launches.
#include <algorithm>
#include <vector>

#include "backward_tables.h"
#include "compose.cuh"
#include "fold_tables.h"

namespace stamina::cuda {
namespace {

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
  const auto launch_part = [&](const Group& part, int64_t, int64_t) {
    const bool regular = is_regular(part, kReads, STAMINA_FLOAT32);
    return launch(regular ? sample_kernel<true> : sample_kernel<false>, grid_of(part), stream,
                  part);
  };
  return launch_group(kComposeHeights, group, members, count, in_features, launch_part);
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
  const auto launch_part = [&](const Group& part, int64_t, int64_t) {
    return with_kernel(dtype, is_regular(part, kReads, dtype), LaunchCompose{part, stream});
  };
  return launch_group(kComposeHeights, group, members, count, in_features, launch_part);
}

int64_t stamina_scratch_bytes(const stamina_member* members, int64_t count, int64_t in_features) {
  if (!check_group(members, count, in_features, {false, false})) return -1;
  const int64_t tasks = total_tasks(kComposeHeights, members, count, in_features);
  return tasks * static_cast<int64_t>(sizeof(Sums));
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
  const auto launch_part = [&](Group part, int64_t first_member, int64_t first_task) {
    part.partials = static_cast<Sums*>(scratch) + first_task;
    const char* error =
        with_kernel(dtype, is_regular(part, kReads, dtype), LaunchSampleCompose{part, stream});
    if (error != nullptr) return error;
    const Statistics out{static_cast<float*>(forget) + first_member,
                         static_cast<float*>(sparse) + first_member,
                         static_cast<int64_t*>(counts) + 2 * first_member};
    return launch(statistics_kernel, {part.members, 32}, stream, part, out);
  };
  return launch_group(kComposeHeights, group, members, count, in_features, launch_part);
}

int64_t stamina_backward_scratch_bytes(const stamina_member* members, int64_t count,
                                       int64_t in_features, const void* dy, const void* x,
                                       int64_t dtype) {
  if (!check_group(members, count, in_features, kBackwardReads) ||
      !Checks().dtype("dtype", dtype).ok()) {
    return -1;
  }
  if (!serves_backward(members, count, in_features, dy, x, dtype)) return 0;
  return backward_parts(members, count, in_features).floats() * 4;
}

int stamina_backward(const stamina_member* members, int64_t count, int64_t in_features,
                     const void* dy, const void* x, int64_t tokens, const void* scale,
                     const void* tau, const void* seed, const void* step, const void* g_forget,
                     const void* g_sparse, int64_t hard, int64_t relu, int64_t dtype,
                     const void* bits, void* gradients, void* scratch, int64_t scratch_bytes,
                     void* stream) {
  if (!check_group(members, count, in_features, kBackwardReads) ||
      !Checks()
           .optional_pointer("dy", dy, kVectorBytes)
           .optional_pointer("x", x, kVectorBytes)
           .size("tokens", tokens, 0, kLargestInt32 - kStepTokens)
           .require("dy", tokens <= 0 || dy != nullptr, "must not be null")
           .require("x", tokens <= 0 || x != nullptr, "must not be null")
           .pointer("scale", scale, 4)
           .pointer("tau", tau, 4)
           .pointer("seed", seed, 8)
           .pointer("step", step, 8)
           .pointer("g_forget", g_forget, 4)
           .pointer("g_sparse", g_sparse, 4)
           .dtype("dtype", dtype)
           .pointer("bits", bits, 4)
           .pointer("gradients", gradients, 4)
           .pointer("scratch", scratch, kVectorBytes)
           .require("members", serves_backward(members, count, in_features, dy, x, dtype),
                    "must be a group that stamina_backward serves")
           .size("scratch_bytes", scratch_bytes,
                 backward_parts(members, count, in_features).floats() * 4, INT64_MAX)
           .ok()) {
    return STAMINA_INVALID_ARGUMENT;
  }
  Backward all{};
  all.group.hard = hard != 0;
  all.group.relu = relu != 0;
  all.group.seed = static_cast<const int64_t*>(seed);
  all.group.step = static_cast<const int64_t*>(step);
  all.group.scale = static_cast<const float*>(scale);
  all.group.bits = const_cast<uint32_t*>(static_cast<const uint32_t*>(bits));
  all.dy = dy;
  all.x = x;
  all.tokens = static_cast<int32_t>(tokens);
  all.tau = static_cast<const float*>(tau);
  all.gradients = static_cast<float*>(gradients);
  const BackwardParts parts = backward_parts(members, count, in_features);
  all.outputs = parts.outputs;
  all.members = static_cast<int32_t>(count);
  all.left = static_cast<float*>(scratch);
  const auto launch_part = [&](const Group& part, int64_t first_member, int64_t) {
    Backward launch = all;
    launch.group = part;
    launch.first_member = static_cast<int32_t>(first_member);
    launch.g_forget = static_cast<const float*>(g_forget) + first_member;
    launch.g_sparse = static_cast<const float*>(g_sparse) + first_member;
    launch.right = all.left + parts.left() + first_member * kPartRanks * in_features;
    launch.bias = all.left + parts.left() + parts.right() + first_member;
    return launch_backward(launch, dtype, stream);
  };
  return launch_group(kBackwardHeights, all.group, members, count, in_features, launch_part);
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
  const char* late_error = wait_for(stream);  // the tables, which may still be read, end here
  return status_of(error == nullptr ? late_error : error);
}

int stamina_usable(void) { return status_of(why_not_launched(fold_kernel)); }

const char* stamina_error(void) { return last_error; }

int64_t stamina_interface_version(void) { return STAMINA_INTERFACE_VERSION; }
