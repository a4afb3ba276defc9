// What csrc/cuda/device.cuh provides, for a host: a thread is a fiber, and they take turns.
//
// A fiber runs until it waits for its warp or its block; then another one runs, in an order drawn
// anew every round from a seed, among all the blocks that are started. What a barrier is missing
// for is therefore seen as a wrong answer under some seed. Memory is that of the host: a missing
// fence is not seen. Warp operations check that all 32 threads make the same one; loads of 16 bytes
// check that they are aligned and inside memory that was announced; shared memory starts poisoned.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define GRACE_FAST_KERNEL(most_threads) inline void
#define GRACE_FAST_BOTH inline
#define GRACE_FAST_DEVICE inline
#define GRACE_FAST_COLD inline
#define __grid_constant__

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace on_host {

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

enum Operation { kShuffle, kShuffleXor, kBallot };

struct Warp {  // of two turns, because a thread may be one operation ahead of another
  uint64_t value[2][32];
  int operation[2] = {};
  long arrived[2] = {};
};

struct Block {
  int index, group;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  long arrived = 0;
  int running = 0;
};

struct Fiber {
  Block* block = nullptr;
  int thread = 0;
  long turns = 0, barriers = 0;
  bool started = false, done = false;
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  int blocks, threads;
  const std::function<void()>* kernel;
  jmp_buf scheduler;
  Fiber* now = nullptr;
  long progress = 0;
};

inline Machine*& machine() {
  static Machine* running = nullptr;
  return running;
}
inline Fiber& now() { return *machine()->now; }

struct Range {
  const char* first;
  const char* last;
};
inline std::vector<Range>& announced() {
  static std::vector<Range> ranges;
  return ranges;
}
class Announced {  // as long as this lives, where anything is
 public:
  explicit Announced(const Range& range) : is_first_(announced().empty()) {
    if (!is_first_) announced().push_back(range);
  }
  ~Announced() {
    if (!is_first_) announced().pop_back();
  }
  Announced(const Announced&) = delete;

 private:
  const bool is_first_;
};
inline void check(const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("a load that is not aligned");
  for (const Range& range : announced()) {
    if (at >= range.first && at + bytes <= range.last) return;
  }
  if (!announced().empty()) fail("a load outside the memory that was announced");
}

inline void wait_a_turn() {
  Fiber& fiber = now();
  if (!_setjmp(fiber.state)) _longjmp(machine()->scheduler, 1);
}

inline void run_fiber() {
  (*machine()->kernel)();
  now().done = true;
  ++machine()->progress;
  _longjmp(machine()->scheduler, 1);
}

inline const uint64_t* exchange(Operation operation, uint64_t value) {
  Fiber& fiber = now();
  Warp& warp = fiber.block->warps[fiber.thread / 32];
  const int turn = fiber.turns % 2;
  const long wanted = 32 * (fiber.turns++ / 2 + 1);
  if (warp.arrived[turn] % 32 == 0) warp.operation[turn] = operation;
  if (warp.operation[turn] != operation) fail("threads of a warp meet in different operations");
  warp.value[turn][fiber.thread % 32] = value;
  ++warp.arrived[turn];
  ++machine()->progress;
  while (warp.arrived[turn] < wanted) wait_a_turn();
  return warp.value[turn];
}

// Run a fiber until it waits or is done.
inline void resume(Fiber& fiber) {
  machine()->now = &fiber;
  if (_setjmp(machine()->scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = 1 << 17;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

inline void start(Block& block, int threads, size_t shared, std::mt19937_64& random,
                  std::vector<std::unique_ptr<Fiber>>& idle,
                  std::vector<std::unique_ptr<Fiber>>& fibers) {
  block.shared.assign(shared + 64, static_cast<unsigned char>(random()));
  block.warps = std::vector<Warp>(threads / 32);
  block.running = threads;
  for (int thread = 0; thread < threads; ++thread) {
    std::unique_ptr<Fiber> fiber;
    if (idle.empty()) {
      fiber = std::make_unique<Fiber>();
      fiber->stack = std::unique_ptr<char[]>(new char[1 << 17]);
    } else {
      fiber = std::move(idle.back());
      idle.pop_back();
    }
    fiber->block = &block;
    fiber->thread = thread;
    fiber->turns = fiber->barriers = 0;
    fiber->started = fiber->done = false;
    fibers.push_back(std::move(fiber));
  }
}

// Run a kernel over blocks x groups, `resident` blocks at a time.
inline void launch(int blocks, int groups, int threads, size_t shared, uint64_t seed, int resident,
                   const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<Fiber>> idle;
  Machine local{};
  local.blocks = blocks;
  local.threads = threads;
  local.kernel = &kernel;
  machine() = &local;
  std::mt19937_64 random(seed);
  std::vector<Block> all(static_cast<size_t>(blocks * groups));
  for (int i = 0; i < blocks * groups; ++i) {
    all[i].index = i % blocks;
    all[i].group = i / blocks;
  }
  std::shuffle(all.begin(), all.end(), random);
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t next = 0;
  int alive = 0;
  std::vector<int> warps;
  while (next < all.size() || alive) {
    for (; next < all.size() && alive < resident; ++next, ++alive) {
      start(all[next], threads, shared, random, idle, fibers);
    }
    warps.resize(fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
    std::shuffle(warps.begin(), warps.end(), random);
    const long before = local.progress;
    for (const int warp : warps) {
      const int shift = static_cast<int>(random() % 32);
      for (int i = 0; i < 32; ++i) {
        Fiber& fiber = *fibers[warp * 32 + (i + shift) % 32];
        if (fiber.done) continue;
        resume(fiber);
        if (fiber.done && --fiber.block->running == 0) --alive;
      }
    }
    if (local.progress == before) fail("every thread waits");
    // Finished blocks give their fibers back, whole blocks at a time.
    for (size_t i = 0; i < fibers.size();) {
      if (fibers[i]->block->running) {
        i += threads;
        continue;
      }
      std::move(fibers.begin() + i, fibers.begin() + i + threads, std::back_inserter(idle));
      fibers.erase(fibers.begin() + i, fibers.begin() + i + threads);
    }
  }
  machine() = nullptr;
}

}  // namespace on_host

namespace grace_fast::device {

inline int thread_index() { return on_host::now().thread; }
inline int thread_count() { return on_host::machine()->threads; }
inline int block_index() { return on_host::now().block->index; }
inline int block_count() { return on_host::machine()->blocks; }
inline int group_index() { return on_host::now().block->group; }

inline unsigned char* shared_memory() {
  auto at = reinterpret_cast<uintptr_t>(on_host::now().block->shared.data());
  return reinterpret_cast<unsigned char*>((at + 63) / 64 * 64);
}

inline void sync_block() {
  on_host::Fiber& fiber = on_host::now();
  ++fiber.block->arrived;
  ++on_host::machine()->progress;
  const long wanted = ++fiber.barriers * on_host::machine()->threads;
  while (fiber.block->arrived < wanted) on_host::wait_a_turn();
}
inline unsigned ballot(bool yes) {
  const uint64_t* values = on_host::exchange(on_host::kBallot, yes);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(values[i]) << i;
  return bits;
}
template <typename T>
T taken(const uint64_t* values, int lane) {
  T value;
  std::memcpy(&value, values + lane, sizeof value);
  return value;
}
template <typename T>
uint64_t given(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T shuffle(T value, int lane) {
  return taken<T>(on_host::exchange(on_host::kShuffle, given(value)), lane);
}
template <typename T>
T shuffle_xor(T value, int mask) {
  const int lane = on_host::now().thread % 32;
  return taken<T>(on_host::exchange(on_host::kShuffleXor, given(value)), lane ^ mask);
}

inline void fence() {}
inline unsigned take_ticket(unsigned* ticket, unsigned last) {
  const unsigned before = *ticket;
  *ticket = before >= last ? 0 : before + 1;
  return before;
}
inline int add_to(int* shared_count, int more) {
  const int before = *shared_count;
  *shared_count += more;
  return before;
}
inline void let_the_next_kernel_start() {}
inline void wait_for_the_kernel_before() {}

inline uint4 load16(const void* from) {
  on_host::check(from, 16);
  return *static_cast<const uint4*>(from);
}
inline uint4 stream16(const void* from) { return load16(from); }
inline uint64_t load_fresh(const uint64_t* from) { return *from; }
inline uint32_t load_fresh(const uint32_t* from) { return *from; }
inline void store_fresh(uint32_t* to, uint32_t value) { *to = value; }
inline void wait_a_moment() {
  ++on_host::machine()->progress;  // who asks a number of times does not wait for ever
  on_host::wait_a_turn();
}

template <typename Work>
uint32_t each_byte(uint32_t a, uint32_t b, const Work& work) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) {
    out |= (static_cast<uint32_t>(work(a >> i & 255, b >> i & 255)) & 255) << i;
  }
  return out;
}
template <typename Work>
uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, const Work& work) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [i](uint32_t x) { return static_cast<int16_t>(x >> i); };
    out |= static_cast<uint32_t>(static_cast<uint16_t>(work(half(a), half(b), half(c)))) << i;
  }
  return out;
}
inline uint32_t abs_difference4(uint32_t a, uint32_t b) {
  return each_byte(a, b, [](uint32_t x, uint32_t y) { return x > y ? x - y : y - x; });
}
inline int dot4(uint32_t a, uint32_t b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}
inline uint32_t unsigned_dot4(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
// Sums wrap, as they do there.
inline int16_t wrapped(int x) { return static_cast<int16_t>(static_cast<uint16_t>(x)); }
inline uint32_t add2(uint32_t a, uint32_t b) {
  return each_half(a, b, 0, [](int x, int y, int) { return wrapped(x + y); });
}
inline uint32_t add_max2(uint32_t a, uint32_t b, uint32_t c) {
  return each_half(a, b, c, [](int x, int y, int z) {
    return std::max({static_cast<int>(wrapped(x + y)), z, 0});
  });
}
inline uint32_t min2(uint32_t a, uint32_t b) {
  return each_half(a, b, 0, [](int x, int y, int) { return std::max(std::min(x, y), 0); });
}
inline uint32_t low_bytes(uint32_t a, uint32_t b) {
  return (a & 255) | (a >> 16 & 255) << 8 | (b & 255) << 16 | (b >> 16 & 255) << 24;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }

inline double minus(double a, double b) { return a - b; }
inline double times(double a, double b) { return a * b; }
inline double plus(double a, double b) { return a + b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double square_root(double x) { return std::sqrt(x); }
inline float nearest_whole(float x) { return std::nearbyint(x); }
inline uint32_t bits_of(float x) { return static_cast<uint32_t>(given(x)); }
inline float float_of(uint32_t bits) {
  const uint64_t wide = bits;
  return taken<float>(&wide, 0);
}
inline float float_of_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                 fraction = bits & 1023u;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_of(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
// By search: the nearest fp16, the even one of two that are as near.
inline uint16_t half_of(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  uint16_t low = 0;
  for (int bit = 1 << 14; bit; bit >>= 1) {
    if ((low | bit) < 0x7c00 && float_of_half(static_cast<uint16_t>(low | bit)) <= size) low |= bit;
  }
  const double below = float_of_half(low);
  const double above = low + 1 < 0x7c00 ? float_of_half(static_cast<uint16_t>(low + 1)) : 65536.0;
  const double left = size - below, right = above - size;
  const bool up = right < left || (right == left && low % 2);
  return static_cast<uint16_t>(sign | (low + up));
}

}  // namespace grace_fast::device

#include "copies.h"
