// What an adaptor does in every forward call of a model, where the call is plain: note the call,
// and at the edited layer find the query token, look it up, count, and write the values of hits
// into a copy of the output, in one call from Python.
//
// Plain is what needs neither autograd nor a graph and says all by its ids and mask. For anything
// else `NotImplemented` is returned before anything was counted or changed, and Python does the
// whole of it (grace_fast/hook/adapter.py, calls.py): it has the law, and the words of refusals.
#pragma once
#include <chrono>
#include <string>
#include <vector>

#include "version.h"

namespace grace_fast {

inline py::object attribute(py::handle of, PyObject* name) {
  PyObject* found = PyObject_GetAttr(of.ptr(), name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

inline int64_t number(py::handle of) {
  const int64_t found = PyLong_AsLongLong(of.ptr());
  if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

inline py::object called(const py::object& function) {
  PyObject* result = PyObject_CallNoArgs(function.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline void check(int status) {
  if (status < 0) throw py::error_already_set();
}

// The item of a dict, borrowed; null where there is none.
inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// The attributes that are read here, by their names in Python.
struct Names {
#define GRACE_FAST_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  GRACE_FAST_NAME(_answers);
  GRACE_FAST_NAME(_book);
  GRACE_FAST_NAME(_current_level);
  GRACE_FAST_NAME(_is_compiling_flag);
  GRACE_FAST_NAME(_made);
  GRACE_FAST_NAME(_modes);
  GRACE_FAST_NAME(_with_keys);
  GRACE_FAST_NAME(arguments);
  GRACE_FAST_NAME(attachment);
  GRACE_FAST_NAME(attention_mask);
  GRACE_FAST_NAME(cached);
  GRACE_FAST_NAME(clone);
  GRACE_FAST_NAME(counts);
  GRACE_FAST_NAME(current);
  GRACE_FAST_NAME(depths);
  GRACE_FAST_NAME(disabled);
  GRACE_FAST_NAME(frames);
  GRACE_FAST_NAME(hits);
  GRACE_FAST_NAME(input_ids);
  GRACE_FAST_NAME(inputs_embeds);
  GRACE_FAST_NAME(live);
  GRACE_FAST_NAME(look_after_layer);
  GRACE_FAST_NAME(made_from);
  GRACE_FAST_NAME(pages);
  GRACE_FAST_NAME(past_key_values);
  GRACE_FAST_NAME(replacement);
  GRACE_FAST_NAME(requires_grad);
  GRACE_FAST_NAME(sees_hooks);
  GRACE_FAST_NAME(site);
  GRACE_FAST_NAME(stack);
  GRACE_FAST_NAME(thread);
  GRACE_FAST_NAME(token_type_ids);
  GRACE_FAST_NAME(training);
  GRACE_FAST_NAME(value_file);
  GRACE_FAST_NAME(value_moves);
  GRACE_FAST_NAME(value_slot);
  GRACE_FAST_NAME(value_slots);
  GRACE_FAST_NAME(version);
#undef GRACE_FAST_NAME
};

inline const Names& names() {
  static const Names all;  // for the life of the process, as modules are
  return all;
}

// What plain calls counted: see `Counters` in grace_fast/hook/counters.py. It is written with the
// GIL held only, so that each figure is exact.
struct Counts {
  std::vector<double> bounds;  // seconds, inclusive upper ends of all buckets but the last
  std::vector<int64_t> buckets;
  int64_t queries = 0, hits = 0, proved = 0, read = 0;
  double seconds = 0;

  explicit Counts(std::vector<double> upper)
      : bounds(std::move(upper)), buckets(bounds.size() + 1) {}
  void add(int64_t asked, int64_t hit, const Effort& effort, double took) {
    queries += asked;
    hits += hit;
    proved += effort.proved;
    read += effort.exact_reranks;
    seconds += took;
    ++buckets[std::lower_bound(bounds.begin(), bounds.end(), took) - bounds.begin()];
  }
};

// Whether torch makes a graph of what runs, or hands it to a mode first. A call of torch's that was
// made just before, by a module's own call, costs a tenth of one whose code is in no cache.
struct Torch {
  py::dict compiler;      // the attributes of torch.compiler
  py::object modes;       // () to how many dispatch modes this thread is in
  py::object tracing;     // () to the state of a trace, or None
  py::object transform;   // () to functorch's interpreter, or None
  py::object forward_ad;  // the module

  explicit Torch(const py::dict& of)
      : compiler(of["compiler"]),
        modes(of["modes"]),
        tracing(of["tracing"]),
        transform(of["transform"]),
        forward_ad(of["forward_ad"]) {}
  bool is_recorded() const {
    return PyLong_AsLong(called(modes).ptr()) != 0 ||
           item(compiler.ptr(), names()._is_compiling_flag) != Py_False;
  }
  bool runs_plainly() const {
    return !is_recorded() && called(tracing).is_none() && called(transform).is_none();
  }
};

// A call of a module that names tokens, in progress in this thread: what Python's `Entered` says,
// without its attributes, each of which takes several lines of the caches.
struct Note {
  const class CallNoter* of;
  PyObject* arguments;  // a dict; `Entered` keeps it
};

struct Notes {
  PyObject* stack = nullptr;  // `in_progress.stack` of this thread, which lives as long
  std::vector<Note> notes;

  // Whether no call in progress was noted by Python.
  bool are_all() const {
    return stack && PyList_GET_SIZE(stack) == static_cast<Py_ssize_t>(notes.size());
  }
};

inline Notes& notes_here() {
  static thread_local Notes here;
  return here;
}

// `forward` of a module whose calls name the tokens: note the call while it runs.
class CallNoter {
 public:
  // of: see grace_fast/hook/plain.py.
  explicit CallNoter(const py::dict& of)
      : torch_(of),
        in_progress_(of["in_progress"]),
        entered_(of["entered"]),
        compile_(of["compile"]),
        modules_(of["modules"]),
        dynamo_(of["dynamo"]),
        caches_(of["caches"]),
        cached_(of["cached"]),
        end_(of["end"]),
        by_place_(of["names"]) {}

  // Be of these adaptors: each with its depth and the list of its seat's steps. All of it is
  // borrowed, for Python's garbage collector does not see through this: the listeners keep it.
  void use(const py::tuple& adaptors, const py::dict& depths) {
    listening_.clear();
    for (const py::handle each : adaptors) {
      PyObject* of = each.ptr();
      listening_.push_back(
          {PyTuple_GET_ITEM(of, 0), number(PyTuple_GET_ITEM(of, 1)), PyTuple_GET_ITEM(of, 2)});
    }
    depths_ = depths.ptr();
  }

  bool is_off = false;  // there are copies of the module

  // How deep in an adaptor's model the module lies, -1 where it is in none.
  int64_t depth_in(PyObject* adaptor) const {
    for (const auto& each : listening_) {
      if (each.adaptor == adaptor) return each.depth;
    }
    return -1;
  }

  // Run forward(*args, **kwargs) as `_announcing` does; null, and not `is_plain`, where Python has
  // to and nothing was done.
  PyObject* run(PyObject* forward, PyObject* args, PyObject* kwargs, bool* is_plain) {
    const auto& n = names();
    if (is_off || torch_.is_recorded() || !sees_hooks()) return nullptr;
    *is_plain = true;
    Notes& here = notes_here();
    if (!here.stack) here.stack = attribute(in_progress_, n.stack).ptr();
    PyObject* const stack = here.stack;
    look_after_layers(here);
    const auto arguments = named(args, kwargs);
    const auto entered = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(entered_.ptr()));
    if (!entered) throw py::error_already_set();
    check(PyObject_SetAttr(entered.ptr(), n.depths, depths_));
    check(PyObject_SetAttr(entered.ptr(), n.arguments, arguments.ptr()));
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(caches_.ptr()); ++at) {
      PyObject* cache = item(arguments.ptr(), PyTuple_GET_ITEM(caches_.ptr(), at));
      if (cache && cache != Py_None) {
        check(PyObject_SetAttr(entered.ptr(), n.cached, cached_(arguments).ptr()));
        break;
      }
    }
    const Py_ssize_t before = PyList_GET_SIZE(stack);
    const size_t noted = here.notes.size();
    here.notes.push_back({this, arguments.ptr()});
    if (PyList_Append(stack, entered.ptr()) < 0) {
      here.notes.resize(noted);
      throw py::error_already_set();
    }
    PyObject* result = PyObject_Call(forward, args, kwargs);
    here.notes.resize(noted);
    PyObject *type = nullptr, *error = nullptr, *trace = nullptr;
    if (!result) PyErr_Fetch(&type, &error, &trace);
    const int status = PyList_SetSlice(stack, before, PyList_GET_SIZE(stack), nullptr);
    const bool is_ended = status == 0 && end(entered, result);
    if (type) {
      PyErr_Clear();
      PyErr_Restore(type, error, trace);  // first of all what the model raised
    } else if (!is_ended) {
      Py_CLEAR(result);
    }
    return result;
  }

 private:
  struct Listening {
    PyObject* adaptor;
    int64_t depth;
    PyObject* steps;  // a list of (modules, a name, the module that was there)
  };

  // Whether torch tells blocks apart by their hooks, or compiles nothing: see compile.py.
  bool sees_hooks() {
    if (!sees_hooks_) {
      sees_hooks_ = attribute(compile_, names().sees_hooks).ptr() == Py_True;
      return sees_hooks_ || !item(modules_.ptr(), dynamo_.ptr());
    }
    return true;
  }

  // Tell the sequences of a call what it returned; false where that raised.
  bool end(const py::object& entered, PyObject* result) const {
    PyObject* frames = PyObject_GetAttr(entered.ptr(), names().frames);
    if (!frames) return false;
    const bool was_read = frames != Py_None;
    Py_DECREF(frames);
    if (!was_read) return true;
    PyObject* done =
        PyObject_CallFunctionObjArgs(end_.ptr(), entered.ptr(), result ? result : Py_None, nullptr);
    Py_XDECREF(done);
    return done != nullptr;
  }

  // The arguments by their names, those that were given by place too.
  py::object named(PyObject* args, PyObject* kwargs) const {
    const Py_ssize_t given = PyTuple_GET_SIZE(args);
    if (!given) return py::reinterpret_borrow<py::object>(kwargs);
    auto arguments = py::reinterpret_steal<py::object>(PyDict_New());
    for (Py_ssize_t at = 0; at < std::min(given, PyTuple_GET_SIZE(by_place_.ptr())); ++at) {
      check(PyDict_SetItem(arguments.ptr(), PyTuple_GET_ITEM(by_place_.ptr(), at),
                           PyTuple_GET_ITEM(args, at)));
    }
    check(PyDict_Update(arguments.ptr(), kwargs));
    return arguments;
  }

  // Follow the layers of adaptors that have moved, in the outermost call of each.
  void look_after_layers(const Notes& here) const {
    const auto& n = names();
    for (size_t at = 0; at < listening_.size(); ++at) {  // which may grow meanwhile
      const Listening each = listening_[at];
      if (each.depth != 0 && is_within(here, each.adaptor)) continue;
      if (is_seated(each.steps)) continue;
      const auto adaptor = py::reinterpret_borrow<py::object>(each.adaptor);
      attribute(adaptor, n.attachment).attr(n.look_after_layer)();
    }
  }

  // Whether the newest call in progress is of an adaptor's model.
  static bool is_within(const Notes& here, PyObject* adaptor) {
    const Py_ssize_t inner = PyList_GET_SIZE(here.stack);
    if (!inner) return false;
    if (here.are_all()) return here.notes.back().of->depth_in(adaptor) >= 0;
    const auto depths = attribute(PyList_GET_ITEM(here.stack, inner - 1), names().depths);
    const int found = PySequence_Contains(depths.ptr(), adaptor);
    check(found);
    return found != 0;
  }

  static bool is_seated(PyObject* steps) {
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(steps); ++at) {
      PyObject* step = PyList_GET_ITEM(steps, at);
      PyObject* now = item(PyTuple_GET_ITEM(step, 0), PyTuple_GET_ITEM(step, 1));
      if ((now ? now : Py_None) != PyTuple_GET_ITEM(step, 2)) return false;
    }
    return true;
  }

  Torch torch_;
  py::object in_progress_, entered_, compile_, modules_, dynamo_;
  py::tuple caches_;
  py::object cached_, end_;
  py::tuple by_place_;
  std::vector<Listening> listening_;
  PyObject* depths_ = Py_None;  // as `Entered` has them
  bool sees_hooks_ = false;     // and that stays
};

// The hook of one adaptor on its layer.
class LayerHook {
 public:
  // of: `_plain_hook` in grace_fast/hook/plain.py says what; counts: outlives this.
  LayerHook(const py::dict& of, py::object counts)
      : torch_(of),
        prepared_(of["prepared"]),
        generation_(of["generation"]),
        in_use_(of["in_use"]),
        name_(of["name"]),
        telling_(of["telling"]),
        every_token_(of["every_token"].cast<bool>()),
        needs_mask_(of["needs_mask"].cast<bool>()),
        padding_(of["padding"].is_none() ? -1 : number(of["padding"])),
        counts_owner_(std::move(counts)),
        counts_(counts_owner_.cast<Counts*>()) {}

  // What the layer returns instead of its output, None where that stays as it is, or
  // NotImplemented. rest: the keyword arguments, if the caller gives any, and the output.
  py::object respond(py::handle adaptor, py::handle module, py::handle args, py::handle rest) {
    PyObject *hidden, *output;
    if (is_off || layer_ != module.ptr() || !given(args.ptr(), rest.ptr(), &hidden, &output) ||
        !torch_.runs_plainly() || (busy_ && !is_in_plain_mode(adaptor)) || !is_chosen() ||
        !(is_ready() || get_ready(adaptor))) {
      return unanswered();
    }
    if (!ready_.live) return py::none();
    if (attribute(module, names().training).ptr() != Py_False) return unanswered();
    const Ready ready = ready_;  // others may look up meanwhile, another version even
    Asked asked;
    if (!located(adaptor, hidden, *ready.version, &asked)) return unanswered();
    return looked_up(adaptor, ready, output, &asked);
  }

  // Another codebook answers, or none.
  void forget() {
    book_ = nullptr;
    ready_ = {};
  }
  // So many modes are on or off from now on, in any thread.
  void count_modes(int64_t more) { busy_ += more; }

  void sit_on(py::handle module) { layer_ = module.ptr(); }

  bool is_off = false;  // the layer's tensors are in an order that Python reads

 private:
  // Queries, and of which tokens of the layer's output [rows, tokens, V] they are.
  struct Asked {
    Queries queries;
    int64_t rows, tokens;
    bool is_flat;                    // the layer's tensors are [rows * tokens, width]
    std::vector<int64_t> positions;  // by row; empty where each row asks with its last token
    std::vector<char> gathered;      // what the queries point into, where they lie apart
    std::vector<char> answers;

    int64_t position(int64_t row) const { return positions.empty() ? tokens - 1 : positions[row]; }
  };

  static py::object unanswered() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

  static bool given(PyObject* args, PyObject* rest, PyObject** hidden, PyObject** output) {
    const Py_ssize_t count = PyTuple_GET_SIZE(rest);
    if (count < 1) return false;
    *output = PyTuple_GET_ITEM(rest, count - 1);
    if (PyTuple_GET_SIZE(args)) {
      *hidden = PyTuple_GET_ITEM(args, 0);
    } else {
      Py_ssize_t at = 0;
      PyObject* kwargs = PyTuple_GET_ITEM(rest, 0);
      if (count != 2 || !PyDict_Next(kwargs, &at, nullptr, hidden)) return false;
    }
    return Version::tensors.takes(*hidden) && Version::tensors.takes(*output);
  }

  // Whether nothing holds for this thread that Python has to look at.
  bool is_in_plain_mode(py::handle adaptor) const {
    const auto& n = names();
    const auto modes = attribute(adaptor, n._modes);
    const auto stack = attribute(attribute(modes, n.thread), n.stack);
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(stack.ptr()); ++at) {
      const py::handle mode = PyTuple_GET_ITEM(PyList_GET_ITEM(stack.ptr(), at), 1);
      // What `generate` holds says nothing where every token asks for itself.
      if (!every_token_ || !py::type::handle_of(mode).is(generation_)) return false;
    }
    return PySet_GET_SIZE(attribute(modes, n.disabled).ptr()) == 0;
  }

  // Whether a codebook answers every row, as one without a name does: see selection.py.
  bool is_chosen() const {
    if (name_.is_none()) return true;
    PyObject* in_use;
    check(PyContextVar_Get(in_use_.ptr(), nullptr, &in_use));
    const auto chosen = py::reinterpret_steal<py::object>(in_use);
    return chosen && PyUnicode_CheckExact(chosen.ptr()) &&
           PyUnicode_Compare(chosen.ptr(), name_.ptr()) == 0;
  }

  // The version that answers, as Python has prepared it.
  struct Ready {
    py::object snapshot, view;
    const Version* version = nullptr;  // the view keeps it
    bool live = false;                 // whether it has keys
  };

  // Whether what was prepared is still of the newest version, with all that its index knows.
  bool is_ready() {
    const auto& n = names();
    if (!book_ || !attribute(book_, n.current).is(ready_.snapshot)) return false;
    // What the index knows by now is no other decision, only a quicker one: it is looked for where
    // that takes long, and now and then.
    if (!ready_.live || (ready_.version->is_quick() && ++since_index_ % 64)) return true;
    return attribute(index_, n.current).is(made_from_);
  }

  bool get_ready(py::handle adaptor) {
    const auto& n = names();
    forget();
    const auto answers = attribute(adaptor, n._answers);
    const py::handle find = PyTuple_GET_ITEM(answers.ptr(), 1);
    if (!py::type::handle_of(find).is(prepared_)) return false;
    const auto book = attribute(find, n._book);
    const auto current = attribute(book, n.current);
    if (number(attribute(attribute(current, n.counts), n.live)) == 0) {
      book_ = book.ptr();
      ready_ = {current, py::none()};
      return true;
    }
    const auto made = attribute(find, n._made);  // snapshot, view, index
    const auto view = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(made.ptr(), 1));
    const auto index = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(made.ptr(), 2));
    if (!current.is(attribute(adaptor, n._with_keys)) || view.is_none() || index.is_none() ||
        current.ptr() != PyTuple_GET_ITEM(made.ptr(), 0)) {
      return false;
    }
    const auto made_from = attribute(view, n.made_from);
    if (!attribute(index, n.current).is(made_from)) return false;
    const auto version = attribute(view, n.version);
    book_ = book.ptr();
    index_ = index;
    made_from_ = made_from;
    ready_ = {current, view, version.cast<const Version*>(), true};
    return true;
  }

  bool located(py::handle adaptor, PyObject* hidden, const Version& version, Asked* asked) const {
    TensorView view;
    Dtype dtype;
    if (!Version::tensors.view(hidden, &view) || view.device_kind != TensorView::kHost ||
        (view.dimensions != 3 && !(every_token_ && view.dimensions == 2)) || !view.dtype(&dtype) ||
        dtype != version.keys.dtype) {
      return false;
    }
    const int last = view.dimensions - 1;
    if (view.shape[last] != version.keys.width || view.strides[last] != 1) return false;
    const int64_t batch = view.shape[0], tokens = last == 2 ? view.shape[1] : 1;
    if (batch < 1 || tokens < 1) return false;
    asked->rows = batch;
    asked->tokens = tokens;
    asked->is_flat = last == 1;
    if (!is_said(adaptor.ptr(), batch, tokens, last == 2, asked)) return false;
    const int64_t width = version.keys.width, by_row = view.strides[0], by_token = view.strides[1];
    const int64_t bytes = view.bits / 8;
    const char* first = static_cast<const char*>(view.data) + view.byte_offset;
    if (every_token_) {
      if (last == 2 && batch > 1 && tokens > 1 && by_row != tokens * by_token) return false;
      asked->queries = {first, last == 2 && tokens > 1 ? by_token : by_row, dtype, batch * tokens};
    } else if (asked->positions.empty()) {
      asked->queries = {first + (tokens - 1) * by_token * bytes, by_row, dtype, batch};
    } else {
      asked->gathered.resize(batch * width * bytes);
      for (int64_t row = 0; row < batch; ++row) {
        std::memcpy(asked->gathered.data() + row * width * bytes,
                    first + (row * by_row + asked->positions[row] * by_token) * bytes,
                    width * bytes);
      }
      asked->queries = {asked->gathered.data(), width, dtype, batch};
    }
    return true;
  }

  // Whether the calls in progress say where the prompts end, and by ids and mask alone; then that
  // is written to `asked`. `Locator.locate` has the rules.
  bool is_said(PyObject* adaptor, int64_t batch, int64_t tokens, bool in_rows, Asked* asked) const {
    const Notes& here = notes_here();
    if (!here.are_all()) return false;
    Said outer;
    for (const Note& note : here.notes) {
      const int64_t depth = note.of->depth_in(adaptor);
      if (depth < 0) continue;
      if (every_token_) {
        if (in_rows && !has_rows(note.arguments, batch)) return false;
      } else if (!outer.ids) {
        if (!outer.read(note.arguments, telling_) || !ends(outer, batch, tokens, asked)) {
          return false;
        }
      } else if (depth == 0 || some(note.arguments, names().input_ids) != outer.ids ||
                 some(note.arguments, names().attention_mask) != outer.mask ||
                 some(note.arguments, names().past_key_values)) {
        return false;
      }
    }
    return every_token_ || outer.ids;
  }

  // Whether the tokens of a call, if it names any, are of so many rows.
  static bool has_rows(PyObject* arguments, int64_t batch) {
    PyObject* tokens = some(arguments, names().input_ids);
    if (!tokens) tokens = some(arguments, names().inputs_embeds);
    TensorView view;
    return !tokens ||
           (Version::tensors.view(tokens, &view) && view.dimensions >= 2 && view.shape[0] == batch);
  }

  // What a call that names its tokens was given; borrowed.
  struct Said {
    PyObject *ids = nullptr, *mask = nullptr;

    // Whether there are ids, and nothing else that says where prompts end. Names are compared by
    // their place first: Python keeps one of each.
    bool read(PyObject* arguments, const py::object& telling) {
      const auto& n = names();
      PyObject *name, *value;
      for (Py_ssize_t at = 0; PyDict_Next(arguments, &at, &name, &value);) {
        if (value == Py_None || name == n.token_type_ids) continue;
        if (name == n.input_ids) {
          ids = value;
        } else if (name == n.attention_mask) {
          mask = value;
        } else {
          const int tells = PySet_Contains(telling.ptr(), name);
          check(tells);
          if (tells) return false;
        }
      }
      return ids;
    }
  };

  // An argument that was given and is not None; borrowed from the arguments.
  static PyObject* some(PyObject* arguments, PyObject* name) {
    PyObject* found = item(arguments, name);
    return found == Py_None ? nullptr : found;
  }

  // Read the last token of each row, by a mask where there is one.
  bool ends(const Said& said, int64_t batch, int64_t tokens, Asked* asked) const {
    TensorView view;
    const auto is_read = [&](PyObject* object) {
      return Version::tensors.view(object, &view) && view.device_kind == TensorView::kHost &&
             view.lanes == 1 && view.dimensions == 2 && view.shape[0] == batch &&
             view.shape[1] == tokens;
    };
    if (!is_read(said.ids)) return false;
    if (!said.mask) {
      if (!needs_mask_ || padding_ < 0) return true;
      // Rows that may end in padding, which Python looks for, or refuses.
      if (view.kind > 1 || (view.bits != 64 && view.bits != 32)) return false;
      for (int64_t row = 0; row < batch; ++row) {
        const char* id = view.at(row, tokens - 1);
        const int64_t token = view.bits == 64 ? read<int64_t>(id) : read<int32_t>(id);
        if (token == padding_) return false;
      }
      return true;
    }
    if (!is_read(said.mask) || !view.has_truth()) return false;
    for (int64_t row = 0; row < batch; ++row) {
      if (asked->positions.empty() && view.is_true(row, tokens - 1)) continue;
      if (asked->positions.empty()) asked->positions.assign(batch, tokens - 1);
      int64_t at = tokens - 1;
      while (at >= 0 && !view.is_true(row, at)) --at;
      if (at >= 0) asked->positions[row] = at;  // a row without a token asks with its last place
    }
    return true;
  }

  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  py::object looked_up(py::handle adaptor, const Ready& ready, PyObject* output, Asked* asked) {
    const int64_t count = asked->queries.batch;
    asked->answers.resize(17 * count);
    char* squared = asked->answers.data();
    const Answers answers{reinterpret_cast<int64_t*>(squared + 8 * count),
                          reinterpret_cast<double*>(squared),
                          reinterpret_cast<bool*>(squared + 16 * count)};
    Effort effort{};
    const auto began = std::chrono::steady_clock::now();
    const int64_t hits = ready.version->found_with_gil(asked->queries, answers, &effort);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    py::object written = py::none();
    if (hits) {
      written = copy_with_values(adaptor, ready.snapshot, output, *asked, answers);
      if (written.ptr() == Py_NotImplemented) return written;
      count_rows(attribute(adaptor, names().hits), answers, count);
    }
    counts_->add(count, hits, effort, took.count());
    return written;
  }

  static void count_rows(const py::object& hits, const Answers& answers, int64_t count) {
    if (!PyDict_Check(hits.ptr())) throw py::type_error("hits are no dict");
    const auto one = py::int_(1);
    for (int64_t query = 0; query < count; ++query) {
      if (!answers.hit[query]) continue;
      const auto row = py::int_(answers.row[query]);
      PyObject* before = item(hits.ptr(), row.ptr());
      const auto now = before ? py::reinterpret_steal<py::object>(PyNumber_Add(before, one.ptr()))
                              : py::object(one);
      if (!now) throw py::error_already_set();
      check(PyDict_SetItem(hits.ptr(), row.ptr(), now.ptr()));
    }
  }

  // The output's copy with the values of what hit, or NotImplemented. Never the output itself:
  // others may hold it, or views of it.
  py::object copy_with_values(py::handle adaptor, const py::object& current, PyObject* output,
                              const Asked& asked, const Answers& answers) const {
    const auto& n = names();
    if (attribute(output, n.requires_grad).ptr() != Py_False ||
        number(attribute(torch_.forward_ad, n._current_level)) >= 0 ||
        !attribute(current, n.value_file).is_none()) {
      return unanswered();
    }
    TensorView from, slots;
    const auto store = attribute(current, n.value_slots);
    if (!Version::tensors.view(output, &from) || !Version::tensors.view(store.ptr(), &slots)) {
      return unanswered();
    }
    const int last = from.dimensions - 1;
    const int64_t width = slots.shape[1], tokens = every_token_ ? 1 : asked.tokens;
    const int64_t wanted = asked.rows * asked.tokens * width;
    if (from.device_kind != TensorView::kHost || !from.has_type_of(slots) || from.lanes != 1 ||
        last < 1 || from.shape[last] != width || from.shape[0] != asked.rows ||
        (last == 2 && from.shape[1] != asked.tokens) || last != (asked.is_flat ? 1 : 2) ||
        from.elements() != wanted || !from.is_contiguous() || slots.strides[1] != 1) {
      return unanswered();
    }
    const auto mode = attribute(attribute(adaptor, n.site), n.replacement);
    const bool all = equals(mode, "replace_all"), one = equals(mode, "replace_last");
    if (!all && !one && !equals(mode, "replace_prompt")) return unanswered();
    std::vector<const char*> values(asked.queries.batch);
    const int64_t bytes = from.bits / 8;
    for (int64_t query = 0; query < asked.queries.batch; ++query) {
      if (!answers.hit[query]) continue;
      const int64_t slot = value_slot(current, answers.row[query]);
      if (slot < 0 || slot >= slots.shape[0]) return unanswered();
      values[query] = slots.at(slot, 0);
    }
    py::object copy = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(output, n.clone));
    if (!copy) throw py::error_already_set();
    TensorView to;
    if (!Version::tensors.view(copy.ptr(), &to) || to.elements() != wanted || !to.is_contiguous() ||
        !to.has_type_of(from)) {
      return unanswered();
    }
    char* row = static_cast<char*>(to.data) + to.byte_offset;
    for (int64_t query = 0; query < asked.queries.batch; ++query, row += tokens * width * bytes) {
      if (!answers.hit[query]) continue;
      // Where each token asks for itself, its place is 0 of 1.
      const int64_t at = every_token_ ? 0 : asked.position(query);
      const int64_t begin = one ? at : 0, end = all ? tokens : one ? at + 1 : at;
      for (int64_t token = begin; token < end; ++token) {
        std::memcpy(row + token * width * bytes, values[query], width * bytes);
      }
    }
    return copy;
  }

  static bool equals(const py::object& mode, const char* name) {
    return PyUnicode_Check(mode.ptr()) && PyUnicode_CompareWithASCIIString(mode.ptr(), name) == 0;
  }

  // The slot of a row's value; -1 where its page cannot be read here.
  static int64_t value_slot(const py::object& current, int64_t row) {
    const auto& n = names();
    if (number(attribute(attribute(current, n.counts), n.value_moves)) == 0) return row;
    const auto pages = attribute(current, n.pages);
    if (row / kPageRows >= PyTuple_GET_SIZE(pages.ptr())) return -1;
    const py::handle page = PyTuple_GET_ITEM(pages.ptr(), row / kPageRows);
    const auto column = attribute(page, n.value_slot);
    TensorView view;
    if (!Version::tensors.view(column.ptr(), &view) || view.dimensions != 1 || view.kind != 0 ||
        view.bits != 64 || row % kPageRows >= view.shape[0]) {
      return -1;
    }
    return read<int64_t>(view.at(row % kPageRows));
  }

  Torch torch_;
  py::object prepared_, generation_, in_use_, name_, telling_;
  bool every_token_, needs_mask_;
  int64_t padding_;  // -1 where none is known
  py::object counts_owner_;
  Counts* counts_;
  int64_t busy_ = 0;           // modes that are on, in any thread
  PyObject* layer_ = nullptr;  // borrowed, only compared
  PyObject* book_ = nullptr;   // borrowed from the adaptor, which tells of another one
  py::object index_, made_from_;
  uint64_t since_index_ = 0;
  Ready ready_;
};

// Functions of Python's own kind, with an object of these classes for their `self`: pybind11's cost
// more to call than what they do.
template <typename T>
struct Held {
  T* of;
  py::object keeper;
};
template <typename T>
py::object bound(PyMethodDef* method, const py::object& self) {
  auto capsule = py::capsule(new Held<T>{self.cast<T*>(), self},
                             [](void* held) { delete static_cast<Held<T>*>(held); });
  PyObject* made = PyCFunction_New(method, capsule.ptr());
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
template <typename T>
T& bound_to(PyObject* capsule) {
  return *static_cast<Held<T>*>(PyCapsule_GetPointer(capsule, nullptr))->of;
}

inline PyObject* refused(const char* what) {
  PyErr_SetString(PyExc_TypeError, what);
  return nullptr;
}

inline PyObject* call_layer_hook(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(given[2]) || !PyTuple_Check(given[3])) {
    return refused("an adaptor, a module and two tuples are wanted");
  }
  try {
    auto& hook = bound_to<LayerHook>(self);
    return hook.respond(given[0], given[1], given[2], given[3]).release().ptr();
  } catch (py::error_already_set& error) {
    // Python does it again and tells what is wrong with it, or leaves the output as it is.
    if (error.matches(PyExc_Exception)) Py_RETURN_NOTIMPLEMENTED;
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

inline PyObject* call_noter(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || !PyTuple_CheckExact(given[1]) || !PyDict_CheckExact(given[2])) {
    return refused("a function, a tuple, a dict and a function are wanted");
  }
  try {
    bool is_plain = false;
    PyObject* result = bound_to<CallNoter>(self).run(given[0], given[1], given[2], &is_plain);
    if (is_plain) return result;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return PyObject_Call(given[3], given[1], given[2]);
}

}  // namespace grace_fast
