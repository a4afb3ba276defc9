// The readable truth: the canonical sum of the law, for any processor.
//
// One query, one key at a time: a sum in a fixed order is one chain of additions, so four keys are
// summed side by side to hide its latency. A partial sum never shrinks; once it is above the best S
// so far the key cannot win, and the rest of it is not read.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../lookup.h"

namespace grace_fast {
namespace {

constexpr int kSideBySide = 4;
constexpr int64_t kStretch = 64;  // elements between two looks at the best S

double widen(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
double widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float16 {
  uint16_t bits;
};
double widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and denormals: mantissa * 2^-24
    const double value = mantissa * 0x1p-24;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t bits = sign | wide << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename Key>
void nearest_of_one(const float* query, const Keys& keys, int64_t* row, double* squared) {
  const auto* slots = static_cast<const Key*>(keys.slots);
  int64_t candidate[kSideBySide];
  const Key* key[kSideBySide];
  int waiting = 0;
  int64_t best_row = -1;
  double best = std::numeric_limits<double>::infinity();

  const auto settle = [&] {
    double sum[kSideBySide] = {};
    for (int64_t begin = 0; begin < keys.width; begin += kStretch) {
      const int64_t end = std::min(begin + kStretch, keys.width);
      for (int64_t j = begin; j < end; ++j) {
        for (int i = 0; i < kSideBySide; ++i) {
          const double difference = static_cast<double>(query[j]) - widen(key[i][j]);
          sum[i] += difference * difference;
        }
      }
      if (*std::min_element(sum, sum + kSideBySide) > best) break;
    }
    // Rows come in ascending order, so a later equal S never takes over; NaN and infinity never
    // win. A sum cut short is above `best` and loses as its whole would.
    for (int i = 0; i < waiting; ++i) {
      if (sum[i] < best) {
        best = sum[i];
        best_row = candidate[i];
      }
    }
    waiting = 0;
  };

  for (int64_t i = 0; i < keys.rows; ++i) {
    if (!keys.live[i]) continue;
    const int64_t slot = keys.key_slot ? keys.key_slot[i] : i;
    candidate[waiting] = i;
    key[waiting++] = slots + slot * keys.width;
    if (waiting == kSideBySide) settle();
  }
  if (waiting) {
    for (int i = waiting; i < kSideBySide; ++i) key[i] = key[0];
    settle();
  }
  if (best_row >= 0) {
    *row = best_row;
    *squared = best;
  }
}

template <typename Key>
void nearest_of_all(const float* queries, int64_t batch, const Keys& keys, int64_t* row,
                    double* squared) {
  for (int64_t b = 0; b < batch; ++b) {
    nearest_of_one<Key>(queries + b * keys.width, keys, row + b, squared + b);
  }
}

}  // namespace

void nearest(const float* queries, int64_t batch, const Keys& keys, int64_t* row, double* squared) {
  switch (keys.dtype) {
    case Dtype::float32:
      return nearest_of_all<float>(queries, batch, keys, row, squared);
    case Dtype::bfloat16:
      return nearest_of_all<BFloat16>(queries, batch, keys, row, squared);
    case Dtype::float16:
      return nearest_of_all<Float16>(queries, batch, keys, row, squared);
  }
}

}  // namespace grace_fast
