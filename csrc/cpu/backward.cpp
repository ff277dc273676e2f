// SPDX-License-Identifier: Apache-2.0
// Backward of the masked linear.
//
// Work is cut into strips of at most 128 columns over all rows of the group. Per strip and block of
// about 96 rows: G = dY^T X (48 KiB, within L2); one pass over its tiles contracts G into the
// factors' gradients and overwrites it with W_eff; then dX += dY W_eff. A strip holds whole
// columns, so dX, dB and dV are finished by it. dA, dU and db are partial sums: strips are dealt to
// a few slots, a number fixed by the shapes, and slots are added in order.
#include <cstring>

#include "group.h"
#include "ops.h"
#include "product.h"

namespace stamina {
namespace {

struct BackwardCall {
  Group group;
  std::vector<RowBlock> blocks;
  int64_t tokens;
  Matrix x, dx;  // dx.data null: not wanted
  const uint32_t* bits;
  float scale, tau;
  const float *g_forget, *g_sparse;
  Sparse sparse;
};

// Where the gradients of one member start in the flat result.
struct Offsets {
  int64_t a, b, u, v, bias, end;
};

Offsets offsets_of(const Member& m, int64_t columns, int64_t start) {
  Offsets at{};
  at.a = start;
  at.b = at.a + m.rows * m.rank;
  at.u = at.b + m.rank * columns;
  at.v = at.u + m.rows * m.mask_rank;
  at.bias = at.v + m.mask_rank * columns;
  at.end = at.bias + 1;
  return at;
}

// Partial dA, dU (rows padded) and db of the whole group; one per slot.
struct Partial {
  Scratch<float> values;
  std::vector<double> bias;

  Partial(int64_t floats, size_t members) : values(floats), bias(members, 0.0) {
    std::memset(values.get(), 0, static_cast<size_t>(floats) * sizeof(float));
  }
};

struct PartialLayout {
  std::vector<int64_t> a, u;  // start of each member's rows
  int64_t floats = 0;

  explicit PartialLayout(const Group& group) {
    for (const Member& m : group.members) {
      a.push_back(floats);
      floats += m.rows * padded_rank(m.rank);
      u.push_back(floats);
      floats += m.rows * padded_rank(m.mask_rank);
    }
  }
};

int64_t strip_count(const Group& group) {
  constexpr int64_t kPairWords = 2 * kTileColumns / kWordColumns;
  return least(group.words(), 2 * ((group.words() + kPairWords - 1) / kPairWords));
}

// Slots hold at most about a quarter of the group's elements in partial sums.
int64_t slot_count(const Group& group, const PartialLayout& layout, int64_t strips) {
  constexpr int64_t kMost = 16;
  const int64_t affordable = group.rows * group.columns / (4 * layout.floats);
  const int64_t even = least(kMost, affordable) / 2 * 2;
  return least(strips, even < 2 ? 2 : even);
}

void pack_transposed(const float* strip, int rank, int columns, float* out) {
  const int64_t padded = padded_rank(rank);
  for (int j = 0; j < columns; ++j) {
    for (int k = 0; k < rank; ++k) out[j * padded + k] = strip[k * kTileColumns + j];
    for (int64_t k = rank; k < padded; ++k) out[j * padded + k] = 0.0f;
  }
}

// Right factor of one member on one strip: values, transpose and gradient.
class RightFactor {
 public:
  RightFactor(const float* data, int rank, int64_t total, int64_t first, int columns)
      : strip_(rank * kTileColumns),
        transposed_(padded_rank(rank) * kTileColumns),
        gradient_(rank * kTileColumns),
        rank_(rank) {
    pack_strip(data, rank, total, first, columns, strip_.get());
    pack_transposed(strip_.get(), rank, columns, transposed_.get());
    std::memset(gradient_.get(), 0, sizeof(float) * static_cast<size_t>(rank) * kTileColumns);
  }

  const float* strip() const { return strip_.get(); }
  const float* transposed() const { return transposed_.get(); }
  float* gradient() const { return gradient_.get(); }
  void store_gradient(float* out, int64_t total, int64_t first, int columns) const {
    for (int k = 0; k < rank_; ++k) {
      std::memcpy(out + k * total + first, gradient_.get() + k * kTileColumns,
                  sizeof(float) * static_cast<size_t>(columns));
    }
  }

 private:
  Scratch<float> strip_, transposed_, gradient_;
  int rank_;
};

// One strip of columns and the memory that it works in.
struct Strip {
  int64_t first;
  int columns;
  InputStrip x;
  Scratch<float> block, dx;

  Strip(int64_t tokens, int64_t block_rows, const Format& format)
      : first(0),
        columns(0),
        x(tokens, format),
        block(block_rows * kBlockStride),
        dx(tokens * kBlockStride) {}
};

// Contracts G of a block, which lies in the strip, tile by tile.
void contract_block(const BackwardCall& call, const RowBlock& block, const Strip& strip,
                    BackwardTile tile, const RightFactor& product, const RightFactor& logits,
                    float* d_left, float* d_logits_left) {
  const Member& m = call.group.members[block.member];
  for (int64_t i = block.begin; i < block.end; i += kTileRows) {
    tile.rows = static_cast<int>(least(kTileRows, block.end - i));
    tile.product = {m.a + i * m.rank, product.strip(), m.rank};
    tile.logits = {m.u + i * m.mask_rank, logits.strip(), m.mask_rank};
    tile.stream = stream_at(m, i, strip.first);
    tile.weight = matrix_at(m.weight, i, strip.first);
    tile.initial = tile.g_forget != 0.0f ? matrix_at(m.initial, i, strip.first) : Matrix{};
    tile.bits = call.bits + (m.first_row + i) * tile.bits_stride + strip.first / kWordColumns;
    tile.gradient = strip.block.get() + (i - block.begin) * kBlockStride;
    tile.d_left = d_left + i * padded_rank(m.rank);
    tile.d_logits_left = d_logits_left + i * padded_rank(m.mask_rank);
    active_kernels().backward(tile);
  }
}

// The gradients of one member on a strip; its share of dX is added to the strip's.
void backward_member(const BackwardCall& call, const OutputGradients& dy, size_t k,
                     const Strip& strip, const PartialLayout& layout, Partial& partial,
                     float* out) {
  const Member& m = call.group.members[k];
  const int64_t total = call.group.columns;
  const RightFactor product(m.b, m.rank, total, strip.first, strip.columns);
  const RightFactor logits(m.v, m.mask_rank, total, strip.first, strip.columns);
  BackwardTile tile{};
  tile.columns = strip.columns;
  tile.bias = m.bias;
  tile.scale = call.scale;
  tile.tau = call.tau;
  tile.g_forget = m.initial.data != nullptr ? call.g_forget[k] : 0.0f;
  tile.g_sparse = call.g_sparse[k];
  tile.sparse = call.sparse;
  tile.composes = call.dx.data != nullptr;
  tile.bits_stride = call.group.words();
  tile.right_transposed = product.transposed();
  tile.logits_right_transposed = logits.transposed();
  tile.d_right = product.gradient();
  tile.d_logits_right = logits.gradient();
  tile.d_bias = &partial.bias[k];
  for (size_t p = 0; p < call.blocks.size(); ++p) {
    const RowBlock& block = call.blocks[p];
    if (block.member != static_cast<int>(k)) continue;
    dy.multiply_inputs(p, strip.x.get(), strip.columns, strip.block.get());
    contract_block(call, block, strip, tile, product, logits, partial.values.get() + layout.a[k],
                   partial.values.get() + layout.u[k]);
    if (tile.composes) {
      dy.multiply_effective(p, strip.block.get(), strip.columns, strip.dx.get());
    }
  }
  const Offsets at = offsets_of(m, total, 0);
  product.store_gradient(out + at.b, total, strip.first, strip.columns);
  logits.store_gradient(out + at.v, total, strip.first, strip.columns);
}

void backward_strip(const BackwardCall& call, const OutputGradients& dy, Strip& strip,
                    const PartialLayout& layout, Partial& partial, float* out) {
  strip.x.pack(matrix_at(call.x, 0, strip.first), strip.columns);
  for (size_t k = 0; k < call.group.members.size(); ++k) {
    backward_member(call, dy, k, strip, layout, partial, out);
    out += offsets_of(call.group.members[k], call.group.columns, 0).end;
  }
  if (call.dx.data == nullptr) return;
  for (int64_t t = 0; t < call.tokens; ++t) {
    active_kernels().convert(strip.dx.get() + t * kBlockStride, DType::kFloat32,
                             matrix_at(call.dx, t, strip.first).data, call.dx.dtype, strip.columns);
  }
}

// Adds all partial sums to the first, slot after slot for each element.
void reduce(const std::vector<std::unique_ptr<Partial>>& partials, int64_t floats) {
  constexpr int64_t kChunk = 4096;
  parallel((floats + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, last = least(first + kChunk, floats);
      float* total = partials[0]->values.get();
      for (size_t slot = 1; slot < partials.size(); ++slot) {
        const float* other = partials[slot]->values.get();
        for (int64_t i = first; i < last; ++i) total[i] += other[i];
      }
    }
  });
}

void copy_without_padding(const float* padded, int64_t rows, int rank, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(out + i * rank, padded + i * padded_rank(rank), sizeof(float) * rank);
  }
}

void run_strips(const BackwardCall& call, const OutputGradients& dy, const PartialLayout& layout,
                float* out, std::vector<std::unique_ptr<Partial>>& partials) {
  const int64_t strips = strip_count(call.group);
  const int64_t words = call.group.words();
  const auto slots = static_cast<int64_t>(partials.size());
  parallel(slots, [&](int64_t begin, int64_t end) {
    Strip strip(call.tokens, largest_block(call.blocks), Format(call.x.dtype));
    for (int64_t slot = begin; slot < end; ++slot) {
      partials[slot] = std::make_unique<Partial>(layout.floats, call.group.members.size());
      for (int64_t p = part(strips, slots, slot); p < part(strips, slots, slot + 1); ++p) {
        strip.first = part(words, strips, p) * kWordColumns;
        const int64_t last = least(part(words, strips, p + 1) * kWordColumns, call.group.columns);
        strip.columns = static_cast<int>(last - strip.first);
        backward_strip(call, dy, strip, layout, *partials[slot], out);
      }
    }
  });
}

void store_left(const BackwardCall& call, const PartialLayout& layout,
                const std::vector<std::unique_ptr<Partial>>& partials, float* out) {
  reduce(partials, layout.floats);
  const float* total = partials[0]->values.get();
  for (size_t k = 0; k < call.group.members.size(); ++k) {
    const Member& m = call.group.members[k];
    const Offsets at = offsets_of(m, call.group.columns, 0);
    copy_without_padding(total + layout.a[k], m.rows, m.rank, out + at.a);
    copy_without_padding(total + layout.u[k], m.rows, m.mask_rank, out + at.u);
    double bias = 0.0;
    for (const auto& partial : partials) bias += partial->bias[k];
    out[at.bias] = static_cast<float>(bias);
    out += at.end;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> masked_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensors& weight, const Tensors& A, const Tensors& B,
    const Tensors& U, const Tensors& V, const Tensors& b, const Tensors& weight_init,
    const Tensor& bits, const Tensor& scale, const Tensor& tau, const Tensor& seed,
    const Tensor& step, const Tensor& g_forget, const Tensor& g_sparse, const Integers& layer_id,
    const Integers& row0, const Integers& col0, bool hard, const std::string& sparse_kind,
    bool need_dx) {
  BackwardCall call{};
  call.group = logits_group(U, V, b, {seed, step, layer_id, row0, col0, hard});
  add_products(call.group, weight, weight_init, A, B);
  const int64_t rows = call.group.rows, columns = call.group.columns;
  check_layout(x, "x");
  check_layout(dy, "dy");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns, "x must be of shape [..., ",
                  columns, "]");
  call.tokens = x.numel() / columns;
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == call.tokens * rows,
                  "dy must be of shape [..., ", rows, "] in the dtype of x");
  const auto n = static_cast<int64_t>(weight.size());
  for (const Tensor* g : {&g_forget, &g_sparse}) {
    check_layout(*g, "g_forget and g_sparse");
    STD_TORCH_CHECK(g->numel() == n && g->scalar_type() == ScalarType::Float,
                    "g_forget and g_sparse must be float32 with one element per member");
  }
  const DType dtype = dtype_of(x, "x");
  call.bits = data_of<const uint32_t>(bits, "bits", ScalarType::Int, rows, call.group.words());
  call.scale = float_of(scale, "scale");
  call.tau = float_of(tau, "tau");
  call.g_forget = static_cast<const float*>(g_forget.data_ptr());
  call.g_sparse = static_cast<const float*>(g_sparse.data_ptr());
  call.sparse = sparse_of(sparse_kind);
  call.x = {x.data_ptr(), columns, dtype};
  Tensor dx = need_dx ? torch::stable::empty_like(x) : empty({0}, x.scalar_type());
  call.dx = {need_dx ? dx.data_ptr() : nullptr, columns, dtype};
  call.blocks = row_blocks(call.group);

  int64_t size = 0;
  for (const Member& m : call.group.members) size = offsets_of(m, columns, size).end;
  Tensor gradients = empty({size}, ScalarType::Float);
  auto* out = static_cast<float*>(gradients.data_ptr());
  const PartialLayout layout(call.group);
  std::vector<std::unique_ptr<Partial>> partials(
      static_cast<size_t>(slot_count(call.group, layout, strip_count(call.group))));
  const OutputGradients gradients_of_y({dy.data_ptr(), rows, dtype}, call.tokens, call.group,
                                       call.blocks, Format(dtype));
  run_strips(call, gradients_of_y, layout, out, partials);
  store_left(call, layout, partials, out);
  return {dx, gradients};
}

}  // namespace stamina
