// Kernels of one stream, run on a host: a thread is a fiber, and they take turns.
//
// A fiber runs until it waits for its warp or its block, or gives up its turn at an operation on
// memory that others see; then the scheduler picks a warp, and lets some of its lanes run. Which
// warp, which lanes and how many is drawn anew every few turns: at random, or by priorities, so
// that some warps are far ahead of others. What a barrier is missing for is therefore seen as a
// wrong answer under some seed. A grid that may start early does so once every block of the grid
// before lets it, and sees what that one has written when it waits for it (memory.h).
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "memory.h"

namespace on_host {

enum Operation { kShuffle, kShuffleXor, kBallot };

struct Warp {  // of two turns, because a thread may be one operation ahead of another
  uint64_t value[2][32];
  int operation[2] = {};
  long arrived[2] = {};
  uint32_t ready = ~0u;  // a bit for every lane that can run
  uint32_t done = 0;
};

struct Grid {
  int blocks, groups, threads;
  size_t shared;
  bool early;  // may start before the grid before has ended
  std::function<void()> kernel;
  int started = 0, released = 0, ended = 0;  // blocks; `released` let the next grid start
  std::vector<int> order{};
  bool is_over() const { return ended == blocks * groups; }
};

struct Block {
  Grid* grid;
  int index, group;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  View view;
  long arrived = 0;
  int running = 0;
  bool released = false;
};

struct Fiber {
  Block* block = nullptr;
  int thread = 0;
  long turns = 0, barriers = 0;
  bool started = false;
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
};

struct Turn {  // of a warp
  Block* block;
  int warp;
  std::unique_ptr<Fiber> fibers[32];
};

struct Machine {
  std::vector<Grid> grids;
  std::mt19937_64 random;
  Memory memory;
  jmp_buf scheduler;
  Fiber* now = nullptr;
  const char* failure = nullptr;
  bool polls = false;       // whether the fiber that ran last only looked whether it may go on
  bool steps_back = false;  // or let all others go first
};

inline Machine*& machine() {
  static Machine* running = nullptr;
  return running;
}
inline Fiber& now() { return *machine()->now; }
inline Warp& warp_now() { return now().block->warps[now().thread / 32]; }

[[noreturn]] inline void fail(const char* why) {
  machine()->failure = why;
  _longjmp(machine()->scheduler, 1);
}

inline void give_up_turn() {
  if (!_setjmp(now().state)) _longjmp(machine()->scheduler, 1);
}
// Let all others go first, where they can.
inline void step_back() {
  machine()->steps_back = true;
  give_up_turn();
}
// For a loop that waits for what somebody else will do.
inline void wait_a_turn() {
  machine()->polls = true;
  step_back();
}
// Where the order of two threads can matter.
inline void maybe_step_back() {
  if (machine()->random() % 4 == 0) step_back();
}
inline void sleep() {
  warp_now().ready &= ~(1u << now().thread % 32);
  give_up_turn();
}

inline const uint64_t* exchange(Operation operation, uint64_t value) {
  Fiber& fiber = now();
  Warp& warp = warp_now();
  const int turn = fiber.turns % 2;
  const long wanted = 32 * (fiber.turns++ / 2 + 1);
  if (warp.arrived[turn] % 32 == 0) warp.operation[turn] = operation;
  if (warp.operation[turn] != operation) fail("threads of a warp meet in different operations");
  warp.value[turn][fiber.thread % 32] = value;
  if (++warp.arrived[turn] == wanted) {
    warp.ready = ~0u;
  } else {
    sleep();
  }
  return warp.value[turn];
}

inline void barrier() {
  Fiber& fiber = now();
  Block& block = *fiber.block;
  if (++block.arrived == ++fiber.barriers * block.grid->threads) {
    for (Warp& warp : block.warps) warp.ready = ~0u;
  } else {
    sleep();
  }
}

inline bool is_over_before(const Grid* grid) {
  for (const Grid& each : machine()->grids) {
    if (&each == grid) return true;
    if (!each.is_over()) return false;
  }
  return true;
}
inline void release_next_grid() {
  Block& block = *now().block;
  block.grid->released += !block.released;
  block.released = true;
}
inline void wait_for_grid_before() {
  while (!is_over_before(now().block->grid)) wait_a_turn();
  machine()->memory.acquire();
}

inline void run_fiber() {
  Block& block = *now().block;
  block.grid->kernel();
  Warp& warp = warp_now();
  warp.done |= 1u << now().thread % 32;
  warp.ready &= ~warp.done;
  --block.running;
  _longjmp(machine()->scheduler, 1);
}

// Run a fiber until it waits or is done.
inline void resume(Fiber& fiber) {
  machine()->now = &fiber;
  if (_setjmp(machine()->scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = 1 << 17;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

class Scheduler {
 public:
  explicit Scheduler(int resident) : resident_(resident) {}

  // Run all grids, `resident` blocks at a time.
  void run() {
    for (Grid& grid : machine_.grids) {
      grid.order.resize(static_cast<size_t>(grid.blocks * grid.groups));
      for (size_t i = 0; i < grid.order.size(); ++i) grid.order[i] = static_cast<int>(i);
      std::shuffle(grid.order.begin(), grid.order.end(), machine_.random);
    }
    long left_of_phase = 0, polls = 0;
    while (start_blocks()) {
      if (left_of_phase-- == 0) left_of_phase = draw_phase();
      const size_t at = pick();
      if (at == turns_.size()) fail_outside("every thread waits");
      machine_.steps_back = false;
      polls = run_lanes(*turns_[at]) ? 0 : polls + 1;
      if (polls > 1000 + 100 * static_cast<long>(turns_.size())) fail_outside("every thread polls");
      if (at >= turns_.size()) continue;                  // a block has ended
      if (machine_.steps_back || is_one_of(demotion_)) {  // to the lowest priority
        std::rotate(turns_.begin() + at, turns_.begin() + at + 1, turns_.end());
      }
    }
  }

 private:
  [[noreturn]] static void fail_outside(const char* why) { throw std::runtime_error(why); }
  bool is_one_of(int many) { return machine_.random() % many == 0; }

  // Start what may start; return whether anything is left to do.
  bool start_blocks() {
    if (alive_ < resident_ && is_any_left_) {
      is_any_left_ = false;
      for (size_t i = 0; i < machine_.grids.size(); ++i) {
        Grid& grid = machine_.grids[i];
        const bool may = i == 0 || is_over_before(&grid) ||
                         (grid.early && machine_.grids[i - 1].released == blocks_of(i - 1));
        for (; may && grid.started < blocks_of(i) && alive_ < resident_; ++alive_) {
          start(grid, grid.order[grid.started++]);
        }
        is_any_left_ |= grid.started < blocks_of(i);
      }
    }
    return !turns_.empty();
  }
  int blocks_of(size_t grid) const {
    return machine_.grids[grid].blocks * machine_.grids[grid].groups;
  }

  void start(Grid& grid, int number) {
    blocks_.push_back(std::make_unique<Block>());
    Block& block = *blocks_.back();
    block.grid = &grid;
    block.index = number % grid.blocks;
    block.group = number / grid.blocks;
    block.shared.assign(grid.shared + 64, static_cast<unsigned char>(machine_.random()));
    block.warps = std::vector<Warp>(grid.threads / 32);
    block.view = machine_.memory.fresh_view();
    block.running = grid.threads;
    for (int warp = 0; warp < grid.threads / 32; ++warp) {
      auto turn = std::make_unique<Turn>();
      turn->block = &block;
      turn->warp = warp;
      for (int lane = 0; lane < 32; ++lane) {
        auto& fiber = turn->fibers[lane];
        if (idle().empty()) {
          fiber = std::make_unique<Fiber>();
          fiber->stack = std::unique_ptr<char[]>(new char[1 << 17]);
        } else {
          fiber = std::move(idle().back());
          idle().pop_back();
        }
        fiber->block = &block;
        fiber->thread = warp * 32 + lane;
        fiber->turns = fiber->barriers = 0;
        fiber->started = false;
      }
      turns_.insert(turns_.begin() + machine_.random() % (turns_.size() + 1), std::move(turn));
    }
  }

  // How turns are dealt for a while, and for how many picks.
  long draw_phase() {
    constexpr int kLanes[] = {1, 3, 12, 32, 32, 32};
    lanes_ = kLanes[machine_.random() % 6];
    by_priority_ = !is_one_of(3);
    demotion_ = 1 << (3 + 3 * (machine_.random() % 3));
    drift_ = is_one_of(2) ? 16 : 1 << 20;
    return 64 + static_cast<long>(machine_.random() % 256);
  }

  // The warp that is next, as a place in `turns_`; their number where every one waits.
  size_t pick() {
    const size_t count = turns_.size();
    const size_t first = by_priority_ ? 0 : machine_.random() % count;
    for (size_t i = 0; i < count; ++i) {
      const size_t at = first + i < count ? first + i : first + i - count;
      if (turns_[at]->block->warps[turns_[at]->warp].ready) return at;
    }
    return count;
  }

  // Run some lanes of a warp; return whether any did more than look whether it may go on.
  bool run_lanes(Turn& turn) {
    Block& block = *turn.block;
    Warp& warp = block.warps[turn.warp];
    machine_.memory.switch_to(&block.view);
    if (is_one_of(drift_)) machine_.memory.drift(machine_.random);
    const uint64_t drawn = machine_.random();
    const int first = static_cast<int>(drawn % 32);
    const int apart = static_cast<int>(drawn >> 32 & 30) | 1;  // odd: every lane has its turn
    bool advanced = false;
    int left = lanes_;
    for (int i = 0; i < 32 && left; ++i) {
      const int lane = (first + i * apart) % 32;
      if (!(warp.ready >> lane & 1)) continue;
      --left;
      machine_.polls = false;
      resume(*turn.fibers[lane]);
      if (machine_.failure) fail_outside(machine_.failure);
      advanced |= !machine_.polls;
    }
    if (block.running == 0) end(block);
    return advanced;
  }

  // Give a block's fibers back. What it wrote without a fence is published when its grid ends.
  void end(Block& block) {
    machine_.memory.switch_to(nullptr);
    Grid& grid = *block.grid;
    ++grid.ended;
    --alive_;
    is_any_left_ = true;
    grid.released += !block.released;
    block.released = true;
    const auto of_block = [&](auto& turn) { return turn->block == &block; };
    for (auto& turn : turns_) {
      if (!of_block(turn)) continue;
      for (auto& fiber : turn->fibers) idle().push_back(std::move(fiber));
    }
    turns_.erase(std::remove_if(turns_.begin(), turns_.end(), of_block), turns_.end());
    if (!grid.is_over()) return;
    for (auto& each : blocks_) {
      if (each->grid != &grid) continue;
      machine_.memory.publish_all(each->view);
      each->view = {};
    }
  }

  static std::vector<std::unique_ptr<Fiber>>& idle() {
    static std::vector<std::unique_ptr<Fiber>> fibers;
    return fibers;
  }

  Machine& machine_ = *machine();
  const int resident_;
  int alive_ = 0, lanes_ = 32, demotion_ = 1, drift_ = 1;
  bool is_any_left_ = true, by_priority_ = false;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Turn>> turns_;  // by priority
};

constexpr int kMostResident = 48;

// Run the grids of a stream; `written` is the global memory that they write.
inline void run(std::vector<Grid> grids, std::vector<Piece> written, uint64_t seed) {
  Machine local;
  local.grids = std::move(grids);
  local.random.seed(seed);
  local.memory.open(std::move(written), local.random);
  machine() = &local;
  int blocks = 0;
  for (const Grid& grid : local.grids) blocks += grid.blocks * grid.groups;
  try {
    Scheduler(1 + static_cast<int>(local.random() % std::min(blocks, kMostResident))).run();
  } catch (...) {
    machine() = nullptr;
    throw;
  }
  local.memory.close();
  machine() = nullptr;
}

}  // namespace on_host
