// What one thread needs while it looks up: aligned memory that is kept, and a query made float32.
#pragma once
#include <cmath>
#include <exception>
#include <vector>

#include "candidates.h"
#include "rounding.h"

namespace grace_fast {

struct alignas(64) Line {
  float lane[16];
};

class Floats {
 public:
  float* resized(int64_t count) {
    lines_.resize(static_cast<size_t>((count + 15) / 16));
    return lines_[0].lane;
  }

 private:
  std::vector<Line> lines_;
};

inline int64_t padded_width(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// The address of query `index` where it needs neither widening nor padding, else null.
inline const float* as_it_is(const Queries& queries, int64_t index, int64_t width) {
  if (queries.dtype != Dtype::float32 || width % kPadding) return nullptr;
  return static_cast<const float*>(queries.first) + index * queries.stride;
}

// Write query `index` as float32, padded with zeros; tell whether it is finite.
inline bool widen_query(const Queries& queries, int64_t index, int64_t width, float* to) {
  with_type(queries.dtype, [&](auto element) {
    const auto* from =
        static_cast<const decltype(element)*>(queries.first) + index * queries.stride;
    for (int64_t j = 0; j < width; ++j) to[j] = widen_exactly(from[j]);
  });
  const int64_t padded = padded_width(width);
  for (int64_t j = width; j < padded; ++j) to[j] = 0;
  float zero[8] = {};  // x * 0 is NaN where x is NaN or infinite
  for (int64_t j = 0; j < padded; j += 8) {
    for (int i = 0; i < 8; ++i) zero[i] += to[j + i] * 0.0f;
  }
  return zero[0] + zero[1] + zero[2] + zero[3] + zero[4] + zero[5] + zero[6] + zero[7] == 0;
}

// Do work(0 .. tasks - 1) on at most `threads` threads; what one of them throws is thrown here.
template <typename Work>
void in_parallel(int64_t tasks, int threads, const Work& work) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) work(i);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    const UsualRounding usual;  // each thread has its own
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      try {
        work(i);
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace grace_fast
