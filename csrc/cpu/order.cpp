// The kd order: points of 16 int16 slots, split at the median of the slot that varies most.
//
// Halves are whole leaves, and whole level-2 nodes of 64 leaves while there are more than one.
#include <algorithm>
#include <vector>

#include "scratch.h"

namespace grace_fast {
namespace {

struct Point {
  int16_t slot[kNear];
  int32_t row;
};

// The slot of largest variance, on at most 512 points.
int widest_slot(const Point* points, int64_t count) {
  const int64_t step = std::max<int64_t>(1, count / 512);
  int widest = 0;
  double most = -1;
  for (int slot = 0; slot < kNear; ++slot) {
    double sum = 0, squares = 0;
    int64_t seen = 0;
    for (int64_t i = 0; i < count; i += step, ++seen) {
      const double value = points[i].slot[slot];
      sum += value;
      squares += value * value;
    }
    const double variance = squares - sum * sum / static_cast<double>(seen);
    if (variance > most) {
      most = variance;
      widest = slot;
    }
  }
  return widest;
}

// The first half's length: whole leaves, or whole level-2 nodes; 0 for points that are one leaf.
int64_t half_of(int64_t count) {
  if (count <= kLeaf) return 0;
  const int64_t unit = count > kLeaf * kLeaf ? kLeaf * kLeaf : kLeaf;
  const int64_t half = std::max<int64_t>(1, (count / 2 + unit / 2) / unit) * unit;
  return half < count ? half : 0;
}

int64_t divide(Point* points, int64_t count) {
  const int64_t half = half_of(count);
  if (!half) return 0;
  const int slot = widest_slot(points, count);
  std::nth_element(points, points + half, points + count,
                   [slot](const Point& a, const Point& b) { return a.slot[slot] < b.slot[slot]; });
  return half;
}

void split(Point* points, int64_t count) {
  while (const int64_t half = divide(points, count)) {
    split(points, half);
    points += half;
    count -= half;
  }
}

struct Range {
  Point* points;
  int64_t count;
};

// Divide all ranges until there are a few for each thread; what no range shares, threads share.
std::vector<Range> shares(Point* points, int64_t count, int threads) {
  std::vector<Range> ranges{{points, count}};
  while (threads > 1 && static_cast<int>(ranges.size()) < 4 * threads) {
    std::vector<int64_t> halves(ranges.size());
    in_parallel(static_cast<int64_t>(ranges.size()), threads,
                [&](int64_t i) { halves[i] = divide(ranges[i].points, ranges[i].count); });
    std::vector<Range> finer;
    for (size_t i = 0; i < ranges.size(); ++i) {
      const auto [first, length] = ranges[i];
      if (halves[i]) finer.push_back({first, halves[i]});
      finer.push_back({first + halves[i], length - halves[i]});
    }
    if (finer.size() == ranges.size()) break;
    ranges.swap(finer);
  }
  return ranges;
}

}  // namespace

void kd_order(const int16_t* points, int64_t count, int threads, int32_t* order) {
  std::vector<Point> sorted(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(points + i * kNear, kNear, sorted[i].slot);
    sorted[i].row = static_cast<int32_t>(i);
  }
  const std::vector<Range> ranges = shares(sorted.data(), count, threads);
  in_parallel(static_cast<int64_t>(ranges.size()), threads,
              [&](int64_t i) { split(ranges[i].points, ranges[i].count); });
  for (int64_t i = 0; i < count; ++i) order[i] = sorted[i].row;
}

}  // namespace grace_fast
