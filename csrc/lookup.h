// The contract between the look-up's C++ and Python. Letters as everywhere: B queries, N rows, D
// width.
//
// S_i = sum over j of (q_j - k_ij)^2 in float64, j ascending, each product rounded before it is
// added. The build forbids contraction into a fused multiply-add (-ffp-contract=off): it is part of
// the law.
#pragma once
#include <cstdint>

namespace grace_fast {

enum class Dtype { float32, bfloat16, float16 };

struct Keys {
  const void* slots;        // [*, D] in `dtype`
  const int64_t* key_slot;  // [N], the slot of each row; null when row i is slot i
  const bool* live;         // [N], false for a removed row
  int64_t rows;             // N
  int64_t width;            // D
  Dtype dtype;
};

// For each query: the live row of least finite S, the lowest on a tie, and that S.
// Where there is none, row and squared keep what they held (-1 and infinity).
//   queries [B, D] float32, row [B], squared [B]
void nearest(const float* queries, int64_t batch, const Keys& keys, int64_t* row, double* squared);

}  // namespace grace_fast
