// How the threads of a launch take turns, and what was launched; for the tests.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace grace_fast::device {

struct OnHostOrder {
  uint64_t seed = 0;
  int threads = 64;
  uint64_t capture = 0;               // that launches are said to go to
  std::vector<std::string> launched;  // kernels, since they were last asked for
};
OnHostOrder& order();

}  // namespace grace_fast::device
