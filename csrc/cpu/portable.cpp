// The readable truth of every kernel, for any processor; the fast files do the same, wider.
#include "kernels.h"
#include "numbers.h"

namespace grace_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 8;
  struct Vector {
    float lane[kCount];
  };
  template <typename Work>
  static Vector each(const Work& work) {
    Vector out;
    for (int i = 0; i < kCount; ++i) out.lane[i] = work(i);
    return out;
  }
  template <typename Key>
  static float widen(Key x) {
    return widen_exactly(x);
  }
  static Vector zero() {
    return each([](int) { return 0.0f; });
  }
  template <typename Key>
  static Vector load(const Key* from) {
    return each([&](int i) { return widen(from[i]); });
  }
  static void store_for_rows(float* to, Vector a, Vector b) {
    for (int i = 0; i < kCount; ++i) to[i] = a.lane[i];
    for (int i = 0; i < kCount; ++i) to[kCount + i] = b.lane[i];
  }
  static void load_rows(const uint16_t* from, Vector* low, Vector* high) {
    *low = each([&](int i) { return widen_exactly(BFloat16{from[2 * i]}); });
    *high = each([&](int i) { return widen_exactly(BFloat16{from[2 * i + 1]}); });
  }
  static Vector add(Vector a, Vector b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vector sub(Vector a, Vector b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static float sum(Vector a) {
    const float even = (a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6]);
    const float odd = (a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]);
    return even + odd;
  }
};

#include "floats.inl"

// On a circle of 256; 127 stands for 128 because the wide kernels multiply it as a signed byte.
int circular_difference(uint8_t a, uint8_t b) {
  const int apart = static_cast<int8_t>(static_cast<uint8_t>(a - b));
  const int size = apart < 0 ? -apart : apart;
  return size < 127 ? size : 127;
}

// How far a point is outside [low, high]; cut off where the sum of 16 squares still fits an int32.
int outside(int low, int high, int point) {
  const int below = low - point, above = point - high;
  const int apart = below > above ? below : above;
  return apart < 0 ? 0 : apart < 2047 ? apart : 2047;
}

int64_t test_boxes(const int16_t* boxes, const float* max_radius, int64_t first, int64_t last,
                   const int16_t* point, CodeThreshold threshold, int32_t* found) {
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    const int16_t* group = boxes + i / 16 * 512;
    int32_t sum = 0;
    for (int slot = 0; slot < kNear; ++slot) {
      const int16_t* pair = group + slot / 2 * 64 + i % 16 * 2 + slot % 2;
      const int apart = outside(pair[0], pair[32], point[slot]);
      sum += apart * apart;
    }
    if (sum <= threshold.at(max_radius[i])) found[count++] = static_cast<int32_t>(i);
  }
  return count;
}

int32_t near_sum(const uint8_t* near, int64_t position, const uint8_t* code) {
  const uint8_t* block = near + position / kBlock * kBlock * kNear;
  int32_t sum = 0;
  for (int slot = 0; slot < kNear; ++slot) {
    const uint8_t byte = block[slot / 4 * 64 + position % kBlock * 4 + slot % 4];
    const int apart = circular_difference(byte, code[slot]);
    sum += apart * apart;
  }
  return sum;
}

int64_t scan_codes(const uint8_t* near, const int32_t* leaves, int64_t first, int64_t count,
                   const float* max_radius, const uint8_t* code, CodeThreshold threshold,
                   int32_t* position, int32_t* sum) {
  int64_t kept = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t leaf = leaves ? leaves[i] : i;
    const int32_t limit = threshold.at(max_radius[leaf]);
    for (int64_t at = leaf * kLeaf; at < (leaf + 1) * kLeaf; ++at) {
      const int32_t apart = near_sum(near, at, code);
      if (apart > limit) continue;
      position[kept] = static_cast<int32_t>(at);
      sum[kept++] = apart;
    }
  }
  return kept;
}

int64_t refine_positions(const Segment& segment, bool norm_slot, const uint8_t* code,
                         CodeThreshold threshold, int64_t count, int32_t* position,
                         const int32_t* sum) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = position[i];
    int32_t total = sum[i];
    if (norm_slot) {  // what rows 0 .. 14 leave over is what the far rows look at
      const uint8_t* block = segment.near + at / kBlock * kBlock * kNear;
      const int apart = circular_difference(block[192 + at % kBlock * 4 + 3], code[kNear - 1]);
      total -= apart * apart;
    }
    for (int slot = 0; slot < kFar; ++slot) {
      const int apart = circular_difference(segment.far[at * kFar + slot], code[kNear + slot]);
      total += apart * apart;
    }
    if (total <= threshold.at(segment.leaf_max_radius[at / kLeaf])) position[kept++] = position[i];
  }
  return kept;
}

}  // namespace

const Kernels portable_kernels = all_kernels("portable", test_boxes, scan_codes, refine_positions);

}  // namespace grace_fast
