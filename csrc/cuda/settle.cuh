// The last block of a look-up: from every block's best two to the law's decision.
//
//   one candidate within the error bound     its radius says miss, or its canonical S decides
//   several                           the canonical S of each decides
//   a block's second is among them    a third may hide behind it: the look-up reads again
//   a hit that is not settled         (by the index only) the look-up reads again, at its distance
// A look-up is a class with
//   batch()          queries that this block decides, the first of which is query first()
//   query(b)         the query as float32
//   may_hit(b)       false where no key can hold the query, whatever the slots say
//   min_radius()          a hit nearer than this needs no second look
//   read_again(b, limit, skip, look)   call look(row, alone) by whole warps for every row whose S
//                    in float32 may be within `limit`, but for those of segment `skip`
//   owner(exact)     the segment whose other keys are proved to be farther than a hit, or -1
//   needs(b, owner)  whether any segment is left to be read again
#pragma once
#include "numbers.cuh"
#include "write.cuh"

namespace grace_fast::device {

constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;

struct SettleShared {
  Exact of_warp[kMostWarps];
  Exact answer[kMostQueries];
  int32_t hard[kMostQueries];  // what one warp cannot decide alone
  uint32_t last;
  WriteShared write;
};

// Where every look-up keeps it: at the start. An address in the open is known to be shared memory.
GRACE_FAST_DEVICE SettleShared* settle_shared() {
  return reinterpret_cast<SettleShared*>(shared_memory());
}

// Tell whether this block is the last of its group, and then may read what all have written.
GRACE_FAST_DEVICE bool is_last_block(uint32_t* ticket) {
  SettleShared* shared = settle_shared();
  sync_block();
  if (thread_index() == 0) {
    const auto last = static_cast<uint32_t>(block_count() - 1);
    shared->last = take_ticket(ticket, last) == last;
  }
  sync_block();
  return shared->last != 0;
}

// What every part of a look-up knows: the call, the place of a thread, and what blocks have seen.
class Place {
 public:
  GRACE_FAST_DEVICE explicit Place(const Call& call)
      : call_(call),
        book_(*call.book),
        error_bound_(call.width),
        lane_(thread_index() % kWarp),
        warp_(thread_index() / kWarp),
        warps_(thread_count() / kWarp) {}

 protected:
  // Of one query of the call, by block.
  GRACE_FAST_DEVICE BestTwo* slots(int query) const {
    return call_.workspace.best + static_cast<int64_t>(query) * block_count();
  }
  GRACE_FAST_DEVICE BestTwo seen(int query, int block) const {
    const BestTwo* slot = slots(query) + block;
    return {load_fresh(&slot->first), load_fresh(&slot->second)};
  }
  // Write down the best two of the block's warps for `batch` queries, of which `first` is the
  // first.
  template <int kColumns>
  GRACE_FAST_DEVICE void join_warps(const BestTwo (&best)[kMostWarps][kColumns], int first,
                                    int batch) const {
    sync_block();
    const int b = thread_index();
    if (b >= batch) return;
    BestTwo joined{kNone, kNone};
    for (int i = 0; i < warps_; ++i) {
      offer(&joined, best[i][b].first);
      offer(&joined, best[i][b].second);
    }
    slots(first + b)[block_index()] = joined;
  }

  const Call& call_;
  const Book& book_;
  const ErrorBound error_bound_;
  const int lane_, warp_, warps_;
};

template <typename Key, typename Lookup>
class Settle : Place {
 public:
  GRACE_FAST_DEVICE Settle(const Call& call, Lookup& lookup) : Place(call), lookup_(lookup) {}

  // Leave the answers in shared memory and write those that are asked for.
  GRACE_FAST_DEVICE void run() {
    for (int b = warp_; b < lookup_.batch(); b += warps_) {
      const bool hard = !decide_alone(b);
      if (lane_ == 0) settle_shared()->hard[b] = hard;
    }
    sync_block();
    for (int b = 0; b < lookup_.batch(); ++b) {
      if (settle_shared()->hard[b]) decide_together(b);
    }
    sync_block();
    for (int b = thread_index(); b < lookup_.batch(); b += thread_count()) write(b);
  }

 private:
  // By one warp: false where it takes more than one canonical sum.
  GRACE_FAST_DEVICE bool decide_alone(int b) {
    if (lane_ == 0) settle_shared()->answer[b] = no_row();
    if (!lookup_.may_hit(b)) return true;
    const BestTwo best = best_of_blocks(b);
    const uint64_t nearest = best.first;
    if (nearest == kNone) return true;
    if (is_within(best.second, error_bound_.above(squared_of(nearest)))) return false;

    const uint32_t tag = tag_of(nearest);
    const double radius = book_.radius[tag >> 1];
    const float found = squared_of(nearest);
    if (!(radius >= 0) || found > error_bound_.above(radius * radius)) return true;
    Exact exact{error_bound_.at_most(found), tag};
    const bool inside = exact.squared <= radius * radius;
    if (!inside || call_.squared) {
      exact.squared = canonical(b, tag);
      if (!(exact.squared <= radius * radius)) return true;
    }
    if (!is_settled(b, exact)) return false;
    if (lane_ == 0) settle_shared()->answer[b] = exact;
    return true;
  }

  // By the block.
  GRACE_FAST_COLD void decide_together(int b) {
    Exact best = no_row();  // of this warp
    int crowded = 0;
    const float limit = error_bound_.above(squared_of(best_of_blocks(b).first));
    for (int i = warp_; i < block_count(); i += warps_) {
      const BestTwo two = seen(lookup_.first() + b, i);
      if (is_within(two.first, limit)) look(b, tag_of(two.first), &best);
      if (is_within(two.second, limit)) look(b, tag_of(two.second), &best);
    }
    for (int i = lane_; i < block_count(); i += kWarp) {
      crowded |= is_within(seen(lookup_.first() + b, i).second, limit);
    }
    best = best_of_block(best);
    const bool again = ballot(crowded != 0) != 0;
    if (again || (is_hit(best) && !is_settled(b, best))) {
      const int skip = again ? -1 : lookup_.owner(best);
      Exact found = best;
      lookup_.read_again(b, limit, skip, [&](int64_t row, uint32_t alone) {
        look(b, static_cast<uint32_t>(row) << 1 | alone, &found);
      });
      best = best_of_block(found);
    }
    if (thread_index() == 0) settle_shared()->answer[b] = is_hit(best) ? best : no_row();
  }

  // The best two that blocks have seen of a query, by a warp.
  GRACE_FAST_COLD BestTwo best_of_blocks(int b) const {
    BestTwo best{kNone, kNone};
    for (int i = lane_; i < block_count(); i += kWarp) {
      const BestTwo two = seen(lookup_.first() + b, i);
      offer(&best, two.first);
      offer(&best, two.second);
    }
    return best_of_lanes<kWarp>(best);
  }

  GRACE_FAST_DEVICE double canonical(int b, uint32_t tag) const {
    return canonical_by_warp(lookup_.query(b), key_of<Key>(book_, call_.width, tag >> 1),
                             call_.width);
  }

  GRACE_FAST_DEVICE void look(int b, uint32_t tag, Exact* best) const {
    const Exact found{canonical(b, tag), tag};
    if (found.before(*best)) *best = found;  // never where S is infinite or NaN
  }

  GRACE_FAST_DEVICE bool is_hit(const Exact& best) const {
    if (!(best.squared < static_cast<double>(infinity()))) return false;
    const double radius = book_.radius[best.tag >> 1];
    return radius >= 0 && best.squared <= radius * radius;
  }

  // Whether nothing nearer than a hit can have been passed over.
  GRACE_FAST_DEVICE bool is_settled(int b, const Exact& hit) const {
    const double min_radius = lookup_.min_radius();
    return hit.squared <= min_radius * min_radius || !lookup_.needs(b, lookup_.owner(hit));
  }

  GRACE_FAST_DEVICE Exact best_of_block(const Exact& of_warp) {
    sync_block();
    if (lane_ == 0) settle_shared()->of_warp[warp_] = of_warp;
    sync_block();
    Exact best = settle_shared()->of_warp[0];
    for (int i = 1; i < warps_; ++i) {
      if (settle_shared()->of_warp[i].before(best)) best = settle_shared()->of_warp[i];
    }
    return best;
  }

  GRACE_FAST_DEVICE void write(int b) const {
    const Exact& answer = settle_shared()->answer[b];
    const bool hit = answer.tag != ~0u;
    const int query = lookup_.first() + b;
    if (call_.hit) call_.hit[query] = hit;
    if (call_.row) call_.row[query] = hit ? static_cast<int64_t>(answer.tag >> 1) : -1;
    if (call_.squared) call_.squared[query] = answer.squared;
  }

  Lookup& lookup_;
};

// List the hits among a look-up's queries, and write their values.
template <typename Lookup>
GRACE_FAST_COLD void write_hits(const Call& call, Lookup& lookup) {
  SettleShared* shared = settle_shared();
  const auto is_hit = [&](int b) { return shared->answer[b].tag != ~0u; };
  for (int b = thread_index(); b < lookup.batch(); b += thread_count()) {
    int before = 0;
    for (int other = 0; other < b; ++other) before += is_hit(other);
    if (is_hit(b)) {
      shared->write.hit[before] = replaced_by(call, shared->answer[b].tag >> 1, lookup.first() + b);
    }
    if (b == lookup.batch() - 1) shared->write.hits = before + is_hit(b);
  }
  sync_block();
  if (Sharing::pays(call)) {
    Sharing(call, &shared->write, lookup.first()).hand_out();
  } else {
    write_values(call, shared->write, 0, shared->write.hits, 0, call.tokens);
  }
}

GRACE_FAST_COLD void help_to_write(const Call& call, int first) {
  Sharing(call, &settle_shared()->write, first).help();
}

// Let the block that takes the last ticket of its group answer the queries of a look-up.
template <typename Key, typename Lookup>
GRACE_FAST_DEVICE void decide(const Call& call, Lookup& lookup) {
  if (!is_last_block(call.workspace.tickets + group_index())) {
    if (Sharing::pays(call)) help_to_write(call, lookup.first());
    return;
  }
  Settle<Key, Lookup> settle(call, lookup);
  settle.run();
  if (call.output) write_hits(call, lookup);
}

}  // namespace grace_fast::device
