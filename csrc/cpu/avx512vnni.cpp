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

struct Bytes {
  static constexpr int kKeys = 16;
  using Vector = __m512i;
  static Vector load(const void* from) { return _mm512_loadu_si512(from); }
  static Vector all(int32_t x) { return _mm512_set1_epi32(x); }
  static void store(int32_t* to, Vector a) { _mm512_store_si512(to, a); }
  static unsigned at_most(Vector a, Vector limit) { return _mm512_cmple_epi32_mask(a, limit); }
  static Vector thresholds(CodeThreshold threshold, const float* max_radius) {
    const __m512 steps =
        _mm512_mul_ps(_mm512_loadu_ps(max_radius), _mm512_set1_ps(threshold.slope));
    const __m512 bound = _mm512_add_ps(steps, _mm512_set1_ps(threshold.offset));
    const __m512 wider = _mm512_mul_ps(_mm512_mul_ps(bound, bound), _mm512_set1_ps(1.00001f));
    const __m512 square = _mm512_add_ps(wider, _mm512_set1_ps(1.0f));
    return _mm512_cvttps_epi32(_mm512_min_ps(square, _mm512_set1_ps(2147483000.0f)));
  }
  static Vector add_apart(Vector sum, Vector a, Vector b) {
    const __m512i apart =
        _mm512_min_epu8(_mm512_abs_epi8(_mm512_sub_epi8(a, b)), _mm512_set1_epi8(127));
    return _mm512_dpbusd_epi32(sum, apart, apart);
  }
  static Vector add_outside(Vector sum, Vector low, Vector high, Vector at) {
    const __m512i below = _mm512_subs_epi16(low, at), above = _mm512_subs_epi16(at, high);
    const __m512i outside = _mm512_max_epi16(_mm512_max_epi16(below, above), all(0));
    const __m512i apart = _mm512_min_epi16(outside, _mm512_set1_epi16(2047));
    return _mm512_dpwssd_epi32(sum, apart, apart);
  }
  struct Far {
    const Vector query;
    static Vector bytes(const uint8_t* from) {
      return _mm512_maskz_loadu_epi8((uint64_t{1} << kFar) - 1, from);
    }
    explicit Far(const uint8_t* code) : query(bytes(code)) {}
    int32_t apart(const uint8_t* far) const {
      return _mm512_reduce_add_epi32(add_apart(all(0), bytes(far), query));
    }
  };
};

#include "codes.inl"

}  // namespace

const Kernels avx512vnni_kernels =
    all_kernels("avx512vnni", test_boxes, scan_codes, refine_positions);

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
