// SPDX-License-Identifier: Apache-2.0
// The table of tile kernels that each instruction set provides. Plain pointers and sizes only: the
// files behind it are compiled with special flags, and a shared inline function compiled there
// could be picked by the linker for a machine that lacks those instructions.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace stamina {

// A tile is at most kTileRows x kTileColumns: its fp32 arrays (6 KiB each) and the matching strips
// of B and V (16 KiB at rank 16) stay in L1 and L2, and each strip is read once for kTileRows rows.
constexpr int kTileRows = 12;
constexpr int kTileColumns = 128;
constexpr int kWordColumns = 32;  // columns per word of mask bits
constexpr int kLineFloats = 16;   // padding unit of all scratch arrays
// Off the power-of-two stride, at which lines of a column collide in the cache.
constexpr int64_t kBlockStride = kTileColumns + kLineFloats;

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Matrix {
  void* data;
  int64_t stride;  // elements from row to row
  DType dtype;
};

// Where the uniforms come from. hard: none, u = 1/2.
struct Stream {
  PhiloxKey key;
  uint32_t step, layer;
  int64_t row, column;  // global coordinates of the tile's first element
  bool hard;
};

// out (rows x columns) = or += left right: one chain of multiply-adds per element over ascending k.
// Element (i, k) of left is left[i * left_row + k * left_inner]. right comes in panels of
// Kernels::panel_columns columns: element (k, j) of one is right[k * right_row + j], and panels are
// right_panel apart. right and out have columns up to a multiple of kLineFloats. An element is a
// float or, for PairProducts, two bf16 values of neighbouring k, the earlier one in the low half.
struct Product {
  int64_t rows, columns, inner;
  const float* left;
  int64_t left_row, left_inner;
  const float* right;
  int64_t right_panel, right_row;
  float* out;
  int64_t out_stride;
  bool accumulate;
};

// One low-rank product of the tile: left rows x rank (row stride `rank`), right rank x columns with
// row stride kTileColumns, zero beyond the tile's columns.
struct LowRank {
  const float* left;
  const float* right;
  int rank;
};

enum class Sparse : int { kSigmoid, kRelu };

struct Sums {
  double forget, sparse;
  int64_t kept, overlap;
};

// Draws the mask of the tile, writes bits and, where sums are given, W + s M (.) (A B) in rows of
// kBlockStride floats.
struct ForwardTile {
  int rows, columns;
  LowRank product, logits;
  float bias, scale;
  Stream stream;
  Sparse sparse;
  Matrix weight, initial;  // data null where absent
  float* effective;
  uint32_t* bits;
  int64_t bits_stride;
  Sums* sums;  // null: bits only
};

// W + s M (.) (A B) from given bits.
struct ComposeTile {
  int rows, columns;
  LowRank product;
  float scale;
  Matrix weight, effective;
  const uint32_t* bits;
  int64_t bits_stride;
};

// Contracts the tile of G = dY^T X, rows of kBlockStride floats, into the gradients of the factors,
// which are accumulated; with `composes` W + s M (.) (A B) takes its place. Transposed strips of B
// and V have `columns` rows of `padded_rank` floats.
struct BackwardTile {
  int rows, columns;
  LowRank product, logits;
  float bias, scale, tau, g_forget, g_sparse;
  Stream stream;
  Sparse sparse;
  bool composes;
  Matrix weight, initial;  // initial.data null: no g_forget
  const uint32_t* bits;
  int64_t bits_stride;
  float* gradient;
  const float *right_transposed, *logits_right_transposed;
  float *d_left, *d_logits_left;    // rows x padded rank
  float *d_right, *d_logits_right;  // rank x kTileColumns
  double* d_bias;
};

// total += c M (.) (left right) for any number of rows; total has rows of kTileColumns.
struct FoldTile {
  int rows, columns;
  LowRank product;
  float coefficient;
  const uint32_t* bits;
  int64_t bits_stride;
  float* total;
};

// Rows of embeddings that an MLP takes at once, and the sizes that it serves.
constexpr int kMlpRows = 64;
constexpr int kMaxMlpWidth = 256;
constexpr int kMaxMlpHidden = 32;
constexpr int64_t kMaxMlpCount = 0x7FFFFFFF;

// Y = silu(E W1^T + b1) W2^T + b2, Y^T where transposed, or its backward. Matrices are contiguous.
struct Mlp {
  int64_t count;
  int width, hidden, out;
  bool transposed;
  const float *embedding, *weight1, *bias1, *weight2, *bias2;
  float* y;         // forward
  const float* dy;  // backward, with what follows
  float *d_embedding, *d_weight1, *d_bias1, *d_weight2, *d_bias2;
  float* scratch;
};

// Products of bf16 values two at a time, where a CPU has them: twice the multiply-adds of fp32.
// Sums are fp32; values below the smallest normal number count as zero.
struct PairProducts {
  void (*multiply)(const Product&);
  // A block in rows of kBlockStride floats, rounded to bf16 and turned into pairs in its place: of
  // neighbours in a row, the last of an odd number of columns with zero,
  void (*pair_columns)(float* block, int64_t rows, int64_t columns);
  // or of neighbours in a column, the last of an odd number of rows with zero.
  void (*pair_rows)(float* block, int64_t rows, int64_t columns);
};

struct Kernels {
  const char* name;
  int64_t panel_columns;  // a divisor of kTileColumns
  void (*forward)(const ForwardTile&);
  void (*compose)(const ComposeTile&);
  void (*backward)(const BackwardTile&);
  void (*fold)(const FoldTile&);
  void (*multiply)(const Product&);
  void (*mlp_forward)(const Mlp&);
  void (*mlp_backward)(const Mlp&);
  // target = round(source + total) on at most kTileColumns; returns whether all results are finite
  bool (*round_sum)(const float* total, const void* source, void* target, int columns, DType dtype);
  // n values from one dtype to another, rounded to nearest even
  void (*convert)(const void* source, DType from, void* target, DType to, int64_t n);
  // the raw words behind the uniforms of a tile, rows x columns
  void (*philox_words)(const Stream&, int rows, int columns, uint32_t* out);
  const PairProducts* pairs;  // null where the CPU has none
};

// The table in use: the widest that this machine supports, or the one that the environment variable
// STAMINA_CPU_ISA names. Throws for a name that is unknown or unsupported here.
const Kernels& active_kernels();
void select_kernels(const char* name);

namespace avx512 {
extern const Kernels kernels;
extern const PairProducts pairs;  // of the extension for bf16
}  // namespace avx512
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

constexpr int64_t padded_rank(int64_t rank) { return round_up(rank, kLineFloats); }

}  // namespace stamina
