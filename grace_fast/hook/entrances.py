"""Where a call of a model comes in: modules around the edited layer whose `forward` names tokens.

`forward` is wrapped on the instance, as `generate` is, so that it is seen whoever calls it: the
module, a library that calls `model.forward(...)` by name, or the model around it. The outermost
that is called says what the call is; one further in says it again where the model around it
computes other tokens than it was given, or was passed by.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)
from torch.utils.hooks import RemovableHandle

Forward = Callable[..., Any]


class Listener(Protocol):
    """An adaptor that is told of every call of a module."""

    def is_traced(self) -> bool:
        """Tell whether the call that is being compiled has been told already."""

    def trace(self, arguments: Mapping[str, Any], depth: int) -> None:
        """Tell of a call that is being compiled."""

    def end_trace(self) -> None:
        """Tell that the call that was being compiled is over."""

    def begin_call(self, arguments: Mapping[str, Any], depth: int) -> Any:
        """Tell of a call; return what `end_call` takes."""

    def end_call(self, before: Any, result: Any) -> None:
        """Tell that the call is over; result: what it returned, None where it raised."""


def is_recorded() -> bool:
    """Tell whether what runs is being made into a graph, by a compiler or op by op.

    A mode that only looks on, as a counter of operations does, makes none.
    """
    if torch.compiler.is_compiling():
        return True
    if not is_in_torch_dispatch_mode():
        return False
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


class _Called(threading.local):
    copy: nn.Module | None = None  # whose hooks before the call have run, its `forward` not yet


_called = _Called()


class _Listeners(list[tuple[Listener, int]]):
    """The adaptors that a module is wrapped for, and how deep in each one's model it lies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self.had_its_own = "forward" in vars(module)
        self.names = tuple(inspect.signature(module.forward).parameters)
        self._hook: RemovableHandle | None = None

    def open(self) -> None:
        """Look at the module's calls, too, before its `forward` runs."""
        if self._hook is None:
            self._hook = self._module.register_forward_pre_hook(self._before, with_kwargs=True)

    def close(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._module:
            _called.copy = module
        elif torch.compiler.is_compiling():
            for one, depth in self:
                if depth == 0:
                    one.trace(self.arguments(args, kwargs), depth)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what a call is given, by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs


def listen(module: nn.Module, listener: Listener, depth: int) -> None:
    """Tell an adaptor of every call of a module that lies so deep in its model, 0 outermost."""
    forward: Forward = module.forward
    listeners: _Listeners | None = getattr(forward, "grace_adaptors", None)
    if listeners is None:
        listeners = _Listeners(module)
        module.__dict__["forward"] = _announcing(forward, listeners)
    listeners.append((listener, depth))
    listeners.open()


def stop_listening(module: nn.Module, listener: Listener) -> None:
    """Take an adaptor off; with the last one `forward` is the module's own again."""
    wrapper = vars(module).get("forward")
    listeners: _Listeners | None = getattr(wrapper, "grace_adaptors", None)
    if wrapper is None or listeners is None:
        return
    listeners[:] = [pair for pair in listeners if pair[0] is not listener]
    if listeners:
        return
    listeners.close()
    if wrapper.grace_wrapper is not wrapper:
        return  # another library has wrapped it since: it passes calls on
    if listeners.had_its_own:
        module.__dict__["forward"] = wrapper.grace_original
    else:
        del module.__dict__["forward"]


def _announcing(forward: Forward, listeners: _Listeners) -> Forward:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = listeners.arguments(args, kwargs) if args else kwargs
        if is_recorded():
            return _traced(forward, args, kwargs, arguments, listeners)
        run = forward
        if _called.copy is not None:  # a replica has the attributes of its original, this one too
            run, _called.copy = _of(_called.copy, forward), None
        told = [(one, one.begin_call(arguments, depth)) for one, depth in listeners]
        result = None
        try:
            result = run(*args, **kwargs)
        finally:
            for one, before in told:
                one.end_call(before, result)
        return result

    wrapper.grace_adaptors = listeners  # type: ignore[attr-defined]
    wrapper.grace_original = forward  # type: ignore[attr-defined]
    wrapper.grace_wrapper = wrapper  # type: ignore[attr-defined]  # who wraps it takes this along
    return wrapper


def _traced(
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arguments: Mapping[str, Any],
    listeners: _Listeners,
) -> Any:
    told = [one for one, depth in listeners if depth == 0 or not one.is_traced()]
    for one, depth in listeners:
        if not one.is_traced():
            one.trace(arguments, depth)
    try:
        return forward(*args, **kwargs)
    finally:
        for one in told:
            one.end_trace()


def _of(module: nn.Module, forward: Forward) -> Forward:
    """Return a module's own `forward`, where it is a copy of the one that was wrapped."""
    own: Any = getattr(forward, "__func__", None)
    if own is None or own is not type(module).forward:
        return forward
    bound: Forward = own.__get__(module)
    return bound
