// SPDX-License-Identifier: Apache-2.0
// Fold of committed adapters into the weights of many layers.
//
// Tasks are blocks of 96 x 512 weights: the fp32 sum of the deltas, 192 KiB, stays in L2 while all
// adapters of the layer pass, so that W is read and written once whatever their number. 512 columns
// are a cache line of mask bits.
#include <atomic>
#include <cstring>

#include "group.h"
#include "ops.h"

namespace stamina {
namespace {

constexpr int64_t kFoldRows = 8 * kTileRows;
constexpr int64_t kFoldColumns = 4 * kTileColumns;

struct Adapter {
  const uint16_t *a, *b;
  const uint32_t* bits;
  int rank;
  float coefficient;
};

struct Layer {
  Matrix weight, initial;
  int64_t rows, columns;
  std::vector<Adapter> adapters;

  int64_t words() const { return round_up(columns, kWordColumns) / kWordColumns; }
};

struct Task {
  int64_t layer, row, column;
};

std::vector<Layer> layers_of(const Tensors& weight, const Tensors& initial, const Tensors& A,
                             const Tensors& B, const std::vector<double>& scale,
                             const Tensors& bits, const Integers& first) {
  const size_t n = weight.size();
  STD_TORCH_CHECK(initial.size() == n && first.size() == n + 1 && first[0] == 0,
                  "fold needs one weight_init per weight and their prefix sums of adapters");
  const auto count = static_cast<size_t>(first[n]);
  STD_TORCH_CHECK(
      A.size() == count && B.size() == count && scale.size() == count && bits.size() == count,
      "fold needs one A, B, scale and bits per adapter");
  std::vector<Layer> layers(n);
  for (size_t k = 0; k < n; ++k) {
    Layer& layer = layers[k];
    layer.weight = matrix_of(weight[k], "weight", -1, -1);
    layer.rows = weight[k].size(0);
    layer.columns = weight[k].size(1);
    layer.initial = matrix_of(initial[k], "weight_init", layer.rows, layer.columns);
    STD_TORCH_CHECK(layer.initial.dtype == layer.weight.dtype,
                    "weight_init must have the dtype of weight");
    STD_TORCH_CHECK(first[k] <= first[k + 1] && first[k + 1] <= first[n], "first must ascend");
    for (auto t = static_cast<size_t>(first[k]); t < static_cast<size_t>(first[k + 1]); ++t) {
      const auto* a = data_of<uint16_t>(A[t], "A", ScalarType::Half, layer.rows, -1);
      const int64_t rank = A[t].size(1);
      layer.adapters.push_back(
          {a, data_of<uint16_t>(B[t], "B", ScalarType::Half, rank, layer.columns),
           data_of<uint32_t>(bits[t], "bits", ScalarType::Int, layer.rows, layer.words()),
           static_cast<int>(rank), static_cast<float>(scale[t])});
    }
  }
  return layers;
}

int highest_rank(const std::vector<Layer>& layers) {
  int highest = 1;
  for (const Layer& layer : layers) {
    for (const Adapter& adapter : layer.adapters) {
      highest = adapter.rank > highest ? adapter.rank : highest;
    }
  }
  return highest;
}

// total: a panel of kFoldRows x kTileColumns for each tile of columns.
struct FoldBuffers {
  Scratch<float> total, left, right;

  explicit FoldBuffers(int rank)
      : total(kFoldRows * kFoldColumns), left(kFoldRows * rank), right(rank * kTileColumns) {}

  float* at(int64_t row, int64_t column) const {
    return total.get() + column / kTileColumns * kFoldRows * kTileColumns + row * kTileColumns;
  }
};

// Rows of a block are short and far apart, which defeats the hardware's prefetcher: what comes next
// is asked for a little at a time, between the uses of what is there.
inline void prefetch(const void* begin, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(begin) + at);
  }
}

// The part of an adapter that a task takes.
struct Piece {
  const Layer& layer;
  const Adapter& adapter;
  const Task& task;

  const uint16_t* left() const { return adapter.a + task.row * adapter.rank; }
  const uint16_t* right(int k, int64_t column) const {
    return adapter.b + k * layer.columns + task.column + column;
  }
  const uint32_t* bits(int64_t row, int64_t column) const {
    return adapter.bits + (task.row + row) * layer.words() + (task.column + column) / kWordColumns;
  }
};

// Loads a strip of B while that of the adapter after it is asked for.
void load_right(const Piece& piece, const Piece& next, int64_t first, int columns, float* right) {
  for (int k = 0; k < piece.adapter.rank; ++k) {
    if (k < next.adapter.rank) prefetch(next.right(k, first), columns * size_of(DType::kFloat16));
    float* strip = right + k * kTileColumns;
    active_kernels().convert(piece.right(k, first), DType::kFloat16, strip, DType::kFloat32,
                             columns);
    for (int j = columns; j < round_up(columns, kWordColumns); ++j) strip[j] = 0.0f;
  }
}

void add_adapter(const Piece& piece, const Piece& next, int64_t rows, int64_t columns,
                 const FoldBuffers& buffers) {
  const int rank = piece.adapter.rank;
  active_kernels().convert(piece.left(), DType::kFloat16, buffers.left.get(), DType::kFloat32,
                           rows * rank);
  const int64_t tiles = count_of(columns, kTileColumns);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kTileColumns;
    const int width = static_cast<int>(least(kTileColumns, columns - first));
    load_right(piece, next, first, width, buffers.right.get());
    for (int64_t i = part(rows, tiles, tile); i < part(rows, tiles, tile + 1); ++i) {
      prefetch(next.bits(i, 0), columns / 8);
    }
    active_kernels().fold({static_cast<int>(rows),
                           width,
                           {buffers.left.get(), buffers.right.get(), rank},
                           piece.adapter.coefficient,
                           piece.bits(0, first),
                           piece.layer.words(),
                           buffers.at(0, first)});
  }
}

// W = round(W_init + total) of a task. Returns whether every result is finite.
bool round_block(const Layer& layer, const Task& task, int64_t rows, int64_t columns,
                 const FoldBuffers& buffers) {
  constexpr int64_t kAhead = 2;  // rows that are asked for before they are used
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = task.row + i, bytes = columns * size_of(layer.weight.dtype);
    if (i + kAhead < rows) {
      prefetch(matrix_at(layer.initial, row + kAhead, task.column).data, bytes);
      prefetch(matrix_at(layer.weight, row + kAhead, task.column).data, bytes);
    }
    for (int64_t j = 0; j < columns; j += kTileColumns) {
      const Matrix source = matrix_at(layer.initial, row, task.column + j);
      const Matrix target = matrix_at(layer.weight, row, task.column + j);
      finite &= active_kernels().round_sum(buffers.at(i, j), source.data, target.data,
                                           static_cast<int>(least(kTileColumns, columns - j)),
                                           target.dtype);
    }
  }
  return finite;
}

bool fold_block(const Layer& layer, const Task& task, const FoldBuffers& buffers) {
  const int64_t rows = least(kFoldRows, layer.rows - task.row);
  const int64_t columns = least(kFoldColumns, layer.columns - task.column);
  std::memset(buffers.total.get(), 0, sizeof(float) * kFoldRows * kFoldColumns);
  const size_t last = layer.adapters.size() - 1;
  for (size_t t = 0; t <= last; ++t) {
    const Piece next{layer, layer.adapters[t < last ? t + 1 : last], task};
    add_adapter({layer, layer.adapters[t], task}, next, rows, columns, buffers);
  }
  return round_block(layer, task, rows, columns, buffers);
}

void restore(const Layer& layer) {
  std::memcpy(layer.weight.data, layer.initial.data,
              static_cast<size_t>(layer.rows * layer.columns * size_of(layer.weight.dtype)));
}

}  // namespace

int64_t fold_(const Tensors& weight, const Tensors& weight_init, const Tensors& A, const Tensors& B,
              const std::vector<double>& scale, const Tensors& bits, const Integers& first) {
  const std::vector<Layer> layers = layers_of(weight, weight_init, A, B, scale, bits, first);
  std::vector<Task> tasks;
  for (size_t k = 0; k < layers.size(); ++k) {
    if (layers[k].adapters.empty()) restore(layers[k]);
    if (layers[k].adapters.empty()) continue;
    for (int64_t i = 0; i < layers[k].rows; i += kFoldRows) {
      for (int64_t j = 0; j < layers[k].columns; j += kFoldColumns) {
        tasks.push_back({static_cast<int64_t>(k), i, j});
      }
    }
  }
  const auto count = static_cast<int64_t>(layers.size());
  std::atomic<int64_t> overflowed{count};
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t begin, int64_t end) {
    const FoldBuffers buffers(highest_rank(layers));
    for (int64_t p = begin; p < end; ++p) {
      if (fold_block(layers[tasks[p].layer], tasks[p], buffers)) continue;
      int64_t lowest = overflowed.load();
      while (tasks[p].layer < lowest && !overflowed.compare_exchange_weak(lowest, tasks[p].layer)) {
      }
    }
  });
  if (overflowed == count) return -1;
  for (const Layer& layer : layers) restore(layer);
  return overflowed;
}

}  // namespace stamina
