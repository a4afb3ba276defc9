// AVX-512 with VNNI: 16 floats or 64 code bytes at a time. portable.cpp says what each kernel does.
//
// No standard templates in here: what this file compiles runs only on processors that have AVX-512.
#if defined(GRACE_FAST_EMULATE_AVX512)  // the test program: the same source, each intrinsic in C
#include "emulated_avx512.inl"
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(__x86_64__)
#if defined(GRACE_FAST_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

// gcc 12 warns of its own _mm512_undefined_* inside the intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace grace_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 16;
  using Vector = __m512;
  static __m256i half(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static float widen(float x) { return x; }
  static float widen(BFloat16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x.bits) << 16)));
  }
  static float widen(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static Vector load(const BFloat16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(from)), 16));
  }
  static Vector load(const Float16* from) { return _mm512_cvtph_ps(half(from)); }
  // 32 elements in the order in which load_rows spreads 32 packed ones: 0-7 and 16-23, then the
  // others.
  static void store_for_rows(float* to, Vector a, Vector b) {
    _mm512_store_ps(to, _mm512_shuffle_f32x4(a, b, 0x44));
    _mm512_store_ps(to + kCount, _mm512_shuffle_f32x4(a, b, 0xee));
  }
  static void load_rows(const uint16_t* from, Vector* low, Vector* high) {
    const __m512i both = _mm512_load_si512(from);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vector a) { return _mm512_reduce_add_ps(a); }
};

#include "floats.inl"

__m512i wide(const void* from) { return _mm512_loadu_si512(from); }

// Add the squares of four circular differences to each key's int32.
__m512i add_apart_squared(__m512i sum, __m512i a, __m512i b) {
  const __m512i apart =
      _mm512_min_epu8(_mm512_abs_epi8(_mm512_sub_epi8(a, b)), _mm512_set1_epi8(127));
  return _mm512_dpbusd_epi32(sum, apart, apart);
}

__m512i thresholds_at(CodeThreshold threshold, const float* max_radius) {
  const __m512 bound =
      _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(max_radius), _mm512_set1_ps(threshold.slope)),
                    _mm512_set1_ps(threshold.offset));
  const __m512 square = _mm512_add_ps(
      _mm512_mul_ps(_mm512_mul_ps(bound, bound), _mm512_set1_ps(1.00001f)), _mm512_set1_ps(1.0f));
  return _mm512_cvttps_epi32(_mm512_min_ps(square, _mm512_set1_ps(2147483000.0f)));
}

int64_t test_boxes(const int16_t* boxes, const float* max_radius, int64_t first, int64_t last,
                   const int16_t* point, CodeThreshold threshold, int32_t* found) {
  const __m512i most = _mm512_set1_epi16(2047), none = _mm512_setzero_si512();
  __m512i at[8];
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
    int32_t both;
    __builtin_memcpy(&both, point + 2 * pair, sizeof both);
    at[pair] = _mm512_set1_epi32(both);
  }
  int64_t count = 0;
  for (int64_t i = first; i < last; i += 16) {
    const int16_t* group = boxes + i / 16 * 512;
    __m512i sum = none;
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const __m512i below = _mm512_subs_epi16(wide(group + pair * 64), at[pair]);
      const __m512i above = _mm512_subs_epi16(at[pair], wide(group + pair * 64 + 32));
      const __m512i apart =
          _mm512_min_epi16(_mm512_max_epi16(_mm512_max_epi16(below, above), none), most);
      sum = _mm512_dpwssd_epi32(sum, apart, apart);
    }
    unsigned within = _mm512_cmple_epi32_mask(sum, thresholds_at(threshold, max_radius + i));
    if (last - i < 16) within &= (1u << (last - i)) - 1;
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
  __m512i query[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    int32_t slots;
    __builtin_memcpy(&slots, code + 4 * i, sizeof slots);
    query[i] = _mm512_set1_epi32(slots);
  }
  int64_t kept = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t leaf = leaves ? leaves[i] : i;
    if (leaves && i + kAhead < first + count) {
      const auto* next = reinterpret_cast<const char*>(near + leaves[i + kAhead] * kLeafBytes);
      for (int64_t line = 0; line < kLeafBytes; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
    }
    const __m512i limit = _mm512_set1_epi32(threshold.at(max_radius[leaf]));
    for (int64_t at = leaf * kLeaf; at < (leaf + 1) * kLeaf; at += kBlock) {
      const uint8_t* block = near + at * kNear;
      __m512i apart = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) apart = add_apart_squared(apart, wide(block + 64 * j), query[j]);
      unsigned within = _mm512_cmple_epi32_mask(apart, limit);
      if (!within) continue;
      alignas(64) int32_t sums[16];
      _mm512_store_si512(sums, apart);
      for (; within; within &= within - 1) {
        const int lane = __builtin_ctz(within);
        position[kept] = static_cast<int32_t>(at + lane);
        sum[kept++] = sums[lane];
      }
    }
  }
  return kept;
}

int64_t refine_positions(const Segment& segment, bool norm_slot, const uint8_t* code,
                         CodeThreshold threshold, int64_t count, int32_t* position,
                         const int32_t* sum) {
  constexpr int64_t kAhead = 8;
  constexpr uint64_t far_slots = (uint64_t{1} << kFar) - 1;
  const __m512i query = _mm512_maskz_loadu_epi8(far_slots, code + kNear);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      _mm_prefetch(
          reinterpret_cast<const char*>(segment.far + int64_t{position[i + kAhead]} * kFar),
          _MM_HINT_T0);
    }
    const int64_t at = position[i];
    int32_t total = sum[i];
    if (norm_slot) {
      const uint8_t byte = segment.near[at / kBlock * kBlock * kNear + 192 + at % kBlock * 4 + 3];
      const int apart = static_cast<int8_t>(static_cast<uint8_t>(byte - code[kNear - 1]));
      const int size = apart < 0 ? -apart : apart;
      total -= size < 127 ? size * size : 127 * 127;
    }
    const __m512i far = _mm512_maskz_loadu_epi8(far_slots, segment.far + at * kFar);
    total += _mm512_reduce_add_epi32(add_apart_squared(_mm512_setzero_si512(), far, query));
    if (total <= threshold.at(segment.leaf_max_radius[at / kLeaf])) position[kept++] = position[i];
  }
  return kept;
}

}  // namespace

const Kernels avx512vnni_kernels = {
    "avx512vnni",
    centre_query,
    project_rows,
    test_boxes,
    scan_codes,
    refine_positions,
    {squared_of<float>, squared_of<BFloat16>, squared_of<Float16>},
    {tile_of<float>, tile_of<BFloat16>, tile_of<Float16>},
};

}  // namespace grace_fast

#if defined(GRACE_FAST_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace grace_fast {
const Kernels avx512vnni_kernels = portable_kernels;
}
#endif
