// What the kernels read, and where: the contract between them and the host.
//
// Letters as in lookup.h: B queries, N rows, D width, V width of a value. A `Book` lies in device
// memory and may be rewritten between two launches, or between two replays of one graph: nothing in
// it is known when a kernel is launched. Every array is key-major and starts at a multiple of 16
// bytes; nothing is padded to whole leaves.
//
// The index is that of csrc/lookup.h, with one difference: a code difference of 128 counts as
// 128, not as 127, which is as true and costs nothing here.
#pragma once
#include <cstdint>

namespace grace_fast::device {

enum class Dtype : int32_t { float32, bfloat16, float16 };  // as in lookup.h
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kNear = 16;          // code bytes read for every key of a leaf that is touched
constexpr int kFar = 48;           // further code bytes, read for candidates
constexpr int kSlots = 64;         // of phi: near and far
constexpr int kLeaf = 64;          // keys of a leaf, and leaves of a level-2 node
constexpr int kMostQueries = 32;   // of a call
constexpr int kMostSegments = 16;  // of an index
constexpr int kPadding = 64;       // Dp is D rounded up to a multiple of this

struct Projection {
  const float* centre;   // [Dp], padded with zeros
  const uint16_t* rows;  // [64, Dp] bfloat16, padded with zeros; near slots first
  const double* turn;    // [16, 16]
  double step, lipschitz, row_norm, eta;
  int32_t norm_slot, far;
};

struct Segment {
  const int32_t* rows;           // [count]
  const uint8_t* near;           // [count, 16]
  const uint8_t* far;            // [count, 48]
  const float* leaf_max_radius;  // [leaves]
  const int16_t* leaf_boxes;     // [leaves, 2, 16], low and -high; null: no order
  const int16_t* node_boxes;     // [nodes, 2, 16]
  const float* node_max_radius;  // [nodes]
  const uint8_t* isolated;       // [leaves * 8] bits, or null
  int32_t count;                 // positions in use
  int32_t first, last;           // a segment with `isolated` holds the rows [first, last)
  float near_error, far_error;
  int32_t unused;
};

struct Book {
  const void* keys;           // [slots, D]
  const int64_t* key_slot;    // [N], or null where row i is slot i
  const bool* live;           // [N]
  const float* radius;        // [N], negative for a dead key
  const void* values;         // [slots, V]
  const int64_t* value_slot;  // [N], or null
  int64_t rows;               // N, below 2^31
  int64_t covered;            // rows below have a position in a segment
  float widest;               // >= every radius
  float min_radius;           // every largest radius of a leaf is at least this
  int32_t segments;
  int32_t unused;
  Projection projection;
  Segment segment[kMostSegments];
};

// A query, projected: written by `encode`, read by `indexed`.
struct Encoded {
  uint32_t code[kSlots / 4];
  uint32_t point[kNear / 2], minus_point[kNear / 2];  // two int16 each
  float near_error, far_error;
  int32_t state;
  int32_t unused;
};
enum State : int32_t { kEncoded, kTooLarge, kNotFinite };

// The smallest and the second smallest of what a block has seen of one query, each
// (bits of S in float32) << 32 | row << 1 | alone; all ones where there is none.
struct BestTwo {
  uint64_t first, second;
};

// A hit whose value is written: over the tokens [first, last) of its query's.
struct Replaced {
  int64_t slot;  // of the value
  int32_t query, first, last, unused;
};

// What the blocks of a group write together.
struct Handout {
  uint32_t listed;  // 1 + the hits to write, once they are known
  uint32_t next;    // part of the work that nobody has taken
  uint32_t left;    // blocks that are through with it
  uint32_t unused;
};

// Memory of look-ups that are made one after the other. Tickets and handouts, kCounterBytes from
// the start, are zero before the first, and every launch leaves them at zero; whatever else a
// launch reads here it has written before.
struct Workspace {
  uint32_t* tickets;   // [2 * kMostQueries]
  Handout* handout;    // [kMostQueries], by group
  Replaced* replaced;  // [kMostQueries]
  float* sums;         // [kMostQueries, 64]
  float* squares;      // [kMostQueries, 2]: |x|^2, and 0 or what is not finite
  Encoded* encoded;    // [kMostQueries]
  BestTwo* best;       // [kMostQueries, blocks]
  float* wide;         // [kMostQueries, Dp]
};

constexpr int64_t kCounterBytes = kMostQueries * (2 * 4 + static_cast<int64_t>(sizeof(Handout)));

// Which tokens a hit replaces: semantics.replacement_mask.
enum class Replacement : int32_t { all, last, prompt };

// One call, as it is launched.
struct Call {
  const Book* book;
  const void* queries;  // [B, D]
  int64_t query_stride;
  Dtype query_dtype, key_dtype;
  int32_t batch, width;
  // The answers; each may be null.
  bool* hit;        // [B]
  int64_t* row;     // [B], -1 where missed
  double* squared;  // [B], S of that row; inf where missed
  // Where to write the values of hits; null: nowhere.
  void* output;                         // [B, T, V], the last dimension side by side
  const int64_t* positions;             // [B], the query's token; null: the last one of each
  int64_t output_stride, token_stride;  // in elements
  Dtype output_dtype;                   // values are in the keys' dtype
  Replacement mode;
  int32_t tokens, value_width;
  Workspace workspace;
};

}  // namespace grace_fast::device
