"""Method-call tracking: what the calls in progress were given, of modules whose call names tokens.

`forward` is wrapped on the instance, as `generate` is, so that it is seen whoever calls it: the
module, a library that calls `model.forward(...)` by name, or the model around it. A call is only
noted, for the thread that makes it; an adaptor reads it when its layer runs. The outermost call
says what it is of; one further in says it again where the model around it computes other tokens
than it was given, or was passed by.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

from grace_fast.hook import compile, generation, plain, positions, wrappers
from grace_fast.hook.generation import Generation, Source, cache_of
from grace_fast.hook.positions import CACHES, Call

Method = Callable[..., Any]


class Frame:
    """What an adaptor read of a call in progress, and of those around it."""

    __slots__ = ("began", "call", "depth", "sequences", "source")

    def __init__(self, call: Call, source: Source, depth: int, began: Entered | None) -> None:
        self.call, self.source = call, source
        self.depth = depth  # of the module that said so; the model itself is outermost, 0
        self.began = began  # the call, where it is within no other
        self.sequences: Generation | None = None  # that it was found to be of

    def end(self, entered: Entered, result: Any) -> None:
        """Note for the sequences of a call what it returned, None where it raised."""
        if self.sequences is None:
            return
        self.sequences.add(cache_of(result))
        if self.began is entered and self.call.tokens is not None:
            self.sequences.seen += self.call.tokens.shape[1]


class Entered:
    """A call in progress; made in every call, and without `__init__` in half the time."""

    depths: MutableMapping[Any, int]  # of the module in the models of the adaptors that it concerns
    arguments: Mapping[str, Any]
    cached: int | Tensor = 0  # tokens in its cache as it began, or UNCOUNTED
    frames: MutableMapping[Any, Frame] | None = None  # by adaptor, as far as it was read


class _InProgress(threading.local):
    """The calls of this thread."""

    copy: nn.Module | None = None  # of a module that is noted: called, its `forward` not yet

    def __init__(self) -> None:
        self.stack: list[Entered] = []  # outermost first


in_progress = _InProgress()


def is_recorded() -> bool:
    """Tell whether what runs is being made into a graph, by a compiler or op by op.

    A mode that only looks on, as a counter of operations does, makes none.
    """
    if compile.is_in_progress():
        return True
    if not compile.modes_here():
        return False
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


_MAKES_COPIES = "_replicate_for_data_parallel", "__getstate__"  # methods of a module


class _Listeners:
    """The adaptors that a module's `forward` or `generate` is wrapped for."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module = module
        self.adaptors: tuple[tuple[Any, int], ...] = ()  # how deep in each one's model it lies
        self.depths: dict[Any, int] = {}  # the same; neither is changed itself
        self.had_its_own = method in vars(module)
        self.names = wrappers.parameters_of(module)
        self.plain: Any = None  # notes calls of `forward` that are plain
        if method == "forward":
            self.plain = plain.call_noter(
                self.names,
                in_progress=in_progress,
                entered=Entered,
                caches=CACHES,
                cached=positions.cached,
                end=_end_frames,
            )

    def set(self, adaptors: tuple[tuple[Any, int], ...]) -> None:
        """Be those of these adaptors."""
        before = self.adaptors, self.depths  # which `plain` has, without keeping them
        self.adaptors, self.depths = adaptors, dict(adaptors)
        if self.plain is not None:
            seated = ((one, depth, one.attachment.seat.steps) for one, depth in adaptors)
            self.plain.use(tuple(seated), self.depths)
        del before

    # A copy of the module has its attributes, and with them a `forward` that runs the original. Its
    # calls are told apart by a hook, which the module itself does without: it costs more than all
    # else that is done in a plain call.

    def look_for_copies(self) -> None:
        """Let a replica of DataParallel's, or a shallow copy of the module, be known by a hook."""
        for name, make in zip(_MAKES_COPIES, (self._replicated, self._state), strict=True):
            if hasattr(self.module, name):
                self.module.__dict__[name] = make

    def end(self) -> None:
        """Let copies be made as the module's class makes them."""
        for name in _MAKES_COPIES:
            self.module.__dict__.pop(name, None)

    def _replicated(self) -> nn.Module:
        kind: Any = type(self.module)
        replica: Any = kind._replicate_for_data_parallel(self.module)
        replica.__dict__ = self._with_hook(replica.__dict__)
        return replica  # type: ignore[no-any-return]

    def _state(self) -> Any:
        kind: Any = type(self.module)
        state = kind.__getstate__(self.module)
        return self._with_hook(state) if isinstance(state, dict) else state

    def _with_hook(self, attributes: dict[str, Any]) -> dict[str, Any]:
        mine = {name: each for name, each in attributes.items() if name not in _MAKES_COPIES}
        hooks = "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"
        mine.update((name, OrderedDict(mine[name])) for name in hooks)
        handle = RemovableHandle(mine[hooks[0]], extra_dict=mine[hooks[1]])
        mine[hooks[0]][handle.id], mine[hooks[1]][handle.id] = self._before_copy, True
        return mine

    def _before_copy(self, module: nn.Module, *_: Any) -> None:
        in_progress.copy = module
        if self.plain is not None:
            self.plain.is_off = True


def listen(module: nn.Module, adaptor: Any, depth: int) -> None:
    """Note every call of a module that lies so deep in an adaptor's model, 0 outermost."""
    _listen(module, "forward", _announcing, adaptor, depth).look_for_copies()


def listen_to_generate(model: nn.Module, adaptor: Any) -> None:
    """Tell an adaptor when a model generates, so that it holds what the prompts find."""
    if getattr(model, "generate", None) is not None:
        _listen(model, "generate", _announcing_prompts, adaptor, 0)


def _listen(
    module: nn.Module,
    method: str,
    announcing: Callable[[Method, _Listeners], Method],
    adaptor: Any,
    depth: int,
) -> _Listeners:
    original: Method = getattr(module, method)
    listeners: _Listeners | None = getattr(original, "grace_adaptors", None)
    if listeners is None:
        listeners = _Listeners(module, method)
        wrapper: Any = functools.wraps(original)(announcing(original, listeners))
        wrapper.grace_adaptors, wrapper.grace_original = listeners, original
        wrapper.grace_wrapper = wrapper  # who wraps it takes this along
        module.__dict__[method] = wrapper
    listeners.set((*listeners.adaptors, (adaptor, depth)))
    return listeners


def stop_listening(module: nn.Module, method: str, adaptor: Any) -> None:
    """Take an adaptor off; with the last one `forward` or `generate` is the module's own again."""
    wrapper = vars(module).get(method)
    listeners: _Listeners | None = getattr(wrapper, "grace_adaptors", None)
    if wrapper is None or listeners is None:
        return
    listeners.set(tuple(pair for pair in listeners.adaptors if pair[0] is not adaptor))
    if listeners.adaptors:
        return
    if method == "forward":
        listeners.end()
    if wrapper.grace_wrapper is not wrapper:
        return  # another library has wrapped it since: it passes calls on
    if listeners.had_its_own:
        module.__dict__[method] = wrapper.grace_original
    else:
        del module.__dict__[method]


def _announcing_prompts(generate: Method, listeners: _Listeners) -> Method:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        own = getattr(listeners.module, "generation_config", None)
        is_draft = bool(getattr(kwargs.get("generation_config") or own, "is_assistant", False))
        call = generation.prompt_of(args, kwargs)
        with ExitStack() as holds:
            for one, _ in listeners.adaptors:
                holds.enter_context(one.generating(call, is_draft))
            return generate(*args, **kwargs)

    return wrapper


def _announcing(forward: Method, listeners: _Listeners) -> Method:
    def otherwise(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(listeners.names, args, strict=False)), **kwargs} if args else kwargs
        if (torch.compiler.is_compiling() and compile.is_in_progress()) or (
            compile.modes_here() > 0 and is_recorded()
        ):
            return _traced(forward, args, kwargs, arguments, listeners)
        if not compile.sees_hooks and "torch._dynamo" in sys.modules:
            compile.see_hooks()
        run = forward
        if in_progress.copy is not None:  # a replica has the attributes of its original, this too
            run, in_progress.copy = _of(in_progress.copy, forward), None
        stack = in_progress.stack
        for one, depth in listeners.adaptors:
            if depth == 0 or not stack or one not in stack[-1].depths:
                for modules, name, module in one.attachment.seat.steps:
                    if modules.get(name) is not module:
                        one.attachment.look_after_layer()
                        break
        at, entered, result = len(stack), Entered(), None
        entered.depths, entered.arguments = listeners.depths, arguments
        for name in CACHES:
            if arguments.get(name) is not None:
                entered.cached = positions.cached(arguments)
                break
        stack.append(entered)
        try:
            result = run(*args, **kwargs)
        finally:
            del stack[at:]
            if entered.frames is not None:
                _end_frames(entered, result)
        return result

    run = None if listeners.plain is None else listeners.plain.run

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Every call of the model comes through here.
        if is_dynamo_compiling() or not notes_plainly or run is None:
            return otherwise(*args, **kwargs)
        return run(forward, args, kwargs, otherwise)

    return wrapper


def _end_frames(entered: Entered, result: Any) -> None:
    assert entered.frames is not None
    for frame in entered.frames.values():
        frame.end(entered, result)


notes_plainly = True  # for tests: else Python notes every call


def _traced(
    forward: Method,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    arguments: Mapping[str, Any],
    listeners: _Listeners,
) -> Any:
    told = [one for one, depth in listeners.adaptors if depth == 0 or one.graphs.order is None]
    for one, depth in listeners.adaptors:
        if one.graphs.order is None:
            one.graphs.trace(arguments, depth)
    try:
        return forward(*args, **kwargs)
    finally:
        for one in told:
            one.graphs.order = None  # what is compiled next is another call


def _of(module: nn.Module, forward: Method) -> Method:
    """Return a module's own `forward`, where it is a copy of the one that was wrapped."""
    own: Any = getattr(forward, "__func__", None)
    if own is None or own is not type(module).forward:
        return forward
    bound: Method = own.__get__(module)
    return bound
