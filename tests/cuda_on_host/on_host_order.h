// How the threads of a launch take turns; the tests set it.
#pragma once
#include <cstdint>

namespace grace_fast::device {

struct OnHostOrder {
  uint64_t seed = 0;
  int threads = 64;
};
OnHostOrder& order();

}  // namespace grace_fast::device
