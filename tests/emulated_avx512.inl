// AVX-512 in plain C for processors without it: the tests run csrc/cpu/avx512vnni.cpp itself (SIMDe
// 0.7.4).
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

// What SIMDe 0.7.4 lacks, from the definitions of the instructions.
#define _mm512_shuffle_f32x4(a, b, lanes) simde_mm512_shuffle_f32x4(a, b, lanes)
#define _mm512_cvtepu16_epi32(a) widened_by_hand(a)
#define _mm512_reduce_add_ps(a) summed_by_hand(a)
#define _mm512_reduce_add_epi32(a) summed_by_hand_int(a)
#define _mm512_maskz_loadu_epi8(mask, from) loaded_by_hand(mask, from)
#define _mm512_cvtph_ps(a) halves_by_hand(a)
#define _mm512_cvttps_epi32(a) truncated_by_hand(a)
static inline simde__m512i widened_by_hand(simde__m256i a) {
  uint16_t from[16];
  uint32_t to[16];
  std::memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return simde_mm512_loadu_si512(to);
}
static inline float summed_by_hand(simde__m512 a) {
  float lane[16], total = 0;
  std::memcpy(lane, &a, sizeof lane);
  for (int half = 8; half; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return total + lane[0];
}
static inline int32_t summed_by_hand_int(simde__m512i a) {
  int32_t lane[16], total = 0;
  std::memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i) total += lane[i];
  return total;
}
static inline simde__m512i loaded_by_hand(uint64_t mask, const void* from) {
  uint8_t to[64] = {};
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) to[i] = static_cast<const uint8_t*>(from)[i];
  }
  return simde_mm512_loadu_si512(to);
}
static inline simde__m512 halves_by_hand(simde__m256i a) {
  uint16_t from[16];
  float to[16];
  std::memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) {
    to[i] = simde_mm_cvtss_f32(simde_mm_cvtph_ps(simde_mm_cvtsi32_si128(from[i])));
  }
  return simde_mm512_loadu_ps(to);
}
static inline simde__m512i truncated_by_hand(simde__m512 a) {
  float from[16];
  int32_t to[16];
  std::memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int32_t>(from[i]);
  return simde_mm512_loadu_si512(to);
}
