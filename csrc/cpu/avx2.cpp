// AVX2, FMA and F16C: 8 floats or 32 code bytes at a time. portable.cpp says what each kernel does.
//
// No standard templates in here: what this file compiles runs only on processors that have AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace grace_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 8;
  using Vector = __m256;
  static __m128i half(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static float widen(float x) { return x; }
  static float widen(BFloat16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x.bits) << 16)));
  }
  static float widen(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static Vector load(const BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(from)), 16));
  }
  static Vector load(const Float16* from) { return _mm256_cvtph_ps(half(from)); }
  static void store_for_rows(float* to, Vector a, Vector b) {
    _mm256_store_ps(to, a);
    _mm256_store_ps(to + kCount, b);
  }
  static void load_rows(const uint16_t* from, Vector* low, Vector* high) {
    const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vector a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#include "floats.inl"

__m256i wide(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The squares of four circular differences, summed: one int32 for each key.
__m256i apart_squared(__m256i a, __m256i b) {
  const __m256i apart =
      _mm256_min_epu8(_mm256_abs_epi8(_mm256_sub_epi8(a, b)), _mm256_set1_epi8(127));
  return _mm256_madd_epi16(_mm256_maddubs_epi16(apart, apart), _mm256_set1_epi16(1));
}

int32_t sum_of(__m256i a) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

__m256i thresholds_at(CodeThreshold threshold, const float* max_radius) {
  const __m256 bound =
      _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(max_radius), _mm256_set1_ps(threshold.slope)),
                    _mm256_set1_ps(threshold.offset));
  const __m256 square = _mm256_add_ps(
      _mm256_mul_ps(_mm256_mul_ps(bound, bound), _mm256_set1_ps(1.00001f)), _mm256_set1_ps(1.0f));
  return _mm256_cvttps_epi32(_mm256_min_ps(square, _mm256_set1_ps(2147483000.0f)));
}

int64_t test_boxes(const int16_t* boxes, const float* max_radius, int64_t first, int64_t last,
                   const int16_t* point, CodeThreshold threshold, int32_t* found) {
  const __m256i most = _mm256_set1_epi16(2047), none = _mm256_setzero_si256();
  __m256i at[8];
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
    int32_t both;
    __builtin_memcpy(&both, point + 2 * pair, sizeof both);
    at[pair] = _mm256_set1_epi32(both);
  }
  int64_t count = 0;
  for (int64_t i = first; i < last; i += 8) {
    const int16_t* group = boxes + i / 16 * 512 + i % 16 * 2;
    __m256i sum = none;
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const __m256i below = _mm256_subs_epi16(wide(group + pair * 64), at[pair]);
      const __m256i above = _mm256_subs_epi16(at[pair], wide(group + pair * 64 + 32));
      const __m256i apart =
          _mm256_min_epi16(_mm256_max_epi16(_mm256_max_epi16(below, above), none), most);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(apart, apart));
    }
    const __m256i past = _mm256_cmpgt_epi32(sum, thresholds_at(threshold, max_radius + i));
    unsigned within = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(past))) & 255u;
    if (last - i < 8) within &= (1u << (last - i)) - 1;
    for (; within; within &= within - 1) {
      found[count++] = static_cast<int32_t>(i + __builtin_ctz(within));
    }
  }
  return count;
}

int64_t scan_codes(const uint8_t* near, const int32_t* leaves, int64_t first, int64_t count,
                   const float* max_radius, const uint8_t* code, CodeThreshold threshold,
                   int32_t* position, int32_t* sum) {
  constexpr int64_t kLeafBytes = kLeaf * kNear, kAhead = 6;
  __m256i query[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    int32_t slots;
    __builtin_memcpy(&slots, code + 4 * i, sizeof slots);
    query[i] = _mm256_set1_epi32(slots);
  }
  int64_t kept = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t leaf = leaves ? leaves[i] : i;
    if (leaves && i + kAhead < first + count) {
      const auto* next = reinterpret_cast<const char*>(near + leaves[i + kAhead] * kLeafBytes);
      for (int64_t line = 0; line < kLeafBytes; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
    }
    const __m256i limit = _mm256_set1_epi32(threshold.at(max_radius[leaf]));
    for (int64_t at = leaf * kLeaf; at < (leaf + 1) * kLeaf; at += kBlock) {
      const uint8_t* block = near + at * kNear;
      __m256i low = apart_squared(wide(block), query[0]);
      __m256i high = apart_squared(wide(block + 32), query[0]);
#pragma GCC unroll 3
      for (int j = 1; j < 4; ++j) {
        low = _mm256_add_epi32(low, apart_squared(wide(block + 64 * j), query[j]));
        high = _mm256_add_epi32(high, apart_squared(wide(block + 64 * j + 32), query[j]));
      }
      const __m256i low_past = _mm256_cmpgt_epi32(low, limit);
      const __m256i high_past = _mm256_cmpgt_epi32(high, limit);
      if (_mm256_movemask_epi8(_mm256_and_si256(low_past, high_past)) == -1) continue;
      alignas(32) int32_t apart[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(apart), low);
      _mm256_store_si256(reinterpret_cast<__m256i*>(apart + 8), high);
      unsigned within = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(low_past))) |
                        static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(high_past)))
                            << 8;
      for (within = ~within & 0xffffu; within; within &= within - 1) {
        const int lane = __builtin_ctz(within);
        position[kept] = static_cast<int32_t>(at + lane);
        sum[kept++] = apart[lane];
      }
    }
  }
  return kept;
}

int64_t refine_positions(const Segment& segment, bool norm_slot, const uint8_t* code,
                         CodeThreshold threshold, int64_t count, int32_t* position,
                         const int32_t* sum) {
  constexpr int64_t kAhead = 8;
  const __m256i query = wide(code + kNear);
  const __m256i query_end = _mm256_zextsi128_si256(Lanes::half(code + kNear + 32));
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      _mm_prefetch(
          reinterpret_cast<const char*>(segment.far + int64_t{position[i + kAhead]} * kFar),
          _MM_HINT_T0);
    }
    const int64_t at = position[i];
    const uint8_t* far = segment.far + at * kFar;
    int32_t total = sum[i];
    if (norm_slot) {
      const uint8_t byte = segment.near[at / kBlock * kBlock * kNear + 192 + at % kBlock * 4 + 3];
      const int apart = static_cast<int8_t>(static_cast<uint8_t>(byte - code[kNear - 1]));
      const int size = apart < 0 ? -apart : apart;
      total -= size < 127 ? size * size : 127 * 127;
    }
    const __m256i end = _mm256_zextsi128_si256(Lanes::half(far + 32));
    total +=
        sum_of(_mm256_add_epi32(apart_squared(wide(far), query), apart_squared(end, query_end)));
    if (total <= threshold.at(segment.leaf_max_radius[at / kLeaf])) position[kept++] = position[i];
  }
  return kept;
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",
    centre_query,
    project_rows,
    test_boxes,
    scan_codes,
    refine_positions,
    {squared_of<float>, squared_of<BFloat16>, squared_of<Float16>},
    {tile_of<float>, tile_of<BFloat16>, tile_of<Float16>},
};

}  // namespace grace_fast

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace grace_fast {
const Kernels avx2_kernels = portable_kernels;
}
#endif
