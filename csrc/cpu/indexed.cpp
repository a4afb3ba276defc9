// The look-up by the index: most misses are proved from a few code bytes, the rest is read exactly.
//
//   boxes of nodes -> boxes of leaves -> near codes -> far codes -> float32 S -> canonical S
// Each step drops only keys that are farther than the largest radius of their leaf. That is at
// least `min_radius`, so the nearest key among those left is the nearest of all if it is in its
// ball within that. A hit farther away is looked up once more, everywhere, at its own distance.
#include <algorithm>

#include "encode.h"

namespace grace_fast {
namespace {

constexpr int64_t kChunk = 256;   // leaves scanned before the candidates' memory is looked at
constexpr int64_t kAlone = 3;     // candidates that are cheaper to read than to project 48 rows for
constexpr int64_t kTogether = 8;  // queries of a task

// Memory that a thread keeps from one look-up to the next.
struct Scratch {
  Floats query, centred;
  Candidates candidates;
  std::vector<int32_t> nodes, leaves, positions, sums;
};

Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

void grow(std::vector<int32_t>& array, int64_t count) {
  if (static_cast<int64_t>(array.size()) < count) array.resize(static_cast<size_t>(2 * count));
}

class Lookup {
 public:
  Lookup(const Keys& keys, const Index& index)
      : keys_(keys),
        index_(index),
        error_bound_(keys.width),
        memory_(scratch()),
        encoder_(index.projection, keys.width, &memory_.centred),
        wide_(memory_.query.resized(padded_width(keys.width))),
        candidates_(memory_.candidates) {}

  // The threshold of keys within a distance, whatever the radii are, for an error of keys.
  auto within(double distance) const {
    return [this, distance](double key_error) {
      return encoder_.threshold_within(distance, encoded_.near_error, key_error);
    };
  }

  Best find(const Queries& queries, int64_t b) {
    const double widest = index_.widest;
    if (widest < 0) return Best{};  // every key is dead
    limit_ = error_bound_.above(widest * widest);
    balls_ = true;
    Best early;
    if (!start(queries, b, &early)) return early;
    const auto per_leaf = [&](double key_error) {
      return encoder_.threshold(encoded_.near_error, key_error);
    };
    if (!collect_all(per_leaf)) return read_all();
    read_rows(index_.covered, keys_.rows);
    const Best best = settle();
    const double min_radius = index_.min_radius;
    if (best.row < 0 || best.squared <= min_radius * min_radius) return best;
    return confirm(best);
  }

  // The nearest live row, in its ball or not, if it is not farther than `distance`.
  Best nearest(const Queries& queries, int64_t b, double distance) {
    limit_ = error_bound_.above(distance * distance);
    balls_ = false;
    Best best;
    if (start(queries, b, &best)) {
      const bool some = collect_all(within(distance));
      if (some) read_rows(index_.covered, keys_.rows);
      best = some ? settle() : read_all();
    }
    return best.squared <= distance * distance ? best : Best{};
  }

  // Tell whether no other row of a segment has a key within twice the radius of the row at a
  // position.
  bool isolated(int32_t number, int64_t position) {
    const Segment& segment = index_.segments[number];
    const int64_t self = segment.rows[position];
    fetch(keys_, self);
    const Queries key{key_of(keys_, self), 0, keys_.dtype, 1};
    const double apart = 2.0 * radius_of(keys_, self);
    if (apart < 0 || !widen_query(key, 0, keys_.width, wide_)) return false;
    query_ = wide_;
    far_known_ = false;
    if (!encoder_.near(query_, &encoded_)) return false;
    const float limit = error_bound_.above(apart * apart * (1 + 1e-6));
    bool alone = true;
    const auto look = [&](int64_t row, int32_t) {
      if (alone && row != self) alone = read(row, limit) > limit;
    };
    return collect(segment, within(apart)(segment.near_error), look) && alone;
  }

  Effort effort{};

 private:
  // Take a query and encode it; false where that settles it.
  bool start(const Queries& queries, int64_t b, Best* best) {
    query_ = as_it_is(queries, b, keys_.width);
    if (!query_) {
      widen_query(queries, b, keys_.width, wide_);
      query_ = wide_;
    }
    candidates_.start(keys_, limit_);
    far_known_ = false;
    if (encoder_.near(query_, &encoded_)) return true;
    // Too large for float32, or not finite.
    const bool finite = widen_query(queries, b, keys_.width, wide_);
    query_ = wide_;
    *best = finite ? read_all() : Best{};
    return false;
  }

  // Nothing nearer than a hit may be hidden in a leaf of small radii: read all at its distance.
  Best confirm(const Best& best) {
    const uint8_t* bits = best.segment < 0 ? nullptr : index_.segments[best.segment].isolated;
    const bool alone = bits && (bits[best.position / 8] >> best.position % 8 & 1);
    const bool some = collect_all(within(std::sqrt(best.squared)), alone ? best.segment : -1);
    return some ? settle() : read_all();
  }

  // Offer every key within the threshold of its segment, but for one segment; false where so many
  // are that reading all is cheaper.
  template <typename Threshold>
  bool collect_all(const Threshold& threshold, int32_t but = -1) {
    for (int32_t i = 0; i < static_cast<int32_t>(index_.segments.size()); ++i) {
      if (i == but) continue;
      const Segment& segment = index_.segments[i];
      const auto offer = [this, i](int64_t row, int32_t position) {
        if (!is_live(keys_, row)) return;
        candidates_.offer(error_bound_, {row, read(row, candidates_.limit()), i, position});
      };
      if (!collect(segment, threshold(segment.near_error), offer)) return false;
    }
    return true;
  }

  // Look at every key of a segment within the threshold; false where so many are that reading all
  // is cheaper.
  template <typename Look>
  bool collect(const Segment& segment, CodeThreshold threshold, const Look& look) {
    const int64_t leaves = (segment.count + kLeaf - 1) / kLeaf;
    const int64_t most = std::max<int64_t>(1024, keys_.rows / 8);
    // In order the leaves whose boxes are touched, otherwise all.
    const bool ordered = segment.leaf_boxes != nullptr;
    const int64_t scanned = ordered ? touch_leaves(segment, leaves, threshold) : leaves;
    int64_t kept = 0;
    for (int64_t i = 0; i < scanned && kept <= most; i += kChunk) {
      const int32_t* touched = ordered ? memory_.leaves.data() + i : nullptr;
      const int64_t count = std::min(kChunk, scanned - i);
      kept += scan(segment, touched, ordered ? 0 : i, count, threshold, kept);
    }
    effort.candidates += kept;
    if (kept > most) return false;
    if (kept > kAlone && index_.projection.far) kept = refine(segment, threshold, kept);
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t position = memory_.positions[i];
      if (position >= segment.count) continue;  // the rest of the last leaf
      const int64_t row = segment.rows[position];
      if (row < keys_.rows) look(row, position);  // or a later row than this snapshot's
    }
    return true;
  }

  int64_t touch_leaves(const Segment& segment, int64_t leaves, CodeThreshold threshold) {
    const int64_t nodes = (leaves + kLeaf - 1) / kLeaf;
    grow(memory_.nodes, nodes);
    const int64_t wide = kernels().boxes(segment.node_boxes, segment.node_max_radius, 0, nodes,
                                         encoded_.point, threshold, memory_.nodes.data());
    grow(memory_.leaves, wide * kLeaf);
    int64_t touched = 0;
    for (int64_t i = 0; i < wide; ++i) {
      const int64_t first = memory_.nodes[i] * kLeaf;
      touched += kernels().boxes(segment.leaf_boxes, segment.leaf_max_radius, first,
                                 std::min(first + kLeaf, leaves), encoded_.point, threshold,
                                 memory_.leaves.data() + touched);
    }
    effort.boxes += nodes + wide * kLeaf;
    return touched;
  }

  int64_t scan(const Segment& segment, const int32_t* leaves, int64_t first, int64_t count,
               CodeThreshold threshold, int64_t kept) {
    grow(memory_.positions, kept + count * kLeaf);
    grow(memory_.sums, kept + count * kLeaf);
    effort.codes += count * kLeaf;
    return kernels().scan(segment.near, leaves, first, count, segment.leaf_max_radius,
                          encoded_.code, threshold, memory_.positions.data() + kept,
                          memory_.sums.data() + kept);
  }

  int64_t refine(const Segment& segment, CodeThreshold near_threshold, int64_t count) {
    if (!far_known_) encoder_.far(&encoded_);
    far_known_ = true;
    // The same radius, with the errors of all slots in the place of those of the near ones.
    const CodeThreshold threshold{near_threshold.slope,
                                  static_cast<float>(near_threshold.offset * (1 + 1e-6) +
                                                     (encoded_.far_error - encoded_.near_error) +
                                                     (segment.far_error - segment.near_error))};
    return kernels().refine(segment, index_.projection.norm_slot, encoded_.code, threshold, count,
                            memory_.positions.data(), memory_.sums.data());
  }

  void read_rows(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (!is_live(keys_, row)) continue;
      candidates_.offer(error_bound_, {row, read(row, candidates_.limit())});
    }
  }

  Best read_all() {
    candidates_.start(keys_, limit_);
    read_rows(0, keys_.rows);
    ++effort.exhaustive;
    return settle();
  }

  Best settle() { return candidates_.settle(query_, error_bound_, balls_); }

  // Read a key whole: S in float32, or something above `limit` once it is.
  float read(int64_t row, float limit) {
    ++effort.exact_reranks;
    fetch(keys_, row);
    return kernels().squared[static_cast<int>(keys_.dtype)](query_, key_of(keys_, row), keys_.width,
                                                            limit);
  }

  const Keys& keys_;
  const Index& index_;
  const ErrorBound error_bound_;
  Scratch& memory_;
  Encoder encoder_;
  float* wide_;                   // room for a query as float32
  const float* query_ = nullptr;  // the query, wherever it is
  Candidates& candidates_;
  Encoded encoded_;
  bool far_known_ = false;
  bool balls_ = true;  // whether only a row whose ball holds the query counts
  float limit_ = 0;    // float32 sums above it never count
};

// Do one(lookup, b) for every query, some to a task; what was read is added to `effort`.
template <typename One>
void look_up(const Queries& queries, const Keys& keys, const Index& index, int threads,
             Effort* effort, const One& one) {
  const UsualRounding usual;
  const int64_t tasks = (queries.batch + kTogether - 1) / kTogether;
  in_parallel(tasks, threads, [&](int64_t task) {
    Lookup lookup(keys, index);
    const int64_t last = std::min((task + 1) * kTogether, queries.batch);
    for (int64_t b = task * kTogether; b < last; ++b) one(lookup, b);
    if (!effort) return;
    const Effort& read = lookup.effort;
    for (const auto segment : {&Effort::boxes, &Effort::codes, &Effort::candidates,
                               &Effort::exact_reranks, &Effort::exhaustive, &Effort::proved}) {
      if (tasks == 1) {
        effort->*segment += read.*segment;
      } else {
        __atomic_fetch_add(&(effort->*segment), read.*segment, __ATOMIC_RELAXED);
      }
    }
  });
}

}  // namespace

int64_t find_indexed(const Queries& queries, const Keys& keys, const Index& index, int threads,
                     const Answers& answers, Effort* effort) {
  int64_t hits = 0;
  look_up(queries, keys, index, threads, effort, [&](Lookup& lookup, int64_t b) {
    const int64_t read_before = lookup.effort.exact_reranks;
    const Best best = lookup.find(queries, b);
    lookup.effort.proved += best.row < 0 && lookup.effort.exact_reranks == read_before;
    answers.hit[b] = best.row >= 0;
    answers.row[b] = best.row;
    answers.squared[b] = best.squared;
    if (best.row >= 0) __atomic_fetch_add(&hits, 1, __ATOMIC_RELAXED);
  });
  return hits;
}

void nearest_indexed(const Queries& queries, const Keys& keys, const Index& index, double within,
                     int threads, const Answers& answers) {
  look_up(queries, keys, index, threads, nullptr, [&](Lookup& lookup, int64_t b) {
    const Best best = lookup.nearest(queries, b, within);
    answers.row[b] = best.row;
    answers.squared[b] = best.squared;
  });
}

void find_isolated(const Keys& keys, const Index& index, int64_t segment, const int64_t* positions,
                   int64_t count, uint8_t* isolated) {
  const UsualRounding usual;
  Lookup lookup(keys, index);
  for (int64_t i = 0; i < count; ++i) {
    if (!lookup.isolated(static_cast<int32_t>(segment), positions[i])) continue;
    isolated[positions[i] / 8] |= static_cast<uint8_t>(1u << positions[i] % 8);
  }
}

}  // namespace grace_fast
