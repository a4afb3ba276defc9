// Floats as IEEE 754 has them, whatever the thread was told: a process may flush denormal numbers
// to zero or round otherwise (torch.set_flush_denormal, or a library that was built for speed and
// says so for everybody when it is loaded), and the law's sums know neither.
#pragma once
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace grace_fast {

class UsualRounding {
 public:
  UsualRounding() : before_(get()) {
    if (before_ & kUnusual) set(before_ & ~kUnusual);
  }
  ~UsualRounding() {
    if (before_ & kUnusual) set(before_);
  }
  UsualRounding(const UsualRounding&) = delete;
  UsualRounding& operator=(const UsualRounding&) = delete;

 private:
  // Not inlined: a compiler may move arithmetic across what it does not know to change it.
#if defined(__SSE2__)
  using Word = uint32_t;
  static constexpr Word kUnusual = 0x8000 | 0x6000 | 0x0040;  // results, rounding, operands
  static Word get() { return _mm_getcsr(); }
  __attribute__((noinline)) static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kUnusual = (1u << 24) | (1u << 19) | (3u << 22);  // FZ, FZ16, rounding
  static Word get() {
    Word word;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  __attribute__((noinline)) static void set(Word word) {
    __asm__ __volatile__("msr fpcr, %0" : : "r"(word) : "memory");
  }
#else
  using Word = uint32_t;
  static constexpr Word kUnusual = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif

  const Word before_;
};

}  // namespace grace_fast
