// Python's view of the look-up: addresses in, answers written in place, no torch in the link.
//
// What is described once a version (`Book`, `Plan`) takes names; the calls made for every query
// take the same few addresses by position, because names cost more than a look-up in a small
// codebook.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lookup.h"

namespace py = pybind11;
using namespace grace_fast;
using py::arg;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

// The answers of a batch in one buffer: S [B] float64, row [B] int64, hit [B] bool. Tensors are
// made of it when they are read; three of them cost more than the look-up.
template <typename Find>
py::tuple answered(int64_t batch, const Find& find) {
  const auto buffer = py::reinterpret_steal<py::object>(
      PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(17 * batch)));
  if (!buffer) throw py::error_already_set();
  char* squared = PyByteArray_AS_STRING(buffer.ptr());
  int64_t hits;
  {
    const py::gil_scoped_release unlocked;
    hits =
        find(reinterpret_cast<bool*>(squared + 16 * batch),
             reinterpret_cast<int64_t*>(squared + 8 * batch), reinterpret_cast<double*>(squared));
  }
  return py::make_tuple(hits, buffer);
}

struct Book {
  Keys keys;
  Book(Address slots, Address slot_pages, Address live_pages, Address radius_pages, int64_t rows,
       int64_t width, const std::string& dtype)
      : keys{pointer<const void>(slots),
             pointer<const int64_t* const>(slot_pages),
             pointer<const bool* const>(live_pages),
             pointer<const float* const>(radius_pages),
             rows,
             width,
             dtype_of(dtype)} {}

  Queries queries(Address first, int64_t stride, int dtype, int64_t batch) const {
    return {pointer<const void>(first), stride, static_cast<Dtype>(dtype), batch};
  }
  void nearest(Address first, int64_t stride, int dtype, int64_t batch, int threads, Address row,
               Address squared) const {
    const py::gil_scoped_release unlocked;
    grace_fast::nearest(queries(first, stride, dtype, batch), keys, threads, pointer<int64_t>(row),
                        pointer<double>(squared));
  }
  py::tuple find(Address first, int64_t stride, int dtype, int64_t batch, int threads,
                 float widest) const {
    return answered(batch, [&](bool* hit, int64_t* row, double* squared) {
      return find_dense(queries(first, stride, dtype, batch), keys, widest, threads, hit, row,
                        squared);
    });
  }
};

struct Plan {
  Certificate certificate{};

  void set_map(Address centre, Address rows, Address turn, double step, double lipschitz,
               double row_norm, double eta, bool norm_slot, bool far) {
    certificate.map = {pointer<const float>(centre),
                       pointer<const uint16_t>(rows),
                       pointer<const double>(turn),
                       step,
                       lipschitz,
                       row_norm,
                       eta,
                       norm_slot,
                       far};
  }
  void set_bounds(int64_t covered, float floor, float widest) {
    certificate.covered = covered;
    certificate.floor = floor;
    certificate.widest = widest;
  }
  void add_part(int64_t count, Address row, Address near, Address far, Address reach,
                double near_residual, double far_residual, Address leaf_boxes, Address super_boxes,
                Address super_reach, Address isolated) {
    certificate.parts.push_back(
        {count, pointer<const int32_t>(row), pointer<const uint8_t>(near),
         pointer<const uint8_t>(far), pointer<const float>(reach), near_residual, far_residual,
         pointer<const int16_t>(leaf_boxes), pointer<const int16_t>(super_boxes),
         pointer<const float>(super_reach), pointer<const uint8_t>(isolated)});
  }
  py::tuple find(const Book& book, Address first, int64_t stride, int dtype, int64_t batch,
                 int threads) const {
    return answered(batch, [&](bool* hit, int64_t* row, double* squared) {
      return find_certified(book.queries(first, stride, dtype, batch), book.keys, certificate,
                            threads, hit, row, squared, nullptr);
    });
  }
  py::dict effort(const Book& book, Address first, int64_t stride, int dtype, int64_t batch) const {
    Effort effort{};
    answered(batch, [&](bool* hit, int64_t* row, double* squared) {
      return find_certified(book.queries(first, stride, dtype, batch), book.keys, certificate, 1,
                            hit, row, squared, &effort);
    });
    py::dict read;
    read["boxes"] = effort.boxes;
    read["codes"] = effort.codes;
    read["survivors"] = effort.survivors;
    read["rechecks"] = effort.rechecks;
    read["exhaustive"] = effort.exhaustive;
    return read;
  }
  void isolated(const Book& book, int64_t part, Address positions, int64_t count,
                Address bits) const {
    const py::gil_scoped_release unlocked;
    find_isolated(book.keys, certificate, part, pointer<const int64_t>(positions), count,
                  pointer<uint8_t>(bits));
  }
};

void kd_order_at(Address points, int64_t count, Address order) {
  const py::gil_scoped_release unlocked;
  kd_order(pointer<const int16_t>(points), count, pointer<int32_t>(order));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Look-ups on the host; see csrc/lookup.h for the contract.";
  py::class_<Book>(module, "Book", "The keys of one version: addresses of slots and page tables.")
      .def(py::init<Address, Address, Address, Address, int64_t, int64_t, const std::string&>(),
           py::kw_only(), arg("slots"), arg("slot_pages"), arg("live_pages"), arg("radius_pages"),
           arg("rows"), arg("width"), arg("dtype"))
      .def("nearest", &Book::nearest, "queries, stride, dtype, batch, threads, row, squared")
      .def("find", &Book::find,
           "queries, stride, dtype, batch, threads, widest; (number of hits, answers)");
  py::class_<Plan>(module, "Plan", "A certificate as one version sees it.")
      .def(py::init<>())
      .def("set_map", &Plan::set_map, py::kw_only(), arg("centre"), arg("rows"), arg("turn"),
           arg("step"), arg("lipschitz"), arg("row_norm"), arg("eta"), arg("norm_slot"), arg("far"))
      .def("set_bounds", &Plan::set_bounds, py::kw_only(), arg("covered"), arg("floor"),
           arg("widest"))
      .def("add_part", &Plan::add_part, py::kw_only(), arg("count"), arg("row"), arg("near"),
           arg("far"), arg("reach"), arg("near_residual"), arg("far_residual"), arg("leaf_boxes"),
           arg("super_boxes"), arg("super_reach"), arg("isolated"))
      .def("find", &Plan::find,
           "book, queries, stride, dtype, batch, threads; (number of hits, answers)")
      .def("effort", &Plan::effort,
           "book, queries, stride, dtype, batch; what `find` reads for them")
      .def("isolated", &Plan::isolated, py::kw_only(), arg("book"), arg("part"), arg("positions"),
           arg("count"), arg("bits"));
  module.def("kd_order", &kd_order_at, py::kw_only(), arg("points"), arg("count"), arg("order"),
             "Write the kd order of points [count, 16] int16 as rows [count] int32.");
  module.def("instruction_set", &instruction_set, "The instruction set in use.");
  module.def("use_instruction_set", &use_instruction_set, arg("name"),
             "Use another one that this processor runs; tell whether it does. For tests.");
}
