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

struct Bytes {
  static constexpr int kKeys = 8;
  using Vector = __m256i;
  static Vector load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Vector all(int32_t x) { return _mm256_set1_epi32(x); }
  static void store(int32_t* to, Vector a) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), a);
  }
  static unsigned at_most(Vector a, Vector limit) {
    const __m256 above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, limit));
    return ~static_cast<unsigned>(_mm256_movemask_ps(above)) & 255u;
  }
  static Vector thresholds(CodeThreshold threshold, const float* max_radius) {
    const __m256 steps =
        _mm256_mul_ps(_mm256_loadu_ps(max_radius), _mm256_set1_ps(threshold.slope));
    const __m256 bound = _mm256_add_ps(steps, _mm256_set1_ps(threshold.offset));
    const __m256 wider = _mm256_mul_ps(_mm256_mul_ps(bound, bound), _mm256_set1_ps(1.00001f));
    const __m256 square = _mm256_add_ps(wider, _mm256_set1_ps(1.0f));
    return _mm256_cvttps_epi32(_mm256_min_ps(square, _mm256_set1_ps(2147483000.0f)));
  }
  static Vector add_apart(Vector sum, Vector a, Vector b) {
    const __m256i apart =
        _mm256_min_epu8(_mm256_abs_epi8(_mm256_sub_epi8(a, b)), _mm256_set1_epi8(127));
    const __m256i pairs = _mm256_maddubs_epi16(apart, apart);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Vector add_outside(Vector sum, Vector low, Vector high, Vector at) {
    const __m256i below = _mm256_subs_epi16(low, at), above = _mm256_subs_epi16(at, high);
    const __m256i outside = _mm256_max_epi16(_mm256_max_epi16(below, above), all(0));
    const __m256i apart = _mm256_min_epi16(outside, _mm256_set1_epi16(2047));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(apart, apart));
  }
  struct Far {
    const Vector first, rest;
    static Vector half(const uint8_t* from) { return _mm256_zextsi128_si256(Lanes::half(from)); }
    explicit Far(const uint8_t* code) : first(load(code)), rest(half(code + 32)) {}
    int32_t apart(const uint8_t* far) const {
      const __m256i sum = add_apart(add_apart(all(0), load(far), first), half(far + 32), rest);
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
  };
};

#include "codes.inl"

}  // namespace

const Kernels avx2_kernels = all_kernels("avx2", test_boxes, scan_codes, refine_positions);

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
