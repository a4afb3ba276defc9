"""Program of a recorded step: operations on numbered registers; see `recording`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)
# Their outputs are their input, where they do not change its shape.
_SAME = (*_VIEWS, _ATEN.detach.default, _ATEN.expand.default)


@dataclass(frozen=True)
class Ref:
    """The tensor of a number, in the arguments of an operation."""

    number: int


@dataclass
class Made:
    """What is known of a tensor that an operation returned."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool
    root: int  # the number of the first tensor of its memory
    constant: Tensor | None = None  # itself, where it may be the same in each step


class Operation(NamedTuple):
    """One operation as it was recorded."""

    call: Any  # an OpOverload
    args: list[Any]
    kwargs: dict[str, Any]
    given: list[int]  # numbers of the tensors that have one
    made: list[int]  # of the tensors that it returned
    several: list[bool] | None  # of several outputs, which are tensors; None: it returned one
    written: tuple[int, ...]  # roots that it wrote to
    is_plain: bool  # no subclass of a tensor takes part


class _Step(NamedTuple):
    """One operation of a program."""

    call: Any
    args: list[Any]  # with None where a register goes
    kwargs: dict[str, Any]
    places: list[tuple[int, Any]]  # of arguments and their registers, or lists of such
    nested: bool
    output: Any  # register, or of several outputs one each
    spent: list[int]  # registers that nobody reads any more


class Program:
    """What a step does, to be run with other values.

    made: by number; rewritten: roots that are written to; dynamic: numbers that a run makes, the
    values' own is 0; outputs: numbers.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        made: Sequence[Made],
        rewritten: set[int],
        dynamic: set[int],
        outputs: Sequence[int | None],
    ) -> None:
        self._made, self._dynamic, self._size = made, dynamic, len(made)
        self._same: dict[int, int] = {}  # of a view that is its source: the source
        self._first: dict[int, int] = {}  # of a view of contiguous memory: its first source
        self._steps: list[_Step] = []
        for operation in operations:
            source = None if operation.call not in _SAME else self._source(operation, rewritten)
            if source is None:
                self._steps.append(self._step(operation))
            elif source != operation.made[0]:
                self._same[operation.made[0]] = source
        self._outputs = [self._register(at) for at in outputs if at is not None]
        self._drop_unread()
        self._free()
        del self._made, self._dynamic, self._same, self._first
        # Of programs of one kind the operations are the same, whatever they are given.
        self.kind = hash(tuple(step.call for step in self._steps))
        # Called without the frame that an overload puts around what it calls.
        self._steps = [step._replace(call=step.call._op) for step in self._steps]

    def __len__(self) -> int:
        return len(self._steps)

    def _register(self, at: int) -> int:
        return self._same.get(at, at)

    def _source(self, operation: Operation, rewritten: set[int]) -> int | None:
        """Return what a view is the same as; itself where its step is made; else None."""
        at = operation.made[0]
        if not operation.given or self._made[at].root in rewritten:
            return None
        given = self._register(operation.given[0])
        if given not in self._dynamic:
            return None
        source, view = self._made[given], self._made[at]
        if (source.shape, source.stride) == (view.shape, view.stride):
            return given
        if operation.call not in _VIEWS or not view.is_contiguous:
            return None
        first = self._first.get(given, given)
        if not self._made[first].is_contiguous:
            return None
        if self._made[first].shape == view.shape:
            return first
        self._first[at] = first
        self._steps.append(self._step(operation)._replace(places=[(0, first)]))
        return at

    def _step(self, operation: Operation) -> _Step:
        args, places, nested = [], [], False
        for at, value in enumerate(operation.args):
            where = self._of(value)
            args.append(self._constant(value) if where is None else None)
            if where is not None:
                places.append((at, where))
                nested |= not isinstance(where, int)
        kwargs = {name: self._constant(value) for name, value in operation.kwargs.items()}
        output: Any = operation.made[0]
        if operation.several is not None:
            numbers = iter(operation.made)
            output = [next(numbers) if is_tensor else None for is_tensor in operation.several]
        return _Step(operation.call, args, kwargs, places, nested, output, [])

    def _of(self, value: Any) -> Any:
        """Return the register of a value, of a list the parts (register, constant); else None."""
        if isinstance(value, Ref):
            return self._register(value.number) if value.number in self._dynamic else None
        if isinstance(value, list) and any(at in self._dynamic for at in references(value)):
            return [
                (self._of(each), None if self._of(each) is not None else self._constant(each))
                for each in value
            ]
        return None

    def _constant(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._made[value.number].constant
        return [self._constant(each) for each in value] if isinstance(value, list) else value

    def _drop_unread(self) -> None:
        read, kept = set(self._outputs), []
        for step in reversed(self._steps):
            made = step.output if isinstance(step.output, list) else [step.output]
            if any(at in read for at in made) or _writes(step):
                kept.append(step)
                read.update(_read(step))
        self._steps = kept[::-1]

    def _free(self) -> None:
        read = set(self._outputs)
        for step in reversed(self._steps):
            for at in _read(step):
                if at not in read:
                    read.add(at)
                    step.spent.append(at)

    @torch.no_grad()
    def run(self, values: Tensor) -> list[Tensor]:
        """Return the outputs for other values, of the shape of those recorded."""
        registers: list[Any] = [None] * self._size
        registers[0] = values
        for call, args, kwargs, places, nested, output, spent in self._steps:
            args = args.copy()
            for place, at in places:
                args[place] = _value(registers, at) if nested else registers[at]
            made = call(*args, **kwargs)
            if type(output) is int:
                registers[output] = made
            else:
                for at, each in zip(output, made, strict=True):
                    if at is not None:
                        registers[at] = each
            for at in spent:
                registers[at] = None
        return [registers[at] for at in self._outputs]


def references(value: Any) -> Iterator[int]:
    """Yield the numbers in an argument."""
    if isinstance(value, Ref):
        yield value.number
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def _writes(step: _Step) -> bool:
    return bool(step.call._schema.is_mutable)


def _value(registers: list[Any], at: Any) -> Any:
    if isinstance(at, int):
        return registers[at]
    return [known if one is None else _value(registers, one) for one, known in at]


def _read(step: _Step) -> Iterator[int]:
    ahead = [at for _, at in step.places]
    while ahead:
        at = ahead.pop()
        if isinstance(at, int):
            yield at
        elif at is not None:
            ahead += [one for one, _ in at]
