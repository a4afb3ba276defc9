// Elements as stored, widened exactly to float32.
#pragma once
#include <cstring>

#include "kernels.h"

namespace grace_fast {

inline float widen_exactly(float x) { return x; }

inline float widen_exactly(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen_exactly(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and denormals
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t bits = sign | wide << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Call work(Key{}) with the C++ type of a dtype.
template <typename Work>
auto with_type(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::bfloat16:
      return work(BFloat16{});
    case Dtype::float16:
      return work(Float16{});
    default:
      return work(float{});
  }
}

}  // namespace grace_fast
