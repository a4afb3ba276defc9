// Elements, sums and bounds that both look-ups share.
//
// S in float32 is a filter: it is within `slack` of its own value, relatively, and `tiny`
// absolutely, because differences are taken first. A lane adds at most D / 32 + 8 squares, five
// more additions join the lanes, and a difference is rounded twice over.
#pragma once
#include "device.cuh"
#include "layout.h"

namespace grace_fast::device {

constexpr int kWarp = 32;
constexpr uint64_t kNone = ~uint64_t{0};
constexpr int32_t kMostSum = 0x7fffffff;

GRACE_FAST_DEVICE float infinity() { return float_of(0x7f800000u); }
GRACE_FAST_DEVICE float widen(float x) { return x; }
GRACE_FAST_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
GRACE_FAST_DEVICE float widen(Float16 x) { return float_of_half(x.bits); }

// The elements of 16 bytes.
template <typename Key>
constexpr int kOf16Bytes = 16 / static_cast<int>(sizeof(Key));

// Four elements: of all 16 bytes, or of two of their words.
GRACE_FAST_DEVICE void widen_four(uint4 raw, int, float*, float (&wide)[4]) {
  wide[0] = float_of(raw.x);
  wide[1] = float_of(raw.y);
  wide[2] = float_of(raw.z);
  wide[3] = float_of(raw.w);
}
GRACE_FAST_DEVICE void widen_four(uint4 raw, int half, BFloat16*, float (&wide)[4]) {
  const uint32_t low = half ? raw.z : raw.x, high = half ? raw.w : raw.y;
  wide[0] = float_of(low << 16);
  wide[1] = float_of(low & 0xffff0000u);
  wide[2] = float_of(high << 16);
  wide[3] = float_of(high & 0xffff0000u);
}
GRACE_FAST_DEVICE void widen_four(uint4 raw, int half, Float16*, float (&wide)[4]) {
  const uint32_t low = half ? raw.z : raw.x, high = half ? raw.w : raw.y;
  wide[0] = float_of_half(static_cast<uint16_t>(low));
  wide[1] = float_of_half(static_cast<uint16_t>(low >> 16));
  wide[2] = float_of_half(static_cast<uint16_t>(high));
  wide[3] = float_of_half(static_cast<uint16_t>(high >> 16));
}

GRACE_FAST_DEVICE float element(const void* from, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  return dtype == Dtype::bfloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}

// Do work(element) with an element of a dtype's C++ type: one branch, before all loops.
template <typename Work>
GRACE_FAST_DEVICE void with_element(Dtype dtype, const Work& work) {
  if (dtype == Dtype::bfloat16) {
    work(BFloat16{});
  } else if (dtype == Dtype::float16) {
    work(Float16{});
  } else {
    work(0.0f);
  }
}

// Rows of queries of one C++ type, read eight elements at a time: `at` only loads, so that several
// loads can be in flight; `widened` waits for one.
template <typename Query>
class QueryRows {
 public:
  struct Eight {
    uint4 raw[8 / kOf16Bytes<Query>];
  };

  GRACE_FAST_DEVICE explicit QueryRows(const Call& call)
      : rows_(static_cast<const Query*>(call.queries)),
        stride_(call.query_stride),
        width_(call.width),
        in_16_bytes_((reinterpret_cast<uintptr_t>(call.queries) | stride_ * sizeof(Query) |
                      width_ * sizeof(Query)) %
                         16 ==
                     0) {}

  // Elements j .. j + 7 of a query, j a multiple of 8; zeros beyond the width.
  GRACE_FAST_DEVICE Eight at(int query, int j) const {
    constexpr int kElements = kOf16Bytes<Query>;
    const Query* row = rows_ + query * stride_;
    Eight eight = {};
#pragma unroll
    for (int i = 0; i < 8; i += kElements) {
      if (in_16_bytes_) {
        if (j + i < width_) eight.raw[i / kElements] = load16(row + j + i);
      } else {
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          if (j + i + e < width_) words[e * 4 / kElements] |= bits_at(row + j + i + e, e);
        }
        eight.raw[i / kElements] = {words[0], words[1], words[2], words[3]};
      }
    }
    return eight;
  }

  // Half 0 or 1 of eight elements in float32.
  GRACE_FAST_DEVICE static void widened(const Eight& eight, int half, float (&wide)[4]) {
    constexpr bool kTwo = sizeof(Query) == 4;
    widen_four(eight.raw[kTwo ? half : 0], kTwo ? 0 : half, static_cast<Query*>(nullptr), wide);
  }

 private:
  // An element's bits, where they lie in a word of 32.
  GRACE_FAST_DEVICE static uint32_t bits_at(const float* from, int) { return bits_of(*from); }
  template <typename Half>
  GRACE_FAST_DEVICE static uint32_t bits_at(const Half* from, int element) {
    return static_cast<uint32_t>(from->bits) << 16 * (element % 2);
  }

  const Query* rows_;
  const int64_t stride_;
  const int width_;
  const bool in_16_bytes_;
};

template <typename T>
GRACE_FAST_DEVICE T sum_of_warp(T value) {
#pragma unroll
  for (int apart = kWarp / 2; apart; apart /= 2) value += shuffle_xor(value, apart);
  return value;
}

// Which of n = 2^k values a lane has the sum of, where `sums_of_lanes` shares them out.
template <int n>
GRACE_FAST_DEVICE int value_of_lane(int lane) {
  return lane / (kWarp / n);
}

// The sums over a warp of n = 2^k values, one to a lane: with each exchange a lane keeps half of
// its values, so that it takes n + 4 exchanges for n = 16, not 5 n.
template <int n>
GRACE_FAST_DEVICE float sums_of_lanes(float (&value)[n]) {
  const int lane = thread_index() % kWarp;
  int values = n;
#pragma unroll
  for (int apart = kWarp / 2; apart; apart /= 2) {
    if (values == 1) {
      value[0] += shuffle_xor(value[0], apart);
      continue;
    }
    values /= 2;
    const bool upper = (lane & apart) != 0;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      if (i >= values) break;
      const float given = upper ? value[i] : value[i + values];
      const float kept = upper ? value[i + values] : value[i];
      value[i] = kept + shuffle_xor(given, apart);
    }
  }
  return value[0];
}

// What a float32 S says about the law's S (csrc/cpu/candidates.h).
struct ErrorBound {
  double slack, tiny;
  GRACE_FAST_DEVICE explicit ErrorBound(int width)
      : slack((width / 32.0 + 17) * 0x1p-24), tiny(width * 0x1p-118) {}
  // A float32 S above this belongs to a larger S than `squared`, itself in float32 or the law's.
  GRACE_FAST_DEVICE float above(double squared) const {
    const double bound = squared * (1 + 3 * slack) + tiny;
    // Near the end of float32 its sums overflow: nothing is above.
    return bound < 1e37 ? static_cast<float>(bound * (1 + 0x1p-22)) : infinity();
  }
  // The law's S is at most this.
  GRACE_FAST_DEVICE double at_most(float squared) const {
    return static_cast<double>(squared) * (1 + 2 * slack) + tiny;
  }
};

// The law's S of a row, or that there is none yet.
struct Exact {
  double squared;
  uint32_t tag;  // row << 1 | alone
  GRACE_FAST_DEVICE bool before(const Exact& other) const {
    return squared < other.squared || (squared == other.squared && tag < other.tag);
  }
};
GRACE_FAST_DEVICE Exact no_row() { return {static_cast<double>(infinity()), ~0u}; }

GRACE_FAST_DEVICE void offer(BestTwo* best, uint64_t found) {
  if (found < best->first) {
    best->second = best->first;
    best->first = found;
  } else if (found < best->second && found != best->first) {  // a moved key may come twice
    best->second = found;
  }
}

// The best two of kLanes lanes side by side, in each of them.
template <int kLanes>
GRACE_FAST_DEVICE BestTwo best_of_lanes(BestTwo best) {
#pragma unroll
  for (int apart = kLanes / 2; apart; apart /= 2) {
    const BestTwo other{shuffle_xor(best.first, apart), shuffle_xor(best.second, apart)};
    offer(&best, other.first);
    offer(&best, other.second);
  }
  return best;
}

GRACE_FAST_DEVICE uint64_t packed(float squared, uint32_t tag) {
  return static_cast<uint64_t>(bits_of(squared)) << 32 | tag;  // S >= 0: its bits are in order
}
GRACE_FAST_DEVICE float squared_of(uint64_t found) {
  return float_of(static_cast<uint32_t>(found >> 32));
}
// Never for kNone, whose S is NaN.
GRACE_FAST_DEVICE bool is_within(uint64_t found, float limit) { return squared_of(found) <= limit; }
GRACE_FAST_DEVICE uint32_t tag_of(uint64_t found) { return static_cast<uint32_t>(found); }

template <typename Key>
GRACE_FAST_DEVICE const Key* key_of(const Book& book, int width, int64_t row) {
  const int64_t slot = book.key_slot ? book.key_slot[row] : row;
  return static_cast<const Key*>(book.keys) + slot * width;
}

// Whether keys can be read 16 bytes at a time.
template <typename Key>
GRACE_FAST_DEVICE bool in_16_bytes(const Book& book, int width) {
  return (reinterpret_cast<uintptr_t>(book.keys) | (width * sizeof(Key))) % 16 == 0;
}

// Four elements of a query in float32, from j on, a multiple of 4.
GRACE_FAST_DEVICE float4 four_of(const float* query, int j) {
  return *reinterpret_cast<const float4*>(query + j);
}

// Add the squares of the differences of four elements.
GRACE_FAST_DEVICE void add_four(const float4& asked, const float (&stored)[4], float* sum) {
  const float four[4] = {asked.x, asked.y, asked.z, asked.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float difference = four[e] - stored[e];
    *sum = multiply_add(difference, difference, *sum);
  }
}

// S of one key in float32, by a warp. A query is read by element, and by `four_of`.
template <typename Key, typename Query>
GRACE_FAST_COLD float squared_by_warp(Query query, const Key* key, int width, bool wide_loads) {
  constexpr int kElements = kOf16Bytes<Key>;
  const int lane = thread_index() % kWarp;
  float sum = 0;
  if (wide_loads) {
#pragma unroll 4
    for (int j = lane * kElements; j < width; j += kWarp * kElements) {
      const uint4 raw = stream16(key + j);
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        float stored[4];
        widen_four(raw, i / 4, static_cast<Key*>(nullptr), stored);
        add_four(four_of(query, j + i), stored, &sum);
      }
    }
  } else {
#pragma unroll 1
    for (int j = lane; j < width; j += kWarp) {
      const float difference = query[j] - widen(key[j]);
      sum = multiply_add(difference, difference, sum);
    }
  }
  return sum_of_warp(sum);
}

// The law's S, by a warp: products side by side, sums one after the other.
template <typename Key, typename Query>
GRACE_FAST_COLD double canonical_by_warp(Query query, const Key* key, int width) {
  const int lane = thread_index() % kWarp;
  double sum = 0;
#pragma unroll 1
  for (int begin = 0; begin < width; begin += kWarp) {
    double product = 0;  // adding it changes nothing
    if (begin + lane < width) {
      const double difference = minus(query[begin + lane], widen(key[begin + lane]));
      product = times(difference, difference);
    }
#pragma unroll 8
    for (int i = 0; i < kWarp; ++i) sum = plus(sum, shuffle(product, i));
  }
  return sum;
}

}  // namespace grace_fast::device
