// Python's view of the GPU look-up: addresses in, work queued on a stream, no torch in the link.
//
// A look-up is described once (`Lookup`); what is called for every query takes addresses by
// position. `pack_book` is the only place that knows how a Book lies in memory.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch.h"
#ifdef GRACE_FAST_ON_HOST
#include "on_host.h"
#include "on_host_order.h"
#endif

namespace py = pybind11;
using namespace grace_fast::device;
using py::arg;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

int64_t padded_width(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

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
  workspace->tickets = pointer<uint32_t>(take(2 * kMostQueries * 4));
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

Map map_of(const py::dict& from) {
  Map map{};
  map.centre = pointer<const float>(from["centre"].cast<Address>());
  map.rows = pointer<const uint16_t>(from["rows"].cast<Address>());
  map.turn = pointer<const double>(from["turn"].cast<Address>());
  map.step = from["step"].cast<double>();
  map.lipschitz = from["lipschitz"].cast<double>();
  map.row_norm = from["row_norm"].cast<double>();
  map.eta = from["eta"].cast<double>();
  map.norm_slot = from["norm_slot"].cast<bool>();
  map.far = from["far"].cast<bool>();
  return map;
}

Part part_of(const py::dict& from) {
  const auto address = [&](const char* name) { return from[name].cast<Address>(); };
  Part part{};
  part.row = pointer<const int32_t>(address("row"));
  part.near = pointer<const uint8_t>(address("near"));
  part.far = pointer<const uint8_t>(address("far"));
  part.reach = pointer<const float>(address("reach"));
  part.leaf_boxes = pointer<const int16_t>(address("leaf_boxes"));
  part.super_boxes = pointer<const int16_t>(address("super_boxes"));
  part.super_reach = pointer<const float>(address("super_reach"));
  part.isolated = pointer<const uint8_t>(address("isolated"));
  part.count = from["count"].cast<int32_t>();
  part.first = from["first"].cast<int32_t>();
  part.last = from["last"].cast<int32_t>();
  // In float32, rounded up.
  part.near_residual = static_cast<float>(from["near_residual"].cast<double>() * (1 + 1e-6));
  part.far_residual = static_cast<float>(from["far_residual"].cast<double>() * (1 + 1e-6));
  return part;
}

py::bytes pack_book(Address keys, Address key_slot, Address live, Address radius, Address values,
                    Address value_slot, int64_t rows, int64_t covered, float widest, float floor,
                    const py::object& map, const py::list& parts) {
  if (rows < 0 || rows > INT32_MAX) throw std::invalid_argument("rows must be in [0, 2^31)");
  if (py::len(parts) > kMostParts) {
    throw std::invalid_argument("at most " + std::to_string(kMostParts) + " parts, got " +
                                std::to_string(py::len(parts)));
  }
  Book book{};
  book.keys = pointer<const void>(keys);
  book.key_slot = pointer<const int64_t>(key_slot);
  book.live = pointer<const bool>(live);
  book.radius = pointer<const float>(radius);
  book.values = pointer<const void>(values);
  book.value_slot = pointer<const int64_t>(value_slot);
  book.rows = rows;
  book.covered = covered;
  book.widest = widest;
  book.floor = floor;
  if (!map.is_none()) {
    book.map = map_of(map.cast<py::dict>());
    for (const auto& each : parts) book.part[book.parts++] = part_of(each.cast<py::dict>());
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

// What stays the same from call to call.
struct Lookup {
  Call call{};
  int blocks;
  bool certified;

  Lookup(Address book, Address workspace, int blocks_, int width, const std::string& dtype,
         int value_width, bool certified_)
      : blocks(blocks_), certified(certified_) {
    if (blocks < 1 || width < 1) throw std::invalid_argument("blocks and width must be positive");
    call.book = pointer<const Book>(book);
    call.key_dtype = dtype_of(dtype);
    call.width = width;
    call.value_width = value_width;
    lay_out(workspace, width, blocks, &call.workspace);
  }

  void launch(const Call& made, Address stream) const {
    if (made.batch < 1 || made.batch > kMostQueries) {
      throw std::invalid_argument("a call takes 1 .. " + std::to_string(kMostQueries) + " queries");
    }
    const auto launch = certified ? launch_certified : launch_dense;
    check(launch(made, blocks, pointer<void>(stream)));
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
  void replace(Address queries, int64_t stride, int dtype, int batch, Address hit, Address row,
               Address output, int output_dtype, int64_t output_stride, int64_t token_stride,
               int tokens, Address mask, Address stream) const {
    Call made = asked(queries, stride, dtype, batch, hit, row, 0);
    if (!made.row) throw std::invalid_argument("replace needs room for the rows");
    made.output = pointer<void>(output);
    made.output_dtype = static_cast<Dtype>(output_dtype);
    made.output_stride = output_stride;
    made.token_stride = token_stride;
    made.tokens = tokens;
    made.mask = pointer<const bool>(mask);
    launch(made, stream);
  }
};

}  // namespace

#ifndef GRACE_FAST_MODULE
#define GRACE_FAST_MODULE _cuda
#endif

PYBIND11_MODULE(GRACE_FAST_MODULE, module) {
  module.doc() = "Look-ups on a GPU; see csrc/cuda/layout.h for the contract.";
  module.attr("MOST_QUERIES") = kMostQueries;
  module.attr("MOST_PARTS") = kMostParts;
  module.attr("BOOK_BYTES") = sizeof(Book);
  py::dict offsets;
  offsets["rows"] = offsetof(Book, rows);
  offsets["covered"] = offsetof(Book, covered);
  offsets["widest"] = offsetof(Book, widest);
  offsets["floor"] = offsetof(Book, floor);
  offsets["parts"] = offsetof(Book, parts);
  module.attr("BOOK_OFFSETS") = offsets;
  module.def("devices", &devices, "The number of devices, or in words why there is none.");
  module.def("device", &device, arg("index"), "What the launches need to know of a device.");
  module.def("workspace_bytes", &workspace_bytes, py::kw_only(), arg("width"), arg("blocks"),
             "Bytes of one stream's workspace; to be zero before the first look-up.");
  module.def("pack_book", &pack_book, py::kw_only(), arg("keys"), arg("key_slot"), arg("live"),
             arg("radius"), arg("values"), arg("value_slot"), arg("rows"), arg("covered"),
             arg("widest"), arg("floor"), arg("map"), arg("parts"),
             "The bytes of a Book, to be copied to the device.");
  py::class_<Lookup>(module, "Lookup", "Look-ups in one book with one stream's workspace.")
      .def(py::init<Address, Address, int, int, const std::string&, int, bool>(), py::kw_only(),
           arg("book"), arg("workspace"), arg("blocks"), arg("width"), arg("dtype"),
           arg("value_width"), arg("certified"))
      .def("find", &Lookup::find, "queries, stride, dtype, batch, hit, row, squared, stream")
      .def("replace", &Lookup::replace,
           "queries, stride, dtype, batch, hit, row, output, output_dtype, output_stride, "
           "token_stride, tokens, mask, stream");
#ifdef GRACE_FAST_ON_HOST
  module.def("set_order", [](uint64_t seed, int threads) { order() = {seed, threads}; });
  module.def("announce", [](Address at, int64_t bytes) {
    on_host::announced().push_back({pointer<const char>(at), pointer<const char>(at) + bytes});
  });
  module.def("forget", [] { on_host::announced().clear(); });
#endif
}
