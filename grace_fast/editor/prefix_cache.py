"""Cache of what an edited layer and those below it return, for the steps of one training.

The weights are frozen and the tokens stay, so every module that ends before the edited layer begins
returns the same tensors at each step: bit for bit what it would compute, without computing it. That
is not taken on trust. The call that is watched must leave no trace: no number drawn, no attribute
or buffer of the model changed, nothing written to what was given. The first step that is spared
them must give each what it was given. And two calls must agree bit for bit where a class is not of
torch or transformers, which may draw from anywhere. Where anything else takes part (hooks, patched,
compiled or offloaded modules, dropout, caches and other objects handed on, checkpoints, modes of
torch, other processes), all of it runs. No call is made that would not be made otherwise.

Other threads use the same model meanwhile: what is cached is returned in the thread that trains,
and only within its steps.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from grace_fast.codebook import forks
from grace_fast.hook import calls, compile

WATCHED = 3  # calls at most, until two in a row agree
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)
_ATOMS = frozenset((*_PLAIN, type(None)))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_KNOWN = ("torch.nn.", "transformers.")

Forward = Callable[..., Any]


class _Parts(NamedTuple):
    """What a module was given or returned: the tensors in it, their versions, and all else."""

    tensors: list[Tensor]
    versions: list[int]
    rest: list[Any]

    @staticmethod
    def of(value: Any) -> _Parts | None:
        """Take apart what is made of tensors and what never changes; None for anything else."""
        parts = _Parts([], [], [])
        return parts if parts.take(value) else None

    def take(self, value: Any) -> bool:
        """Add a value; False where it may change unseen."""
        if type(value) is Tensor and value.layout == torch.strided and not value.is_inference():
            self.tensors.append(value)
            self.versions.append(value._version)
            value = Tensor
        elif isinstance(value, tuple):
            self.rest.append(len(value))
            return all(map(self.take, value))
        elif _is_named(value):
            self.rest.append((type(value), *value))
            return all(map(self.take, value.values()))
        elif not (value is None or isinstance(value, _PLAIN)):
            return False
        self.rest.append(value)
        return True

    def is_unchanged(self) -> bool:
        """Tell whether nobody wrote to it since."""
        return [each._version for each in self.tensors] == self.versions

    def is_same(self, other: _Parts) -> bool:
        """Tell whether it is the same as something else, bit for bit."""
        return self.rest == other.rest and all(
            one.dtype == two.dtype and one.stride() == two.stride() and torch.equal(one, two)
            for one, two in zip(self.tensors, other.tensors, strict=True)
        )


class _Run(NamedTuple):
    """One call of a module."""

    given: _Parts
    output: Any
    made: _Parts

    def again(self) -> Any:
        """Return the output, as a new object where somebody may write to it."""
        return type(self.output)(**self.output) if _is_named(self.output) else self.output


class _Watched:
    """One forward call in which every module runs."""

    def __init__(self, held: list[Any]) -> None:
        self.drawn, self.held = _drawn(), held
        self.calls: dict[nn.Module, int] = {}
        self.runs: dict[nn.Module, _Run] = {}  # of the layer, and of what ended before it
        self.is_reached = False  # the layer
        self.is_odd = False  # others take part
        self.is_traceless = False  # nothing in the model was changed until the layer


class _Here(threading.local):
    cache: PrefixCache | None = None  # whose step this thread is in


_here = _Here()
_installing = threading.Lock()
forks.guard(sys.modules[__name__], "_installing")


class _StandIn:
    """A module's `forward` while trainings go on: its own, but in the steps of a cache."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.wanted = module, module.forward, 0
        functools.update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _here.cache
        if cache is None:
            return self.own(*args, **kwargs)
        return cache.call(self.module, self.own, args, kwargs)

    def __reduce__(self) -> Any:
        return _own_forward, (self.module,)  # a copy of the module has the copy's own


def _own_forward(module: nn.Module) -> Forward:
    own: Forward = type(module).forward.__get__(module)
    return own


class PrefixCache:
    """A layer of a model and the modules that run before it; for a `with` block, of one thread.

    adaptor: the module in the layer's place that writes values, where there is one; looks: the
    calls that have to agree where classes are not known; 1 as the references' users have it.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        adaptor: nn.Module | None = None,
        looks: Literal[1, 2] = 2,
    ) -> None:
        self._looks = looks
        self._model, self._layer, self._adaptor = model, layer, adaptor
        self._path = _path(model, layer)
        self._beside = _beside(self._path)
        self._stand_ins: list[_StandIn] = []
        self._rows: list[int] | None = None  # of a batch
        self._restart()
        own = (vars(module).get("forward") for module in (*self._beside, layer))
        self._is_fit = bool(self._path) and not (
            any(each is not None and not isinstance(each, _StandIn) for each in own)
            or any(isinstance(module, nn.DataParallel) for module in model.modules())
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
        )

    def go_on_with(self, rows: Sequence[int]) -> None:
        """Forget what was returned where what follows is of other rows of a batch than before."""
        if self._rows != list(rows):
            self._restart()
            self._rows = list(rows)

    def _restart(self) -> None:
        """Forget what was returned: what follows is given other tokens."""
        self._rows = None
        self._kept: dict[nn.Module, _Run] | None = None
        self._is_proved = False  # that the modules are given what they were given
        self._last: dict[nn.Module, _Run] | None = None
        self._watched: _Watched | None = None
        self._left = WATCHED

    @property
    def is_kept(self) -> bool:
        """Tell whether what runs before the layer returns what it returned before."""
        return self._kept is not None

    def trace(self) -> list[Any]:
        """Return what a step may change beside what it returns; see `is_traceless`."""
        return [_drawn(), self._held()]

    def is_traceless(self, before: list[Any]) -> bool:
        """Tell whether nothing was drawn and nothing in the model changed since a `trace`."""
        drawn, held = self.trace()
        return drawn == before[0] and _is_as_before(before[1], held)

    @property
    def is_alone(self) -> bool:
        """Tell whether nobody else takes part in any module of the model but the layer's hook."""
        return (
            self._is_fit
            and not (
                _is_in_mode()
                or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
                or _is_used_by_others(self._layer, _HOOKS[1:])
                or len(self._layer._forward_hooks) > 1
                or any(each.training for each in self._model.modules())
                or any(map(_is_used_by_others, set(self._model.modules()) - {self._layer}))
            )
        )

    def __enter__(self) -> Self:
        if self._is_fit:
            with _installing:
                self._stand_ins = [_stand_in(module) for module in (*self._beside, self._layer)]
        return self

    def __exit__(self, *_: object) -> None:
        with _installing:
            for stand_in in self._stand_ins:
                stand_in.wanted -= 1
                own = vars(stand_in.module)
                if not stand_in.wanted and own.get("forward") is stand_in:
                    del own["forward"]
        self._stand_ins = []
        self._restart()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Take the forward call of the block as one of many that are alike below the layer."""
        if not self._stand_ins or not self._left or _is_in_mode():
            yield
            return
        outer, _here.cache = _here.cache, self
        try:
            if self._kept is not None:
                yield
                self._is_proved = True
                return
            seen = self._watched = _Watched(self._held())
            yield
            self._settle(seen)
        finally:
            self._watched, _here.cache = None, outer

    def _settle(self, seen: _Watched) -> None:
        """Keep what a call returned, where it left no trace and returned what the last did."""
        self._left -= 1
        runs = {
            module: run
            for module, run in seen.runs.items()
            if seen.calls[module] == 1 and run.made.is_unchanged()
        }
        before, self._last = self._last, runs
        if seen.calls.get(self._layer) != 1 or seen.is_odd or seen.drawn != _drawn():
            self._left = 0
        elif seen.is_traceless and (
            self._looks == 1
            or all(map(_is_known, runs))
            or (
                before is not None
                and before.keys() == runs.keys()
                and all(run.made.is_same(before[module].made) for module, run in runs.items())
            )
        ):
            self._kept = runs
        if self._kept is not None or not self._left:
            self._last = None

    def call(self, module: nn.Module, own: Forward, args: Any, kwargs: Any) -> Any:
        """Run a module in a step, or return what it returned before."""
        if self._kept is not None:
            kept = self._kept.get(module)
            if kept is None or not kept.made.is_unchanged():
                return own(*args, **kwargs)
            if not self._is_proved and not _is_given(kept, args, kwargs):
                self._kept, self._left = None, 0
                return own(*args, **kwargs)
            return kept.again()
        seen = self._watched
        if seen is None:
            return own(*args, **kwargs)
        seen.calls[module] = seen.calls.get(module, 0) + 1
        is_layer = module is self._layer
        if is_layer and not seen.is_reached:
            seen.is_odd |= self._is_odd(seen)
            seen.is_traceless = _is_as_before(seen.held, self._held())
        is_before = not seen.is_reached
        seen.is_reached |= is_layer
        given = _Parts.of((args, *kwargs, *kwargs.values())) if is_before else None
        output = own(*args, **kwargs)
        if given is None or not given.is_unchanged() or (seen.is_reached and not is_layer):
            return output
        made = _Parts.of(output)
        if made is not None and not any(each.requires_grad for each in made.tensors):
            seen.runs[module] = _Run(given, output, made)
            seen.is_odd |= _is_saving_otherwise()
        return output

    def _is_odd(self, seen: _Watched) -> bool:
        """Tell whether others take part in what ran until the layer."""
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return True
        if any(each.training for each in self._model.modules() if each is not self._adaptor):
            return True
        if any(isinstance(each, _GENERATORS) for each in seen.held):
            return True
        ran = [inner for module in seen.runs for inner in module.modules()]
        ran += [inner for inner in self._layer.modules() if inner is not self._layer]
        # What the layer returns is seen by the adaptors' hooks, which run at each step.
        return _is_used_by_others(self._layer, _HOOKS[1:]) or any(
            map(_is_used_by_others, {*ran, *self._path})
        )

    def _held(self) -> list[Any]:
        """Return what the modules of the model hold: a forward call leaves its traces there."""
        return _held(each for each in self._model.modules() if each is not self._adaptor)


def _is_named(value: Any) -> bool:
    """Tell whether it is what models of transformers return: tensors by name."""
    return isinstance(value, OrderedDict) and type(value).__module__.startswith(_KNOWN[1])


def _path(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return the modules around a layer, outermost first; none where it is not in the model."""
    name = next((name for name, module in model.named_modules() if module is layer), "")
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _beside(path: list[nn.Module]) -> list[nn.Module]:
    """Return the modules beside those of a path, or beside what it leads to, each once."""
    on_path = set(path)
    children = (child for holder in path for child in holder.children())
    return list(dict.fromkeys(child for child in children if child not in on_path))


def _stand_in(module: nn.Module) -> _StandIn:
    found = vars(module).get("forward")
    if not isinstance(found, _StandIn):
        found = vars(module)["forward"] = _StandIn(module)
    found.wanted += 1
    return found


def _is_used_by_others(module: nn.Module, hooks_at: Sequence[str] = _HOOKS) -> bool:
    """Tell whether a module's call is more than its class says, or its weights are not there."""
    own = vars(module)
    forward = own.get("forward")
    # A model that is edited tells its calls to the adaptors of this package, as they come in.
    is_own = forward is None or isinstance(forward, _StandIn) or hasattr(forward, "grace_adaptors")
    hooks = [hook for name in hooks_at for hook in (own.get(name) or {}).values()]
    return (
        not is_own
        or any(getattr(hook, "__module__", "") != calls.__name__ for hook in hooks)
        or own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own.get("_modules", {})
        or isinstance(module, torch.jit.ScriptModule)
        or "_hf_hook" in own
        or any(each is not None and each.is_meta for each in own["_parameters"].values())
    )


def _is_in_mode() -> bool:
    """Tell whether operations are looked on, changed or recorded by a mode of torch."""
    return (
        compile.modes_here() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch.compiler.is_compiling()
        or _is_saving_otherwise()
    )


def _is_saving_otherwise() -> bool:
    """Tell whether what autograd saves goes elsewhere, as under a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _is_known(module: nn.Module) -> bool:
    """Tell whether a module is made of classes that return the same for the same."""
    return all(type(each).__module__.startswith(_KNOWN) for each in module.modules())


def _is_given(run: _Run, args: Any, kwargs: Any) -> bool:
    given = _Parts.of((args, *kwargs, *kwargs.values()))
    return given is not None and run.given.is_unchanged() and given.is_same(run.given)


def _drawn() -> Any:
    """Return the state of every global generator."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += [each.get_state() for each in torch.cuda.default_generators]
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # others may draw from it
    words = numpy["state"].pop("key")
    states.append(torch.from_numpy(words.view(np.uint8)))
    return [each.numpy().tobytes() for each in states], random.getstate(), numpy


def _held(modules: Iterable[nn.Module]) -> list[Any]:
    """Return what modules hold, and what that holds in turn, with the versions of tensors."""
    seen: set[int] = set()
    held: list[Any] = []
    for module in modules:
        for value in vars(module).values():
            held.append(value)
            if type(value) in _ATOMS:
                continue
            inner: Any = None
            if isinstance(value, dict | list | set):
                inner = value
            elif not (isinstance(value, (Tensor, nn.Module, *_PLAIN)) or callable(value)):
                inner = getattr(value, "__dict__", None)
            if inner and id(inner) not in seen:
                seen.add(id(inner))
                held += inner.values() if isinstance(inner, dict) else inner
    versions = [
        each._version
        for each in held
        if type(each) not in _ATOMS and isinstance(each, Tensor) and not each.is_inference()
    ]
    return held + versions


def _is_as_before(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        one is two or (type(one) is type(two) and isinstance(one, _PLAIN) and one == two)
        for one, two in zip(before, after, strict=True)
    )
