// Everything that only a GPU has, under names of its own, so that the kernels are plain C++.
//
// tests/cuda_on_host gives the same names to a host: there a thread is a fiber, and the source that
// runs here is held against the law. Warps are 32 threads; every warp operation is by all of them.
#pragma once
#ifndef __CUDACC__
#include "on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define GRACE_FAST_KERNEL(most_threads) __global__ void __launch_bounds__(most_threads, 1)
#define GRACE_FAST_BOTH __host__ __device__ __forceinline__
#define GRACE_FAST_DEVICE __device__ __forceinline__
#define GRACE_FAST_COLD __device__ __noinline__

namespace grace_fast::device {

GRACE_FAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GRACE_FAST_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
GRACE_FAST_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
GRACE_FAST_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
GRACE_FAST_DEVICE int group_index() { return static_cast<int>(blockIdx.y); }

GRACE_FAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// Threads.
GRACE_FAST_DEVICE void sync_block() { __syncthreads(); }
GRACE_FAST_DEVICE unsigned ballot(bool yes) { return __ballot_sync(~0u, yes); }
template <typename T>
GRACE_FAST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <typename T>
GRACE_FAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// Publish what the block has written before it, with the next store or ticket of this thread; or
// what was published before the last load or ticket of this thread may be read after it.
GRACE_FAST_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Count up to `last`, then start again at zero; returns the count before. One thread of a block,
// after a barrier, publishes all that the block has written: a release covers what was made visible
// to the thread that releases (it is cumulative), and a barrier has made the block's writes so. The
// block that takes the last ticket has acquired what all others released, and a barrier hands that
// on to its threads.
GRACE_FAST_DEVICE unsigned take_ticket(unsigned* ticket, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(ticket), "r"(last)
               : "memory");
  return before;
}
GRACE_FAST_DEVICE int add_to(int* shared_count, int more) { return atomicAdd(shared_count, more); }

// Kernels of one stream: start the next one early, and wait for the one before to be complete.
GRACE_FAST_DEVICE void let_the_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
GRACE_FAST_DEVICE void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes of what does not change while the kernel runs: to be read again soon, or once.
GRACE_FAST_DEVICE uint4 load16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
GRACE_FAST_DEVICE uint4 stream16(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
// Bring so many bytes, a multiple of 16, to L2; or not.
GRACE_FAST_DEVICE void prefetch(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
// Copies of 16 bytes to shared memory, or zeros where nothing is there, that go on while the thread
// does something else. They are ended in groups; the thread that made them reads what they brought
// after it has waited until at most `left` of its groups are under way.
GRACE_FAST_DEVICE void copy16_ahead(void* shared, const void* from, bool there) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
GRACE_FAST_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
GRACE_FAST_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
// What another block, or the kernel before, has written.
GRACE_FAST_DEVICE uint64_t load_fresh(const uint64_t* from) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
GRACE_FAST_DEVICE uint32_t load_fresh(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
// What another block is waiting for.
GRACE_FAST_DEVICE void store_fresh(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}
GRACE_FAST_DEVICE void wait_a_moment() { __nanosleep(100); }

// Four bytes, or two int16, at a time.
GRACE_FAST_DEVICE uint32_t abs_difference4(uint32_t a, uint32_t b) { return __vabsdiffu4(a, b); }
GRACE_FAST_DEVICE int dot4(uint32_t a, uint32_t b, int sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}
GRACE_FAST_DEVICE uint32_t unsigned_dot4(uint32_t a, uint32_t b, uint32_t sum) {
  return __dp4a(a, b, sum);
}
GRACE_FAST_DEVICE uint32_t add2(uint32_t a, uint32_t b) { return __vadd2(a, b); }
// max(a + b, c, 0)
GRACE_FAST_DEVICE uint32_t add_max2(uint32_t a, uint32_t b, uint32_t c) {
  return __viaddmax_s16x2_relu(a, b, c);
}
// max(min(a, b), 0)
GRACE_FAST_DEVICE uint32_t min2(uint32_t a, uint32_t b) { return __vimin_s16x2_relu(a, b); }
// The low bytes of four int16.
GRACE_FAST_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x6420); }
GRACE_FAST_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Float64 that is rounded at every step: the law forbids contraction.
GRACE_FAST_DEVICE double minus(double a, double b) { return __dsub_rn(a, b); }
GRACE_FAST_DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
GRACE_FAST_DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }

GRACE_FAST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
GRACE_FAST_DEVICE double square_root(double x) { return sqrt(x); }
GRACE_FAST_DEVICE float nearest_whole(float x) { return rintf(x); }
GRACE_FAST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GRACE_FAST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
GRACE_FAST_DEVICE float float_of_half(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
GRACE_FAST_DEVICE uint16_t half_of(float x) { return __half_as_ushort(__float2half_rn(x)); }
GRACE_FAST_DEVICE uint16_t bfloat16_of(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

}  // namespace grace_fast::device
#endif
