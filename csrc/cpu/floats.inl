// The floating-point kernels, once, over `Lanes`: the including file says what a vector is.
//
// Included inside an anonymous namespace and under the file's own target, so that no two
// instruction sets share a function. Lanes has: kCount; Vector; zero, load (float, BFloat16,
// Float16), store, add, sub, multiply_add, sum; and load_rows, which spreads packed bfloat16 rows
// over two vectors.

constexpr int64_t kStretch =
    256;  // elements between two reductions: keeps chains of roundings short

// Bytes of a key that are worth leaving unread: to leave the stream of keys for the next key
// costs as much (Zen 4, fp32, D = 1536: leaving the last 4 KiB took 1.4 times as long, 1 KiB
// twice).
constexpr int64_t kWorthLeaving = 4608;

float centre_query(const float* query, const float* centre, int64_t padded, float* x) {
  float total = 0;
  for (int64_t begin = 0; begin < padded; begin += kStretch) {
    const int64_t end = begin + kStretch < padded ? begin + kStretch : padded;
    Lanes::Vector sum0 = Lanes::zero(), sum1 = Lanes::zero();
    for (int64_t j = begin; j < end; j += 2 * Lanes::kCount) {
      const auto x0 = Lanes::sub(Lanes::load(query + j), Lanes::load(centre + j));
      const auto x1 = Lanes::sub(Lanes::load(query + j + Lanes::kCount),
                                 Lanes::load(centre + j + Lanes::kCount));
      sum0 = Lanes::multiply_add(x0, x0, sum0);
      sum1 = Lanes::multiply_add(x1, x1, sum1);
      Lanes::store_for_rows(x + j, x0, x1);
    }
    total += Lanes::sum(Lanes::add(sum0, sum1));
  }
  return total;
}

void project_rows(const uint16_t* rows, const float* x, int64_t padded, int count, float* sums) {
  constexpr int kTogether = 8;
  for (int first = 0; first < count; first += kTogether) {
    const uint16_t* row = rows + first * padded;
    for (int r = 0; r < kTogether; ++r) sums[first + r] = 0;
    for (int64_t begin = 0; begin < padded; begin += kStretch) {
      const int64_t end = begin + kStretch < padded ? begin + kStretch : padded;
      Lanes::Vector sum[kTogether];
#pragma GCC unroll 8
      for (int r = 0; r < kTogether; ++r) sum[r] = Lanes::zero();
      for (int64_t j = begin; j < end; j += 2 * Lanes::kCount) {
        const auto x0 = Lanes::load(x + j), x1 = Lanes::load(x + j + Lanes::kCount);
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) {
          Lanes::Vector w0, w1;
          Lanes::load_rows(row + r * padded + j, &w0, &w1);
          sum[r] = Lanes::multiply_add(w0, x0, sum[r]);
          sum[r] = Lanes::multiply_add(w1, x1, sum[r]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTogether; ++r) sums[first + r] += Lanes::sum(sum[r]);
    }
  }
}

template <typename Key>
float rest_of_squared(const float* query, const Key* key, int64_t begin, int64_t end) {
  float total = 0;
  for (int64_t j = begin; j < end; ++j) {
    const float difference = query[j] - Lanes::widen(key[j]);
    total += difference * difference;
  }
  return total;
}

template <typename Key>
float squared_of(const float* query, const void* stored, int64_t width, float limit) {
  const auto* key = static_cast<const Key*>(stored);
  constexpr int64_t kStep = 4 * Lanes::kCount;
  const int64_t whole = width / kStep * kStep;
  Lanes::Vector sum[4];
  for (auto& lane : sum) lane = Lanes::zero();
  int64_t look = kStretch;
  for (int64_t j = 0; j < whole; j += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto difference = Lanes::sub(Lanes::load(query + j + i * Lanes::kCount),
                                         Lanes::load(key + j + i * Lanes::kCount));
      sum[i] = Lanes::multiply_add(difference, difference, sum[i]);
    }
    if (j + kStep >= look && (whole - j) * static_cast<int64_t>(sizeof(Key)) > kWorthLeaving) {
      look += kStretch;
      const float partial =
          Lanes::sum(Lanes::add(Lanes::add(sum[0], sum[1]), Lanes::add(sum[2], sum[3])));
      if (partial > limit) return partial;
    }
  }
  const float total =
      Lanes::sum(Lanes::add(Lanes::add(sum[0], sum[1]), Lanes::add(sum[2], sum[3])));
  // At most 4 * kCount - 1 elements are left: their chain is inside the promise of kernels.h only
  // because it is cut in eights here.
  float rest = 0;
  for (int64_t j = whole; j < width; j += 8) {
    rest += rest_of_squared(query, key, j, j + 8 < width ? j + 8 : width);
  }
  return total + rest;
}

template <typename Key>
void tile_of(const float* queries, int64_t stride, const void* stored0, const void* stored1,
             int64_t width, float* squared) {
  const Key* key[2] = {static_cast<const Key*>(stored0), static_cast<const Key*>(stored1)};
  const int64_t whole = width / Lanes::kCount * Lanes::kCount;
  Lanes::Vector sum[4][2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sum[i / 2][i % 2] = Lanes::zero();
  for (int64_t j = 0; j < whole; j += Lanes::kCount) {
    const auto key0 = Lanes::load(key[0] + j), key1 = Lanes::load(key[1] + j);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto query = Lanes::load(queries + i * stride + j);
      const auto apart0 = Lanes::sub(query, key0), apart1 = Lanes::sub(query, key1);
      sum[i][0] = Lanes::multiply_add(apart0, apart0, sum[i][0]);
      sum[i][1] = Lanes::multiply_add(apart1, apart1, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) squared[i] += Lanes::sum(sum[i / 2][i % 2]);
  if (whole == width) return;
  for (int i = 0; i < 8; ++i) {
    float rest = 0;
    for (int64_t j = whole; j < width; j += 8) {
      rest +=
          rest_of_squared(queries + i / 2 * stride, key[i % 2], j, j + 8 < width ? j + 8 : width);
    }
    squared[i] += rest;
  }
}

// The kernels of an instruction set: those of floats, and its own of codes.
constexpr Kernels all_kernels(const char* name, decltype(Kernels::boxes) boxes,
                              decltype(Kernels::scan) scan, decltype(Kernels::refine) refine) {
  return {name,
          centre_query,
          project_rows,
          boxes,
          scan,
          refine,
          {squared_of<float>, squared_of<BFloat16>, squared_of<Float16>},
          {tile_of<float>, tile_of<BFloat16>, tile_of<Float16>}};
}
