// What one instruction set provides: straight loops over memory, no decisions.
//
// Floating point here is a filter. Its promise is a bound on rounding, u = 2^-24, whatever the
// order:
//   project, centre: each dot product is within dot_roundings(D) * u of sum |w_j x_j|;
//   squared, tile:   each S is within (D / 8 + 16) * u of its own value (differences, so no
//   cancellation),
//                    and D * 2^-120 where numbers are denormal.
#pragma once
#include <cstdint>

#include "../lookup.h"

namespace grace_fast {

// Products and sums of 256 elements in 8 lanes or more, then the sums of those, then the lanes.
constexpr double dot_roundings(int64_t width) { return 48.0 + static_cast<double>(width) / 256.0; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// An integer threshold as a function of a radius: every key within it has a sum <= at(radius).
struct CodeThreshold {
  float slope, offset;
  int32_t at(float radius) const {
    const float bound = radius * slope + offset;  // four roundings, below the factor that follows
    const float square = bound * bound * 1.00001f + 1.0f;
    return square < 2147483000.0f ? static_cast<int32_t>(square) : INT32_MAX;
  }
};

struct Kernels {
  const char* name;

  // x = query - centre in the order that `project` reads; returns |x|^2.   x [Dp], 64-byte aligned
  float (*centre)(const float* query, const float* centre, int64_t padded, float* x);

  // sums[r] = rows[r] . x for `count` rows (a multiple of 8).
  void (*project)(const uint16_t* rows, const float* x, int64_t padded, int count, float* sums);

  // Append the boxes of [first, last) within the threshold; first is a multiple of 16. Returns how
  // many.
  int64_t (*boxes)(const int16_t* boxes, const float* max_radius, int64_t first, int64_t last,
                   const int16_t* point, CodeThreshold threshold, int32_t* found);

  // Append the positions of `count` leaves within the threshold and their sums. `leaves` null: from
  // leaf 0.
  int64_t (*scan)(const uint8_t* near, const int32_t* leaves, int64_t first, int64_t count,
                  const float* max_radius, const uint8_t* code, CodeThreshold threshold,
                  int32_t* position, int32_t* sum);

  // Keep those of `count` positions whose near and far sum is within the threshold. Returns how
  // many.
  int64_t (*refine)(const Segment& segment, bool norm_slot, const uint8_t* code,
                    CodeThreshold threshold, int64_t count, int32_t* position, const int32_t* sum);

  // S of one key in float32, or something above `limit` once it is.   by Dtype
  float (*squared[3])(const float* query, const void* key, int64_t width, float limit);

  // Add S of 4 queries [4, stride] and 2 keys to squared [4][2].   by Dtype
  void (*tile[3])(const float* queries, int64_t stride, const void* key0, const void* key1,
                  int64_t width, float* squared);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
const Kernels& kernels();  // of the instruction set in use

}  // namespace grace_fast
