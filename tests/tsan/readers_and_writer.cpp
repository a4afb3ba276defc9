// Readers beside a writer under ThreadSanitizer, by the rules that Python follows (codebook.py,
// maintained.py): slots are appended, pages are copied before they are written, a version is
// published by one store, and whoever asks first for a version takes it into the codes, under a
// lock. Every answer is held against the version that was asked.
//
// Four arrays of codes are read while they are written, on purpose: `Codes` says which and why.
// Nothing else is exempt.
//
// Usage: readers_and_writer [edits] [careless]. It ends with 1 for a wrong answer, and TSan's 66
// for a data race; a careless writer does not copy its pages, and has to be caught.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/lookup.h"

extern "C" void AnnotateBenignRaceSized(const char* file, int line, const volatile void* address,
                                        size_t size, const char* why);

namespace {

using namespace grace_fast;

constexpr int kWidth = 64, kReaders = 4, kSlots = 64;
constexpr int64_t kMostRows = 1 << 15, kMostKeys = 1 << 16, kFirstRows = 4096;
constexpr float kSmall = 0.25f, kLarge = 0.5f, kBetween = 0.375f;  // radii, and a distance
constexpr double kStep = 0x1p-4;

struct Page {
  int64_t slot[kPageRows];
  bool live[kPageRows];
  float radius[kPageRows];
};

// Exempt what is read while others write it: any mixture of before and after is a bound that holds,
// or at a position that no version has yet, which the look-up drops.
template <typename Element>
void exempt(const std::vector<Element>& array, const char* why) {
  AnnotateBenignRaceSized(__FILE__, __LINE__, array.data(), array.size() * sizeof(Element), why);
}

struct Version {
  int64_t number = 0, rows = 0;
  std::vector<std::shared_ptr<Page>> pages;
  std::vector<const int64_t*> slot;
  std::vector<const bool*> live;
  std::vector<const float*> radius;

  void describe() {
    slot.clear(), live.clear(), radius.clear();
    for (const auto& page : pages) {
      slot.push_back(page->slot);
      live.push_back(page->live);
      radius.push_back(page->radius);
    }
  }
  Page& page(int64_t row) const { return *pages[row / kPageRows]; }
};

// A key of 64 numbers in [-1, 1], the same for the same number; two of them are far apart.
void draw(int64_t number, float* key) {
  std::minstd_rand random(static_cast<unsigned>(number) * 2654435761u + 1);
  for (int j = 0; j < kWidth; ++j) key[j] = static_cast<float>(random() % 2048) / 1024.0f - 1.0f;
}

// Codes under the identity: slot j of a key is its j-th number, in steps.
struct Codes {
  int64_t count = 0;
  std::vector<int32_t> row;
  std::vector<uint8_t> near, far, isolated;
  std::vector<float> max_radius;

  explicit Codes(int64_t capacity)
      : row(capacity),
        near(capacity * kNear),
        far(capacity * kFar),
        isolated(capacity / 8),
        max_radius(capacity / kLeaf + 32, kSmall) {
    exempt(near, "a leaf is scanned to its end, and what is found past the count is dropped");
    exempt(far, "likewise");
    exempt(max_radius, "a largest radius only grows: the larger one makes a reader read more");
    exempt(isolated, "a bit is only cleared: without it a reader reads more");
  }
  void append(const float* key, int64_t of_row, float radius) {
    const int64_t at = count++;
    if (at == static_cast<int64_t>(row.size())) std::abort();
    row[at] = static_cast<int32_t>(of_row);
    for (int j = 0; j < kWidth; ++j) {
      const auto code = static_cast<uint8_t>(static_cast<int>(std::lround(key[j] / kStep)));
      if (j < kNear) {
        near[at / kBlock * kBlock * kNear + j / 4 * 64 + at % kBlock * 4 + j % 4] = code;
      } else {
        far[at * kFar + j - kNear] = code;
      }
    }
    raise(at, radius);
  }
  void raise(int64_t at, float radius) {
    if (radius > max_radius[at / kLeaf]) max_radius[at / kLeaf] = radius;
  }
  void clear(int64_t at) { isolated[at / 8] &= static_cast<uint8_t>(~(1u << at % 8)); }
  Segment segment() const {
    const double near_error = std::sqrt(kNear) / 2 + 1e-2, far_error = std::sqrt(kSlots) / 2 + 1e-2;
    return {count,     row.data(), near.data(), far.data(), max_radius.data(),   near_error,
            far_error, nullptr,    nullptr,     nullptr,    isolated.data()};
  }
};

class Codebook {
 public:
  explicit Codebook(bool careless)
      : careless_(careless), keys_(kMostKeys * kWidth), run_(kFirstRows), tail_(2 * kMostKeys) {
    for (int64_t row = 0; row < kFirstRows; ++row) append(kSmall);
    publish();
    const Version& first = *current();
    for (int64_t row = 0; row < kFirstRows; ++row) {
      run_.append(key_at(first, row), row, kSmall);
      positions_.push_back(row);
    }
    covered_ = kFirstRows;
    pages_ = first.pages;
    seen_.push_back(first.number);
    std::vector<uint8_t> bits(run_.isolated.size());
    find_isolated(keys_of(first), index(), 0, positions_.data(), kFirstRows, bits.data());
    run_.isolated = bits;
  }

  const Version* current() const { return current_.load(std::memory_order_acquire); }
  const float* key_at(const Version& version, int64_t row) const {
    return &keys_[version.page(row).slot[row % kPageRows] * kWidth];
  }
  Keys keys_of(const Version& version) const {
    return {keys_.data(),          version.slot.data(), version.live.data(),
            version.radius.data(), version.rows,        kWidth,
            Dtype::float32};
  }

  // One edit, published: a row with a key of its own, a moved key, another radius, or a removal.
  bool edit(std::minstd_rand& random) {
    if (version_of_writer_.rows + 2 > kMostRows || slots_ + 2 > kMostKeys) return false;
    const int64_t row = static_cast<int64_t>(random() % version_of_writer_.rows);
    switch (random() % 8) {
      case 0:
        writable(row).radius[row % kPageRows] = -1.0f;
        break;
      case 1:
        writable(row).live[row % kPageRows] = false;
        break;
      case 2:
      case 3:
        writable(row).slot[row % kPageRows] = new_slot();
        break;
      case 4:
      case 5:
        writable(row).radius[row % kPageRows] = kLarge;
        break;
      default:
        append(random() % 2 ? kSmall : kLarge);
    }
    publish();
    return true;
  }

  // What a reader is given for a version: see Index.view.
  Index view(const Version& version) {
    const std::lock_guard<std::mutex> locked(taking_in_);
    take_in(version);
    return index();
  }

 private:
  int64_t new_slot() {
    draw(slots_, &keys_[slots_ * kWidth]);
    return slots_++;
  }
  void append(float radius) {
    Version& next = version_of_writer_;
    const int64_t row = next.rows++, offset = row % kPageRows;
    if (!offset) next.pages.push_back(std::make_shared<Page>());
    Page& page = next.page(row);  // past the rows of every version: written in place
    page.slot[offset] = new_slot();
    page.live[offset] = true;
    page.radius[offset] = radius;
  }
  Page& writable(int64_t row) {
    auto& page = version_of_writer_.pages[row / kPageRows];
    if (!careless_) page = std::make_shared<Page>(*page);
    return *page;
  }
  void publish() {
    ++version_of_writer_.number;
    version_of_writer_.describe();
    versions_.push_back(version_of_writer_);
    current_.store(&versions_.back(), std::memory_order_release);
  }

  void take_in(const Version& version) {
    for (const int64_t known : seen_) {
      if (known == version.number) return;
    }
    seen_.push_back(version.number);
    if (seen_.size() > 64) seen_.erase(seen_.begin());
    for (size_t number = 0; number < std::min(pages_.size(), version.pages.size()); ++number) {
      if (pages_[number] != version.pages[number]) take_in_page(version, number);
    }
    for (; covered_ < version.rows; ++covered_) {
      const int64_t row = covered_;
      tail_.append(key_at(version, row), row, version.page(row).radius[row % kPageRows]);
    }
    pages_ = version.pages;
  }
  void take_in_page(const Version& version, size_t number) {
    const Page &page = *version.pages[number], &old = *pages_[number];
    const int64_t first = static_cast<int64_t>(number) * kPageRows;
    const int64_t here = std::min({kPageRows, version.rows - first, covered_ - first});
    for (int64_t offset = 0; offset < here; ++offset) {
      const int64_t row = first + offset;
      if (page.radius[offset] > old.radius[offset]) raise(row, page.radius[offset]);
      if (page.slot[offset] == old.slot[offset]) continue;
      tail_.append(key_at(version, row), row, page.radius[offset]);
      // The moved key may have come near any other.
      if (row < kFirstRows) run_.clear(row);
    }
  }
  void raise(int64_t row, float radius) {
    if (row < kFirstRows) {
      run_.raise(row, radius);
      run_.clear(row);
    }
    for (int64_t at = 0; at < tail_.count; ++at) {
      if (tail_.row[at] == row) tail_.raise(at, radius);
    }
  }
  Index index() const {
    static const std::vector<float> centre(kWidth);
    static const std::vector<uint16_t> rows = [] {
      std::vector<uint16_t> made(kSlots * kWidth);
      for (int r = 0; r < kSlots; ++r) {  // of 16 elements, j and j + 8 side by side
        const int in_16 = r % 16, at = r / 16 * 16 + in_16 % 8 * 2 + in_16 / 8;
        made[r * kWidth + at] = 0x3f80;  // 1 in bfloat16
      }
      return made;
    }();
    static const std::vector<double> turn = [] {
      std::vector<double> made(kNear * kNear);
      for (int i = 0; i < kNear; ++i) made[i * kNear + i] = 1;
      return made;
    }();
    const Projection projection{centre.data(), rows.data(), turn.data(), kStep, 1.0, 1.0, 1e-6, false, true};
    return {projection, {run_.segment(), tail_.segment()}, covered_, kSmall, kLarge};
  }

  const bool careless_;
  std::vector<float> keys_;  // [kMostKeys, kWidth], at one address for life
  int64_t slots_ = 0;
  Version version_of_writer_;
  std::deque<Version> versions_;  // all of them: who still reads one is not known
  std::atomic<const Version*> current_{nullptr};

  std::mutex taking_in_;
  Codes run_, tail_;
  std::vector<int64_t> positions_, seen_;
  std::vector<std::shared_ptr<Page>> pages_;
  int64_t covered_ = 0;
};

// Ask a version for keys of its own, exactly and a little beside; return the wrong answers.
int64_t ask(const Codebook& book, const Version& version, const Index& index,
            std::minstd_rand& random) {
  constexpr int kBatch = 4;
  float queries[kBatch][kWidth];
  int64_t expected[kBatch];
  for (int b = 0; b < kBatch; ++b) {
    // Every second of the youngest: they are what is being written about.
    const int64_t back = static_cast<int64_t>(random() % (b % 2 ? 64 : version.rows));
    const int64_t row = version.rows - 1 - back, offset = row % kPageRows;
    const Page& page = version.page(row);
    const float* key = book.key_at(version, row);
    std::copy(key, key + kWidth, queries[b]);
    const bool beside = random() % 2;
    if (beside) queries[b][0] += kBetween;
    const float radius = page.radius[offset];
    expected[b] = page.live[offset] && radius >= (beside ? kBetween : 0) ? row : -1;
  }
  const Queries asked{queries, kWidth, Dtype::float32, kBatch};
  const Keys keys = book.keys_of(version);
  bool hit[kBatch];
  int64_t found[kBatch];
  double squared[kBatch];
  int64_t wrong = 0;
  Effort effort{};  // as every look-up from Python counts it
  find_indexed(asked, keys, index, 1, {found, squared, hit}, &effort);
  for (int b = 0; b < kBatch; ++b) wrong += found[b] != expected[b];
  if (random() % 64) return wrong;
  find_dense(asked, keys, kLarge, 1, {found, squared, hit}, &effort);
  for (int b = 0; b < kBatch; ++b) wrong += found[b] != expected[b];
  return wrong;
}

// Let readers ask while a writer makes so many edits; return the wrong answers.
int64_t run(int64_t edits, bool careless) {
  Codebook book(careless);
  std::atomic<bool> done{false};
  std::atomic<int64_t> look_ups{0}, wrong{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < kReaders; ++reader) {
    readers.emplace_back([&, reader] {
      std::minstd_rand random(static_cast<unsigned>(reader) + 1);
      while (!done.load(std::memory_order_acquire)) {
        const Version& version = *book.current();
        const Index index = book.view(version);
        for (int i = 0; i < 8; ++i) {  // the version grows old meanwhile
          wrong += ask(book, version, index, random);
          look_ups += 4;
        }
      }
    });
  }
  std::minstd_rand random(99);
  int64_t made = 0;
  while (made < edits && book.edit(random)) {
    ++made;
    if (made % 16 == 0) std::this_thread::yield();
  }
  done.store(true, std::memory_order_release);
  for (std::thread& reader : readers) reader.join();
  std::printf("%s: %lld look-ups in %d threads beside %lld edits, %lld wrong\n", instruction_set(),
              static_cast<long long>(look_ups), kReaders, static_cast<long long>(made),
              static_cast<long long>(wrong));
  return wrong;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t edits = count > 1 ? std::atoll(arguments[1]) : 3000;
  int64_t wrong = 0;
  for (const char* set : {"portable", "avx2", "avx512vnni"}) {
    if (use_instruction_set(set)) wrong += run(edits, count > 2);
  }
  return wrong ? 1 : 0;
}
