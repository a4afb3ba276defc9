// Launching look-ups: what the bindings call. tests/cuda_on_host has the same functions for a host.
#pragma once
#include <algorithm>
#include <cstddef>

#include "layout.h"

namespace grace_fast::device {

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that a block may ask for
  int major, minor;
  int index;
};

// The rest are errors as CUDA numbers them; zero is success.
constexpr int kTooWide = -1;  // no query of that width fits in shared memory

int device_count(int* count);
int describe_device(int index, Device* device);
const char* error_text(int error);

// Where there are few rows, a warp takes one and a block is as small as this: it finds a place
// beside another kernel's, and leaves multiprocessors to it.
constexpr int kFewWarps = 4;

// How many blocks read all keys where `rows` are expected. More are read as well, in more time.
inline int dense_blocks(int64_t rows, int most) {
  const int64_t wanted = (rows + kFewWarps - 1) / kFewWarps;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, most)));
}

// Do work(key) with the C++ type of a dtype.
template <typename Work>
int with_key(Dtype dtype, const Work& work) {
  if (dtype == Dtype::bfloat16) return work(BFloat16{});
  if (dtype == Dtype::float16) return work(Float16{});
  return work(float{});
}

// Say which capture a stream's launches go to; 0 where they run.
int capture_of(void* stream, uint64_t* capture);

// Queue a look-up of call.batch <= 32 queries on a stream. Nothing is allocated or waited for.
// Fewer blocks than multiprocessors are small ones.
int launch_look_up(const Call& call, bool indexed, int blocks, const Device& device, void* stream);

}  // namespace grace_fast::device
