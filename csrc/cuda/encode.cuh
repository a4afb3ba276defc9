// z = round(W (q - centre) / step) and a bound on how far that is from phi(q), for every query.
//
// The first node of the look-up by the index: 16 blocks a query, each projects on four rows; the
// one that takes the query's last ticket turns, wraps and quantises. The error budget is that of
// csrc/cpu/encode.cpp, and so is the promise it rests on: each dot product is within
// dot_roundings(D) * u of sum |w_j x_j|. Here a thread adds at most D / 256 + 8 products, and 13
// more additions join the threads.
//
// What takes time is waiting for memory: a thread asks for all that it multiplies of two groups of
// eight elements before it uses any, and for the query before it knows where the projection lies.
#pragma once
#include <cstddef>

#include "numbers.cuh"

namespace grace_fast::device {

constexpr int kEncodeThreads = 256;
constexpr int kEncodeRows = 4;
constexpr int kEncodeBlocks = kSlots / kEncodeRows;
constexpr int kEncodeAhead = 2;  // groups of eight elements that a thread has in flight
constexpr double kUnit = 0x1p-24;
constexpr float kSlotLimit = 0x1p21f;  // slots are clamped there, for keys and queries alike
constexpr int kPointLimit = 16000;     // and once more for the boxes, in int16

struct EncodeShared {
  float of_warp[kEncodeThreads / kWarp][kEncodeRows + 2];
  uint32_t last;
};

class Encode {
 public:
  GRACE_FAST_DEVICE explicit Encode(const Call& call)
      : call_(call),
        projection_(call.book->projection),
        mapped_(call.book->segments > 0),
        query_(group_index()),
        lane_(thread_index() % kWarp),
        padded_((call.width + kPadding - 1) / kPadding * kPadding),
        sums_(call.workspace.sums + query_ * kSlots),
        squares_(call.workspace.squares + query_ * 2) {}

  GRACE_FAST_DEVICE void run() {
    let_the_next_kernel_start();
    float sum[kEncodeRows + 2] = {};  // of the rows; |x|^2; what is not finite
    with_element(call_.query_dtype, [&](auto element) { project<decltype(element)>(sum); });
    join(sum);
    if (!is_last()) return;
    if (thread_index() < kWarp) quantise();
  }

 private:
  // Eight elements of the query, and what they are multiplied by.
  template <typename Query>
  struct Group {
    typename QueryRows<Query>::Eight query;
    uint4 centre[2];
    uint4 rows[kEncodeRows];
  };

  GRACE_FAST_DEVICE static EncodeShared* shared() {
    return reinterpret_cast<EncodeShared*>(shared_memory());
  }

  template <typename Query>
  GRACE_FAST_DEVICE void project(float (&sum)[kEncodeRows + 2]) {
    const QueryRows<Query> queries(call_);
    const uint16_t* rows =
        projection_.rows + static_cast<int64_t>(block_index() * kEncodeRows) * padded_;
    const int step = thread_count() * 8;
    for (int j = thread_index() * 8; j < padded_; j += kEncodeAhead * step) {
      Group<Query> group[kEncodeAhead] = {};
#pragma unroll
      for (int i = 0; i < kEncodeAhead; ++i) {
        if (j + i * step < padded_) group[i].query = queries.at(query_, j + i * step);
      }
      if (mapped_) {
#pragma unroll
        for (int i = 0; i < kEncodeAhead; ++i) {
          const int at = j + i * step;
          if (at >= padded_) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            group[i].centre[half] = load16(projection_.centre + at + half * 4);
          }
#pragma unroll
          for (int r = 0; r < kEncodeRows; ++r) {
            group[i].rows[r] = load16(rows + static_cast<int64_t>(r) * padded_ + at);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kEncodeAhead; ++i) {
        if (j + i * step < padded_) add(group[i], j + i * step, sum);
      }
    }
  }

  template <typename Query>
  GRACE_FAST_DEVICE void add(const Group<Query>& group, int at, float (&sum)[kEncodeRows + 2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float query[4], centre[4], x[4];
      QueryRows<Query>::widened(group.query, half, query);
      widen_four(group.centre[half], 0, static_cast<float*>(nullptr), centre);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = query[e] - centre[e];
#pragma unroll
      for (int r = 0; r < kEncodeRows; ++r) {
        float row[4];
        widen_four(group.rows[r], half, static_cast<BFloat16*>(nullptr), row);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[r] = multiply_add(row[e], x[e], sum[r]);
      }
      if (block_index() != 0) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[kEncodeRows] = multiply_add(x[e], x[e], sum[kEncodeRows]);
        sum[kEncodeRows + 1] = multiply_add(query[e], 0.0f, sum[kEncodeRows + 1]);
      }
      float* wide = call_.workspace.wide + static_cast<int64_t>(query_) * padded_ + at + half * 4;
      *reinterpret_cast<float4*>(wide) = {query[0], query[1], query[2], query[3]};
    }
  }

  GRACE_FAST_DEVICE void join(const float (&sum)[kEncodeRows + 2]) {
#pragma unroll
    for (int r = 0; r < kEncodeRows + 2; ++r) {
      const float joined = sum_of_warp(sum[r]);
      if (lane_ == 0) shared()->of_warp[thread_index() / kWarp][r] = joined;
    }
    sync_block();
    const int r = thread_index();
    if (r >= kEncodeRows + 2) return;
    float total = 0;
    for (int i = 0; i < thread_count() / kWarp; ++i) total += shared()->of_warp[i][r];
    if (r < kEncodeRows) {
      sums_[block_index() * kEncodeRows + r] = total;
    } else if (block_index() == 0) {
      squares_[r - kEncodeRows] = total;
    }
  }

  GRACE_FAST_DEVICE bool is_last() {
    sync_block();
    if (thread_index() == 0) {
      uint32_t* ticket = call_.workspace.tickets + kMostQueries + query_;
      shared()->last = take_ticket(ticket, kEncodeBlocks - 1) == kEncodeBlocks - 1;
    }
    sync_block();
    return shared()->last != 0;
  }

  GRACE_FAST_DEVICE static float fresh(const float* from) {
    return float_of(load_fresh(reinterpret_cast<const uint32_t*>(from)));
  }

  // The integer of one slot, and the square of its residual; a step is a power of two.
  GRACE_FAST_DEVICE static int whole_steps(double value, double per_step, double* residual) {
    float t = static_cast<float>(value * per_step);
    t = t < -kSlotLimit ? -kSlotLimit : t > kSlotLimit ? kSlotLimit : t;
    const float whole = nearest_whole(t);
    *residual += static_cast<double>(t - whole) * (t - whole);
    return static_cast<int>(whole);
  }

  // Write down that a query has no code, by one warp.
  GRACE_FAST_DEVICE void write_none(State state) {
    auto* out = reinterpret_cast<uint32_t*>(call_.workspace.encoded + query_);
    for (int i = lane_; i < static_cast<int>(sizeof(Encoded) / 4); i += kWarp) {
      out[i] = i == static_cast<int>(offsetof(Encoded, state) / 4) ? state : 0;
    }
  }

  // By one warp. A lane has slot `lane` of the near ones, and slots 16 + lane and 48 + lane.
  GRACE_FAST_DEVICE void quantise() {
    const int slot = lane_ % kNear;
    double turn[kNear] = {};
#pragma unroll
    for (int i = 0; i < kNear && mapped_; ++i) turn[i] = projection_.turn[slot * kNear + i];
    const float square = fresh(squares_), not_finite = fresh(squares_ + 1);
    const float near_sum = fresh(sums_ + slot);
    const float far_sum0 = fresh(sums_ + kNear + lane_);
    const float far_sum1 = fresh(sums_ + kNear + kWarp + slot);
    if (not_finite != 0) return write_none(kNotFinite);
    if (!mapped_) return write_none(kEncoded);
    if (!(square < 1e30f)) return write_none(kTooLarge);

    const double per_step = 1 / projection_.step;
    const double norm = square_root(square) * 1.0001 + 1e-16;
    const double rounding = (48.0 + call_.width / 256.0) * kUnit * 1.0001;
    const int slots = projection_.norm_slot ? kNear - 1 : kNear;

    double turned = 0, near_residual = 0, far_residual = 0;
#pragma unroll
    for (int i = 0; i < kNear; ++i) turned += turn[i] * shuffle(near_sum, i);
    int near = 0;
    if (lane_ < slots) {
      near = whole_steps(turned, per_step, &near_residual);
    } else {
      turned = 0;
    }
    const double inside = sum_of_warp(turned * turned);
    near_residual = sum_of_warp(near_residual);
    far_residual = near_residual;

    const double lost = kUnit * projection_.lipschitz;
    double error = norm * (square_root(slots) * rounding * projection_.row_norm + lost);
    if (projection_.norm_slot) {
      const double wrong =
          1.001 * ((rounding + 4 * kUnit) * norm * norm + 2 * square_root(inside) * error +
                   error * error + 2 * projection_.eta * inside) +
          1e-30;
      const double left = square > inside ? square_root(square - inside) : 0;
      const double apart =
          wrong / (left * left > wrong ? left : square_root(wrong)) + left * 0x1p-23;
      double residual = 0;
      const int norm_steps = whole_steps(left, per_step, &residual);
      if (lane_ == kNear - 1) near = norm_steps;
      near_residual += residual;
      error = square_root(error * error + apart * apart);
    }
    double of_far = 0;
    const int far0 = whole_steps(far_sum0, per_step, &of_far);
    int far1 = 0;
    if (lane_ < kNear) far1 = whole_steps(far_sum1, per_step, &of_far);
    far_residual += sum_of_warp(of_far);
    const double far_error = norm * (square_root(kSlots) * rounding * projection_.row_norm + lost);

    Encoded* out = call_.workspace.encoded + query_;
    auto* code = reinterpret_cast<uint8_t*>(out->code);
    code[kNear + lane_] = static_cast<uint8_t>(far0);
    if (lane_ < kNear) {
      code[lane_] = static_cast<uint8_t>(near);
      code[kNear + kWarp + lane_] = static_cast<uint8_t>(far1);
      const int point = near < -kPointLimit  ? -kPointLimit
                        : near > kPointLimit ? kPointLimit
                                             : near;
      reinterpret_cast<int16_t*>(out->point)[lane_] = static_cast<int16_t>(point);
      reinterpret_cast<int16_t*>(out->minus_point)[lane_] = static_cast<int16_t>(-point);
    }
    if (lane_ == 0) {  // in float32, rounded up
      const double up = 1 + 1e-6;
      out->near_error = static_cast<float>((square_root(near_residual) + error * per_step) * up);
      out->far_error = static_cast<float>((square_root(far_residual) + far_error * per_step) * up);
      out->state = kEncoded;
      out->unused = 0;
    }
  }

  const Call& call_;
  const Projection projection_;
  const bool mapped_;  // or there are no codes, and every row is read as it is
  const int query_, lane_, padded_;
  float* sums_;
  float* squares_;
};

GRACE_FAST_KERNEL(kEncodeThreads)
encode_kernel(const __grid_constant__ Call call) {
  Encode encode(call);
  encode.run();
}

}  // namespace grace_fast::device
