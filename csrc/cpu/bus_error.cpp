// What a mapped file no longer holds is a bus error, which ends a process. Here it becomes a page
// of zeros and a mark, and the look-up that read it says so.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "../lookup.h"

namespace grace_fast {
namespace {

struct Guarded {
  std::atomic<uintptr_t> first{0}, last{0};  // addresses; an empty range is free
  std::atomic<bool> lost{false};
};

constexpr int kMost = 256;
Guarded guarded[kMost];
struct sigaction usual;

// Only what may be called in a signal handler: loads, stores and system calls.
void on_bus_error(int number, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (Guarded& each : guarded) {
    if (address < each.first.load() || address >= each.last.load()) continue;
    void* const from = reinterpret_cast<void*>(address / page * page);
    const int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS;
    if (mmap(from, page, PROT_READ, flags, -1, 0) == MAP_FAILED) break;
    each.lost.store(true);
    return;
  }
  if (usual.sa_flags & SA_SIGINFO) {
    usual.sa_sigaction(number, info, context);
  } else if (usual.sa_handler != SIG_DFL && usual.sa_handler != SIG_IGN) {
    usual.sa_handler(number);
  } else {
    signal(number, SIG_DFL);  // the read is tried again, and ends the process as it would have
  }
}

}  // namespace

int guard(uintptr_t first, int64_t bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> locked(one_at_a_time);
  static const bool installed = [] {
    struct sigaction ours = {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, &usual) == 0;
  }();
  for (int i = 0; installed && i < kMost; ++i) {
    if (guarded[i].last.load()) continue;
    guarded[i].lost.store(false);
    guarded[i].first.store(first);
    guarded[i].last.store(first + static_cast<uintptr_t>(bytes));
    return i;
  }
  return -1;
}

void unguard(int number) {
  if (number >= 0) guarded[number].last.store(0);
}

bool is_lost(int number) { return number >= 0 && guarded[number].lost.load(); }

}  // namespace grace_fast
