// A query under the projection, with everything that may be wrong with it.
#pragma once
#include "scratch.h"

namespace grace_fast {

struct Encoded {
  alignas(64) uint8_t code[kNear + kFar];
  alignas(32) int16_t point[kNear];  // the near slots again, for the boxes
  double near_error;                 // in steps: residual and rounding of the near slots
  double far_error;                  // of all slots; set by encode_far
};

class Encoder {
 public:
  Encoder(const Projection& projection, int64_t width, Floats* memory);

  // Encode the near slots of a query padded with zeros; false where float32 cannot hold its norm.
  bool near(const float* query, Encoded* out);
  // Encode the far slots of the same query.
  void far(Encoded* out);

  // The threshold of all keys within the largest radius of their leaf; `key_error` is e_k, in
  // steps.
  CodeThreshold threshold(double query_error, double key_error) const {
    return {static_cast<float>(slope_), static_cast<float>(query_error + key_error + kSlack)};
  }
  // The threshold of all keys within one radius.
  CodeThreshold threshold_within(double radius, double query_error, double key_error) const {
    return {0.0f, static_cast<float>(radius * slope_ + query_error + key_error + kSlack)};
  }

 private:
  // In steps: what underflow may take from a projection; a step is at least 2^-40.
  static constexpr double kSlack = 1e-3;
  const Projection& projection_;
  const int64_t padded_;
  const double rounding_;  // of a dot product, relative to the norms
  const double slope_;     // steps for a unit of radius
  float* x_;               // the centred query
  double norm_ = 0, square_ = 0;
  double near_residual_ = 0;  // squared, of the near slots that rows fill
};

}  // namespace grace_fast
