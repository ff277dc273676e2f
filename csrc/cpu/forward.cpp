// SPDX-License-Identifier: Apache-2.0
// sample, compose and the forward of the masked linear.
//
// Forward: per block of about 96 rows and strip of 128 columns, W_eff is composed tile by tile and
// multiplied with X at once. Composing an element costs about 4 r flops against 2 N for the product
// (N tokens), and no byte of W_eff leaves the cache.
#include "group.h"
#include "ops.h"
#include "product.h"

namespace stamina {
namespace {

// The right factors of one member, cut into strips of kTileColumns columns that all blocks share.
class RightStrips {
 public:
  RightStrips(const Member& member, int64_t columns)
      : member_(member),
        product_(member.rank * round_up(columns, kTileColumns)),
        logits_(member.mask_rank * round_up(columns, kTileColumns)) {
    parallel(count_of(columns, kTileColumns), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kTileColumns;
        const int width = static_cast<int>(least(kTileColumns, columns - first));
        if (member.b != nullptr) {
          pack_strip(member.b, member.rank, columns, first, width,
                     product_.get() + first * member.rank);
        }
        pack_strip(member.v, member.mask_rank, columns, first, width,
                   logits_.get() + first * member.mask_rank);
      }
    });
  }

  LowRank product(int64_t row, int64_t first) const {
    return {member_.a + row * member_.rank, product_.get() + first * member_.rank, member_.rank};
  }
  LowRank logits(int64_t row, int64_t first) const {
    return {member_.u + row * member_.mask_rank, logits_.get() + first * member_.mask_rank,
            member_.mask_rank};
  }

 private:
  const Member& member_;
  Scratch<float> product_, logits_;
};

std::vector<RightStrips> right_strips(const Group& group) {
  std::vector<RightStrips> strips;
  strips.reserve(group.members.size());
  for (const Member& member : group.members) strips.emplace_back(member, group.columns);
  return strips;
}

struct ForwardSettings {
  float scale;
  Sparse sparse;
};

// Draws the bits of a strip of a block and, where `effective` is given, composes W_eff there.
void forward_strip(const Group& group, const RowBlock& block, const RightStrips& strips,
                   int64_t first, int columns, const ForwardSettings& settings, float* effective,
                   uint32_t* bits, Sums* sums) {
  const Member& member = group.members[block.member];
  ForwardTile tile{};
  tile.columns = columns;
  tile.bias = member.bias;
  tile.scale = settings.scale;
  tile.sparse = settings.sparse;
  tile.bits_stride = group.words();
  tile.sums = sums;
  for (int64_t i = block.begin; i < block.end; i += kTileRows) {
    tile.rows = static_cast<int>(least(kTileRows, block.end - i));
    tile.logits = strips.logits(i, first);
    tile.stream = stream_at(member, i, first);
    tile.bits = bits + (member.first_row + i) * tile.bits_stride + first / kWordColumns;
    if (effective != nullptr) {
      tile.product = strips.product(i, first);
      tile.weight = matrix_at(member.weight, i, first);
      tile.initial = matrix_at(member.initial, i, first);
      tile.effective = effective + (i - block.begin) * kBlockStride;
    }
    active_kernels().forward(tile);
  }
}

// Sums of the blocks per member, in order.
void store_sums(const std::vector<RowBlock>& blocks, const std::vector<Sums>& sums, size_t members,
                float* forget, float* sparse, int64_t* counts) {
  std::vector<Sums> totals(members, Sums{});
  for (size_t p = 0; p < blocks.size(); ++p) {
    Sums& total = totals[blocks[p].member];
    total.forget += sums[p].forget;
    total.sparse += sums[p].sparse;
    total.kept += sums[p].kept;
    total.overlap += sums[p].overlap;
  }
  for (size_t k = 0; k < members; ++k) {
    forget[k] = static_cast<float>(totals[k].forget);
    sparse[k] = static_cast<float>(totals[k].sparse);
    counts[2 * k] = totals[k].kept;
    counts[2 * k + 1] = totals[k].overlap;
  }
}

Tensor empty_outputs(const Tensor& x, int64_t rows) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = rows;
  return torch::stable::empty({shape.data(), shape.size()}, x.scalar_type());
}

// The biases of the group in x's dtype, one after the other; the caller has concatenated them.
void* bias_of(const Tensors& bias, const Group& group, ScalarType type) {
  if (bias.empty()) return nullptr;
  STD_TORCH_CHECK(
      bias.size() == 1 && bias[0].numel() == group.rows && bias[0].scalar_type() == type,
      "bias must be one tensor of sum O elements in the dtype of x");
  check_layout(bias[0], "bias");
  return bias[0].data_ptr();
}

// What the blocks of one call share.
struct ForwardCall {
  Group group;
  std::vector<RowBlock> blocks;
  ForwardSettings settings;
  int64_t tokens;
  DType dtype;
  void *x, *bias;
  Matrix y;
  uint32_t* bits;
};

std::vector<Sums> run_forward(const ForwardCall& call) {
  const Group& group = call.group;
  const TokenPanels x(call.x, call.tokens, group.columns, call.dtype, Format(call.dtype));
  const bool biased = call.bias != nullptr;
  const Words bias(call.bias, biased ? 1 : 0, group.rows, call.dtype, Format(DType::kFloat32));
  const std::vector<RightStrips> strips = right_strips(group);
  const int64_t rows = largest_block(call.blocks);
  std::vector<Sums> sums(call.blocks.size(), Sums{});
  parallel(static_cast<int64_t>(call.blocks.size()), [&](int64_t begin, int64_t end) {
    Scratch<float> effective(rows * kBlockStride), outputs(rows * scratch_stride(call.tokens));
    for (int64_t p = begin; p < end; ++p) {
      const RowBlock& block = call.blocks[p];
      for (int64_t j = 0; j < group.columns; j += kTileColumns) {
        const int columns = static_cast<int>(least(kTileColumns, group.columns - j));
        forward_strip(group, block, strips[block.member], j, columns, call.settings,
                      effective.get(), call.bits, &sums[p]);
        x.multiply(effective.get(), block.end - block.begin, j, columns, outputs.get());
      }
      const int64_t first = first_row(group, block);
      store_outputs(outputs.get(), block.end - block.begin, call.tokens,
                    biased ? bias.get() + first : nullptr, matrix_at(call.y, 0, first));
    }
  });
  return sums;
}

}  // namespace

Tensor sample(const Tensors& U, const Tensors& V, const Tensors& b, const Tensor& seed,
              const Tensor& step, const Integers& layer_id, const Integers& row0,
              const Integers& col0, bool hard) {
  const Group group = logits_group(U, V, b, {seed, step, layer_id, row0, col0, hard});
  Tensor bits = empty({group.rows, group.words()}, ScalarType::Int);
  auto* words = static_cast<uint32_t*>(bits.data_ptr());
  const std::vector<RowBlock> blocks = row_blocks(group);
  const std::vector<RightStrips> strips = right_strips(group);
  parallel(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t j = 0; j < group.columns; j += kTileColumns) {
        const int columns = static_cast<int>(least(kTileColumns, group.columns - j));
        forward_strip(group, blocks[p], strips[blocks[p].member], j, columns, {}, nullptr, words,
                      nullptr);
      }
    }
  });
  return bits;
}

Tensor compose(const Tensors& weight, const Tensors& A, const Tensors& B, const Tensor& bits,
               const Tensor& scale, ScalarType dtype) {
  STD_TORCH_CHECK(!weight.empty() && weight[0].dim() == 2, "weight must be a list of matrices");
  Group group;
  group.columns = weight[0].size(1);
  for (const Tensor& w : weight) {
    Member member{};
    member.first_row = group.rows;
    member.rows = w.size(0);
    group.rows += member.rows;
    group.members.push_back(member);
  }
  add_products(group, weight, {}, A, B);
  const auto* words =
      data_of<const uint32_t>(bits, "bits", ScalarType::Int, group.rows, group.words());
  const float s = float_of(scale, "scale");
  Tensor effective = empty({group.rows, group.columns}, dtype);
  const Matrix target = matrix_of(effective, "dtype", group.rows, group.columns);
  const std::vector<RowBlock> blocks = row_blocks(group);
  parallel(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const RowBlock& block = blocks[p];
      const Member& member = group.members[block.member];
      Scratch<float> strip(member.rank * kTileColumns);
      for (int64_t j = 0; j < group.columns; j += kTileColumns) {
        const int columns = static_cast<int>(least(kTileColumns, group.columns - j));
        pack_strip(member.b, member.rank, group.columns, j, columns, strip.get());
        for (int64_t i = block.begin; i < block.end; i += kTileRows) {
          const int64_t row = member.first_row + i;
          active_kernels().compose({static_cast<int>(least(kTileRows, block.end - i)),
                                    columns,
                                    {member.a + i * member.rank, strip.get(), member.rank},
                                    s,
                                    matrix_at(member.weight, i, j),
                                    matrix_at(target, row, j),
                                    words + row * group.words() + j / kWordColumns,
                                    group.words()});
        }
      }
    }
  });
  return effective;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_linear(
    const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& A, const Tensors& B,
    const Tensors& U, const Tensors& V, const Tensors& b, const Tensors& weight_init,
    const Tensor& scale, const Tensor& seed, const Tensor& step, const Integers& layer_id,
    const Integers& row0, const Integers& col0, bool hard, const std::string& sparse_kind) {
  ForwardCall call{};
  call.group = logits_group(U, V, b, {seed, step, layer_id, row0, col0, hard});
  const Group& group = call.group;
  add_products(call.group, weight, weight_init, A, B);
  check_layout(x, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == group.columns, "x must be of shape [..., ",
                  group.columns, "]");
  const auto n = static_cast<int64_t>(weight.size());
  Tensor y = empty_outputs(x, group.rows);
  Tensor forget = empty({n}, ScalarType::Float), sparse = empty({n}, ScalarType::Float);
  Tensor counts = empty({n, 2}, ScalarType::Long);
  Tensor bits = empty({group.rows, group.words()}, ScalarType::Int);
  call.dtype = dtype_of(x, "x");
  call.blocks = row_blocks(group);
  call.settings = {float_of(scale, "scale"), sparse_of(sparse_kind)};
  call.tokens = x.numel() / group.columns;
  call.x = x.data_ptr();
  call.bias = bias_of(bias, group, x.scalar_type());
  call.y = {y.data_ptr(), group.rows, call.dtype};
  call.bits = static_cast<uint32_t*>(bits.data_ptr());
  store_sums(call.blocks, run_forward(call), group.members.size(),
             static_cast<float*>(forget.data_ptr()), static_cast<float*>(sparse.data_ptr()),
             static_cast<int64_t*>(counts.data_ptr()));
  return {y, forget, sparse, counts, bits};
}

Tensor philox_words(int64_t seed, int64_t step, int64_t layer_id, int64_t row0, int64_t col0,
                    int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && rows <= kTileRows && columns >= 0 && columns <= kTileColumns,
                  "rows and columns must fit one tile, ", kTileRows, " x ", kTileColumns);
  Tensor words = empty({rows, columns}, ScalarType::Int);
  const auto bits = static_cast<uint64_t>(seed);
  const Stream stream{{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
                      static_cast<uint32_t>(step),
                      static_cast<uint32_t>(layer_id),
                      row0,
                      col0,
                      false};
  active_kernels().philox_words(stream, static_cast<int>(rows), static_cast<int>(columns),
                                static_cast<uint32_t*>(words.data_ptr()));
  return words;
}

}  // namespace stamina
