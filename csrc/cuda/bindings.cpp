// Python's view of the GPU look-up: addresses in, work queued on a stream, no torch in the link.
//
// A look-up is described once (`Lookup`); what is called for every query takes addresses by
// position. `pack_book` is the only place that knows how a Book lies in memory.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../python.h"
#include "launch.h"
#ifdef GRACE_FAST_ON_HOST
#include "on_host.h"
#include "on_host_order.h"
#endif

namespace py = pybind11;
using namespace grace_fast::device;
using grace_fast::Address;
using grace_fast::Fields;
using grace_fast::pointer;
using grace_fast::projection_of;
using py::arg;

namespace {

int64_t padded_width(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

void check(int error) {
  if (error) {
    throw std::runtime_error("CUDA error " + std::to_string(error) + ": " + error_text(error));
  }
}

// Lay a workspace out, and return how many bytes that takes.
int64_t lay_out(Address base, int64_t width, int64_t blocks, Workspace* workspace) {
  Address at = base;
  const auto take = [&](int64_t bytes) {
    const Address here = at;
    at += static_cast<Address>((bytes + 255) / 256 * 256);
    return here;
  };
  // One piece, so that it is zeroed in one go.
  const Address counters = take(kCounterBytes);
  workspace->tickets = pointer<uint32_t>(counters);
  workspace->handout = pointer<Handout>(counters + 2 * kMostQueries * 4);
  workspace->replaced = pointer<Replaced>(take(kMostQueries * sizeof(Replaced)));
  workspace->sums = pointer<float>(take(kMostQueries * kSlots * 4));
  workspace->squares = pointer<float>(take(kMostQueries * 2 * 4));
  workspace->encoded = pointer<Encoded>(take(kMostQueries * static_cast<int64_t>(sizeof(Encoded))));
  workspace->best = pointer<BestTwo>(take(kMostQueries * blocks * 16));
  workspace->wide = pointer<float>(take(kMostQueries * padded_width(width) * 4));
  return static_cast<int64_t>(at - base);
}

int64_t workspace_bytes(int64_t width, int64_t blocks) {
  Workspace unused;
  return lay_out(0, width, blocks, &unused);
}

Segment segment_of(const Fields& of) {
  const auto rounded_up = [](double error) { return static_cast<float>(error * (1 + 1e-6)); };
  return {of["rows"],
          of["near"],
          of["far"],
          of["leaf_max_radius"],
          of["leaf_boxes"],
          of["node_boxes"],
          of["node_max_radius"],
          of["isolated"],
          of["count"],
          of["first"],
          of["last"],
          rounded_up(of["near_error"]),
          rounded_up(of["far_error"]),
          0};
}

py::bytes pack_book(const py::dict& columns, int64_t rows, int64_t covered, float widest,
                    float min_radius, const py::object& projection, const py::list& segments) {
  if (rows < 0 || rows > INT32_MAX) throw std::invalid_argument("rows must be in [0, 2^31)");
  if (py::len(segments) > kMostSegments) {
    throw std::invalid_argument("at most " + std::to_string(kMostSegments) + " parts, got " +
                                std::to_string(py::len(segments)));
  }
  const Fields of(columns);
  Book book{of["keys"],
            of["key_slot"],
            of["live"],
            of["radius"],
            of["values"],
            of["value_slot"],
            rows,
            covered,
            widest,
            min_radius,
            0,
            0,
            {},
            {}};
  if (!projection.is_none()) {
    book.projection = projection_of<Projection>(Fields(projection));
    for (const py::handle each : segments) {
      book.segment[book.segments++] = segment_of(Fields(each));
    }
  }
  return py::bytes(reinterpret_cast<const char*>(&book), sizeof book);
}

py::dict device(int index) {
  Device found;
  check(describe_device(index, &found));
  py::dict out;
  out["multiprocessors"] = found.multiprocessors;
  out["shared_memory"] = found.shared_memory;
  out["capability"] = py::make_tuple(found.major, found.minor);
  return out;
}

// How many devices there are, or in words why none can be used.
py::object devices() {
  int count = 0;
  const int error = device_count(&count);
  if (error) return py::str("CUDA error " + std::to_string(error) + ": " + error_text(error));
  return py::int_(count);
}

uint64_t capture(Address stream) {
  uint64_t number = 0;
  check(capture_of(pointer<void>(stream), &number));
  return number;
}

// What stays the same from call to call.
struct Lookup {
  Call call{};
  int blocks;
  bool indexed;
  Device device{};

  Lookup(Address book, Address workspace, int most_blocks, int width, int dtype, int value_width,
         bool indexed_, int64_t expected_rows, int device_index)
      : blocks(indexed_ ? most_blocks : dense_blocks(expected_rows, most_blocks)),
        indexed(indexed_) {
    if (most_blocks < 1 || width < 1) {
      throw std::invalid_argument("blocks and width must be positive");
    }
    call.book = pointer<const Book>(book);
    call.key_dtype = static_cast<Dtype>(dtype);
    call.width = width;
    call.value_width = value_width;
    lay_out(workspace, width, most_blocks, &call.workspace);
    check(describe_device(device_index, &device));
  }

  void launch(const Call& made, Address stream) const {
    if (made.batch < 1 || made.batch > kMostQueries) {
      throw std::invalid_argument("a call takes 1 .. " + std::to_string(kMostQueries) + " queries");
    }
    check(launch_look_up(made, indexed, blocks, device, pointer<void>(stream)));
  }
  Call asked(Address queries, int64_t stride, int dtype, int batch, Address hit, Address row,
             Address squared) const {
    Call made = call;
    made.queries = pointer<const void>(queries);
    made.query_stride = stride;
    made.query_dtype = static_cast<Dtype>(dtype);
    made.batch = batch;
    made.hit = pointer<bool>(hit);
    made.row = pointer<int64_t>(row);
    made.squared = pointer<double>(squared);
    return made;
  }
  void find(Address queries, int64_t stride, int dtype, int batch, Address hit, Address row,
            Address squared, Address stream) const {
    launch(asked(queries, stride, dtype, batch, hit, row, squared), stream);
  }
  void replace(Address queries, int64_t stride, int dtype, int batch, Address output,
               int output_dtype, int64_t output_stride, int64_t token_stride, int tokens,
               Address positions, int mode, Address stream) const {
    Call made = asked(queries, stride, dtype, batch, 0, 0, 0);
    if (mode < 0 || mode > static_cast<int>(Replacement::prompt)) {
      throw std::invalid_argument("mode must be 0 (all), 1 (last) or 2 (prompt)");
    }
    made.output = pointer<void>(output);
    made.output_dtype = static_cast<Dtype>(output_dtype);
    made.output_stride = output_stride;
    made.token_stride = token_stride;
    made.tokens = tokens;
    made.positions = pointer<const int64_t>(positions);
    made.mode = static_cast<Replacement>(mode);
    launch(made, stream);
  }
};

}  // namespace

#ifndef GRACE_FAST_MODULE
#define GRACE_FAST_MODULE _cuda
#endif

PYBIND11_MODULE(GRACE_FAST_MODULE, module) {
  module.doc() = "Look-ups on a GPU; see csrc/cuda/layout.h for the contract.";
  module.attr("ROWS_OFFSET") = offsetof(Book, rows);
  module.attr("COUNTER_BYTES") = kCounterBytes;  // of a workspace; zero before its first look-up
  module.def("devices", &devices, "The number of devices, or in words why there is none.");
  module.def("device", &device, arg("index"), "What the launches need to know of a device.");
  module.def("workspace_bytes", &workspace_bytes, py::kw_only(), arg("width"), arg("blocks"),
             "Bytes of a workspace, for look-ups that are made one after the other.");
  module.def("capture_of", &capture, arg("stream"),
             "The capture that a stream's launches go to; 0 where they run.");
  module.def("pack_book", &pack_book, py::kw_only(), arg("columns"), arg("rows"), arg("covered"),
             arg("widest"), arg("min_radius"), arg("projection").none(true), arg("segments"),
             "The bytes of a Book, to be copied to the device.");
  py::class_<Lookup>(module, "Lookup", "Look-ups in one book with one workspace.")
      .def(py::init<Address, Address, int, int, int, int, bool, int64_t, int>(), py::kw_only(),
           arg("book"), arg("workspace"), arg("blocks"), arg("width"), arg("dtype"),
           arg("value_width"), arg("indexed"), arg("expected_rows"), arg("device"))
      .def("find", &Lookup::find, "queries, stride, dtype, batch, hit, row, squared, stream")
      .def("replace", &Lookup::replace,
           "queries, stride, dtype, batch, output, output_dtype, output_stride, token_stride, "
           "tokens, positions, mode, stream");
#ifdef GRACE_FAST_ON_HOST
  module.def("set_order", [](uint64_t seed, int threads) {
    order().seed = seed;
    order().threads = threads;
  });
  module.def("set_capture", [](uint64_t number) { order().capture = number; });
  module.def("take_launched", [] {
    py::list names;
    for (const std::string& name : order().launched) names.append(name);
    order().launched.clear();
    return names;
  });
  module.def("announce", [](Address at, int64_t bytes) {
    on_host::announced().push_back({pointer<const char>(at), pointer<const char>(at) + bytes});
  });
  module.def("forget", [] { on_host::announced().clear(); });
  module.def("loads", [] {
    py::list of_block;
    for (const long loads : on_host::loads()) of_block.append(loads);
    return of_block;
  });
#endif
}
