// Keys on their way: a warp's ring of stages in shared memory, copied while an earlier one is used.
//
// A warp takes tiles of kKeys rows, and of a tile one stage after the other: kPieces pieces of 16
// bytes a lane, which are kPieces / kKeys chunks of each key. A lane reads only pieces that it has
// copied itself, so that no barrier stands between copying and reading: it waits for its own
// copies. Copies run kStages ahead, across tiles, and the first of them start before anything else.
#pragma once
#include "numbers.cuh"

namespace grace_fast::device {

constexpr int kPieces = 4;
constexpr int kStages = 3;
constexpr int kStageBytes = kPieces * kWarp * 16;
constexpr int kRingBytes = kStages * kStageBytes;  // of a warp

// The tiles of a warp: rows first .. first + kKeys - 1, then `step` further, below `rows`.
struct Tiles {
  uint32_t first, step, rows;
};

template <typename Key, int kKeys>
class KeyRing {
 public:
  static constexpr int kChunk = kWarp * kOf16Bytes<Key>;  // elements that a warp reads at a time
  static constexpr int kChunks = kPieces / kKeys;         // of each key in a stage

  // `ring` is where this warp's stages lie in shared memory.
  GRACE_FAST_DEVICE KeyRing(const Book& book, int width, int ring, const Tiles& tiles)
      : book_(book),
        width_(width),
        lane_(thread_index() % kWarp),
        first_(ring + lane_ * 16),
        at_(first_),
        tiles_(tiles) {
    take_tile();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) copy_ahead();
  }

  // Wait until this lane may read the oldest stage.
  GRACE_FAST_DEVICE void wait() const { wait_for_copies<kStages - 1>(); }
  // This lane's piece of a key in the oldest stage; zeros beyond the key's end.
  GRACE_FAST_DEVICE uint4 piece(int chunk, int key) const {
    return *reinterpret_cast<const uint4*>(at(chunk, key));
  }
  // Copy a later stage over the oldest one, which has been used.
  GRACE_FAST_DEVICE void copy_ahead() {
    if (tiles_.first < tiles_.rows) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const bool there = start_ + c * kChunk < width_ - lane_ * kOf16Bytes<Key>;
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          copy16_ahead(at(c, k), key_[k] + start_ + c * kChunk, there);
        }
      }
      start_ += kChunks * kChunk;
      if (start_ >= width_) {
        tiles_.first += tiles_.step;
        take_tile();
      }
    }
    end_copies();
    at_ = at_ == first_ + (kStages - 1) * kStageBytes ? first_ : at_ + kStageBytes;
  }

 private:
  GRACE_FAST_DEVICE unsigned char* at(int chunk, int key) const {
    return shared_memory() + at_ + (chunk * kKeys + key) * kWarp * 16;
  }

  // A removed row is read all the same: its key's address need not wait for `live`.
  GRACE_FAST_DEVICE void take_tile() {
    start_ = 0;
    if (tiles_.first >= tiles_.rows) return;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t row = tiles_.first + k;
      key_[k] = key_of<Key>(book_, width_, row < tiles_.rows ? row : tiles_.first) +
                lane_ * kOf16Bytes<Key>;
    }
  }

  const Book& book_;
  const int width_, lane_;
  const int first_;        // of this lane's place in each stage: offsets in shared memory
  int at_;                 // that of the oldest
  Tiles tiles_;            // that are still to be copied
  const Key* key_[kKeys];  // this lane's part of the first of them
  int start_;              // the next element of these
};

}  // namespace grace_fast::device
