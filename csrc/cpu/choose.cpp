// The instruction set, chosen once at run time from one build.
#include <cstring>

#include "kernels.h"

namespace grace_fast {
namespace {

bool runs_here(const Kernels& set) {
#if defined(__x86_64__)
  if (&set == &avx512vnni_kernels) {
#if defined(GRACE_FAST_EMULATE_AVX512)
    return true;
#endif
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  }
  if (&set == &avx2_kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return &set == &portable_kernels;
}

const Kernels* widest() {
  for (const Kernels* set : {&avx512vnni_kernels, &avx2_kernels}) {
    if (runs_here(*set)) return set;
  }
  return &portable_kernels;
}

const Kernels*& in_use() {
  static const Kernels* set = widest();
  return set;
}

}  // namespace

const Kernels& kernels() { return *in_use(); }

const char* instruction_set() { return kernels().name; }

bool use_instruction_set(const char* name) {
  for (const Kernels* set : {&portable_kernels, &avx2_kernels, &avx512vnni_kernels}) {
    if (std::strcmp(set->name, name) || !runs_here(*set)) continue;
    in_use() = set;
    return true;
  }
  return false;
}

}  // namespace grace_fast
