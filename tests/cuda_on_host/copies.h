// Copies to shared memory that go on while a thread does something else, for a host.
//
// Each is made at once or when it is waited for, by turns: what reads too early, or lets a copy
// overwrite what is still needed, is seen as a wrong answer.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

namespace on_host {

struct Copy {  // of 16 bytes; from nowhere: zeros
  unsigned char* to;
  const unsigned char* from;
  void make() const {
    if (from) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

struct Copies {  // of a thread
  std::vector<Copy> open;                // of the group that has not ended
  std::deque<std::vector<Copy>> groups;  // under way
};

inline Copies& copies() {
  static std::unordered_map<const Fiber*, Copies> of_threads;
  return of_threads[&now()];
}

}  // namespace on_host

namespace grace_fast::device {

inline void copy16_ahead(void* shared, const void* from, bool there) {
  static uint64_t turn = 0;
  if (there) on_host::check(from, 16);
  if (reinterpret_cast<uintptr_t>(shared) % 16) on_host::fail("a copy that is not aligned");
  const on_host::Copy copy{static_cast<unsigned char*>(shared),
                           there ? static_cast<const unsigned char*>(from) : nullptr};
  turn = turn * 6364136223846793005u + 1442695040888963407u;
  if (turn >> 63) {
    copy.make();
  } else {
    on_host::copies().open.push_back(copy);
  }
}
inline void end_copies() {
  on_host::Copies& copies = on_host::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int left>
void wait_for_copies() {
  auto& groups = on_host::copies().groups;
  for (; groups.size() > left; groups.pop_front()) {
    for (const on_host::Copy& copy : groups.front()) copy.make();
  }
}

}  // namespace grace_fast::device
