// The certified look-up: most misses are proved from a few code bytes, the rest is read exactly.
//
//   super boxes -> leaf boxes -> near codes -> far codes -> float32 S -> canonical S
// Each step drops only keys that are farther than the reach of their leaf, so the nearest key among
// those left is the nearest of all if it is in its ball within `floor`, which every reach is at
// least. A hit farther than that is looked up once more, everywhere, at its own distance.
#include <algorithm>

#include "encode.h"

namespace grace_fast {
namespace {

constexpr int64_t kChunk = 256;   // leaves scanned before the candidates' memory is looked at
constexpr int64_t kAlone = 3;     // survivors that are cheaper to read than to project 48 rows for
constexpr int64_t kTogether = 8;  // queries of a task

// Memory that a thread keeps from one look-up to the next.
struct Scratch {
  Floats query, centred;
  Candidates candidates;
  std::vector<int32_t> supers, leaves, positions, sums;
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
  Lookup(const Keys& keys, const Certificate& certificate)
      : keys_(keys),
        certificate_(certificate),
        band_(keys.width),
        memory_(scratch()),
        encoder_(certificate.map, keys.width, &memory_.centred),
        wide_(memory_.query.resized(padded_width(keys.width))),
        candidates_(memory_.candidates) {}

  Best find(const Queries& queries, int64_t index) {
    const double widest = certificate_.widest;
    if (widest < 0) return Best{};  // every key is dead
    limit_ = band_.above(widest * widest);
    balls_ = true;
    Best early;
    if (!start(queries, index, &early)) return early;
    for (size_t part = 0; part < certificate_.parts.size(); ++part) {
      const Part& codes = certificate_.parts[part];
      const Cut cut = encoder_.cut(encoded_.near_error, codes.near_residual);
      if (!collect(static_cast<int32_t>(part), cut, nullptr)) return read_all();
    }
    read_rows(certificate_.covered, keys_.rows);
    const Best best = settle();
    const double floor = certificate_.floor;
    if (best.row < 0 || best.squared <= floor * floor) return best;
    return confirm(best);
  }

  // The nearest live row, in its ball or not, if it is not farther than `within`.
  Best nearest(const Queries& queries, int64_t index, double within) {
    limit_ = band_.above(within * within);
    balls_ = false;
    Best best;
    if (start(queries, index, &best)) best = nearest_coded(within);
    return best.squared <= within * within ? best : Best{};
  }

  // Tell whether no other row of a part has a key within twice the radius of the row at a position.
  bool isolated(int32_t part, int64_t position) {
    const int64_t self = certificate_.parts[part].row[position];
    fetch(keys_, self);
    const Queries key{key_of(keys_, self), 0, keys_.dtype, 1};
    const double apart = 2.0 * radius_of(keys_, self);
    if (apart < 0 || !widen_query(key, 0, keys_.width, wide_)) return false;
    query_ = wide_;
    far_known_ = false;
    if (!encoder_.near(query_, &encoded_)) return false;
    Other other{self, band_.above(apart * apart * (1 + 1e-6))};
    const double key_error = certificate_.parts[part].near_residual;
    return collect(part, encoder_.cut_within(apart, encoded_.near_error, key_error), &other) &&
           !other.found;
  }

  Effort effort{};

 private:
  // What `isolated` looks for: a key that is not `self` and not above the limit.
  struct Other {
    int64_t self;
    float limit;
    bool found = false;
  };

  // Take a query and encode it; false where that settles it.
  bool start(const Queries& queries, int64_t index, Best* best) {
    query_ = as_it_is(queries, index, keys_.width);
    if (!query_) {
      widen_query(queries, index, keys_.width, wide_);
      query_ = wide_;
    }
    candidates_.start(keys_, limit_);
    far_known_ = false;
    if (encoder_.near(query_, &encoded_)) return true;
    // Too large for float32, or not finite.
    const bool finite = widen_query(queries, index, keys_.width, wide_);
    query_ = wide_;
    *best = finite ? read_all() : Best{};
    return false;
  }

  Best nearest_coded(double within) {
    const auto& parts = certificate_.parts;
    for (size_t part = 0; part < parts.size(); ++part) {
      const Cut cut = encoder_.cut_within(within, encoded_.near_error, parts[part].near_residual);
      if (!collect(static_cast<int32_t>(part), cut, nullptr)) return read_all();
    }
    read_rows(certificate_.covered, keys_.rows);
    return settle();
  }

  // Nothing nearer than a hit may be hidden behind a shorter reach: read all at its distance.
  Best confirm(const Best& best) {
    const double distance = std::sqrt(best.squared);
    const auto& parts = certificate_.parts;
    const uint8_t* bits = best.part < 0 ? nullptr : parts[best.part].isolated;
    const bool alone = bits && (bits[best.position / 8] >> best.position % 8 & 1);
    for (size_t part = 0; part < parts.size(); ++part) {
      if (alone && static_cast<int32_t>(part) == best.part) continue;
      const Cut cut = encoder_.cut_within(distance, encoded_.near_error, parts[part].near_residual);
      if (!collect(static_cast<int32_t>(part), cut, nullptr)) return read_all();
    }
    return settle();
  }

  // Offer every key of a part within the cut; false where so many are that reading all is cheaper.
  bool collect(int32_t index, Cut cut, Other* other) {
    const Part& part = certificate_.parts[index];
    const int64_t leaves = (part.count + kLeaf - 1) / kLeaf;
    const int64_t most = std::max<int64_t>(1024, keys_.rows / 8);
    int64_t kept = 0;
    if (part.leaf_boxes) {
      const int64_t touched = touch_leaves(part, leaves, cut);
      for (int64_t i = 0; i < touched && kept <= most; i += kChunk) {
        kept += scan(part, memory_.leaves.data() + i, 0, std::min(kChunk, touched - i), cut, kept);
      }
    } else {
      for (int64_t i = 0; i < leaves && kept <= most; i += kChunk) {
        kept += scan(part, nullptr, i, std::min(kChunk, leaves - i), cut, kept);
      }
    }
    effort.survivors += kept;
    if (kept > most) return false;
    if (kept > kAlone && certificate_.map.far) kept = refine(part, cut, kept);
    read_positions(index, kept, other);
    return true;
  }

  int64_t touch_leaves(const Part& part, int64_t leaves, Cut cut) {
    const int64_t supers = (leaves + kLeaf - 1) / kLeaf;
    grow(memory_.supers, supers);
    const int64_t wide = kernels().boxes(part.super_boxes, part.super_reach, 0, supers,
                                         encoded_.point, cut, memory_.supers.data());
    grow(memory_.leaves, wide * kLeaf);
    int64_t touched = 0;
    for (int64_t i = 0; i < wide; ++i) {
      const int64_t first = memory_.supers[i] * kLeaf;
      touched +=
          kernels().boxes(part.leaf_boxes, part.reach, first, std::min(first + kLeaf, leaves),
                          encoded_.point, cut, memory_.leaves.data() + touched);
    }
    effort.boxes += supers + wide * kLeaf;
    return touched;
  }

  int64_t scan(const Part& part, const int32_t* leaves, int64_t first, int64_t count, Cut cut,
               int64_t kept) {
    grow(memory_.positions, kept + count * kLeaf);
    grow(memory_.sums, kept + count * kLeaf);
    effort.codes += count * kLeaf;
    return kernels().scan(part.near, leaves, first, count, part.reach, encoded_.code, cut,
                          memory_.positions.data() + kept, memory_.sums.data() + kept);
  }

  int64_t refine(const Part& part, Cut near_cut, int64_t count) {
    if (!far_known_) encoder_.far(&encoded_);
    far_known_ = true;
    // The same radius, with the errors of all slots in the place of those of the near ones.
    const Cut cut{near_cut.slope, static_cast<float>(near_cut.offset * (1 + 1e-6) +
                                                     (encoded_.far_error - encoded_.near_error) +
                                                     (part.far_residual - part.near_residual))};
    return kernels().refine(part, certificate_.map.norm_slot, encoded_.code, cut, count,
                            memory_.positions.data(), memory_.sums.data());
  }

  void read_positions(int32_t index, int64_t count, Other* other) {
    const Part& part = certificate_.parts[index];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t position = memory_.positions[i];
      if (position >= part.count) continue;  // the rest of the last leaf
      const int64_t row = part.row[position];
      if (row >= keys_.rows) continue;  // a later row than this snapshot's
      if (other) {
        if (other->found || row == other->self) continue;
        other->found = read(row, other->limit) <= other->limit;
      } else if (is_live(keys_, row)) {
        candidates_.offer(band_, {row, read(row, candidates_.limit()), index, position});
      }
    }
  }

  void read_rows(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (!is_live(keys_, row)) continue;
      candidates_.offer(band_, {row, read(row, candidates_.limit())});
    }
  }

  Best read_all() {
    candidates_.start(keys_, limit_);
    read_rows(0, keys_.rows);
    ++effort.exhaustive;
    return settle();
  }

  Best settle() { return candidates_.settle(query_, band_, balls_); }

  // Read a key whole: S in float32, or something above `limit` once it is.
  float read(int64_t row, float limit) {
    ++effort.rechecks;
    fetch(keys_, row);
    return kernels().squared[static_cast<int>(keys_.dtype)](query_, key_of(keys_, row), keys_.width,
                                                            limit);
  }

  const Keys& keys_;
  const Certificate& certificate_;
  const Band band_;
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
void look_up(const Queries& queries, const Keys& keys, const Certificate& certificate, int threads,
             Effort* effort, const One& one) {
  const UsualRounding usual;
  const int64_t tasks = (queries.batch + kTogether - 1) / kTogether;
  in_parallel(tasks, threads, [&](int64_t task) {
    Lookup lookup(keys, certificate);
    const int64_t last = std::min((task + 1) * kTogether, queries.batch);
    for (int64_t b = task * kTogether; b < last; ++b) one(lookup, b);
    if (!effort) return;
    const Effort& read = lookup.effort;
    for (const auto part : {&Effort::boxes, &Effort::codes, &Effort::survivors, &Effort::rechecks,
                            &Effort::exhaustive, &Effort::proved}) {
      if (tasks == 1) {
        effort->*part += read.*part;
      } else {
        __atomic_fetch_add(&(effort->*part), read.*part, __ATOMIC_RELAXED);
      }
    }
  });
}

}  // namespace

int64_t find_certified(const Queries& queries, const Keys& keys, const Certificate& certificate,
                       int threads, bool* hit, int64_t* row, double* squared, Effort* effort) {
  int64_t hits = 0;
  look_up(queries, keys, certificate, threads, effort, [&](Lookup& lookup, int64_t b) {
    const int64_t read_before = lookup.effort.rechecks;
    const Best best = lookup.find(queries, b);
    lookup.effort.proved += best.row < 0 && lookup.effort.rechecks == read_before;
    hit[b] = best.row >= 0;
    row[b] = best.row;
    squared[b] = best.squared;
    if (hit[b]) __atomic_fetch_add(&hits, 1, __ATOMIC_RELAXED);
  });
  return hits;
}

void nearest_certified(const Queries& queries, const Keys& keys, const Certificate& certificate,
                       double within, int threads, int64_t* row, double* squared) {
  look_up(queries, keys, certificate, threads, nullptr, [&](Lookup& lookup, int64_t b) {
    const Best best = lookup.nearest(queries, b, within);
    row[b] = best.row;
    squared[b] = best.squared;
  });
}

void find_isolated(const Keys& keys, const Certificate& certificate, int64_t part,
                   const int64_t* positions, int64_t count, uint8_t* isolated) {
  const UsualRounding usual;
  Lookup lookup(keys, certificate);
  for (int64_t i = 0; i < count; ++i) {
    if (!lookup.isolated(static_cast<int32_t>(part), positions[i])) continue;
    isolated[positions[i] / 8] |= static_cast<uint8_t>(1u << positions[i] % 8);
  }
}

}  // namespace grace_fast
