"""Recording of a step: the operations that make losses and gradients out of values.

A step of a training calls the model with other values and everything else alike. So what torch is
asked to do, below autograd, is the same from step to step: the same operations in the same order,
forward and backward, on tensors of the same shapes. They are written down once, as they run:

    values -> index -> where -> addmm -> gelu -> ... -> losses -> ... -> mm -> gradients

Every tensor that an operation returns gets a number. A tensor is dynamic where a dynamic one was
given to the operation that made it; the values are the first. What is not dynamic is a constant:
weights, masks, what the layers below returned. `Recording.program` returns the dynamic operations
that lead to the outputs, as a `Program`, which runs them again on the same kernels: bit for bit
what the step would compute, without modules, masks or a graph of autograd.

Memory that is written to in place is followed as a whole (its root): every operation that touches
it runs again, so it is made anew each time. Data of dynamic tensors is not held.

Not everything can be recorded, see `Unrecordable`. What no operation shows (a kernel that torch is
not told of, a number that leaves in C++) is found by who compares a program with the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from grace_fast.editor.program import Made, Operation, Program, Ref, references

_ATEN = torch.ops.aten
_FROM_SHAPES = ("ones_like", "zeros_like", "new_zeros", "new_ones", "full_like", "new_full")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_FOREIGN = -1  # root of memory that was there before
# By these a tensor's numbers leave torch, and no operation shows it.
_LEAVING = frozenset(
    getattr(Tensor, name)
    for name in ("tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "untyped_storage")
)


class Unrecordable(Exception):
    """Something in a step may be another thing in the next one."""


class _Leaving(TorchFunctionMode):
    """Notes whose numbers are asked for."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = weakref.ref(recording)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recording = self._recording()
        if func in _LEAVING and recording is not None:
            recording.read(args)
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What this thread computes of an input from `start` to `stop`.

    It is put on torch's stack without `__enter__`, which notes in a flag of the process what was
    set before: where two threads record at once, that flag would stay set.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id, while it lives
        self._made: list[Made] = []
        self._operations: list[Operation] = []
        self._refused: str | None = None
        self._is_on, self._leaving = False, _Leaving(self)
        # As far as is known yet: in memory that is written to later, more is dynamic.
        self._dynamic = {self._number(values, None)}
        self._dynamic_roots = {0}

    def start(self) -> None:
        """Record from now on."""
        if not self._is_on:
            self._is_on = True
            self._leaving.__enter__()  # type: ignore[no-untyped-call]
            _push_mode(self)

    def stop(self) -> None:
        """Record no more."""
        if self._is_on:
            self._is_on = False
            _pop_mode()
            self._leaving.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def read(self, value: Any) -> None:
        """Note that the numbers of the tensors in a value are read."""
        if any(at in self._dynamic for at in self._known(value)):
            self._refuse("numbers of a tensor are read")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._refused is None:
            if not isinstance(func, torch._ops.OpOverload):
                self._refuse(f"{func} is of a higher order")
            elif _draws(func):
                self._refuse(f"{func} draws numbers")
            else:
                self._note(func, args, kwargs, output)
        return output

    def program(self, outputs: Sequence[Tensor]) -> Program:
        """Return how outputs, tensors of the recorded step, are made of its values.

        Raises: Unrecordable.
        """
        if self._refused is not None:
            raise Unrecordable(self._refused)
        asked = [self._number_of(each) for each in outputs]
        chosen, dynamic = self._chosen()
        if any(at not in dynamic for at in asked):
            raise Unrecordable("an output is not made of the values by what was recorded")
        roots = {root for operation in chosen for root in operation.written}
        return Program(_needed(chosen, asked), self._made, roots, dynamic, asked)

    def _refuse(self, reason: str) -> None:
        self._refused = self._refused or reason
        self._operations, self._made = [], []
        self._numbers.clear()

    # As the step runs

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        given: list[Tensor] = []
        _collect((*args, *kwargs.values()), given)
        numbers = [self._number_of(each) for each in given]
        written = self._written(func, args, kwargs) if func._schema.is_mutable else ()
        if self._refused is not None:
            return
        is_dynamic = any(
            at is not None and (at in self._dynamic or self._made[at].root in self._dynamic_roots)
            for at in numbers
        )
        if is_dynamic:
            self._dynamic_roots.update(written)
        found = _collect(output, [])
        memory = [(_memory(each), self._root(at)) for each, at in zip(given, numbers, strict=True)]
        operation = Operation(
            func,
            [self._kept(each) for each in args],
            {name: self._kept(each) for name, each in kwargs.items()},
            [at for at in numbers if at is not None],
            [self._number(each, memory) for each in found],
            [isinstance(each, Tensor) for each in output]
            if isinstance(output, list | tuple)
            else None,
            tuple(written),
            all(type(each) in _PLAIN for each in given + found)
            and not (isinstance(output, tuple) and any(isinstance(one, list) for one in output)),
        )
        self._operations.append(operation)
        if is_dynamic and func._opname not in _FROM_SHAPES:
            self._dynamic.update(operation.made)
        else:
            for at, each in zip(operation.made, found, strict=True):
                self._made[at].constant = each

    def _number(self, tensor: Tensor, memory: list[tuple[int, int]] | None) -> int:
        """Return the number of a tensor that was made; a new one where it has none."""
        known = self._number_of(tensor)
        if known is not None:
            return known
        at, own = len(self._made), _memory(tensor) if memory else 0
        root = next((root for known, root in memory or () if known == own), at)
        self._numbers[id(tensor)] = (weakref.ref(tensor), at)
        made = Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_contiguous(), root)
        self._made.append(made)
        return at

    def _number_of(self, tensor: Tensor) -> int | None:
        known = self._numbers.get(id(tensor))
        return None if known is None or known[0]() is not tensor else known[1]

    def _root(self, at: int | None) -> int:
        return _FOREIGN if at is None else self._made[at].root

    def _known(self, value: Any) -> Iterator[int]:
        for each in _collect(value, []):
            at = self._number_of(each)
            if at is not None:
                yield at

    def _kept(self, value: Any) -> Any:
        """Return a value with numbers in the place of tensors that have one."""
        if isinstance(value, Tensor):
            at = self._number_of(value)
            return value if at is None else Ref(at)
        if isinstance(value, list | tuple):
            return [self._kept(each) for each in value]
        return value

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
        """Return the roots of what an operation writes to."""
        roots = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                roots += [self._root(self._number_of(each)) for each in _collect(given, [])]
        if _FOREIGN in roots:
            self._refuse("a tensor that a step did not make is written to")
        return roots

    # Once it has run

    def _chosen(self) -> tuple[list[Operation], set[int]]:
        """Return what depends on the values, and the numbers of all that it makes.

        Raises: Unrecordable.
        """
        rewritten = {root for operation in self._operations for root in operation.written}
        dynamic, chosen = {0}, []
        for operation in self._operations:
            touched = (*operation.given, *operation.made)
            if not any(self._made[at].root in rewritten for at in touched) and (
                operation.call._opname in _FROM_SHAPES
                or not any(at in dynamic for at in operation.given)
            ):
                continue
            self._check(operation, dynamic)
            dynamic.update(operation.made)
            chosen.append(operation)
        return chosen, dynamic

    def _check(self, operation: Operation, dynamic: set[int]) -> None:
        """Refuse what leads out of tensors, or makes as many as their numbers say."""
        call, tags = operation.call, operation.call.tags
        if not operation.is_plain:
            raise Unrecordable(f"{call} is given a tensor of another kind")
        by_numbers = torch.Tag.dynamic_output_shape in tags and not (
            call is _ATEN.index.Tensor
            and all(
                at not in dynamic or self._made[at].dtype == torch.int64
                for at in references(operation.args[1])
            )
        )
        if by_numbers or torch.Tag.data_dependent_output in tags or not operation.made:
            raise Unrecordable(f"{call} goes by what is in a tensor")
        if any(at in dynamic for each in operation.kwargs.values() for at in references(each)):
            raise Unrecordable(f"{call} is given what changes by name")


@functools.cache
def _draws(call: Any) -> bool:
    """Tell whether an operation draws from a generator that it is given, or the global one."""
    return any(argument.name == "generator" for argument in call._schema.arguments)


def _needed(chosen: list[Operation], outputs: Sequence[int | None]) -> list[Operation]:
    """Return what leads to the outputs."""
    live, needed = set(outputs), []
    for operation in reversed(chosen):
        if operation.written or any(at in live for at in operation.made):
            needed.append(operation)
            live.update(operation.given)
    return needed[::-1]


def _collect(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Add the tensors in a value to those found, and return these."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, found)
    return found


def _memory(tensor: Tensor) -> int:
    at: int = tensor.untyped_storage()._cdata
    return at
