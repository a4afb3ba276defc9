// z = round(W (q - centre) / step) and a bound on how far that is from phi(q).
//
//   rounding of one dot product    dot_roundings * u * |w| |x|
//   of m of them, as a vector      sqrt(m) times that, and u * lipschitz * |x| for x itself
//   of the norm slot, c^2 = |x|^2 - |z|^2:  |c - c'| <= e / max(c', sqrt(e)), e the error of c'^2
// The step is a power of two, so phi / step is exact, and |t| < 2^21, so t - round(t) is exact too.
#include "encode.h"

#include <algorithm>

namespace grace_fast {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kSlotLimit = 0x1p21f;  // slots are clamped there, for keys and queries alike
constexpr int kPointLimit = 16000;     // and once more for the boxes, in int16

// Round to the nearest integer, without a call: adding 1.5 * 2^23 leaves no room for a fraction.
float rounded(float t) { return (t + 0x1.8p23f) - 0x1.8p23f; }

// Write the code of one slot and return the square of its residual.
double encode_slot(double value, double step, uint8_t* code, int* integer) {
  const float t = std::clamp(static_cast<float>(value / step), -kSlotLimit, kSlotLimit);
  const float whole = rounded(t);
  *integer = static_cast<int>(whole);
  *code = static_cast<uint8_t>(*integer);
  return static_cast<double>(t - whole) * (t - whole);
}

}  // namespace

Encoder::Encoder(const Projection& projection, int64_t width, Floats* memory)
    : projection_(projection),
      padded_(padded_width(width)),
      rounding_(dot_roundings(width) * kUnit * 1.0001),
      slope_(projection.lipschitz * (1 + 1e-6) / projection.step),
      x_(memory->resized(padded_)) {}

bool Encoder::near(const float* query, Encoded* out) {
  square_ = kernels().centre(query, projection_.centre, padded_, x_);
  if (!(square_ < 1e30)) return false;
  norm_ = std::sqrt(square_) * 1.0001 + 1e-16;
  float sums[kNear];
  kernels().project(projection_.rows, x_, padded_, kNear, sums);
  double turned[kNear] = {};
  for (int j = 0; j < kNear; ++j) {
    for (int i = 0; i < kNear; ++i)
      turned[i] += projection_.turn[j * kNear + i] * sums[j];  // symmetric
  }

  const int slots = projection_.norm_slot ? kNear - 1 : kNear;
  int integers[kNear];
  double residual = 0, inside = 0;
  for (int i = 0; i < slots; ++i) {
    residual += encode_slot(turned[i], projection_.step, out->code + i, integers + i);
    inside += turned[i] * turned[i];
  }
  near_residual_ = residual;
  double error =
      norm_ * (std::sqrt(slots) * rounding_ * projection_.row_norm + kUnit * projection_.lipschitz);
  if (projection_.norm_slot) {
    const double wrong =
        1.001 * ((rounding_ + 4 * kUnit) * norm_ * norm_ + 2 * std::sqrt(inside) * error +
                 error * error + 2 * projection_.eta * inside) +
        1e-30;
    const double left = std::sqrt(std::max(0.0, square_ - inside));
    const double apart = wrong / std::max(left, std::sqrt(wrong)) + left * 0x1p-23;
    residual += encode_slot(left, projection_.step, out->code + slots, integers + slots);
    error = std::sqrt(error * error + apart * apart);
  }
  for (int i = 0; i < kNear; ++i) {
    out->point[i] = static_cast<int16_t>(std::clamp(integers[i], -kPointLimit, kPointLimit));
  }
  out->near_error = std::sqrt(residual) + error / projection_.step;
  return true;
}

void Encoder::far(Encoded* out) {
  float sums[kFar];
  kernels().project(projection_.rows + kNear * padded_, x_, padded_, kFar, sums);
  double residual = near_residual_;
  for (int i = 0; i < kFar; ++i) {
    int integer;
    residual += encode_slot(sums[i], projection_.step, out->code + kNear + i, &integer);
  }
  const double error = norm_ * (std::sqrt(kNear + kFar) * rounding_ * projection_.row_norm +
                                kUnit * projection_.lipschitz);
  out->far_error = std::sqrt(residual) + error / projection_.step;
}

}  // namespace grace_fast
