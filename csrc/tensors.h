// Read a torch tensor without linking torch: the DLPack C exchange API, which torch >= 2.10 hangs
// on torch.Tensor as the capsule `__dlpack_c_exchange_api__`. It fills a view in 30 ns, where the
// same facts asked one by one in Python cost more than a look-up.
//
// The layouts are those of DLPack 1.x (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
#pragma once
#include <Python.h>

#include <algorithm>
#include <cstring>

#include "lookup.h"

namespace grace_fast {

struct TensorView {
  void* data;
  int32_t device_kind, device_number;
  int32_t dimensions;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  static constexpr int kHost = 1;
  static constexpr int kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6;
  // Whether the elements are of a type that queries may have, and which.
  bool dtype(Dtype* out) const {
    if (lanes != 1) return false;
    if (kind == kFloat && bits == 32) return *out = Dtype::float32, true;
    if (kind == kFloat && bits == 16) return *out = Dtype::float16, true;
    if (kind == kBFloat && bits == 16) return *out = Dtype::bfloat16, true;
    return false;
  }
  bool has_type_of(const TensorView& other) const {
    return kind == other.kind && bits == other.bits && lanes == other.lanes;
  }
  int64_t elements() const {
    int64_t count = 1;
    for (int axis = 0; axis < dimensions; ++axis) count *= shape[axis];
    return count;
  }
  // Whether the elements lie in order and side by side.
  bool is_contiguous() const {
    int64_t step = 1;
    for (int axis = dimensions - 1; axis >= 0; --axis) {
      if (shape[axis] != 1 && strides[axis] != step) return false;
      step *= shape[axis];
    }
    return true;
  }
  // The address of an element of one axis, or of two.
  const char* at(int64_t first, int64_t second = 0) const {
    const int64_t place = first * strides[0] + (dimensions > 1 ? second * strides[1] : 0);
    return static_cast<const char*>(data) + byte_offset + place * (bits / 8);
  }
  // Whether `is_true` can read the elements: whole numbers, truth values, or float32.
  bool has_truth() const {
    if (lanes != 1) return false;
    return kind == kInt || kind == kUInt || kind == kBool || (kind == kFloat && bits == 32);
  }
  bool is_true(int64_t first, int64_t second) const {
    const char* element = at(first, second);
    if (kind == kFloat) {
      float value;
      std::memcpy(&value, element, sizeof value);
      return value != 0;
    }
    return std::any_of(element, element + bits / 8, [](char byte) { return byte != 0; });
  }
};

class TensorReader {
 public:
  // Read tensors of exactly this type from now on; false where its API is missing or too new.
  bool use(PyObject* type) {
    PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const auto* api =
        capsule ? static_cast<const Api*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))
                : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    if (!api || api->major != 1 || !api->view_no_sync) return false;
    type_ = reinterpret_cast<PyTypeObject*>(type);
    view_ = api->view_no_sync;
    return true;
  }
  // Whether this is a tensor, and of no subclass.
  bool takes(PyObject* object) const { return type_ && Py_TYPE(object) == type_; }
  // View a tensor; false for anything else, subclasses included, and for what has no plain memory.
  bool view(PyObject* object, TensorView* out) const {
    if (Py_TYPE(object) != type_) return false;
    if (view_(object, out) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  struct Api {
    uint32_t major, minor;
    void* older;
    void* allocate;
    void* own_no_sync;
    void* wrap_no_sync;
    int (*view_no_sync)(void* object, TensorView* out);
    int (*current_stream)(int32_t device_kind, int32_t device_number, void** stream);
  };
  PyTypeObject* type_ = nullptr;
  int (*view_)(void*, TensorView*) = nullptr;
};

}  // namespace grace_fast
