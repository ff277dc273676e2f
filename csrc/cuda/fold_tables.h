// SPDX-License-Identifier: Apache-2.0
// What a launch of fold reads of its layers and adapters, made of the C interface's arguments once
// they are checked.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "fold.cuh"

namespace stamina::cuda {

inline bool check_layer(const stamina_layer& layer, int64_t index) {
  return Checks("layers", index)
      .dtype("dtype", layer.dtype)
      .pointer("weight", layer.weight, bytes_of(layer.dtype))
      .pointer("weight_init", layer.weight_init, bytes_of(layer.dtype))
      .size("out_features", layer.out_features, 1)
      .size("in_features", layer.in_features, 1, kLargestInt32 - kBlockColumns)
      .size("adapters", layer.adapters, 1)
      .ok();
}

inline bool check_adapter(const stamina_adapter& adapter, int64_t index) {
  return Checks("adapters", index)
      .pointer("A", adapter.A, 2)
      .pointer("B", adapter.B, 2)
      .pointer("bits", adapter.bits, 4)
      .size("rank", adapter.rank, 1)
      .ok();
}

struct FoldTables {
  std::vector<FoldLayer> layers;
  std::vector<FoldStep> steps;
  int64_t most_tasks = 0;  // of a layer
  bool regular = true;     // whether fold_regular_kernel can do it
};

// Appends the steps of an adapter of a layer.
inline void add_steps(const stamina_adapter& adapter, const stamina_layer& layer,
                      std::vector<FoldStep>& steps) {
  const int64_t in_features = layer.in_features;
  // elements of A and vectors of bits, 128 weights, are counted in 32 bits
  const bool counts = layer.out_features < (int64_t{1} << 39) / in_features &&
                      layer.out_features < (int64_t{1} << 32) / adapter.rank;
  const bool vectors = adapter.rank % 8 == 0 && in_features % kBlockColumns == 0 && counts &&
                       is_aligned(adapter.A) && is_aligned(adapter.B) && is_aligned(adapter.bits);
  for (int64_t first = 0; first < adapter.rank; first += kRankStep) {
    const int64_t depth = adapter.rank - first < kRankStep ? adapter.rank - first : kRankStep;
    steps.push_back({static_cast<const uint16_t*>(adapter.A) + first,
                     static_cast<const uint16_t*>(adapter.B) + first * in_features,
                     static_cast<const uint32_t*>(adapter.bits),
                     static_cast<float>(adapter.coefficient), static_cast<int32_t>(adapter.rank),
                     static_cast<int32_t>(depth), vectors && depth == kRankStep});
  }
}

// Whether fold_regular_kernel<the first layer's dtype> can do a layer whose steps are regular.
inline bool is_regular(const stamina_layer& layer, int64_t dtype) {
  constexpr int64_t kMostFeatures = int64_t{1} << 28;  // eight rows, in bytes, take 32 bits
  return layer.dtype == dtype && bytes_of(dtype) == 2 && layer.out_features % kFoldWarpRows == 0 &&
         layer.in_features < kMostFeatures && is_aligned(layer.weight) &&
         is_aligned(layer.weight_init);
}

// False where an argument is wrong.
inline bool fold_tables(const stamina_layer* layers, int64_t layer_count,
                        const stamina_adapter* adapters, int64_t adapter_count,
                        FoldTables& tables) {
  int64_t used = 0;
  for (int64_t k = 0; k < layer_count; ++k) {
    const stamina_layer& layer = layers[k];
    if (!check_layer(layer, k)) return false;
    if (!Checks("layers", k)
             .require("adapters", layer.adapters <= adapter_count - used,
                      "must not exceed adapter_count, all layers together")
             .ok()) {
      return false;
    }
    const auto first_step = static_cast<int64_t>(tables.steps.size());
    for (int64_t t = used; t < used + layer.adapters; ++t) {
      if (!check_adapter(adapters[t], t)) return false;
      add_steps(adapters[t], layer, tables.steps);
    }
    const auto end_step = static_cast<int64_t>(tables.steps.size());
    if (!Checks().size("the sum of adapters[*].rank / 16", end_step, 1).ok()) return false;
    tables.regular = tables.regular && is_regular(layer, layers[0].dtype);
    const int64_t column_tasks = ceil_div(layer.in_features, kBlockColumns);
    const int64_t tasks = ceil_div(layer.out_features, kFoldRows) * column_tasks;
    if (!Checks("layers", k).size("the number of tasks", tasks, 1, kLargestInt32 / kFoldRows).ok())
      return false;
    tables.layers.push_back({layer.weight, layer.weight_init, layer.in_features,
                             static_cast<int32_t>(layer.out_features),
                             static_cast<int32_t>(first_step),
                             static_cast<int32_t>(end_step - first_step),
                             static_cast<DType>(layer.dtype), static_cast<int32_t>(column_tasks)});
    tables.most_tasks = std::max(tables.most_tasks, tasks);
    used += layer.adapters;
  }
  for (const FoldStep& step : tables.steps) tables.regular = tables.regular && step.regular;
  return Checks()
      .require("adapter_count", used == adapter_count, "must be the sum of layers[*].adapters")
      .ok();
}

}  // namespace stamina::cuda
