// What the extensions take from Python: addresses, and structs as dicts of their fields.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace grace_fast {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The fields of a struct by name; each becomes what it is wanted as, an address a pointer.
class Fields {
 public:
  explicit Fields(pybind11::handle from) : from_(pybind11::cast<pybind11::dict>(from)) {}

  struct Field {
    pybind11::object value;
    template <typename T>
    operator T() const {
      if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value.cast<Address>());
      } else if constexpr (std::is_enum_v<T>) {
        return static_cast<T>(value.cast<int>());
      } else {
        return value.cast<T>();
      }
    }
  };
  Field operator[](const char* name) const { return {from_[name]}; }

 private:
  pybind11::dict from_;
};

// The projection of the host's layout, or of the device's.
template <typename Projection>
Projection projection_of(const Fields& of) {
  return {of["centre"],   of["rows"], of["turn"],      of["step"], of["lipschitz"],
          of["row_norm"], of["eta"],  of["norm_slot"], of["far"]};
}

}  // namespace grace_fast
