// The look-up by the index of a few queries: most misses are proved from a few code bytes.
//
//   boxes of nodes -> boxes of leaves -> near codes -> far codes -> float32 S -> canonical S
// Each step drops only keys that are farther than the largest radius of their leaf
// (csrc/cpu/indexed.cpp says why the nearest of the others decides). The second launch, after
// `encode`:
//
//   boxes     a warp takes a level-2 node: a lane tests its box for a query each, then its leaves
//             for all queries that are left; leaves that may hold a hit go to a list of the block
//   codes     a warp takes a few leaves at a time, a lane two keys of each; all their codes are
//             asked for before the first is used
//   keys      a warp takes a candidate of the block and reads it; best two as in dense.cuh
//   share     a block whose second is too near to its first to tell looks at its share again, with
//             canonical sums, and is left with one
//   decision  by the block with the last ticket (settle.cuh)
// Segments without boxes are scanned leaf by leaf; rows without a code are read as they are, and
// so is every row for a query too large for float32 to project. A candidate that finds the list
// full is read at once: a list is a convenience, not a limit. So whatever is doubtful about a
// query, all blocks share what is read for it. The last block looks again only where a hit is
// farther than the radius of some leaf, and only at such leaves.
#pragma once
#include "encode.cuh"
#include "settle.cuh"

namespace grace_fast::device {

constexpr int kLeafList = kMostWarps * kLeaf;  // a level-2 node for every warp
constexpr int kCandidateList = 1024;
constexpr int kTogether = 4;          // leaves that a warp has in flight
constexpr float kSlackSteps = 1e-3f;  // what underflow may take from a projection

struct IndexedShared {
  SettleShared settle;  // first, as Settle expects
  Encoded query[kMostQueries];
  BestTwo best[kMostWarps][kMostQueries];
  int2 leaf[kLeafList];             // the leaf, and a bit for each query
  uint2 candidate[kCandidateList];  // row << 1 | alone, and the query
  int32_t leaves, candidates;
};

// The largest sum of squared code differences of a key within `radius`, for the errors of query and
// keys and the slack together, in steps, and how many steps a unit of radius is.
GRACE_FAST_DEVICE int largest_sum(float radius, float steps, float errors) {
  const float bound = radius * steps + errors;  // a few roundings, below the factor that follows
  const float square = bound * bound * 1.00001f + 1.0f;
  return square < 2147483000.0f ? static_cast<int>(square) : kMostSum;
}

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
GRACE_FAST_DEVICE int code_distance(uint4 code, uint4 query, int sum) {
  const uint32_t words[4] = {code.x, code.y, code.z, code.w};
  const uint32_t asked[4] = {query.x, query.y, query.z, query.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t apart = abs_difference4(words[i], asked[i]);
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
        steps_(
            static_cast<float>(book_.projection.lipschitz * (1 + 1e-6) / book_.projection.step)) {}

  GRACE_FAST_DEVICE void read() {
    prefetch_codes();
    wait_for_the_kernel_before();
    take_queries();
    const double widest = book_.widest;
    if (widest >= 0) {
      const Search search{in_state(kEncoded), in_state(kTooLarge), block_index(), block_count(),
                          error_bound_.above(widest * widest)};
      collect(search, Nearest{});
    }
    leave_one();
  }

  // What Settle asks.
  GRACE_FAST_DEVICE int first() const { return 0; }
  GRACE_FAST_DEVICE int batch() const { return call_.batch; }
  GRACE_FAST_DEVICE const float* query(int b) const {
    return call_.workspace.wide + static_cast<int64_t>(b) * padded_;
  }
  GRACE_FAST_DEVICE bool may_hit(int b) const {
    return book_.widest >= 0 && shared()->query[b].state != kNotFinite;
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
  GRACE_FAST_DEVICE bool needs(int b, int owner) const {
    if (shared()->query[b].state == kTooLarge) return false;
    for (int segment = 0; segment < book_.segments; ++segment) {
      if (segment != owner && book_.segment[segment].count > 0) return true;
    }
    return false;
  }

  // Only leaves whose largest radius is below the hit's distance have been looked at less far.
  template <typename Look>
  GRACE_FAST_DEVICE void read_again(int b, float limit, int skip, const Look& look) {
    collect_exactly({1u << b, 0, 0, 1, limit, radius_of(limit), true, skip});
    const Exact found = settle_shared()->of_warp[warp_];
    sync_block();
    if (found.tag != ~0u) look(found.tag >> 1, found.tag & 1);
  }

 private:
  GRACE_FAST_DEVICE static IndexedShared* shared() {
    return reinterpret_cast<IndexedShared*>(shared_memory());
  }

  // What is looked for, and this block's share of it.
  struct Search {
    uint32_t by_codes, by_keys;  // queries, a bit for each
    int share, shares;
    float limit;               // of S in float32
    float radius = -1;         // in the place of each leaf's largest radius; or negative
    bool hidden_only = false;  // leave out leaves whose largest radius is at least that
    int skip = -1;             // a segment
  };

  // What to do with a key whose S in float32 is within the limit, by a warp: `Nearest` keeps the
  // best two, `Exactly` the first by the law.
  struct Nearest {
    GRACE_FAST_DEVICE void operator()(const Indexed&, int b, uint32_t tag, float squared) const {
      const int warp = thread_index() / kWarp;
      if (thread_index() % kWarp == 0) offer(&shared()->best[warp][b], packed(squared, tag));
    }
  };
  struct Exactly {
    GRACE_FAST_DEVICE void operator()(const Indexed& lookup, int b, uint32_t tag, float) const {
      const Key* key = key_of<Key>(lookup.book_, lookup.call_.width, tag >> 1);
      const Exact found{canonical_by_warp(lookup.query(b), key, lookup.call_.width), tag};
      Exact* best = &settle_shared()->of_warp[lookup.warp_];
      if (lookup.lane_ == 0 && found.before(*best)) *best = found;  // never an infinite S, or NaN
    }
  };

  // A segment, as a thread scans it: what is the same for all leaves.
  struct Part {
    const Segment* segment;
    const uint8_t* near;
    const float* leaf_max_radius;
    int last;      // position
    float errors;  // of this lane's query and of the keys, and the slack; in steps
  };

  GRACE_FAST_DEVICE static float radius_of(float limit) {
    return static_cast<float>(square_root(limit) * (1 + 1e-6));
  }

  // Ask for the codes that this block will read first, before queries are known: they wait in L2.
  GRACE_FAST_DEVICE void prefetch_codes() const {
    for (int i = 0; i < book_.segments; ++i) {
      const Segment& segment = book_.segment[i];
      const int64_t at = (block_index() + static_cast<int64_t>(thread_index()) * block_count());
      if (segment.leaf_boxes) {
        if (thread_index() < warps_ && at < (segment.count + kLeaf * kLeaf - 1) / (kLeaf * kLeaf)) {
          prefetch(segment.node_boxes + at * 2 * kNear, 4 * kNear);
        }
      } else if (thread_index() < warps_ * kTogether && (at + 1) * kLeaf <= segment.count) {
        prefetch(segment.near + at * kLeaf * kNear, kLeaf * kNear);
      }
    }
  }

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

  GRACE_FAST_DEVICE uint32_t in_state(State state) const {
    return ballot(lane_ < call_.batch && shared()->query[lane_].state == state);
  }

  GRACE_FAST_DEVICE Part part_of(const Segment& segment) const {
    const float of_query = lane_ < call_.batch ? shared()->query[lane_].near_error : 0.0f;
    return {&segment, segment.near, segment.leaf_max_radius, segment.count - 1,
            of_query + segment.near_error + kSlackSteps};
  }

  // What sums of near code differences are at most, for this lane's query.
  GRACE_FAST_DEVICE int near_limit(const Search& search, const Part& part, float max_radius) const {
    return largest_sum(search.radius >= 0 ? search.radius : max_radius, steps_, part.errors);
  }

  // Look at every key within the thresholds, of this block's share, and at every key of it for the
  // queries that have no code.
  template <typename Look>
  GRACE_FAST_DEVICE void collect(const Search& search, const Look& look) {
    for (int i = 0; i < book_.segments && search.by_codes; ++i) {
      if (i != search.skip) scan(search, book_.segment[i], look);
    }
    if (!search.hidden_only) read_rows(search, search.by_codes, book_.covered, look);
    read_rows(search, search.by_keys, 0, look);
    read_candidates(search, look);
  }

  // Leave the first by the law of what each warp finds where `Exactly` keeps it.
  GRACE_FAST_COLD void collect_exactly(Search search) {
    sync_block();
    if (lane_ == 0) settle_shared()->of_warp[warp_] = no_row();
    collect(search, Exactly{});
  }

  template <typename Look>
  GRACE_FAST_DEVICE void scan(const Search& search, const Segment& segment, const Look& look) {
    const Part part = part_of(segment);
    const int leaves = part.last / kLeaf + 1;
    const int stride = search.shares * warps_;
    if (part.last < 0) return;
    if (!segment.leaf_boxes && !search.hidden_only) {
      const int first = search.share + warp_ * search.shares;
      if (leaves <= stride) {
        scan_leaves<1>(search, part, first, leaves, look);
      } else {
        scan_leaves<kTogether>(search, part, first, leaves, look);
      }
      return;
    }
    const int nodes = (leaves + kLeaf - 1) / kLeaf;
    for (int first = 0; first + search.share < nodes; first += stride) {
      const int node = first + search.share + warp_ * search.shares;
      if (node < nodes) list_leaves(search, part, node, leaves);
      sync_block();
      scan_list(search, segment, part, look);
      sync_block();
      if (thread_index() == 0) shared()->leaves = 0;
      sync_block();
    }
  }

  // List the leaves of a node that may hold what is looked for, by a warp.
  GRACE_FAST_DEVICE void list_leaves(const Search& search, const Part& part, int node, int leaves) {
    const Segment& segment = *part.segment;
    uint4 box[4];
    uint32_t queries = search.by_codes;
    if (segment.leaf_boxes) {
      load_box(segment.node_boxes, node, box);
      const int limit = near_limit(search, part, segment.node_max_radius[node]);
      const bool asked = search.by_codes >> lane_ & 1;
      const int b = asked ? lane_ : lowest_bit(search.by_codes);
      queries = ballot(asked && box_distance(box, shared()->query[b]) <= limit);
    }
    if (!queries) return;
#pragma unroll 1
    for (int half = 0; half < kLeaf; half += kWarp) {
      const int leaf = node * kLeaf + half + lane_;
      const bool there = leaf < leaves;
      const float max_radius = part.leaf_max_radius[there ? leaf : leaves - 1];
      uint32_t within = there && !(search.hidden_only && max_radius >= search.radius) ? queries : 0;
      if (segment.leaf_boxes) {
        load_box(segment.leaf_boxes, there ? leaf : leaves - 1, box);
        const float radius = search.radius >= 0 ? search.radius : max_radius;
        for (uint32_t left = queries; left; left &= left - 1) {
          const int b = lowest_bit(left);
          const int limit = largest_sum(radius, steps_, shuffle(part.errors, b));
          if (box_distance(box, shared()->query[b]) > limit) within &= ~(1u << b);
        }
      }
      if (within) {
        shared()->leaf[add_to(&shared()->leaves, 1)] = {leaf, static_cast<int>(within)};
      }
    }
  }

  // The near codes of a leaf: a lane's two keys. A lane past the end reads the last key.
  struct Codes {
    uint4 first, second;
  };
  GRACE_FAST_DEVICE Codes codes_of(const Part& part, int leaf) const {
    const int at0 = leaf * kLeaf + lane_, at1 = at0 + kWarp;
    return {load16(part.near + static_cast<int64_t>(at0 < part.last ? at0 : part.last) * kNear),
            load16(part.near + static_cast<int64_t>(at1 < part.last ? at1 : part.last) * kNear)};
  }

  // Scan the leaves of a warp, some at a time: those of its share that the list has.
  template <typename Look>
  GRACE_FAST_DEVICE void scan_list(const Search& search, const Segment& segment, const Part& part,
                                   const Look& look) {
    const int listed = shared()->leaves;
#pragma unroll 1
    for (int first = warp_; first < listed; first += kTogether * warps_) {
      int2 entry[kTogether];
      Codes codes[kTogether];
      float max_radius[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int at = first + k * warps_;
        entry[k] = shared()->leaf[at < listed ? at : first];
        if (at >= listed) entry[k].y = 0;
        codes[k] = codes_of(part, entry[k].x);
        max_radius[k] = part.leaf_max_radius[entry[k].x];
      }
      uint32_t within = 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const Codes one[1] = {codes[k]};
        const int limit = near_limit(search, part, max_radius[k]);
        within |= compare<1>(one, limit, static_cast<uint32_t>(entry[k].y)) << k;
      }
      const auto leaf_at = [=](int k) { return shared()->leaf[first + k * warps_].x; };
      refine(search, segment, within, leaf_at, look);
    }
  }

  // Scan every `stride`th leaf from `first` on, kLeaves of them at a time.
  template <int kLeaves, typename Look>
  GRACE_FAST_DEVICE void scan_leaves(const Search& search, const Part& part, int first, int leaves,
                                     const Look& look) {
    const int stride = search.shares * warps_;
#pragma unroll 1
    for (int leaf = first; leaf < leaves; leaf += kLeaves * stride) {
      Codes codes[kLeaves];
      float max_radius = 0;
#pragma unroll
      for (int k = 0; k < kLeaves; ++k) {
        const int at = leaf + k * stride < leaves ? leaf + k * stride : leaf;
        codes[k] = codes_of(part, at);
        const float other = part.leaf_max_radius[at];
        max_radius = other > max_radius ? other : max_radius;
      }
      const int limit = near_limit(search, part, max_radius);
      const uint32_t within = compare<kLeaves>(codes, limit, search.by_codes);
      const auto leaf_at = [=](int k) { return leaf + k * stride; };
      refine(search, *part.segment, within, leaf_at, look);
    }
  }

  // Compare the codes of a few leaves with some queries, by a warp. Returns for a lane's query a
  // bit for each leaf in which some code is within the limit, which is that of the widest radius.
  template <int kLeaves>
  GRACE_FAST_DEVICE uint32_t compare(const Codes (&codes)[kLeaves], int limit,
                                     uint32_t queries) const {
    uint32_t found = 0;
#pragma unroll 1
    for (uint32_t left = queries; left; left &= left - 1) {
      const int b = lowest_bit(left);
      const uint4 query = *reinterpret_cast<const uint4*>(shared()->query[b].code);
      const int start = ~shuffle(limit, b);  // sums from here on are negative within the limit
      int least[kLeaves];
      int least_of_all = 0;
#pragma unroll
      for (int k = 0; k < kLeaves; ++k) {
        least[k] = code_distance(codes[k].first, query, start) |
                   code_distance(codes[k].second, query, start);
        least_of_all |= least[k];
      }
      if (!ballot(least_of_all < 0)) continue;
#pragma unroll
      for (int k = 0; k < kLeaves; ++k) {
        const uint32_t within = ballot(least[k] < 0) != 0;
        if (lane_ == b) found |= within << k;
      }
    }
    return found;
  }

  // Look closer at leaves leaf_at(k) for a lane's query where its bit k is set.
  template <typename LeafAt, typename Look>
  GRACE_FAST_DEVICE void refine(const Search& search, const Segment& segment, uint32_t within,
                                const LeafAt& leaf_at, const Look& look) {
#pragma unroll 1
    for (uint32_t left = ballot(within != 0); left; left &= left - 1) {
      const int b = lowest_bit(left);
#pragma unroll 1
      for (uint32_t which = shuffle(within, b); which; which &= which - 1) {
        const int leaf = leaf_at(lowest_bit(which));
        Indexed cold(*this);  // its address is taken, and this one's must not be
        cold.refine_leaf(search.limit, search.radius, segment, leaf, b, look);
      }
    }
  }

  // List the keys of a leaf that the codes leave in doubt.
  template <typename Look>
  GRACE_FAST_COLD void refine_leaf(float limit, float radius, const Segment& segment, int leaf,
                                   int b, const Look& look) {
    if (radius < 0) radius = segment.leaf_max_radius[leaf];
    for (int half = 0; half < kLeaf; half += kWarp) {
      refine_codes(limit, radius, segment, leaf * kLeaf + half + lane_, b, look);
    }
  }

  template <typename Look>
  GRACE_FAST_DEVICE void refine_codes(float limit, float radius, const Segment& segment,
                                      int position, int b, const Look& look) {
    const Encoded& query = shared()->query[b];
    const auto* asked = reinterpret_cast<const uint4*>(query.code);
    const auto threshold = [&](float of_query, float of_keys) {
      return largest_sum(radius, steps_, of_query + of_keys + kSlackSteps);
    };
    int sum = 0;
    bool kept = position < segment.count;
    uint4 code = {};
    if (kept) {
      code = load16(segment.near + static_cast<int64_t>(position) * kNear);
      sum = code_distance(code, asked[0], 0);
      kept = sum <= threshold(query.near_error, segment.near_error);
    }
    if (!ballot(kept)) return;
    uint32_t tag = 0;
    if (kept && book_.projection.far) {
      if (book_.projection.norm_slot) {
        // What rows 0 .. 14 leave over is what the far rows look at.
        const uint32_t apart = abs_difference4(code.w, query.code[3]) & 0xff000000u;
        sum -= dot4(apart, apart, 0);
      }
      const uint8_t* far = segment.far + static_cast<int64_t>(position) * kFar;
#pragma unroll
      for (int i = 0; i < kFar / 16; ++i) {
        sum = code_distance(load16(far + 16 * i), asked[1 + i], sum);
      }
      kept = sum <= threshold(query.far_error, segment.far_error);
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
      read_key(limit, b, shuffle(tag, lowest_bit(left)), look);
    }
  }

  template <typename Look>
  GRACE_FAST_DEVICE void read_candidates(const Search& search, const Look& look) {
    sync_block();
    const int listed =
        shared()->candidates < kCandidateList ? shared()->candidates : kCandidateList;
    for (int i = warp_; i < listed; i += warps_) {
      const uint2 entry = shared()->candidate[i];
      read_key(search.limit, static_cast<int>(entry.y), entry.x, look);
    }
    sync_block();
    if (thread_index() == 0) shared()->candidates = 0;
    sync_block();
  }

  // Read the rows from `first` on, of this block's share, for some queries.
  template <typename Look>
  GRACE_FAST_DEVICE void read_rows(const Search& search, uint32_t queries, int64_t first,
                                   const Look& look) {
    if (!queries) return;
    const int64_t stride = static_cast<int64_t>(search.shares) * warps_;
    for (int64_t row = first + search.share + warp_ * search.shares; row < book_.rows;
         row += stride) {
      if (!book_.live[row]) continue;
      for (uint32_t left = queries; left; left &= left - 1) {
        read_key(search.limit, lowest_bit(left), static_cast<uint32_t>(row) << 1, look);
      }
    }
  }

  // Read one key, by a warp, and look at it if it is not beyond the limit.
  template <typename Look>
  GRACE_FAST_DEVICE void read_key(float limit, int b, uint32_t tag, const Look& look) {
    const Key* key = key_of<Key>(book_, call_.width, tag >> 1);
    const float squared = squared_by_warp(query(b), key, call_.width, wide_loads_);
    if (squared <= limit) look(*this, b, tag, squared);
  }

  // Write down the nearest of the block's share of each query.
  //
  // The nearest key of all has an S in float32 within the bound of the least of its block, so it is
  // that one, or its block is looked at again. Every block then has one that decides, and the last
  // block never meets a second.
  GRACE_FAST_DEVICE void leave_one() {
    sync_block();
    const int mine = thread_index();
    if (mine < call_.batch) {
      BestTwo joined{kNone, kNone};
      for (int i = 0; i < warps_; ++i) {
        offer(&joined, shared()->best[i][mine].first);
        offer(&joined, shared()->best[i][mine].second);
      }
      shared()->best[0][mine] = joined;
    }
    sync_block();
    const auto is_crowded = [this](int b) {
      const BestTwo two = shared()->best[0][b];
      return is_within(two.second, error_bound_.above(squared_of(two.first)));
    };
    for (uint32_t left = ballot(lane_ < call_.batch && is_crowded(lane_)); left; left &= left - 1) {
      Indexed cold(*this);
      cold.look_again(lowest_bit(left));
    }
    if (mine < call_.batch) slots(mine)[block_index()] = {shared()->best[0][mine].first, kNone};
  }

  // Find the nearest of the block's share by the law.
  GRACE_FAST_COLD void look_again(int b) {
    const float limit = error_bound_.above(squared_of(shared()->best[0][b].first));
    const bool by_codes = shared()->query[b].state == kEncoded;
    collect_exactly({by_codes ? 1u << b : 0, by_codes ? 0 : 1u << b, block_index(), block_count(),
                     limit, radius_of(limit)});
    if (thread_index() == 0) {
      Exact best = settle_shared()->of_warp[0];
      for (int i = 1; i < warps_; ++i) {
        if (settle_shared()->of_warp[i].before(best)) best = settle_shared()->of_warp[i];
      }
      // The law's S in float32 is within the bound of a sum in float32.
      const float squared = best.squared < 3e38 ? static_cast<float>(best.squared) : infinity();
      shared()->best[0][b].first = best.tag == ~0u ? kNone : packed(squared, best.tag);
    }
    sync_block();
  }

  const int padded_;
  const bool wide_loads_;
  const float steps_;  // for a unit of radius, at least
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
