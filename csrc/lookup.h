// The contract between the look-up's C++ and Python. Letters as everywhere: B queries, N rows, D
// width.
//
// S_i = sum over j of (q_j - k_ij)^2 in float64, j ascending, each product rounded before it is
// added. The build forbids contraction into a fused multiply-add (-ffp-contract=off): it is part of
// the law. Everything faster only finds candidates; what is within its rounding of a decision is
// summed again so.
//
// The index (grace_fast/index/quantizer.py has the proof): phi is 1-Lipschitz up to `lipschitz`,
// z_k and z_q are the integers nearest phi / step on a torus of 256, and a key within radius r of
// the query has
//   sum (z_q - z_k)^2 <= ((lipschitz * r + delta) / step + e_q + e_k)^2.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace grace_fast {

enum class Dtype { float32, bfloat16, float16 };

constexpr int64_t kPageRows = 4096;  // grace_fast/codebook/codebook.py
constexpr int64_t kLeaf = 64;        // keys of a leaf, and leaves of a level-2 node
constexpr int kNear = 16;            // code bytes read for every key of a leaf that is touched
constexpr int kFar = 48;             // further code bytes, read for candidates
constexpr int kBlock = 16;           // keys of a block: [kNear / 4][16 keys][4 bytes]
constexpr int kPadding = 64;         // widths are padded with zeros to a multiple of this

// The first slots of a codebook that lies in a file: blocks of it are tested before they are read.
struct Mapped {
  int64_t slots;                            // slots below are in the file
  int64_t block_bytes;                      // of a block, the first one beginning with slot 0
  const uint8_t* tested;                    // by block, not 0 once it was found to be as saved
  std::function<void(int64_t block)> test;  // sets that, or throws; any thread may call it
  std::function<void()> lose;               // throws: the file no longer holds what was read
  int guarded;                              // by `guard`
};

// Let reads of a mapped file's memory give zeros where the file has shrunk, and be marked, rather
// than end the process. Returns a number for `is_lost`; -1 where there are too many.
int guard(uintptr_t first, int64_t bytes);
void unguard(int number);
bool is_lost(int number);

struct Keys {
  const void* slots;                 // [*, D] in `dtype`
  const int64_t* const* slot_pages;  // of [4096], the slot of each row; null when row i is slot i
  const bool* const* live_pages;     // of [4096], false for a removed row
  const float* const* radius_pages;  // of [4096], negative for a dead key
  int64_t rows;                      // N
  int64_t width;                     // D
  Dtype dtype;
  const Mapped* mapped = nullptr;  // null when every slot is in memory
};

struct Queries {
  const void* first;  // [B, D] in `dtype`
  int64_t stride;     // elements from one query to the next
  Dtype dtype;
  int64_t batch;  // B
};

// The 1-Lipschitz map: centre, project on rows, turn the near slots.
struct Projection {
  const float* centre;   // [Dp], D padded with zeros
  const uint16_t* rows;  // [64, Dp] bfloat16, see quantizer.Projection; near slots first
  const double* turn;    // [16, 16], makes the near rows orthonormal up to `eta`
  double step;           // a power of two
  double lipschitz;      // >= the largest singular value of the rows
  double row_norm;       // >= the norm of every row, turned or not
  double eta;            // >= the spectral norm of W W^T - I on rows 0 .. 14, W = turn * rows
  bool norm_slot;        // slot 15 is the norm of what rows 0 .. 14 leave over
  bool far;              // whether the far slots say anything
};

// Codes of some rows: a segment in kd order under two levels of bounding boxes, or the delta
// buffer, in order of arrival.
struct Segment {
  int64_t count;                 // positions in use
  const int32_t* rows;           // [count], the row at each position
  const uint8_t* near;           // [blocks][kNear / 4][16][4]
  const uint8_t* far;            // [leaves * 64][kFar]
  const float* leaf_max_radius;  // [leaves], >= every radius of the leaf; only ever grows
  double near_error;             // >= e_k of the near slots, in steps
  double far_error;              // >= e_k of all slots, in steps
  const int16_t* leaf_boxes;  // [leaves / 16][8 slot pairs][low, high][16 boxes][2]; null: no order
  const int16_t* node_boxes;  // the same of 64 leaves each
  const float* node_max_radius;  // [nodes]
  const uint8_t* isolated;  // [count / 8] bits: no other key of the segment within 2 radii; or null
};

struct Index {
  Projection projection;
  std::vector<Segment> segments;
  int64_t covered;   // rows below have a position in a segment; the others are read as they are
  float min_radius;  // every largest radius of a leaf is at least this
  float widest;      // >= every radius
};

// What the look-ups of a batch read; the calibration predicts bytes from it, and adaptors count it.
struct Effort {
  int64_t boxes, codes, candidates;
  int64_t exact_reranks;  // keys read whole
  int64_t exhaustive;     // look-ups that read every key after all
  int64_t proved;         // misses for which no key was read
};

// Where answers go, [B] each.
struct Answers {
  int64_t* row;
  double* squared;
  bool* hit;  // null for `nearest`
};

// For each query: the live row of least finite S, the lowest on a tie, and that S; (-1, inf) where
// there is none.
void nearest_dense(const Queries& queries, const Keys& keys, int threads, const Answers& answers);
// The same where S <= within^2, and (-1, inf) where it is not. The index has to know the keys of
// the rows it covers; their radii may be others.
void nearest_indexed(const Queries& queries, const Keys& keys, const Index& index, double within,
                     int threads, const Answers& answers);

// For each query: whether it is in the ball of its nearest row, and then that row and its S, else
// (-1, inf). Returns the number of hits. What was read is added to `effort`, where there is one.
int64_t find_dense(const Queries& queries, const Keys& keys, float widest, int threads,
                   const Answers& answers, Effort* effort);
int64_t find_indexed(const Queries& queries, const Keys& keys, const Index& index, int threads,
                     const Answers& answers, Effort* effort);

// Set the isolated bit of the positions of a segment whose rows have no other key of it within 2
// radii.
void find_isolated(const Keys& keys, const Index& index, int64_t segment, const int64_t* positions,
                   int64_t count, uint8_t* isolated);

// Write the kd order of points [count, 16]: leaves of 64, the widest slot split at its median. It
// is the same for any number of threads.
void kd_order(const int16_t* points, int64_t count, int threads, int32_t* order);

// "avx512vnni", "avx2" or "portable": the widest this processor runs, or the one asked for.
const char* instruction_set();
bool use_instruction_set(const char* name);

}  // namespace grace_fast
