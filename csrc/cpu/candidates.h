// From float32 candidates to the law's decision.
//
// A float32 S is within `slack` of its own value, relatively, and `tiny` absolutely. A key whose
// float32 S is above `above(S of another)` has a larger canonical S and cannot win; the others are
// summed again.
#pragma once
#include <limits>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace grace_fast {

struct Candidate {
  int64_t row;
  float squared;         // S in float32
  int32_t segment = -1;  // where its code is; -1 for a row that has none
  int32_t position = 0;  // in that segment
};

struct Best {
  int64_t row = -1;
  double squared = std::numeric_limits<double>::infinity();
  int32_t segment = -1;
  int32_t position = 0;
};

struct ErrorBound {
  double slack, tiny;
  explicit ErrorBound(int64_t width)
      : slack((static_cast<double>(width) / 8 + 16) * 0x1p-24),
        tiny(static_cast<double>(width) * 0x1p-118) {}
  // A bound for float32 sums: what is above it has a larger S than `squared`.
  float above(double squared) const {
    const double bound = squared * (1 + 3 * slack) + tiny;
    // Near the end of float32 its sums overflow: keep all.
    return bound < 1e37 ? static_cast<float>(bound * (1 + 0x1p-22))
                        : std::numeric_limits<float>::infinity();
  }
  bool surely_above(float sum, double squared) const { return sum > above(squared); }
};

inline bool is_live(const Keys& keys, int64_t row) {
  return keys.live_pages[row / kPageRows][row % kPageRows];
}

inline float radius_of(const Keys& keys, int64_t row) {
  return keys.radius_pages[row / kPageRows][row % kPageRows];
}

inline int64_t slot_of(const Keys& keys, int64_t row) {
  return keys.slot_pages ? keys.slot_pages[row / kPageRows][row % kPageRows] : row;
}

inline int64_t key_bytes(const Keys& keys) {
  return keys.width * (keys.dtype == Dtype::float32 ? 4 : 2);
}

inline const char* key_of(const Keys& keys, int64_t row) {
  return static_cast<const char*>(keys.slots) + slot_of(keys, row) * key_bytes(keys);
}

// Before a key is read: test the blocks of the file that it lies in, once each.
inline void fetch(const Keys& keys, int64_t row) {
  if (!keys.mapped) return;
  const Mapped& mapped = *keys.mapped;
  const int64_t slot = slot_of(keys, row), bytes = key_bytes(keys);
  if (slot >= mapped.slots) return;
  const int64_t last = ((slot + 1) * bytes - 1) / mapped.block_bytes;
  for (int64_t block = slot * bytes / mapped.block_bytes; block <= last; ++block) {
    if (!__atomic_load_n(mapped.tested + block, __ATOMIC_ACQUIRE)) mapped.test(block);
  }
}

inline bool in_ball(double squared, float radius) {
  const double wide = radius;
  return wide >= 0 && squared <= wide * wide;
}

// Write the canonical S of `count` keys.
void canonical(const float* query, const Keys& keys, const Candidate* candidates, int64_t count,
               double* squared);

// The candidates of one query, as they come; those that cannot win any more are dropped on the way.
class Candidates {
 public:
  void start(const Keys& keys, float limit) {
    keys_ = &keys;
    limit_ = limit;
    kept_.clear();
    sweep_at_ = 256;
  }
  float limit() const { return limit_; }
  void offer(const ErrorBound& error_bound, Candidate candidate) {
    if (candidate.squared > limit_) return;
    kept_.push_back(candidate);
    const float bound = error_bound.above(candidate.squared);
    if (bound < limit_) limit_ = bound;
    if (kept_.size() >= sweep_at_) {
      sweep();
      sweep_at_ = 2 * kept_.size() + 256;
    }
  }
  void merge(const ErrorBound& error_bound, const Candidates& others) {
    for (const Candidate& other : others.kept_) offer(error_bound, other);
  }
  // The nearest row and its S, the lowest row on a tie. With `balls`, none unless it is in its
  // ball.
  Best settle(const float* query, const ErrorBound& error_bound, bool balls);

 private:
  void sweep();
  const Keys* keys_ = nullptr;
  float limit_ = 0;
  size_t sweep_at_ = 256;
  std::vector<Candidate> kept_;
  std::vector<double> squared_;
};

}  // namespace grace_fast
