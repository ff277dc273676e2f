// SPDX-License-Identifier: Apache-2.0
// A group of projections that share their input, and how its work is cut into blocks. The cuts
// depend on shapes alone, never on the number of threads: results are the same for any number.
#pragma once

#include "tensors.h"

namespace stamina {

struct Coordinates {
  const Tensor &seed, &step;
  const Integers &layer_id, &row0, &col0;
  bool hard;
};

struct Member {
  int64_t rows, first_row;  // first_row: in the group
  const float *a, *b, *u, *v;
  int rank, mask_rank;
  float bias;  // of the mask logits
  Matrix weight, initial;
  Stream stream;  // of the member's element (0, 0)
};

struct RowBlock {
  int member;
  int64_t begin, end;  // rows of the member
};

struct Group {
  std::vector<Member> members;
  int64_t rows = 0, columns = 0;

  int64_t words() const { return round_up(columns, kWordColumns) / kWordColumns; }
};

// The counter of the random stream holds rows in 32 bits and columns / 4 in 32 bits.
inline void check_coordinates(const Coordinates& at, size_t k, int64_t rows, int64_t columns) {
  constexpr int64_t kIds = int64_t{1} << 32, kColumns = int64_t{1} << 34;
  STD_TORCH_CHECK(at.layer_id[k] >= 0 && at.layer_id[k] < kIds, "layer_id must be in [0, 2^32)");
  STD_TORCH_CHECK(at.row0[k] >= 0 && at.row0[k] <= kIds - rows,
                  "row0 must keep rows within [0, 2^32)");
  STD_TORCH_CHECK(at.col0[k] >= 0 && at.col0[k] <= kColumns - columns,
                  "col0 must keep columns within [0, 2^34)");
}

// The logit factors and the stream of every member.
inline Group logits_group(const Tensors& U, const Tensors& V, const Tensors& b,
                          const Coordinates& at) {
  const size_t n = U.size();
  STD_TORCH_CHECK(n > 0 && V.size() == n && b.size() == n && at.layer_id.size() == n &&
                      at.row0.size() == n && at.col0.size() == n,
                  "a group needs one U, V, b, layer_id, row0 and col0 per member");
  const auto seed = static_cast<uint64_t>(scalar_of<int64_t>(at.seed, "seed", ScalarType::Long));
  const auto step = static_cast<uint32_t>(scalar_of<int64_t>(at.step, "step", ScalarType::Long));
  Group group;
  group.columns = V[0].dim() == 2 ? V[0].size(1) : 0;
  STD_TORCH_CHECK(group.columns > 0, "V must be of shape [m, I]");
  for (size_t k = 0; k < n; ++k) {
    Member member{};
    member.first_row = group.rows;
    member.u = floats_of(U[k], "U", -1, -1);
    member.rows = U[k].size(0);
    member.mask_rank = static_cast<int>(U[k].size(1));
    STD_TORCH_CHECK(member.rows > 0 && member.mask_rank > 0,
                    "U must have at least one row and one column");
    check_coordinates(at, k, member.rows, group.columns);
    member.v = floats_of(V[k], "V", member.mask_rank, group.columns);
    member.bias = float_of(b[k], "b");
    member.stream = {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                     step,
                     static_cast<uint32_t>(at.layer_id[k]),
                     at.row0[k],
                     at.col0[k],
                     at.hard};
    group.rows += member.rows;
    group.members.push_back(member);
  }
  return group;
}

inline void add_products(Group& group, const Tensors& weight, const Tensors& initial,
                         const Tensors& A, const Tensors& B) {
  const size_t n = group.members.size();
  STD_TORCH_CHECK(weight.size() == n && A.size() == n && B.size() == n &&
                      (initial.empty() || initial.size() == n),
                  "a group needs one weight, A and B per member, and one weight_init or none");
  for (size_t k = 0; k < n; ++k) {
    Member& member = group.members[k];
    member.weight = matrix_of(weight[k], "weight", member.rows, group.columns);
    if (!initial.empty()) {
      member.initial = matrix_of(initial[k], "weight_init", member.rows, group.columns);
    }
    member.a = floats_of(A[k], "A", member.rows, -1);
    member.rank = static_cast<int>(A[k].size(1));
    STD_TORCH_CHECK(member.rank > 0, "A must have at least one column");
    member.b = floats_of(B[k], "B", member.rank, group.columns);
  }
}

inline Stream stream_at(const Member& member, int64_t row, int64_t column) {
  Stream stream = member.stream;
  stream.row += row;
  stream.column += column;
  return stream;
}

inline Matrix matrix_at(const Matrix& m, int64_t row, int64_t column) {
  if (m.data == nullptr) return m;
  return {offset(m.data, row * m.stride + column, m.dtype), m.stride, m.dtype};
}

// Bound k of n nearly equal parts of `total` units.
inline int64_t part(int64_t total, int64_t n, int64_t k) { return total * k / n; }

inline int64_t count_of(int64_t total, int64_t unit) { return (total + unit - 1) / unit; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of about 96 rows, an even number of them, in whole tiles: 96 x 128 fp32 values, 48 KiB,
// stay in L2 between the tile kernels and the products with X and dY.
inline std::vector<RowBlock> row_blocks(const Group& group) {
  constexpr int64_t kPairRows = 192;
  std::vector<RowBlock> blocks;
  for (size_t k = 0; k < group.members.size(); ++k) {
    const int64_t rows = group.members[k].rows;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t count = least(tiles, 2 * ((rows + kPairRows - 1) / kPairRows));
    for (int64_t p = 0; p < count; ++p) {
      blocks.push_back({static_cast<int>(k), part(tiles, count, p) * kTileRows,
                        least(part(tiles, count, p + 1) * kTileRows, rows)});
    }
  }
  return blocks;
}

inline int64_t first_row(const Group& group, const RowBlock& block) {
  return group.members[static_cast<size_t>(block.member)].first_row + block.begin;
}

inline int64_t largest_block(const std::vector<RowBlock>& blocks) {
  int64_t rows = 0;
  for (const RowBlock& block : blocks) {
    rows = rows < block.end - block.begin ? block.end - block.begin : rows;
  }
  return rows;
}

// right (rank x total columns) -> strip of `columns` columns, zero up to whole words.
inline void pack_strip(const float* right, int rank, int64_t total, int64_t first, int columns,
                       float* strip) {
  const int padded = static_cast<int>(round_up(columns, kWordColumns));
  for (int k = 0; k < rank; ++k) {
    const float* source = right + k * total + first;
    float* target = strip + k * kTileColumns;
    for (int j = 0; j < columns; ++j) target[j] = source[j];
    for (int j = columns; j < padded; ++j) target[j] = 0.0f;
  }
}

}  // namespace stamina
