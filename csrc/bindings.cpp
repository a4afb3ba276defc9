// Python's view of the look-up: addresses in, answers written in place, no torch in the link.
//
// What is described once a version (`Book`, `Plan`) takes names; the calls made for every query
// take the same few addresses by position, because names cost more than a look-up in a small
// codebook.
#include <pybind11/stl.h>

#include "hook.h"
#include "version.h"

namespace py = pybind11;
using namespace grace_fast;
using py::arg;

namespace {

void kd_order_at(Address points, int64_t count, Address order, int threads) {
  const py::gil_scoped_release unlocked;
  kd_order(pointer<const int16_t>(points), count, threads, pointer<int32_t>(order));
}

// Described once an adaptor, called in every forward call of its model.
PyMethodDef described(const char* name, _PyCFunctionFast call, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          doc};
}
PyMethodDef layer_hook = described("layer_hook", call_layer_hook,
                                   "adaptor, args, rest; the output, None or NotImplemented");
PyMethodDef call_noted =
    described("run", call_noter, "forward, args, kwargs, otherwise; what forward returns");

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Look-ups on the host; see csrc/lookup.h for the contract.";
  py::class_<MappedKeys>(module, "MappedKeys", "The slots of a codebook that are in a file.")
      .def(py::init<int64_t, int64_t, Address, py::function, py::function, int>(), py::kw_only(),
           arg("slots"), arg("block_bytes"), arg("tested"), arg("test"), arg("lose"),
           arg("guarded"));
  py::class_<Plan>(module, "Plan", "The index as one version sees it.")
      .def(py::init<py::dict, py::list, int64_t, float, float>(), py::kw_only(), arg("projection"),
           arg("segments"), arg("covered"), arg("min_radius"), arg("widest"));
  py::class_<Version>(module, "Version", "A version, ready to be asked.")
      .def(py::init([](const py::dict& fields, const MappedKeys* mapped, const Plan* plan) {
             const Fields of(fields);
             const Keys keys{of["slots"],      of["slot_pages"],
                             of["live_pages"], of["radius_pages"],
                             of["rows"],       of["width"],
                             of["dtype"],      mapped ? &mapped->mapped : nullptr};
             return Version{keys, plan, of["widest"], of["predicted_bytes"], of["indexed_up_to"]};
           }),
           py::kw_only(), arg("fields"), arg("mapped").none(true), arg("plan").none(true),
           py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
      .def("effort", &Version::effort, "queries, stride, dtype, batch; what `find` reads for them")
      .def("isolated", &Version::isolated, py::kw_only(), arg("segment"), arg("positions"),
           arg("count"), arg("bits"))
      .def_readwrite("indexed_up_to", &Version::indexed_up_to,
                     "the largest batch that is looked up by the index")
      .def("nearest", &Version::nearest,
           "queries, stride, dtype, batch, threads, row, squared, within, by_index; written there")
      .def("find", &Version::find,
           "queries, stride, dtype, batch, threads; (number of hits, answers)")
      .def("ask", &Version::ask, "queries [B, D]; as `find`, or None");
  module.def(
      "use_tensors", [](py::handle type) { return Version::tensors.use(type.ptr()); },
      "Let `Version.ask` read tensors of this type; tell whether it can.");
  py::class_<Counts>(module, "Counts", "What plain calls of one adaptor counted.")
      .def(py::init<std::vector<double>>(), arg("bounds"))
      .def_readonly("buckets", &Counts::buckets)
      .def_readonly("queries", &Counts::queries)
      .def_readonly("hits", &Counts::hits)
      .def_readonly("certified_misses", &Counts::proved)
      .def_readonly("rechecks", &Counts::read)
      .def_readonly("seconds", &Counts::seconds);
  py::class_<LayerHook>(module, "LayerHook", "The hook of one adaptor for plain calls: see hook.h.")
      .def(py::init<py::dict, py::object>(), arg("of"), arg("counts"))
      .def_readwrite("is_off", &LayerHook::is_off, "whether no call is plain")
      .def("sit_on", &LayerHook::sit_on, arg("layer"), "Answer at this layer only.")
      .def("count_modes", &LayerHook::count_modes, arg("more"), "Know of modes that go on or off.")
      .def("forget", &LayerHook::forget, "Know of no codebook.")
      .def_property_readonly(
          "respond", [](const py::object& self) { return bound<LayerHook>(&layer_hook, self); });
  py::class_<CallNoter>(module, "CallNoter", "What notes the plain calls of a module: see hook.h.")
      .def(py::init<py::dict>(), arg("of"))
      .def_readwrite("is_off", &CallNoter::is_off, "whether no call is plain")
      .def("use", &CallNoter::use, arg("adaptors"), arg("depths"),
           "Be of these adaptors, each with its depth and its seat's steps.")
      .def_property_readonly(
          "run", [](const py::object& self) { return bound<CallNoter>(&call_noted, self); });
  module.def("guard", &guard, py::kw_only(), arg("first"), arg("bytes"),
             "Let a mapped file that shrinks be seen by `is_lost`, not end the process.");
  module.def("unguard", &unguard, arg("number"), "Forget memory that is no longer mapped.");
  module.def("is_lost", &is_lost, arg("number"), "Whether something was read that is gone.");
  module.def("kd_order", &kd_order_at, py::kw_only(), arg("points"), arg("count"), arg("order"),
             arg("threads") = 1,
             "Write the kd order of points [count, 16] int16 as rows [count] int32.");
  module.def("instruction_set", &instruction_set, "The instruction set in use.");
  module.def("use_instruction_set", &use_instruction_set, arg("name"),
             "Use another one that this processor runs; tell whether it does. For tests.");
}
