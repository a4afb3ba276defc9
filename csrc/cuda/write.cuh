// The values of hits, written over the layer's output: which tokens, and by whom.
//
// Mode and position say which tokens a hit replaces, and that is always a range of them. Where it
// is short, the block that decided writes it. Where it may be long, that block lists the hits and
// the others of its group, which wait for the list, take parts of the work from one counter, as it
// does itself. A block that has waited in vain leaves, and what nobody has taken the deciding block
// writes: nothing depends on how many blocks run at once.
#pragma once
#include "numbers.cuh"

namespace grace_fast::device {

constexpr int kFewTokens = 8;  // that one block writes faster than others are told; not measured
constexpr int kTokensOfPart = 16;     // taken at a time; not measured
constexpr int kPatience = 1024;       // times a block asks for the list, a few hundred ns each
constexpr uint32_t kNoEnd = ~0u - 1;  // of a counter that is put back before it gets there
constexpr int kAhead = 4;             // loads of a thread that are in flight

struct WriteShared {
  Replaced hit[kMostQueries];
  int32_t hits;
  uint32_t part;
};

GRACE_FAST_DEVICE int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// The tokens that a hit replaces, as semantics.replacement_mask says.
GRACE_FAST_DEVICE Replaced replaced_by(const Call& call, int64_t row, int query) {
  const Book& book = *call.book;
  Replaced hit{book.value_slot ? book.value_slot[row] : row, query, 0, call.tokens, 0};
  if (call.mode == Replacement::all) return hit;
  const int64_t position = call.positions ? call.positions[query] : call.tokens - 1;
  const bool before = position < 0, behind = position >= call.tokens;
  hit.last = before ? 0 : behind ? call.tokens : static_cast<int32_t>(position);
  if (call.mode == Replacement::last) {
    hit.first = hit.last;
    hit.last += !before && !behind;
  }
  return hit;
}

// Write the values of the hits [first, last) of the list over those of the tokens [begin, end) that
// they replace, by a block.
GRACE_FAST_COLD void write_values(const Call& call, const WriteShared& listed, int first, int last,
                                  int begin, int end) {
  const char* values = static_cast<const char*>(call.book->values);
  auto* output = static_cast<char*>(call.output);
  const int size = size_of(call.key_dtype), output_size = size_of(call.output_dtype);
  const int64_t value_bytes = static_cast<int64_t>(call.value_width) * size;
  const int64_t query_bytes = call.output_stride * output_size;
  const int64_t token_bytes = call.token_stride * output_size;
  const auto together = reinterpret_cast<uintptr_t>(values) | reinterpret_cast<uintptr_t>(output) |
                        static_cast<uintptr_t>(value_bytes | query_bytes | token_bytes);
  const bool as_it_is = call.output_dtype == call.key_dtype && together % 16 == 0;
  // A thread takes a piece of a value, and writes it over every token.
  const int pieces = as_it_is ? static_cast<int>(value_bytes / 16) : call.value_width;
  const int all = (last - first) * pieces;
  const auto over_tokens = [&](int i, int bytes, const auto& put) {
    const Replaced& hit = listed.hit[first + i / pieces];
    const int from = hit.first < begin ? begin : hit.first, to = hit.last < end ? hit.last : end;
    char* at = output + hit.query * query_bytes + static_cast<int64_t>(i % pieces) * bytes;
    for (int token = from; token < to; ++token) put(at + token * token_bytes);
  };
  if (as_it_is) {
    for (int i = thread_index(); i < all; i += kAhead * thread_count()) {
      uint4 value[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = i + k * thread_count();
        if (at >= all) break;
        const Replaced& hit = listed.hit[first + at / pieces];
        value[k] = load16(values + hit.slot * value_bytes + static_cast<int64_t>(at % pieces) * 16);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = i + k * thread_count();
        if (at >= all) break;
        over_tokens(at, 16, [&](char* to) { *reinterpret_cast<uint4*>(to) = value[k]; });
      }
    }
    return;
  }
  for (int i = thread_index(); i < all; i += thread_count()) {
    const int64_t slot = listed.hit[first + i / pieces].slot;
    const float value = element(values + slot * value_bytes, call.key_dtype, i % pieces);
    const uint16_t half =
        call.output_dtype == Dtype::bfloat16 ? bfloat16_of(value) : half_of(value);
    over_tokens(i, output_size, [&](char* to) {
      if (call.output_dtype == Dtype::float32) {
        *reinterpret_cast<float*>(to) = value;
      } else {
        *reinterpret_cast<uint16_t*>(to) = half;
      }
    });
  }
}

// The blocks of a group that write one list together.
class Sharing {
 public:
  GRACE_FAST_DEVICE Sharing(const Call& call, WriteShared* shared, int first)
      : call_(call),
        shared_(shared),
        handout_(call.workspace.handout + group_index()),
        list_(call.workspace.replaced + first) {}

  GRACE_FAST_DEVICE static bool pays(const Call& call) {
    return call.output && call.mode != Replacement::last && call.tokens > kFewTokens;
  }

  // By the block that has the list, in shared memory.
  GRACE_FAST_DEVICE void hand_out() const {
    const auto* from = reinterpret_cast<const uint64_t*>(shared_->hit);
    auto* to = reinterpret_cast<uint64_t*>(list_);
    for (int i = thread_index(); i < shared_->hits * kWords; i += thread_count()) to[i] = from[i];
    sync_block();
    if (thread_index() == 0) {
      fence();
      store_fresh(&handout_->listed, static_cast<uint32_t>(shared_->hits + 1));
    }
    take_parts();
    leave();
  }

  // By the others.
  GRACE_FAST_DEVICE void help() const {
    sync_block();
    if (thread_index() == 0) {
      uint32_t listed = 0;
      for (int i = 0; i < kPatience && !listed; ++i) {
        listed = load_fresh(&handout_->listed);
        if (!listed) wait_a_moment();
      }
      fence();
      shared_->hits = listed ? static_cast<int>(listed - 1) : 0;
    }
    sync_block();
    const auto* from = reinterpret_cast<const uint64_t*>(list_);
    auto* to = reinterpret_cast<uint64_t*>(shared_->hit);
    for (int i = thread_index(); i < shared_->hits * kWords; i += thread_count()) {
      to[i] = load_fresh(from + i);
    }
    take_parts();
    leave();
  }

 private:
  static constexpr int kWords = sizeof(Replaced) / 8;

  GRACE_FAST_DEVICE void take_parts() const {
    const int parts = (call_.tokens + kTokensOfPart - 1) / kTokensOfPart;
    const auto all = static_cast<uint32_t>(shared_->hits * parts);
    for (uint32_t part = 0; part < all;) {
      sync_block();
      if (thread_index() == 0) shared_->part = take_ticket(&handout_->next, kNoEnd);
      sync_block();
      part = shared_->part;
      if (part >= all) break;
      const int hit = static_cast<int>(part) / parts;
      const int begin = static_cast<int>(part) % parts * kTokensOfPart;
      write_values(call_, *shared_, hit, hit + 1, begin, begin + kTokensOfPart);
    }
  }

  // The last to leave puts everything back to zero.
  GRACE_FAST_DEVICE void leave() const {
    if (thread_index() != 0) return;
    const auto last = static_cast<uint32_t>(block_count() - 1);
    if (take_ticket(&handout_->left, last) != last) return;
    handout_->listed = handout_->next = 0;
  }

  const Call& call_;
  WriteShared* shared_;
  Handout* handout_;
  Replaced* list_;
};

}  // namespace grace_fast::device
