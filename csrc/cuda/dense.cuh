// The dense look-up of a few queries: every key is read once, in one launch.
//
// Rows are dealt out to blocks in tiles, a few keys to a warp; their way is a ring in shared memory
// (key_ring.cuh), or straight where they are not at 16 bytes. Queries are kept there too, as
// float32. Each block keeps the best two rows of every query by their float32 S and writes them
// down; the block that takes the last ticket decides (settle.cuh) and writes the values. Where a
// block's second is too near to its first to tell, the rows of that block are read once more. N is
// in device memory, nothing is allocated, the ticket starts again by itself: a graph may replay it.
#pragma once
#include "key_ring.cuh"
#include "settle.cuh"

namespace grace_fast::device {

// Keys of a warp's tile, once there are enough for all warps: as many as registers hold sums for.
template <int kQueries>
constexpr int kManyKeys = kQueries == 8 ? 2 : 4;

template <int kQueries>
struct DenseShared {
  SettleShared settle;  // first, as Settle expects
  BestTwo best[kMostWarps][kQueries];
  uint32_t not_finite[kMostWarps];  // a bit for each query
};

// Queries in shared memory, in the order in which warps read them: for a chunk of keys, 16 bytes a
// lane, that part of every query; of each first the first four elements of all lanes, then the next
// four, so that all banks take part each time. Zeros beyond the width.
template <typename Key, int kQueries>
struct StagedQuery {
  static constexpr int kElements = kOf16Bytes<Key>, kChunk = kWarp * kElements;
  const float* at;

  GRACE_FAST_DEVICE static int place(int j) {
    const int lane = j % kChunk / kElements, part = j % kElements / 4;
    return j / kChunk * (kChunk * kQueries) + part * kWarp * 4 + lane * 4 + j % 4;
  }
  GRACE_FAST_DEVICE float operator[](int j) const { return at[place(j)]; }
  // The width as it is staged.
  GRACE_FAST_BOTH static constexpr int padded(int width) {
    return (width + kChunk - 1) / kChunk * kChunk;
  }
};
template <typename Key, int kQueries>
GRACE_FAST_DEVICE float4 four_of(const StagedQuery<Key, kQueries>& query, int j) {
  return *reinterpret_cast<const float4*>(query.at + query.place(j));
}

template <typename Key, int kQueries>
class Dense : Place {
 public:
  using Shared = DenseShared<kQueries>;
  using Staged = StagedQuery<Key, kQueries>;

  // What a block keeps in shared memory but for the warps' rings, which follow.
  GRACE_FAST_BOTH static constexpr int64_t ring_at(int width) {
    return kQueriesAt + static_cast<int64_t>(kQueries) * Staged::padded(width) * 4;
  }

  GRACE_FAST_DEVICE explicit Dense(const Call& call)
      : Place(call),
        wide_loads_(in_16_bytes<Key>(book_, call.width)),
        rows_(static_cast<uint32_t>(book_.rows)),
        few_(book_.rows <= static_cast<int64_t>(block_count()) * warps_ * 2) {}

  GRACE_FAST_DEVICE void read() {
    BestTwo best{kNone, kNone};  // of this lane's query
    if (few_) {
      best = read_tiles<1>();
    } else {
      best = read_tiles<kManyKeys<kQueries>>();
    }
    constexpr int kLanes = kWarp / kQueries;  // of a query
    best = best_of_lanes<kLanes>(best);
    if (lane_ % kLanes == 0) shared()->best[warp_][lane_ / kLanes] = best;
    join_warps(shared()->best, first(), batch());
  }

  // What Settle asks.
  GRACE_FAST_DEVICE int first() const { return group_index() * kQueries; }
  GRACE_FAST_DEVICE int batch() const {
    const int left = call_.batch - first();
    return left < kQueries ? left : kQueries;
  }
  GRACE_FAST_DEVICE Staged query(int b) const { return {staged() + b * Staged::kChunk}; }
  GRACE_FAST_DEVICE bool may_hit(int b) const {
    const uint32_t odd = lane_ < warps_ ? shared()->not_finite[lane_] : 0;
    return ballot((odd >> b & 1) != 0) == 0;
  }
  GRACE_FAST_DEVICE double min_radius() const { return 0; }
  GRACE_FAST_DEVICE int owner(const Exact&) const { return -1; }
  GRACE_FAST_DEVICE bool needs(int, int) const { return false; }  // every key has been read

  template <typename Look>
  GRACE_FAST_DEVICE void read_again(int b, float limit, int, const Look& look) {
    for (int block = 0; block < block_count(); ++block) {
      if (!is_within(seen(first() + b, block).second, limit)) continue;
      const int keys = few_ ? 1 : kManyKeys<kQueries>;
      for (int64_t i = warp_;; i += warps_) {
        const int64_t row = (i / keys * block_count() + block) * keys + i % keys;
        if (row - i % keys >= rows_) break;
        if (row >= rows_ || !book_.live[row]) continue;
        const Key* key = key_of<Key>(book_, call_.width, row);
        if (squared_by_warp(query(b), key, call_.width, wide_loads_) <= limit) look(row, 0);
      }
    }
  }

 private:
  static constexpr int64_t kQueriesAt = (sizeof(Shared) + 15) / 16 * 16;
  GRACE_FAST_DEVICE static Shared* shared() { return reinterpret_cast<Shared*>(shared_memory()); }
  GRACE_FAST_DEVICE static float* staged() {
    return reinterpret_cast<float*>(shared_memory() + kQueriesAt);
  }

  GRACE_FAST_COLD static void stage_queries(const Call& call) {
    with_element(call.query_dtype,
                 [&](auto element) { Dense(call).stage(QueryRows<decltype(element)>(call)); });
    sync_block();
  }

  // Four loads at least are in flight before the first is used. Beyond the batch stands its first
  // query again.
  template <typename Query>
  GRACE_FAST_DEVICE void stage(const QueryRows<Query>& rows) const {
    constexpr int kSteps = kQueries < 4 ? 4 / kQueries : 1;
    const int step = thread_count() * 8, queries = batch();
    const int padded = Staged::padded(call_.width);
    float odd[kQueries] = {};  // NaN once an element is not finite
#pragma unroll 1
    for (int start = thread_index() * 8; start < padded; start += kSteps * step) {
      typename QueryRows<Query>::Eight eight[kSteps][kQueries];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int b = 0; b < kQueries; ++b) {
          eight[i][b] = rows.at(first() + (b < queries ? b : 0), start + i * step);
        }
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (start + i * step >= padded) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to = staged() + Staged::place(start + i * step + 4 * half);
#pragma unroll
          for (int b = 0; b < kQueries; ++b) {
            float x[4];
            rows.widened(eight[i][b], half, x);
#pragma unroll
            for (int e = 0; e < 4; ++e) odd[b] = multiply_add(x[e], 0.0f, odd[b]);
            *reinterpret_cast<float4*>(to + b * Staged::kChunk) = {x[0], x[1], x[2], x[3]};
          }
        }
      }
    }
    uint32_t not_finite = 0;
#pragma unroll
    for (int b = 0; b < kQueries; ++b) {
      if (ballot(!(odd[b] == 0))) not_finite |= 1u << b;
    }
    if (lane_ == 0) shared()->not_finite[warp_] = not_finite;
  }

  // Tile i goes to block i modulo the blocks; in a block, to one warp after the other. Returns the
  // best two of a lane's query among the keys that it had the sums of.
  template <int kKeys>
  GRACE_FAST_DEVICE BestTwo read_tiles() {
    const uint32_t step = static_cast<uint32_t>(block_count()) * kKeys;
    const Tiles tiles{block_index() * kKeys + warp_ * step, warps_ * step, rows_};
    if (!wide_loads_) {
      stage_queries(call_);
      return read_sums<kKeys>(tiles, [&](uint32_t tile, auto& sum) { add_elements(tile, sum); });
    }
    const int ring = static_cast<int>(ring_at(call_.width)) + warp_ * kRingBytes;
    KeyRing<Key, kKeys> keys(book_, call_.width, ring, tiles);
    stage_queries(call_);
    return read_sums<kKeys>(tiles, [&](uint32_t, auto& sum) { add_stages(&keys, sum); });
  }

  template <int kKeys, typename Add>
  GRACE_FAST_DEVICE BestTwo read_sums(const Tiles& tiles, const Add& add) {
    const double widest = book_.widest;
    const float limit = widest >= 0 ? error_bound_.above(widest * widest) : -1.0f;
    BestTwo best{kNone, kNone};
#pragma unroll 1
    for (uint32_t tile = tiles.first; tile < rows_; tile += tiles.step) {
      const uint32_t row = tile + value_of_lane<kQueries * kKeys>(lane_) % kKeys;
      const bool live = row < rows_ && book_.live[row];
      float sum[kQueries * kKeys] = {};  // of query b and key k at b * kKeys + k
      add(tile, sum);
      const float squared = sums_of_lanes(sum);
      if (live && squared <= limit) offer(&best, packed(squared, row << 1));
    }
    return best;
  }

  // Add a lane's share of S of a tile, as it comes.
  template <int kKeys>
  GRACE_FAST_DEVICE void add_stages(KeyRing<Key, kKeys>* keys,
                                    float (&sum)[kQueries * kKeys]) const {
    constexpr int kChunks = KeyRing<Key, kKeys>::kChunks;
    const float* query = staged() + lane_ * 4;
#pragma unroll 1
    for (int left = call_.width; left > 0; left -= kChunks * Staged::kChunk) {
      keys->wait();
#pragma unroll(kQueries == 8 ? 1 : kChunks)
      for (int c = 0; c < kChunks; ++c) {
        if (c && left <= c * Staged::kChunk) break;
        add_chunk(*keys, c, query, sum);
        query += kQueries * Staged::kChunk;
      }
      keys->copy_ahead();
    }
  }
  template <int kKeys>
  GRACE_FAST_DEVICE void add_chunk(const KeyRing<Key, kKeys>& keys, int chunk, const float* query,
                                   float (&sum)[kQueries * kKeys]) const {
    uint4 raw[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) raw[k] = keys.piece(chunk, k);
#pragma unroll
    for (int part = 0; part < kOf16Bytes<Key> / 4; ++part) {
      float stored[kKeys][4];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        widen_four(raw[k], part, static_cast<Key*>(nullptr), stored[k]);
      }
#pragma unroll
      for (int b = 0; b < kQueries; ++b) {
        const auto asked =
            *reinterpret_cast<const float4*>(query + b * Staged::kChunk + part * kWarp * 4);
#pragma unroll
        for (int k = 0; k < kKeys; ++k) add_four(asked, stored[k], &sum[b * kKeys + k]);
      }
    }
  }

  // The same by elements.
  template <int kValues>
  GRACE_FAST_DEVICE void add_elements(uint32_t tile, float (&sum)[kValues]) const {
    constexpr int kKeys = kValues / kQueries;
    const Key* key[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      key[k] = key_of<Key>(book_, call_.width, tile + k < rows_ ? tile + k : tile);
    }
#pragma unroll 1
    for (int j = lane_; j < call_.width; j += kWarp) {
      const float* asked = staged() + Staged::place(j);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const float stored = widen(key[k][j]);
#pragma unroll
        for (int b = 0; b < kQueries; ++b) {
          const float difference = asked[b * Staged::kChunk] - stored;
          sum[b * kKeys + k] = multiply_add(difference, difference, sum[b * kKeys + k]);
        }
      }
    }
  }

  const bool wide_loads_;
  const uint32_t rows_;
  const bool few_;
};

template <typename Key, int kQueries>
GRACE_FAST_KERNEL(kMostThreads)
dense_kernel(const __grid_constant__ Call call) {
  // Two objects, so that what reads the keys stays in registers: cold code takes the address of the
  // other.
  Dense<Key, kQueries> reader(call), decider(call);
  reader.read();
  decide<Key>(call, decider);
}

}  // namespace grace_fast::device
