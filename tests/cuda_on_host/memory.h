// What the blocks of a launch see of the global memory that kernels write.
//
// Every block has a view of its own: what it writes stays there until it releases, and it reads
// what it has seen until it acquires. Only atomic operations and fresh loads reach what is
// published. Which block runs is switched by copying, so that kernels store and load as they are.
// A real store may also become visible early, and a stale line may be fetched again: `drift` does
// that to some words, at random.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace on_host {

struct Piece {
  char* at;
  size_t bytes;
  bool carried;  // from launch to launch; the rest is poisoned before each
  size_t offset = 0;
};

struct View {
  std::vector<char> seen, base;  // as it is now, and without what the block wrote since
};

class Memory {
 public:
  void open(std::vector<Piece> pieces, std::mt19937_64& random) {
    pieces_ = std::move(pieces);
    size_t bytes = 0;
    for (Piece& piece : pieces_) {
      piece.offset = bytes;
      bytes += (piece.bytes + kLine - 1) / kLine * kLine;
      if (!piece.carried) poison(piece, random);
    }
    published_.assign(bytes, 0);
    running_ = nullptr;
    copy_from_place(published_);
  }
  void close() {
    switch_to(nullptr);
    copy_to_place(published_);
  }

  View fresh_view() const { return {published_, published_}; }

  void switch_to(View* view) {
    if (view == running_) return;
    if (running_) copy_from_place(running_->seen);
    if (view) copy_to_place(view->seen);
    running_ = view;
  }

  // What the running block has written, others may see from now on.
  void release() {
    if (!running_) return;
    copy_from_place(running_->seen);
    publish(*running_, [](size_t) { return true; });
  }
  // The running block sees what has been published, over which its own stores stay.
  void acquire() {
    if (!running_) return;
    copy_from_place(running_->seen);
    fetch(*running_, [](size_t) { return true; });
    copy_to_place(running_->seen);
  }
  // The same of a block that does not run.
  void publish_all(View& view) {
    publish(view, [](size_t) { return true; });
  }

  // Some words of the running block go out or come in by themselves.
  void drift(std::mt19937_64& random) {
    if (!running_) return;
    const uint64_t key = random() | 1;
    const auto some = [key](size_t word) { return (word * 0x9e3779b97f4a7c15u * key >> 62) == 0; };
    copy_from_place(running_->seen);
    publish(*running_, some);
    fetch(*running_, some);
    copy_to_place(running_->seen);
  }

  // An atomic operation: `change` takes the published value and returns the new one.
  template <typename T, typename Change>
  T update(T* at, const Change& change) {
    char* published = place_of(at);
    T before = *at;
    if (published) std::memcpy(&before, published, sizeof before);
    const T after = change(before);
    *at = after;
    if (published) {
      const ptrdiff_t offset = published - published_.data();
      std::memcpy(published, &after, sizeof after);
      if (running_) std::memcpy(running_->base.data() + offset, &after, sizeof after);
    }
    return before;
  }

  // A load that no stale line answers: the block's own store, or what is published.
  template <typename T>
  T load(const T* at) {
    const char* published = place_of(at);
    T value = *at;
    if (!published || !running_) return value;
    const ptrdiff_t offset = published - published_.data();
    if (std::memcmp(&value, running_->base.data() + offset, sizeof value) == 0) {
      std::memcpy(&value, published, sizeof value);
    }
    return value;
  }

  bool holds(const void* from, size_t bytes) const {
    for (const Piece& piece : pieces_) {
      if (from >= piece.at && static_cast<const char*>(from) + bytes <= piece.at + piece.bytes) {
        return true;
      }
    }
    return false;
  }

 private:
  static constexpr size_t kLine = 32;

  static void poison(const Piece& piece, std::mt19937_64& random) {
    const uint64_t drawn = random();
    const int pattern = static_cast<int>(drawn % 4);  // zeros, ones, one byte or many
    uint64_t state = drawn;
    for (size_t i = 0; i < piece.bytes; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      piece.at[i] = static_cast<char>(pattern == 0   ? 0
                                      : pattern == 1 ? 255
                                      : pattern == 2 ? drawn >> 8
                                                     : state >> 56);
    }
  }

  char* place_of(const void* at) {
    const char* from = static_cast<const char*>(at);
    for (const Piece& piece : pieces_) {
      if (from >= piece.at && from < piece.at + piece.bytes) {
        return published_.data() + piece.offset + (from - piece.at);
      }
    }
    return nullptr;
  }
  void copy_from_place(std::vector<char>& to) const {
    for (const Piece& piece : pieces_) std::memcpy(&to[piece.offset], piece.at, piece.bytes);
  }
  void copy_to_place(const std::vector<char>& from) const {
    for (const Piece& piece : pieces_) std::memcpy(piece.at, &from[piece.offset], piece.bytes);
  }

  template <typename Chosen>
  void publish(View& view, const Chosen& chosen) {
    for (size_t line = 0; line < published_.size(); line += kLine) {
      if (std::memcmp(&view.seen[line], &view.base[line], kLine) == 0) continue;
      for (size_t i = line; i < line + kLine; ++i) {
        if (view.seen[i] != view.base[i] && chosen(i / 4)) {
          published_[i] = view.base[i] = view.seen[i];
        }
      }
    }
  }
  template <typename Chosen>
  void fetch(View& view, const Chosen& chosen) const {
    for (size_t line = 0; line < published_.size(); line += kLine) {
      if (std::memcmp(&published_[line], &view.base[line], kLine) == 0) continue;
      for (size_t i = line; i < line + kLine; ++i) {
        if (view.seen[i] == view.base[i] && chosen(i / 4)) {
          view.seen[i] = view.base[i] = published_[i];
        }
      }
    }
  }

  std::vector<Piece> pieces_;
  std::vector<char> published_;
  View* running_ = nullptr;
};

}  // namespace on_host
