// The kd order: points of 16 int16 slots, split at the median of the slot that varies most.
//
// Halves are whole leaves, and whole level-2 nodes of 64 leaves while there are more than one.
#include <algorithm>
#include <vector>

#include "scratch.h"

namespace grace_fast {
namespace {

constexpr int64_t kWorthATask = 1 << 14;  // points

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

// Halves share nothing: of many points the first is left to whichever thread has nothing to do.
void split(Point* points, int64_t count) {
  const UsualRounding usual;  // each thread has its own
  while (const int64_t half = divide(points, count)) {
#pragma omp task if (half > kWorthATask)
    split(points, half);
    points += half;
    count -= half;
  }
}

}  // namespace

void kd_order(const int16_t* points, int64_t count, int threads, int32_t* order) {
  std::vector<Point> sorted(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(points + i * kNear, kNear, sorted[i].slot);
    sorted[i].row = static_cast<int32_t>(i);
  }
  if (threads <= 1) {  // without OpenMP, whose locks a forked child might find taken
    split(sorted.data(), count);
  } else {
#pragma omp parallel num_threads(threads)
#pragma omp single
    split(sorted.data(), count);
  }
  for (int64_t i = 0; i < count; ++i) order[i] = sorted[i].row;
}

}  // namespace grace_fast
