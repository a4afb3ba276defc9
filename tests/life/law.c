// The law, as plainly as it can be said and still be asked a billion times: for each query the live
// key of least finite S, the lowest row on a tie; (-1, inf) where there is none.
//
// columns: [D][stride] float32, a key in each column, stride a multiple of 8; live: [stride] bytes.
// S is summed in float64, j ascending, each product rounded before it is added: compile with
// -ffp-contract=off. Eight keys and four queries at a time are summed side by side, each in its
// own order.
#include <math.h>
#include <stdint.h>

enum { KEYS = 8, QUERIES = 4, TOGETHER = 2048 };
typedef float floats __attribute__((vector_size(4 * KEYS), aligned(4)));
typedef double sums __attribute__((vector_size(8 * KEYS)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
void nearest_keys(const double* queries, int64_t batch, const float* columns, int64_t stride,
                  int64_t width, int64_t rows, const uint8_t* live, int64_t* row,
                  double* squared) {
  for (int64_t b = 0; b < batch; ++b) {
    row[b] = -1;
    squared[b] = INFINITY;
  }
  // Keys that stay in the cache are held against all queries.
  int64_t together = TOGETHER / (width > 8 ? width / 8 : 1) / KEYS * KEYS;
  if (together < KEYS) together = KEYS;
  for (int64_t first = 0; first < rows; first += together) {
    const int64_t last = first + together < rows ? first + together : rows;
    for (int64_t b = 0; b < batch; b += QUERIES) {
      const int64_t here = batch - b < QUERIES ? batch - b : QUERIES;
      const double* asked[QUERIES];
      for (int64_t i = 0; i < QUERIES; ++i) asked[i] = queries + (b + (i < here ? i : 0)) * width;
      for (int64_t k = first; k < last; k += KEYS) {
        sums total[QUERIES] = {{0}, {0}, {0}, {0}};
        for (int64_t j = 0; j < width; ++j) {
          const sums key = __builtin_convertvector(*(const floats*)(columns + j * stride + k), sums);
          for (int64_t i = 0; i < QUERIES; ++i) {
            const sums difference = asked[i][j] - key;
            const sums product = difference * difference;
            total[i] = total[i] + product;
          }
        }
        for (int64_t i = 0; i < here; ++i) {
          for (int64_t lane = 0; lane < KEYS; ++lane) {
            if (live[k + lane] && total[i][lane] < squared[b + i]) {
              squared[b + i] = total[i][lane];
              row[b + i] = k + lane;
            }
          }
        }
      }
    }
  }
}
