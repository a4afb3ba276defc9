// A version of a codebook as the extension holds it: its keys, what its index says, and a look-up.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "lookup.h"
#include "python.h"
#include "tensors.h"

namespace grace_fast {

namespace py = pybind11;

// The answers of a batch in one buffer: S [B] float64, row [B] int64, hit [B] bool, and what it
// took: proved misses and keys read, int64 each. Tensors are made of it when they are read; three
// of them cost more than the look-up.
template <typename Find>
py::tuple answered(int64_t batch, Effort* effort, const Find& find) {
  const auto buffer = py::reinterpret_steal<py::object>(
      PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(17 * batch + 16)));
  if (!buffer) throw py::error_already_set();
  char* squared = PyByteArray_AS_STRING(buffer.ptr());
  const Answers answers{reinterpret_cast<int64_t*>(squared + 8 * batch),
                        reinterpret_cast<double*>(squared),
                        reinterpret_cast<bool*>(squared + 16 * batch)};
  int64_t hits;
  {
    const py::gil_scoped_release unlocked;
    hits = find(answers);
  }
  const int64_t work[] = {effort->proved, effort->exact_reranks};
  std::memcpy(squared + 17 * batch, work, sizeof work);
  return py::make_tuple(hits, buffer);
}

// Keys in a file: `test(block)` is called in Python, once a block, by whichever thread needs it.
struct MappedKeys {
  Mapped mapped;
  MappedKeys(int64_t slots, int64_t block_bytes, Address tested, py::function test,
             py::function lose, int guarded)
      : mapped{slots,
               block_bytes,
               pointer<const uint8_t>(tested),
               [test = std::move(test)](int64_t block) {
                 const py::gil_scoped_acquire locked;
                 test(block);
               },
               [lose = std::move(lose)] {
                 const py::gil_scoped_acquire locked;
                 lose();
               },
               guarded} {}
};

// After keys were read: nothing that a file no longer held may decide.
inline void check_not_lost(const Keys& keys) {
  if (keys.mapped && is_lost(keys.mapped->guarded)) keys.mapped->lose();
}

inline Queries queries_at(Address first, int64_t stride, int dtype, int64_t batch) {
  return {pointer<const void>(first), stride, static_cast<Dtype>(dtype), batch};
}

struct Plan {
  Index index;

  Plan(const py::dict& projection, const py::list& segments, int64_t covered, float min_radius,
       float widest)
      : index{projection_of<Projection>(Fields(projection)), {}, covered, min_radius, widest} {
    for (const py::handle segment : segments) index.segments.push_back(segment_of(Fields(segment)));
  }
  static Segment segment_of(const Fields& of) {
    return {of["count"],
            of["rows"],
            of["near"],
            of["far"],
            of["leaf_max_radius"],
            of["near_error"],
            of["far_error"],
            of["leaf_boxes"],
            of["node_boxes"],
            of["node_max_radius"],
            of["isolated"]};
  }
};

// A version of a codebook, ready to be asked: its keys, what its index says of them (or nothing),
// and up to which batch reading by it is predicted to cost less than reading all keys.
struct Version {
  Keys keys;
  const Plan* plan;
  float widest;
  double predicted_bytes;  // of one query, by the index
  int64_t indexed_up_to;

  // What `find` reads for some queries, by the plan that has to be there.
  py::tuple effort(Address first, int64_t stride, int dtype, int64_t batch) const {
    Effort effort{};
    answered(batch, &effort, [&](const Answers& answers) {
      return find_indexed(queries_at(first, stride, dtype, batch), keys, plan->index, 1, answers,
                          &effort);
    });
    return py::make_tuple(effort.boxes, effort.codes, effort.candidates, effort.exact_reranks,
                          effort.exhaustive);
  }
  void isolated(int64_t segment, Address positions, int64_t count, Address bits) const {
    const py::gil_scoped_release unlocked;
    find_isolated(keys, plan->index, segment, pointer<const int64_t>(positions), count,
                  pointer<uint8_t>(bits));
  }
  // by_index: only keys that are not farther than `within`; there has to be a plan.
  void nearest(Address first, int64_t stride, int dtype, int64_t batch, int threads, Address row,
               Address squared, double within, bool by_index) const {
    const py::gil_scoped_release unlocked;
    const Queries queries = queries_at(first, stride, dtype, batch);
    const Answers answers{pointer<int64_t>(row), pointer<double>(squared), nullptr};
    if (by_index) {
      nearest_indexed(queries, keys, plan->index, within, threads, answers);
    } else {
      nearest_dense(queries, keys, threads, answers);
    }
    check_not_lost(keys);
  }
  py::tuple find(Address first, int64_t stride, int dtype, int64_t batch, int threads) const {
    return found(queries_at(first, stride, dtype, batch), threads);
  }
  // The same for a tensor [B, D] on the host; None for any that has to be looked at in Python.
  py::object ask(py::handle queries) const {
    TensorView view;
    Dtype dtype;
    if (!tensors.view(queries.ptr(), &view) || view.device_kind != TensorView::kHost ||
        view.dimensions != 2 || view.shape[0] < 1 || view.shape[1] != keys.width ||
        view.strides[1] != 1 || !view.dtype(&dtype)) {
      return py::none();
    }
    const int64_t batch = view.shape[0];
    const char* first = static_cast<const char*>(view.data) + view.byte_offset;
    // What torch.get_num_threads() says: it sets this very variable of the libgomp that we share.
    return found({first, view.strides[0], dtype, batch}, batch == 1 ? 1 : omp_get_max_threads());
  }

  // The same for a caller that holds the GIL, which it gives up for what takes long, and where keys
  // in a file may have to be tested. Returns the number of hits.
  int64_t found_with_gil(const Queries& queries, const Answers& answers, Effort* effort) const {
    const int threads = queries.batch == 1 ? 1 : omp_get_max_threads();
    int64_t hits;
    if (keys.mapped || bytes_to_read(queries.batch) > kBriefly) {
      const py::gil_scoped_release unlocked;
      hits = decided(queries, threads, answers, effort);
    } else {
      // Who gives the GIL up may wait 5 ms until another thread does.
      hits = decided(queries, threads, answers, effort);
    }
    check_not_lost(keys);
    return hits;
  }

  // Whether one query is looked up by reading little.
  bool is_quick() const { return !keys.mapped && bytes_to_read(1) <= kBriefly; }

  inline static TensorReader tensors;

 private:
  static constexpr double kBriefly = 1 << 20;  // bytes, read in some 50 us
  double bytes_to_read(int64_t batch) const {
    const double all = static_cast<double>(keys.rows) * static_cast<double>(keys.width) *
                       (keys.dtype == Dtype::float32 ? 4 : 2);
    const bool is_indexed = plan && batch <= indexed_up_to;
    return is_indexed ? predicted_bytes * static_cast<double>(batch) : all;
  }

  py::tuple found(const Queries& queries, int threads) const {
    Effort effort{};
    return answered(queries.batch, &effort, [&](const Answers& answers) {
      const int64_t hits = decided(queries, threads, answers, &effort);
      check_not_lost(keys);
      return hits;
    });
  }
  int64_t decided(const Queries& queries, int threads, const Answers& answers,
                  Effort* effort) const {
    if (!plan || queries.batch > indexed_up_to) {
      return find_dense(queries, keys, widest, threads, answers, effort);
    }
    // A thread is worth waking for 16 MiB, some 2 ms: it may have to wait for a busy core.
    const double wanted = 1 + predicted_bytes * static_cast<double>(queries.batch) / (1 << 24);
    const int worth = static_cast<int>(std::min<double>(threads, wanted));
    return find_indexed(queries, keys, plan->index, worth, answers, effort);
  }
};

}  // namespace grace_fast
