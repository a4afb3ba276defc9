// Read a torch tensor without linking torch: the DLPack C exchange API, which torch >= 2.10 hangs
// on torch.Tensor as the capsule `__dlpack_c_exchange_api__`. It fills a view in 30 ns, where the
// same facts asked one by one in Python cost more than a look-up.
//
// The layouts are those of DLPack 1.x (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
#pragma once
#include <Python.h>

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
  // Whether the elements are of a type that queries may have, and which.
  bool dtype(Dtype* out) const {
    constexpr int kFloat = 2, kBFloat = 4;
    if (lanes != 1) return false;
    if (kind == kFloat && bits == 32) return *out = Dtype::float32, true;
    if (kind == kFloat && bits == 16) return *out = Dtype::float16, true;
    if (kind == kBFloat && bits == 16) return *out = Dtype::bfloat16, true;
    return false;
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
