// The dense look-up of a few queries: every key is read once, in one launch.
//
// Rows are dealt out to blocks in tiles, a few keys to a warp; queries are kept in shared memory as
// float32. Each block keeps the best two rows of every query by their float32 S and writes them
// down; the block that takes the last ticket decides (settle.cuh) and writes the values. Where a
// block's second is too near to its first to tell, the rows of that block are read once more. N is
// in device memory, nothing is allocated, the ticket starts again by itself: a graph may replay it.
#pragma once
#include "settle.cuh"

namespace grace_fast::device {

// Keys of a warp's tile, once there are enough for all warps: as many as registers hold sums for.
template <int kQueries>
constexpr int kManyKeys = kQueries == 8 ? 2 : 4;

template <int kQueries>
struct DenseShared {
  SettleShared settle;  // first, as Settle expects
  BestTwo best[kMostWarps][kQueries];
  int32_t not_finite[kQueries];
};

GRACE_FAST_BOTH constexpr int staged_width(int width) { return (width + 7) / 8 * 8; }

template <typename Key, int kQueries>
class Dense : Place {
 public:
  using Shared = DenseShared<kQueries>;
  static constexpr int64_t kQueriesAt = (sizeof(Shared) + 15) / 16 * 16;

  GRACE_FAST_DEVICE explicit Dense(const Call& call)
      : Place(call),
        stride_(staged_width(call.width)),
        wide_loads_(in_16_bytes<Key>(book_, call.width)),
        rows_(book_.rows),
        few_(rows_ <= static_cast<int64_t>(block_count()) * warps_ * 2) {}

  GRACE_FAST_DEVICE void read() {
    stage_queries();
    const double widest = book_.widest;
    const float limit = widest >= 0 ? error_bound_.above(widest * widest) : -1.0f;
    if (few_) {
      read_tiles<1>(limit);
    } else {
      read_tiles<kManyKeys<kQueries>>(limit);
    }
    join_warps(shared()->best, first(), batch());
  }

  // What Settle asks.
  GRACE_FAST_DEVICE int first() const { return group_index() * kQueries; }
  GRACE_FAST_DEVICE int batch() const {
    const int left = call_.batch - first();
    return left < kQueries ? left : kQueries;
  }
  GRACE_FAST_DEVICE const float* query(int b) const { return staged() + b * stride_; }
  GRACE_FAST_DEVICE int state(int b) const {
    return shared()->not_finite[b] ? kNotFinite : kEncoded;
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
  GRACE_FAST_DEVICE static Shared* shared() { return reinterpret_cast<Shared*>(shared_memory()); }
  GRACE_FAST_DEVICE static float* staged() {
    return reinterpret_cast<float*>(shared_memory() + kQueriesAt);
  }

  GRACE_FAST_DEVICE void stage_queries() {
    if (thread_index() < kQueries) shared()->not_finite[thread_index()] = 0;
    sync_block();
    with_element(call_.query_dtype,
                 [this](auto element) { stage(QueryRows<decltype(element)>(call_)); });
    sync_block();
  }

  // Four loads at least are in flight before the first is used. Beyond the batch stands its first
  // query again.
  template <typename Query>
  GRACE_FAST_DEVICE void stage(const QueryRows<Query>& rows) {
    constexpr int kSteps = kQueries < 4 ? 4 / kQueries : 1;
    const int step = thread_count() * 8, queries = batch();
    float odd[kQueries] = {};  // NaN once an element is not finite
#pragma unroll 1
    for (int start = thread_index() * 8; start < stride_; start += kSteps * step) {
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
        if (start + i * step >= stride_) break;
#pragma unroll
        for (int b = 0; b < kQueries; ++b) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float x[4];
            rows.widened(eight[i][b], half, x);
#pragma unroll
            for (int e = 0; e < 4; ++e) odd[b] = multiply_add(x[e], 0.0f, odd[b]);
            float* to = staged() + b * stride_ + start + i * step + 4 * half;
            *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
          }
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kQueries; ++b) {
      if (!(odd[b] == 0)) shared()->not_finite[b] = 1;
    }
  }

  // Tile i goes to block i modulo the blocks; in a block, to one warp after the other.
  template <int kKeys>
  GRACE_FAST_DEVICE void read_tiles(float limit) {
    BestTwo best{kNone, kNone};  // of query `lane`
    const int64_t step = static_cast<int64_t>(block_count()) * kKeys;
#pragma unroll 1
    for (int64_t tile = block_index() * kKeys + warp_ * step; tile < rows_; tile += warps_ * step) {
      const Key* key[kKeys];
      bool live[kKeys];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        // A removed row is read all the same: its key's address need not wait for `live`.
        const int64_t row = tile + k < rows_ ? tile + k : tile;
        live[k] = tile + k < rows_ && book_.live[row];
        key[k] = key_of<Key>(book_, call_.width, row);
      }
      float sum[kQueries][kKeys] = {};
      add_squares<Key, kQueries, kKeys>(staged(), stride_, key, call_.width, wide_loads_, sum);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        float mine = 0;
#pragma unroll
        for (int b = 0; b < kQueries; ++b) {
          const float squared = sum_of_warp(sum[b][k]);
          if (lane_ == b) mine = squared;
        }
        if (live[k] && mine <= limit) {
          offer(&best, packed(mine, static_cast<uint32_t>(tile + k) << 1));
        }
      }
    }
    if (lane_ < kQueries) shared()->best[warp_][lane_] = best;
  }

  const int stride_;
  const bool wide_loads_;
  const int64_t rows_;
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
