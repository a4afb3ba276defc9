// Every key is read: float32 differences as a filter, the canonical sum for what is left.
//
// Four queries meet two keys at a time, in tiles of keys that stay in the cache. Threads share the
// queries, or the keys where there are fewer groups of four than threads.
#include <algorithm>

#include "scratch.h"

namespace grace_fast {
namespace {

constexpr int64_t kStretch = 512;        // elements of a tile
constexpr int64_t kGroup = 4;            // queries of a tile
constexpr int64_t kTileBytes = 1 << 17;  // keys that are met by every group before the next ones
constexpr int64_t kSerialElements = 1 << 20;  // differences below which one thread is faster

struct Task {
  int64_t group_first, group_last;  // of four queries
  int64_t row_first, row_last;
};

class Dense {
 public:
  Dense(const Queries& queries, const Keys& keys, float limit)
      : keys_(keys), error_bound_(keys.width), batch_(queries.batch), limit_(limit) {
    stride_ = padded_width(keys.width);
    wide_ = memory_.resized(std::max<int64_t>(1, (batch_ + kGroup) * stride_));
    finite_.resize(static_cast<size_t>(batch_));
    for (int64_t b = 0; b < batch_; ++b) {
      finite_[b] = widen_query(queries, b, keys.width, wide_ + b * stride_);
      if (!finite_[b]) std::fill_n(wide_ + b * stride_, stride_, 0.0f);  // its answer is not used
    }
    // The last group repeats a query rather than read what is not there.
    for (int64_t b = batch_; b < batch_ + kGroup && batch_; ++b) {
      std::copy_n(wide_ + (batch_ - 1) * stride_, stride_, wide_ + b * stride_);
    }
  }

  const float* query(int64_t b) const { return wide_ + b * stride_; }
  bool finite(int64_t b) const { return finite_[b]; }
  const ErrorBound& error_bound() const { return error_bound_; }
  int64_t keys_read() const { return keys_read_; }  // once for each query

  // Leave the candidates of every query in the first batch_ of the returned.
  std::vector<Candidates>& run(int threads) {
    const int64_t groups = (batch_ + kGroup - 1) / kGroup;
    const bool small = batch_ * keys_.rows * keys_.width < kSerialElements;
    const int64_t shares = small ? 1 : std::max(1, threads);
    const bool by_query = groups >= shares;
    candidates_.resize(static_cast<size_t>(by_query ? batch_ : batch_ * shares));
    for (Candidates& each : candidates_) each.start(keys_, limit_);
    const int64_t whole = by_query ? groups : keys_.rows;
    in_parallel(shares, static_cast<int>(shares), [&](int64_t i) {
      const int64_t first = whole * i / shares, last = whole * (i + 1) / shares;
      const Task task = by_query ? Task{first, last, 0, keys_.rows} : Task{0, groups, first, last};
      read(task, candidates_.data() + (by_query ? 0 : i * batch_));
    });
    for (int64_t i = batch_; i < static_cast<int64_t>(candidates_.size()); ++i) {
      candidates_[i % batch_].merge(error_bound_, candidates_[i]);
    }
    return candidates_;
  }

 private:
  void read(const Task& task, Candidates* candidates) {
    int64_t keys_read = 0;
    const int64_t step = std::max<int64_t>(2, kTileBytes / key_bytes(keys_));
    std::vector<int64_t> rows;
    for (int64_t first = task.row_first; first < task.row_last; first += step) {
      rows.clear();
      for (int64_t row = first; row < std::min(first + step, task.row_last); ++row) {
        if (!is_live(keys_, row)) continue;
        fetch(keys_, row);
        rows.push_back(row);
      }
      for (int64_t group = task.group_first; group < task.group_last; ++group) {
        const int64_t query_first = group * kGroup;
        const int64_t count = std::min(kGroup, batch_ - query_first);
        keys_read += count * static_cast<int64_t>(rows.size());
        if (count < 3) {
          read_alone(rows, query_first, count, candidates);
        } else {
          read_tile(rows, query_first, count, candidates);
        }
      }
    }
    __atomic_fetch_add(&keys_read_, keys_read, __ATOMIC_RELAXED);
  }

  void read_alone(const std::vector<int64_t>& rows, int64_t first, int64_t count,
                  Candidates* candidates) const {
    const auto squared = kernels().squared[static_cast<int>(keys_.dtype)];
    for (int64_t b = first; b < first + count; ++b) {
      for (const int64_t row : rows) {
        const float sum = squared(query(b), key_of(keys_, row), keys_.width, candidates[b].limit());
        candidates[b].offer(error_bound_, {row, sum});
      }
    }
  }

  // Stretch by stretch, so that four queries' share of it stays in the first cache.
  void read_tile(const std::vector<int64_t>& rows, int64_t first, int64_t count,
                 Candidates* candidates) const {
    const auto tile = kernels().tile[static_cast<int>(keys_.dtype)];
    const int64_t size = keys_.dtype == Dtype::float32 ? 4 : 2;
    const auto last = static_cast<int64_t>(rows.size()) - 1;
    std::vector<float> sums(rows.size() / 2 * 8 + 8);
    for (int64_t begin = 0; begin < keys_.width; begin += kStretch) {
      const int64_t here = std::min(kStretch, keys_.width - begin);
      for (int64_t i = 0; i <= last; i += 2) {
        const char* key0 = key_of(keys_, rows[i]) + begin * size;
        const char* key1 = key_of(keys_, rows[std::min(i + 1, last)]) + begin * size;
        tile(query(first) + begin, stride_, key0, key1, here, sums.data() + i * 4);
      }
    }
    for (int64_t i = 0; i <= last; ++i) {
      for (int64_t b = 0; b < count; ++b) {
        const float sum = sums[i / 2 * 8 + 2 * b + i % 2];
        if (sum > candidates[first + b].limit()) continue;
        candidates[first + b].offer(error_bound_, {rows[i], sum});
      }
    }
  }

  const Keys& keys_;
  const ErrorBound error_bound_;
  const int64_t batch_;
  const float limit_;
  int64_t stride_;
  Floats memory_;
  float* wide_;
  std::vector<char> finite_;
  std::vector<Candidates> candidates_;
  int64_t keys_read_ = 0;
};

// Return how many keys were read, once for each query.
int64_t answer(const Queries& queries, const Keys& keys, float limit, int threads,
               const Answers& answers) {
  Dense dense(queries, keys, limit);
  std::vector<Candidates>& candidates = dense.run(threads);
  in_parallel(queries.batch, threads, [&](int64_t b) {
    const bool balls = answers.hit != nullptr;
    const Best best =
        dense.finite(b) ? candidates[b].settle(dense.query(b), dense.error_bound(), balls) : Best{};
    answers.row[b] = best.row;
    answers.squared[b] = best.squared;
  });
  return dense.keys_read();
}

}  // namespace

void nearest_dense(const Queries& queries, const Keys& keys, int threads, const Answers& answers) {
  const UsualRounding usual;
  answer(queries, keys, std::numeric_limits<float>::infinity(), threads, answers);
}

int64_t find_dense(const Queries& queries, const Keys& keys, float widest, int threads,
                   const Answers& answers, Effort* effort) {
  const UsualRounding usual;
  int64_t hits = 0;
  if (widest >= 0) {
    const float limit = ErrorBound(keys.width).above(static_cast<double>(widest) * widest);
    const int64_t read = answer(queries, keys, limit, threads, answers);
    if (effort) effort->exact_reranks += read;
  } else {  // every key is dead
    if (effort) effort->proved += queries.batch;
    std::fill_n(answers.row, queries.batch, -1);
    std::fill_n(answers.squared, queries.batch, std::numeric_limits<double>::infinity());
  }
  for (int64_t b = 0; b < queries.batch; ++b) hits += answers.hit[b] = answers.row[b] >= 0;
  return hits;
}

}  // namespace grace_fast
