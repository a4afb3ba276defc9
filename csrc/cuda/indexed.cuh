// The look-up by the index of a few queries: most misses are proved from a few code bytes.
//
//   boxes of nodes -> boxes of leaves -> near codes -> far codes -> float32 S -> canonical S
// Each step drops only keys that are farther than the largest radius of their leaf
// (csrc/cpu/indexed.cpp says why the nearest of the others decides). The second launch, after
// `encode`:
//
//   boxes     a warp takes a level-2 node: a lane tests its box for a query each, then its leaves
//             for all queries that are left; leaves that may hold a hit go to a list of the block
//   codes     a warp takes a leaf of the list, a lane two keys of it
//   keys      a warp takes a candidate of the block and reads it; best two as in dense.cuh
//   decision  by the block with the last ticket (settle.cuh)
// Segments without boxes are scanned leaf by leaf, and rows without a code are read as they are. A
// candidate that finds the list full is read at once: a list is a convenience, not a limit. When
// the last block must look again, it does so at one radius, for all keys, with canonical sums.
#pragma once
#include "encode.cuh"
#include "settle.cuh"

namespace grace_fast::device {

constexpr int kLeafList = kMostWarps * kLeaf;  // a level-2 node for every warp
constexpr int kCandidateList = 1024;
constexpr float kSlackSteps = 1e-3f;  // what underflow may take from a projection

struct IndexedShared {
  SettleShared settle;  // first, as Settle expects
  Encoded query[kMostQueries];
  BestTwo best[kMostWarps][kMostQueries];
  int2 leaf[kLeafList];             // the leaf, and a bit for each query
  uint2 candidate[kCandidateList];  // row << 1 | alone, and the query
  int32_t leaves, candidates;
};

// A sum of squared code differences above `at(radius)` belongs to a key beyond that radius.
struct CodeThreshold {
  float slope, offset;
  GRACE_FAST_DEVICE int at(float radius) const {
    const float bound = radius * slope + offset;  // a few roundings, below the factor that follows
    const float square = bound * bound * 1.00001f + 1.0f;
    return square < 2147483000.0f ? static_cast<int>(square) : kMostSum;
  }
};

// How far a point is outside a box, squared; what is above 255 a slot counts as 255.
GRACE_FAST_DEVICE int box_distance(const uint4 (&box)[4], const Encoded& query) {
  const uint32_t low[8] = {box[0].x, box[0].y, box[0].z, box[0].w,
                           box[1].x, box[1].y, box[1].z, box[1].w};
  const uint32_t minus_high[8] = {box[2].x, box[2].y, box[2].z, box[2].w,
                                  box[3].x, box[3].y, box[3].z, box[3].w};
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    uint32_t apart[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t above = add2(query.point[i + k], minus_high[i + k]);
      const uint32_t outside = add_max2(low[i + k], query.minus_point[i + k], above);
      apart[k] = min2(outside, 0x00ff00ffu);
    }
    const uint32_t bytes = low_bytes(apart[0], apart[1]);
    sum = unsigned_dot4(bytes, bytes, sum);
  }
  return static_cast<int>(sum);
}

GRACE_FAST_DEVICE void load_box(const int16_t* boxes, int64_t index, uint4 (&box)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) box[i] = load16(boxes + index * 2 * kNear + i * 8);
}

// The squared circular differences of 16 code bytes: the absolute difference of two bytes, taken as
// a signed byte, has the square of the shorter way around.
GRACE_FAST_DEVICE int code_distance(uint4 code, const uint32_t* query, int sum) {
  const uint32_t words[4] = {code.x, code.y, code.z, code.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t apart = abs_difference4(words[i], query[i]);
    sum = dot4(apart, apart, sum);
  }
  return sum;
}

template <typename Key>
class Indexed : Place {
 public:
  GRACE_FAST_DEVICE explicit Indexed(const Call& call)
      : Place(call),
        padded_((call.width + kPadding - 1) / kPadding * kPadding),
        wide_loads_(in_16_bytes<Key>(book_, call.width)),
        slope_(
            static_cast<float>(book_.projection.lipschitz * (1 + 1e-6) / book_.projection.step)) {}

  GRACE_FAST_DEVICE void read() {
    wait_for_the_kernel_before();
    take_queries();
    const double widest = book_.widest;
    Search search{encoded_queries(), block_index(), block_count(), 0, false, 0};
    search.limit = widest >= 0 ? error_bound_.above(widest * widest) : -1.0f;
    if (search.queries && widest >= 0) {
      const auto look = [](int b, uint32_t tag, float squared) {
        const int warp = thread_index() / kWarp;
        if (thread_index() % kWarp == 0) offer(&shared()->best[warp][b], packed(squared, tag));
      };
      for (int segment = 0; segment < book_.segments; ++segment)
        collect(search, book_.segment[segment], look);
      read_rows(search, book_.covered, look);
      read_candidates(search, look);
    }
    join_warps(shared()->best, 0, call_.batch);
  }

  // What Settle asks.
  GRACE_FAST_DEVICE int first() const { return 0; }
  GRACE_FAST_DEVICE int batch() const { return call_.batch; }
  GRACE_FAST_DEVICE const float* query(int b) const {
    return call_.workspace.wide + static_cast<int64_t>(b) * padded_;
  }
  GRACE_FAST_DEVICE int state(int b) const {
    return book_.widest >= 0 ? shared()->query[b].state : kNotFinite;
  }
  GRACE_FAST_DEVICE double min_radius() const { return book_.min_radius; }

  GRACE_FAST_DEVICE int owner(const Exact& hit) const {
    if (!(hit.tag & 1)) return -1;
    const int64_t row = hit.tag >> 1;
    for (int segment = 0; segment < book_.segments; ++segment) {
      const Segment& codes = book_.segment[segment];
      if (codes.isolated && codes.first <= row && row < codes.last) return segment;
    }
    return -1;
  }
  GRACE_FAST_DEVICE bool needs(int, int owner) const {
    for (int segment = 0; segment < book_.segments; ++segment) {
      if (segment != owner && book_.segment[segment].count > 0) return true;
    }
    return false;
  }

  template <typename Look>
  GRACE_FAST_DEVICE void read_again(int b, float limit, int skip, const Look& found) {
    const bool all = shared()->query[b].state == kTooLarge;
    Search search{1u << b, 0, 1, limit, true, 0};
    search.radius = static_cast<float>(square_root(limit) * (1 + 1e-6));
    const auto look = [&](int, uint32_t tag, float) { found(tag >> 1, tag & 1); };
    for (int segment = 0; segment < book_.segments && !all; ++segment) {
      if (segment != skip) collect(search, book_.segment[segment], look);
    }
    read_rows(search, all ? 0 : book_.covered, look);
    read_candidates(search, look);
  }

 private:
  GRACE_FAST_DEVICE static IndexedShared* shared() {
    return reinterpret_cast<IndexedShared*>(shared_memory());
  }

  // What is looked for, and this block's share of it.
  struct Search {
    uint32_t queries;  // a bit for each
    int share, shares;
    float limit;         // of S in float32
    bool at_one_radius;  // or each leaf's largest radius
    float radius;
  };

  GRACE_FAST_DEVICE void take_queries() {
    const auto* from = reinterpret_cast<const uint32_t*>(call_.workspace.encoded);
    auto* to = reinterpret_cast<uint32_t*>(shared()->query);
    const int words = call_.batch * static_cast<int>(sizeof(Encoded) / 4);
    for (int i = thread_index(); i < words; i += thread_count()) to[i] = load_fresh(from + i);
    for (int i = thread_index(); i < warps_ * kMostQueries; i += thread_count()) {
      shared()->best[i / kMostQueries][i % kMostQueries] = {kNone, kNone};
    }
    if (thread_index() == 0) shared()->leaves = shared()->candidates = 0;
    sync_block();
  }

  GRACE_FAST_DEVICE uint32_t encoded_queries() const {
    return ballot(lane_ < call_.batch && shared()->query[lane_].state == kEncoded);
  }

  // What sums of code differences are at most within a radius, for the errors of query and keys.
  GRACE_FAST_DEVICE int limit(const Search& search, float max_radius, float of_query,
                              float of_keys) const {
    const CodeThreshold threshold{slope_, of_query + of_keys + kSlackSteps};
    return threshold.at(search.at_one_radius ? search.radius : max_radius);
  }
  GRACE_FAST_DEVICE int near_limit(const Search& search, const Segment& segment, int b,
                                   float max_radius) const {
    return limit(search, max_radius, shared()->query[b].near_error, segment.near_error);
  }

  // Offer every key of a segment within the threshold, of this block's share.
  template <typename Look>
  GRACE_FAST_DEVICE void collect(const Search& search, const Segment& segment, const Look& look) {
    const int leaves = (segment.count + kLeaf - 1) / kLeaf;
    const int stride = search.shares * warps_;
    if (!segment.leaf_boxes) {
      for (int leaf = search.share + warp_ * search.shares; leaf < leaves; leaf += stride) {
        scan_leaf(search, segment, leaf, search.queries, look);
      }
      return;
    }
    const int nodes = (leaves + kLeaf - 1) / kLeaf;
    for (int first = 0; first + search.share < nodes; first += stride) {
      const int node = first + search.share + warp_ * search.shares;
      if (node < nodes) test_boxes(search, segment, node, leaves);
      sync_block();
      const int listed = shared()->leaves;
      for (int i = warp_; i < listed; i += warps_) {
        const int2 entry = shared()->leaf[i];
        scan_leaf(search, segment, entry.x, static_cast<uint32_t>(entry.y), look);
      }
      sync_block();
      if (thread_index() == 0) shared()->leaves = 0;
      sync_block();
    }
  }

  GRACE_FAST_DEVICE void test_boxes(const Search& search, const Segment& segment, int node,
                                    int leaves) {
    uint4 box[4];
    load_box(segment.node_boxes, node, box);
    const bool asked = search.queries >> lane_ & 1;
    const int b = asked ? lane_ : lowest_bit(search.queries);
    const float max_radius = segment.node_max_radius[node];
    const uint32_t queries = ballot(asked && box_distance(box, shared()->query[b]) <=
                                                 near_limit(search, segment, b, max_radius));
    if (!queries) return;
#pragma unroll 1
    for (int half = 0; half < kLeaf; half += kWarp) {
      const int leaf = node * kLeaf + half + lane_;
      uint32_t within = 0;
      if (leaf < leaves) {
        load_box(segment.leaf_boxes, leaf, box);
        const float leaf_max_radius = segment.leaf_max_radius[leaf];
        for (uint32_t left = queries; left; left &= left - 1) {
          const int query = lowest_bit(left);
          const int apart = box_distance(box, shared()->query[query]);
          if (apart <= near_limit(search, segment, query, leaf_max_radius)) within |= 1u << query;
        }
      }
      if (!ballot(within != 0)) continue;
      if (within) {
        shared()->leaf[add_to(&shared()->leaves, 1)] = {leaf, static_cast<int>(within)};
      }
    }
  }

  // Scan the 64 near codes of a leaf for some queries, by a warp.
  template <typename Look>
  GRACE_FAST_DEVICE void scan_leaf(const Search& search, const Segment& segment, int leaf,
                                   uint32_t queries, const Look& look) {
    const int at0 = leaf * kLeaf + lane_, at1 = at0 + kWarp;
    const int last = segment.count - 1;  // a lane past the end reads the last key and drops it
    const uint4 code0 =
        load16(segment.near + static_cast<int64_t>(at0 < last ? at0 : last) * kNear);
    const uint4 code1 =
        load16(segment.near + static_cast<int64_t>(at1 < last ? at1 : last) * kNear);
    const float max_radius = segment.leaf_max_radius[leaf];
#pragma unroll 1
    for (uint32_t left = queries; left; left &= left - 1) {
      const int b = lowest_bit(left);
      const Encoded& query = shared()->query[b];
      const int limit = near_limit(search, segment, b, max_radius);
      const int sum0 = code_distance(code0, query.code, 0);
      const int sum1 = code_distance(code1, query.code, 0);
      const bool near0 = sum0 <= limit && at0 <= last, near1 = sum1 <= limit && at1 <= last;
      if (!ballot(near0 || near1)) continue;
      Indexed cold(*this);  // its address is taken, and this one's must not be
      cold.refine(search, segment, at0, near0, sum0, code0.w, max_radius, b, look);
      cold.refine(search, segment, at1, near1, sum1, code1.w, max_radius, b, look);
    }
  }

  // Look at the far codes of the positions that are kept, and list what is left.
  template <typename Look>
  GRACE_FAST_COLD void refine(Search search, const Segment& segment, int position, bool kept,
                              int sum, uint32_t last_word, float max_radius, int b,
                              const Look& look) {
    const Encoded& query = shared()->query[b];
    uint32_t tag = 0;
    if (kept && book_.projection.far) {
      if (book_.projection
              .norm_slot) {  // what rows 0 .. 14 leave over is what the far rows look at
        const uint32_t apart = abs_difference4(last_word, query.code[3]) & 0xff000000u;
        sum -= dot4(apart, apart, 0);
      }
      const uint8_t* far = segment.far + static_cast<int64_t>(position) * kFar;
#pragma unroll
      for (int i = 0; i < kFar / 16; ++i) {
        sum = code_distance(load16(far + 16 * i), query.code + 4 + 4 * i, sum);
      }
      kept = sum <= limit(search, max_radius, query.far_error, segment.far_error);
    }
    if (kept) {
      const int64_t row = segment.rows[position];
      kept = row < book_.rows && book_.live[row];  // or a later row, or a removed one
      const bool alone = segment.isolated && (segment.isolated[position / 8] >> position % 8 & 1);
      tag = static_cast<uint32_t>(row) << 1 | static_cast<uint32_t>(alone);
    }
    bool listed = false;
    if (kept) {
      const int at = add_to(&shared()->candidates, 1);
      listed = at < kCandidateList;
      if (listed) shared()->candidate[at] = {tag, static_cast<uint32_t>(b)};
    }
    for (uint32_t left = ballot(kept && !listed); left; left &= left - 1) {
      read_key(search, b, shuffle(tag, lowest_bit(left)), look);
    }
  }

  template <typename Look>
  GRACE_FAST_DEVICE void read_candidates(const Search& search, const Look& look) {
    sync_block();
    const int listed =
        shared()->candidates < kCandidateList ? shared()->candidates : kCandidateList;
    for (int i = warp_; i < listed; i += warps_) {
      const uint2 entry = shared()->candidate[i];
      read_key(search, static_cast<int>(entry.y), entry.x, look);
    }
    sync_block();
    if (thread_index() == 0) shared()->candidates = 0;
    sync_block();
  }

  // Read the rows from `first` on, of this block's share.
  template <typename Look>
  GRACE_FAST_DEVICE void read_rows(const Search& search, int64_t first, const Look& look) {
    const int64_t stride = static_cast<int64_t>(search.shares) * warps_;
    for (int64_t row = first + search.share + warp_ * search.shares; row < book_.rows;
         row += stride) {
      if (!book_.live[row]) continue;
      for (uint32_t left = search.queries; left; left &= left - 1) {
        read_key(search, lowest_bit(left), static_cast<uint32_t>(row) << 1, look);
      }
    }
  }

  // Read one key, by a warp, and look at it if it is not beyond the limit.
  template <typename Look>
  GRACE_FAST_DEVICE void read_key(const Search& search, int b, uint32_t tag, const Look& look) {
    const Key* key = key_of<Key>(book_, call_.width, tag >> 1);
    const float squared = squared_by_warp(query(b), key, call_.width, wide_loads_);
    if (squared <= search.limit) look(b, tag, squared);
  }

  const int padded_;
  const bool wide_loads_;
  const float slope_;
};

template <typename Key>
GRACE_FAST_KERNEL(kMostThreads)
indexed_kernel(const __grid_constant__ Call call) {
  // Two objects, so that what reads the codes stays in registers: cold code takes the address of
  // the other.
  Indexed<Key> reader(call), decider(call);
  reader.read();
  decide<Key>(call, decider);
}

}  // namespace grace_fast::device
