// The code kernels of the wide instruction sets, once, over `Bytes`; portable.cpp says what each
// does. Included after floats.inl, likewise inside an anonymous namespace.
//
// Bytes has: kKeys, the int32 lanes of a Vector; load, all (of one int32), store; at_most, a bit
// for each lane that is not above another's; thresholds of kKeys leaves or nodes; add_apart, the
// squares of four circular differences of bytes; add_outside, those of two int16 outside a box; and
// Far, which sums over the far bytes.

// The bytes that `Vector` takes, in a block of four slots of 16 keys.
constexpr int kVectorBytes = 4 * Bytes::kKeys, kVectors = 64 / kVectorBytes;

template <typename From>
Bytes::Vector four_bytes(const From* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return Bytes::all(bytes);
}

int64_t test_boxes(const int16_t* boxes, const float* max_radius, int64_t first, int64_t last,
                   const int16_t* point, CodeThreshold threshold, int32_t* found) {
  Bytes::Vector at[8];
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) at[pair] = four_bytes(point + 2 * pair);
  int64_t count = 0;
  for (int64_t i = first; i < last; i += Bytes::kKeys) {
    const int16_t* group = boxes + i / 16 * 512 + i % 16 * 2;
    auto sum = Bytes::all(0);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const int16_t* low = group + pair * 64;
      sum = Bytes::add_outside(sum, Bytes::load(low), Bytes::load(low + 32), at[pair]);
    }
    unsigned within = Bytes::at_most(sum, Bytes::thresholds(threshold, max_radius + i));
    if (last - i < Bytes::kKeys) within &= (1u << (last - i)) - 1;
    for (; within; within &= within - 1) {
      found[count++] = static_cast<int32_t>(i + __builtin_ctz(within));
    }
  }
  return count;
}

int64_t scan_codes(const uint8_t* near, const int32_t* leaves, int64_t first, int64_t count,
                   const float* max_radius, const uint8_t* code, CodeThreshold threshold,
                   int32_t* position, int32_t* sum) {
  constexpr int64_t kLeafBytes = kLeaf * kNear, kAhead = 6;
  Bytes::Vector query[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) query[i] = four_bytes(code + 4 * i);
  int64_t kept = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t leaf = leaves ? leaves[i] : i;
    if (leaves && i + kAhead < first + count) {
      const auto* next = reinterpret_cast<const char*>(near + leaves[i + kAhead] * kLeafBytes);
      for (int64_t line = 0; line < kLeafBytes; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
    }
    const auto limit = Bytes::all(threshold.at(max_radius[leaf]));
    for (int64_t at = leaf * kLeaf; at < (leaf + 1) * kLeaf; at += kBlock) {
      Bytes::Vector apart[kVectors];
      unsigned within = 0;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* block = near + at * kNear + v * kVectorBytes;
        apart[v] = Bytes::all(0);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          apart[v] = Bytes::add_apart(apart[v], Bytes::load(block + 64 * j), query[j]);
        }
        within |= Bytes::at_most(apart[v], limit) << v * Bytes::kKeys;
      }
      if (!within) continue;
      alignas(64) int32_t sums[kBlock];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) Bytes::store(sums + v * Bytes::kKeys, apart[v]);
      for (; within; within &= within - 1) {
        const int lane = __builtin_ctz(within);
        position[kept] = static_cast<int32_t>(at + lane);
        sum[kept++] = sums[lane];
      }
    }
  }
  return kept;
}

int64_t refine_positions(const Segment& segment, bool norm_slot, const uint8_t* code,
                         CodeThreshold threshold, int64_t count, int32_t* position,
                         const int32_t* sum) {
  constexpr int64_t kAhead = 8;
  const Bytes::Far query(code + kNear);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const uint8_t* next = segment.far + int64_t{position[i + kAhead]} * kFar;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
    }
    const int64_t at = position[i];
    int32_t total = sum[i];
    if (norm_slot) {
      const uint8_t byte = segment.near[at / kBlock * kBlock * kNear + 192 + at % kBlock * 4 + 3];
      const int apart = static_cast<int8_t>(static_cast<uint8_t>(byte - code[kNear - 1]));
      const int size = apart < 0 ? -apart : apart;
      total -= size < 127 ? size * size : 127 * 127;
    }
    total += query.apart(segment.far + at * kFar);
    if (total <= threshold.at(segment.leaf_max_radius[at / kLeaf])) position[kept++] = position[i];
  }
  return kept;
}
