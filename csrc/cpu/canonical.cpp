// The law's own sum, and the decision from it.
//
// A sum in a fixed order is one chain of additions, so four keys are summed side by side to hide
// its latency. No instruction set may change a bit of this: it is compiled once, for the baseline.
#include <algorithm>

#include "candidates.h"

namespace grace_fast {
namespace {

constexpr int kSideBySide = 4;

template <typename Key>
void sum_side_by_side(const float* query, const Keys& keys, const Candidate* candidates,
                      int64_t count, double* squared) {
  const Key* key[kSideBySide];
  for (int i = 0; i < kSideBySide; ++i) {
    key[i] = reinterpret_cast<const Key*>(key_of(keys, candidates[i < count ? i : 0].row));
  }
  double sum[kSideBySide] = {};
  for (int64_t j = 0; j < keys.width; ++j) {
    for (int i = 0; i < kSideBySide; ++i) {
      const double difference =
          static_cast<double>(query[j]) - static_cast<double>(widen_exactly(key[i][j]));
      sum[i] += difference * difference;
    }
  }
  std::copy(sum, sum + std::min<int64_t>(count, kSideBySide), squared);
}

}  // namespace

void canonical(const float* query, const Keys& keys, const Candidate* candidates, int64_t count,
               double* squared) {
  with_type(keys.dtype, [&](auto key) {
    for (int64_t i = 0; i < count; i += kSideBySide) {
      sum_side_by_side<decltype(key)>(query, keys, candidates + i, count - i, squared + i);
    }
  });
}

void Candidates::sweep() {
  const auto lost = [this](const Candidate& candidate) { return candidate.squared > limit_; };
  kept_.erase(std::remove_if(kept_.begin(), kept_.end(), lost), kept_.end());
}

Best Candidates::settle(const float* query, const ErrorBound& error_bound, bool balls) {
  sweep();
  Best best;
  const auto may_hit = [&](const Candidate& candidate) {
    const double radius = radius_of(*keys_, candidate.row);
    return radius >= 0 && !error_bound.surely_above(candidate.squared, radius * radius);
  };
  if (kept_.empty() || (balls && std::none_of(kept_.begin(), kept_.end(), may_hit))) return best;
  squared_.resize(kept_.size());
  canonical(query, *keys_, kept_.data(), static_cast<int64_t>(kept_.size()), squared_.data());
  for (size_t i = 0; i < kept_.size(); ++i) {
    const bool nearer = squared_[i] < best.squared;
    if (nearer || (squared_[i] == best.squared && kept_[i].row < best.row)) {
      best = {kept_[i].row, squared_[i], kept_[i].segment, kept_[i].position};
    }
  }
  if (balls && (best.row < 0 || !in_ball(best.squared, radius_of(*keys_, best.row)))) return Best{};
  return best;
}

}  // namespace grace_fast
