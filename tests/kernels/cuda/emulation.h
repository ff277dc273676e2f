// SPDX-License-Identifier: Apache-2.0
// The host twin of csrc/cuda/primitives.cuh: kernels run unchanged on a CPU, for tests only.
//
// Blocks run one after the other; the threads of a block are fibers that give way at barriers and
// where a warp acts as one. A warp runs alone until it waits for the block. Lanes, warps and blocks
// run in ascending or, built with REVERSED, descending order. Asynchronous copies are made as late
// as allowed, when they are waited for, and what they will write holds NaN from the moment they are
// asked for, as shared memory does before every block: a missing wait or barrier shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../csrc/common/half.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x, y;
};

inline Index threadIdx, blockIdx, blockDim;
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

namespace stamina::emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  void make() const { from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes); }
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false, waits = false;  // waits: for the block, in this round
  unsigned round = 0;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::vector<std::vector<AsyncCopy>> groups{1};  // the last one is open
};

// Threads that have arrived, and how often all had.
struct Meeting {
  int arrived = 0;
  unsigned rounds = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline int current = 0;
inline jmp_buf scheduler;
inline ucontext_t scheduler_start;
inline Meeting block_meeting;
inline std::vector<Meeting> warp_meetings;
inline std::vector<std::pair<void*, size_t>> shared_variables;
inline void (*run_thread)(void*) = nullptr;
inline void* run_argument = nullptr;
inline size_t dynamic_bytes = 0;  // that the launch gives

inline void give_way() {
  if (_setjmp(fibers[current]->state) == 0) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting, int count) {
  const unsigned round = meeting.rounds;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.rounds;
  }
  while (meeting.rounds == round) give_way();
}

inline bool can_run(const Fiber& fiber) {
  return !fiber.done && !(fiber.waits && fiber.round == block_meeting.rounds);
}

inline void meet_block(int count) {
  Fiber& fiber = *fibers[current];
  fiber.waits = true;
  fiber.round = block_meeting.rounds;
  meet(block_meeting, count);
  fiber.waits = false;
}

inline void meet_warp() { meet(warp_meetings[current / kWarp], kWarp); }

inline void enter_fiber() {
  run_thread(run_argument);
  fibers[current]->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter_fiber, 0);
  setcontext(&fiber.start);
}

inline void run_block(int threads) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  for (auto& fiber : fibers) {
    fiber->started = fiber->done = fiber->waits = false;
    fiber->groups.assign(1, {});
  }
  block_meeting = {};
  warp_meetings.assign(threads / kWarp, {});
  for (auto& [variable, bytes] : shared_variables) std::memset(variable, 0xFF, bytes);
  const int warps = threads / kWarp;
  for (int left = threads, turn = 0; left > 0; turn = (turn + 1) % warps) {
    const int first = kWarp * (REVERSED ? warps - 1 - turn : turn);
    for (bool runs = true; runs;) {
      runs = false;
      for (int lane = 0; lane < kWarp; ++lane) {
        current = first + (REVERSED ? kWarp - 1 - lane : lane);
        Fiber& fiber = *fibers[current];
        if (!can_run(fiber)) continue;
        runs = true;
        threadIdx.x = static_cast<unsigned>(current);
        resume(fiber);
        left -= fiber.done;
      }
    }
  }
}

// A __shared__ variable: static, and known to run_block.
template <typename T>
struct Shared {
  alignas(128) unsigned char storage[sizeof(T)];
  Shared() {
    std::memset(storage, 0xFF, sizeof storage);
    shared_variables.push_back({storage, sizeof storage});
  }
  T& get() { return *reinterpret_cast<T*>(storage); }
};

// What the lanes of a warp show each other: a word each, and then every lane computes its own.
struct WarpWords {
  uint32_t words[kWarp][8];
};
inline std::vector<WarpWords> exchanged(32);

template <typename Use>
void exchange(const uint32_t* mine, int count, const Use& use) {
  WarpWords& warp = exchanged[current / kWarp];
  std::memcpy(warp.words[current % kWarp], mine, count * sizeof *mine);
  meet_warp();
  use(warp);
  meet_warp();
}

inline void require(bool holds) {
  if (!holds) std::abort();
}

inline bool is_multiple(const void* p, size_t of) {
  return reinterpret_cast<uintptr_t>(p) % of == 0;
}

}  // namespace stamina::emulation

#define STAMINA_SHARED(type, name)                   \
  static ::stamina::emulation::Shared<type> name##_; \
  type& name = name##_.get()

#define STAMINA_DYNAMIC_SHARED(type, name)                                            \
  ::stamina::emulation::require(sizeof(type) == ::stamina::emulation::dynamic_bytes); \
  STAMINA_SHARED(type, name)

namespace stamina::cuda {

namespace host = ::stamina::emulation;

constexpr int kComputeMajor = EMULATED_MAJOR;
constexpr int64_t kEnoughTasks = ENOUGH_TASKS;
inline int compute_major() { return kComputeMajor; }

inline int thread_again() { return static_cast<int>(threadIdx.x); }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float exp_approx(float x) { return std::exp(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float log2_approx(float x) { return std::log2(x); }

inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
}

inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline uint32_t pack_half(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline uint32_t and_bits(uint32_t a, uint32_t b) { return a & b; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return result;
}

// d += a b with a(words of the holder, row beyond 8, k) and b(words of the holder, k), where the
// holder of row r or column r and of k is lane 4 (r % 8) + holder_of(k).
template <typename Holder, typename A, typename B>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int depth,
         const Holder& holder_of, const A& value_a, const B& value_b) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  host::exchange(mine, 6, [&](const host::WarpWords& warp) {
    const int lane = host::current % 32, row = lane / 4, quad = lane % 4;
    for (int e = 0; e < 4; ++e) {
      const int column = 2 * quad + e % 2;
      for (int k = 0; k < depth; ++k) {
        const int holder = holder_of(k);
        d[e] += value_a(warp.words[4 * row + holder], e / 2, k) *
                value_b(warp.words[4 * column + holder] + 4, k);
      }
    }
  });
}

// The hardware takes no notice of the last 13 bits.
inline float tf32_to_float(uint32_t x) { return bits_float(x & 0xFFFFE000); }

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(
      d, a, b, 8, [](int k) { return k % 4; },
      [](const uint32_t* w, int below, int k) { return tf32_to_float(w[2 * (k / 4) + below]); },
      [](const uint32_t* w, int k) { return tf32_to_float(w[k / 4]); });
}

// Of words of 16 bits, two of neighbouring k in a register.
template <typename ToFloat>
void mma_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               const ToFloat& to_float) {
  const auto value = [&](uint32_t word, int k) {
    return to_float(static_cast<uint16_t>(word >> (16 * (k % 2))));
  };
  mma(
      d, a, b, 16, [](int k) { return k % 8 / 2; },
      [&](const uint32_t* w, int below, int k) { return value(w[2 * (k / 8) + below], k); },
      [&](const uint32_t* w, int k) { return value(w[k / 8], k); });
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_pairs(d, a, b, half_to_float);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_pairs(d, a, b, bf16_to_float);
}

inline uint32_t transpose_matrix(uint32_t pair) {
  host::exchange(&pair, 1, [&](const host::WarpWords& warp) {
    const int row = host::current % 32 / 4, column = 2 * (host::current % 4);
    const auto word = [&](int k) {  // element `row` of row k
      return warp.words[4 * k + row / 2][0] >> (16 * (row % 2)) & 0xFFFF;
    };
    pair = word(column) | word(column + 1) << 16;
  });
  return pair;
}

// Matrix m of the four has the rows whose addresses lanes 8m .. 8m + 7 give.
inline void load_matrices(uint32_t (&a)[4], const uint16_t* shared) {
  host::require(host::is_multiple(shared, 16));
  uint32_t mine[2];
  std::memcpy(mine, &shared, sizeof mine);
  host::exchange(mine, 2, [&](const host::WarpWords& warp) {
    const int lane = host::current % 32;
    for (int m = 0; m < 4; ++m) {
      const uint16_t* row;
      std::memcpy(&row, warp.words[8 * m + lane / 4], sizeof row);
      std::memcpy(&a[m], row + 2 * (lane % 4), sizeof a[m]);
    }
  });
}
inline void load_matrices_transposed(uint32_t (&a)[4], const uint16_t* shared) {
  load_matrices(a, shared);
  for (uint32_t& matrix : a) matrix = transpose_matrix(matrix);
}

inline void warp_barrier() { host::meet_warp(); }
inline void block_barrier() { host::meet_block(static_cast<int>(blockDim.x)); }

template <typename T>
T shuffle_xor(T value, int lane_mask) {
  uint32_t mine[2] = {0, 0};
  std::memcpy(mine, &value, sizeof value);
  host::exchange(mine, 2, [&](const host::WarpWords& warp) {
    std::memcpy(&value, warp.words[host::current % 32 ^ lane_mask], sizeof value);
  });
  return value;
}

inline uint32_t shuffle(uint32_t value, int from_lane) {
  host::exchange(&value, 1, [&](const host::WarpWords& warp) { value = warp.words[from_lane][0]; });
  return value;
}
inline uint32_t broadcast(uint32_t value) { return shuffle(value, 0); }

inline uint32_t shift_right(uint32_t high, uint32_t low, int by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> by);
}

// Reads the address, so that a sanitiser sees one that is not there.
inline void prefetch_line(const void* global) {
  [[maybe_unused]] const volatile char first = *static_cast<const volatile char*>(global);
}

inline void copy_vector_or_zeros_async(void* shared, const void* global, bool exists) {
  host::require(host::is_multiple(shared, 16) && (!exists || host::is_multiple(global, 16)));
  std::memset(shared, 0xFF, 16);
  host::fibers[host::current]->groups.back().push_back({shared, exists ? global : nullptr, 16});
}
inline void copy_vector_async(void* shared, const void* global) {
  copy_vector_or_zeros_async(shared, global, true);
}
inline void commit_async_copies() { host::fibers[host::current]->groups.emplace_back(); }
template <int kPending>
void wait_async_copies() {
  auto& groups = host::fibers[host::current]->groups;
  const size_t due = groups.size() - 1 > kPending ? groups.size() - 1 - kPending : 0;
  for (size_t g = 0; g < due; ++g) {
    for (const host::AsyncCopy& copy : groups[g]) copy.make();
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(due));
}

struct Grid {
  int64_t blocks;
  int threads;
  int dynamic_bytes = 0;
  int rows = 1;
};

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, void*, const Arguments&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  host::run_argument = const_cast<void*>(static_cast<const void*>(&call));
  host::run_thread = [](void* p) { (*static_cast<decltype(call)*>(p))(); };
  host::dynamic_bytes = static_cast<size_t>(grid.dynamic_bytes);
  blockDim.x = static_cast<unsigned>(grid.threads);
  host::require(grid.blocks > 0 && grid.blocks <= 0x7FFFFFFF && grid.rows > 0 &&
                grid.rows <= 65535);
  const int64_t blocks = grid.blocks * grid.rows;
  for (int64_t turn = 0; turn < blocks; ++turn) {
    const int64_t block = REVERSED ? blocks - 1 - turn : turn;
    blockIdx.x = static_cast<unsigned>(block % grid.blocks);
    blockIdx.y = static_cast<unsigned>(block / grid.blocks);
    host::run_block(grid.threads);
  }
  host::run_argument = nullptr;
  return nullptr;
}

template <typename... Parameters>
const char* why_not_launched(void (*)(Parameters...)) {
  return nullptr;
}
inline const char* wait_for(void*) { return nullptr; }

inline const char* copy_bytes_to_device(void* device, const void* from, int64_t bytes, void*) {
  std::memcpy(device, from, static_cast<size_t>(bytes));
  return nullptr;
}

}  // namespace stamina::cuda
