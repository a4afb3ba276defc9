// Python's view of the look-up: addresses in, answers written in place, no torch in the link.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lookup.h"

namespace py = pybind11;
using namespace grace_fast;

namespace {

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void nearest_at(uintptr_t queries, uintptr_t keys, uintptr_t key_slot, uintptr_t live,
                uintptr_t row, uintptr_t squared, int64_t batch, int64_t rows, int64_t width,
                const std::string& dtype) {
  const Keys described{pointer<const void>(keys),
                       pointer<const int64_t>(key_slot),
                       pointer<const bool>(live),
                       rows,
                       width,
                       dtype_of(dtype)};
  const py::gil_scoped_release unlocked;
  nearest(pointer<const float>(queries), batch, described, pointer<int64_t>(row),
          pointer<double>(squared));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Look-ups on the host; see csrc/lookup.h for the contract.";
  module.def("nearest", &nearest_at, py::kw_only(), py::arg("queries"), py::arg("keys"),
             py::arg("key_slot"), py::arg("live"), py::arg("row"), py::arg("squared"),
             py::arg("batch"), py::arg("rows"), py::arg("width"), py::arg("dtype"),
             "Write the nearest live row [B] and its S [B]; arguments are addresses and sizes.");
}
