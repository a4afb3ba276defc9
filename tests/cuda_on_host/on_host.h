// What csrc/cuda/device.cuh provides, for a host: threads are fibers (fibers.h), and stores reach
// other blocks when they are published (memory.h).
//
// Warp operations check that all 32 threads make the same one; loads of 16 bytes check that they
// are aligned and inside memory that was announced; shared memory starts poisoned. Not seen: the
// order of two stores or loads of one thread, and what is visible to the rest of its block.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fibers.h"

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
// Loads of 16 bytes by each block of the last grid of the last launch.
inline std::vector<long>& loads() {
  static std::vector<long> of_block;
  return of_block;
}
inline void count_load() {
  const Block& block = *now().block;
  if (block.grid != &machine()->grids.back()) return;
  ++loads()[block.group * block.grid->blocks + block.index];
}
inline void check(const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("a load that is not aligned");
  for (const Range& range : announced()) {
    if (at >= range.first && at + bytes <= range.last) return;
  }
  if (machine()->memory.holds(from, bytes)) return;
  if (!announced().empty()) fail("a load outside the memory that was announced");
}

}  // namespace on_host

namespace grace_fast::device {

inline int thread_index() { return on_host::now().thread; }
inline int thread_count() { return on_host::now().block->grid->threads; }
inline int block_index() { return on_host::now().block->index; }
inline int block_count() { return on_host::now().block->grid->blocks; }
inline int group_index() { return on_host::now().block->group; }

inline unsigned char* shared_memory() {
  auto at = reinterpret_cast<uintptr_t>(on_host::now().block->shared.data());
  return reinterpret_cast<unsigned char*>((at + 63) / 64 * 64);
}

inline void sync_block() { on_host::barrier(); }
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

inline void fence() {
  on_host::maybe_step_back();
  on_host::machine()->memory.release();
  on_host::machine()->memory.acquire();
  on_host::maybe_step_back();
}
inline unsigned take_ticket(unsigned* ticket, unsigned last) {
  on_host::maybe_step_back();
  on_host::machine()->memory.release();
  const unsigned before = on_host::machine()->memory.update(
      ticket, [last](unsigned count) { return count >= last ? 0 : count + 1; });
  on_host::machine()->memory.acquire();
  on_host::maybe_step_back();
  return before;
}
inline int add_to(int* shared_count, int more) {
  const int before = *shared_count;
  *shared_count += more;
  on_host::maybe_step_back();
  return before;
}
inline void let_the_next_kernel_start() { on_host::release_next_grid(); }
inline void wait_for_the_kernel_before() { on_host::wait_for_grid_before(); }

inline uint4 load16(const void* from) {
  on_host::check(from, 16);
  on_host::count_load();
  return *static_cast<const uint4*>(from);
}
inline uint4 stream16(const void* from) { return load16(from); }
inline void prefetch(const void* from, int bytes) {
  for (int at = 0; at < bytes; at += 16) on_host::check(static_cast<const char*>(from) + at, 16);
}
inline uint64_t load_fresh(const uint64_t* from) { return on_host::machine()->memory.load(from); }
inline uint32_t load_fresh(const uint32_t* from) { return on_host::machine()->memory.load(from); }

inline void store_fresh(uint32_t* to, uint32_t value) {
  on_host::machine()->memory.update(to, [value](uint32_t) { return value; });
}
inline void wait_a_moment() { on_host::step_back(); }

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
