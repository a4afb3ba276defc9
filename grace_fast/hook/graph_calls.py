"""The calls of compiled graphs: told to `ops` when a graph is made, and to `calls` when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_fast.hook import calls, generation, ops, positions
from grace_fast.hook.calls import Entered, Frame
from grace_fast.hook.locate import Locator
from grace_fast.hook.positions import Call


class GraphCalls:
    """The graphs that ask one adaptor: of the whole model, or of a module within it."""

    def __init__(self, adaptor: Any, locator: Locator) -> None:
        self._locator = locator
        self._order: Tensor | None = None  # of the ops in the graph that is being made
        # As the ops name them, by depth; they are kept here, and known to the ops weakly.
        self._entrances = [_Entrance(adaptor, locator, depth) for depth in (0, 1)]
        self.numbers = [ops.register(entrance) for entrance in self._entrances]

    def forget(self) -> None:
        """Let graphs leave the output as it is."""
        for number in self.numbers:
            ops.forget(number)

    def is_traced(self) -> bool:
        """Tell whether the call that is being compiled has been told already."""
        return self._order is not None

    def trace(self, arguments: Mapping[str, Any], depth: int) -> None:
        """Tell the ops of a compiled graph of a call."""
        self._order = ops.entered(self._locator.read(arguments), self.numbers[min(depth, 1)])

    def end_trace(self) -> None:
        """Let what is compiled next be another call."""
        self._order = None

    def adapted(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with values, by the op."""
        return ops.adapted(hidden, output, self._order, self.numbers[0])


class _Entrance:
    """What the ops of a graph ask."""

    def __init__(self, adaptor: Any, locator: Locator, depth: int) -> None:
        self._adaptor, self._locator, self._depth = adaptor, locator, depth

    def enter(self, call: Call | None) -> None:
        """Take a forward call that a graph tells of as this thread's, until it tells of none."""
        adaptor, stack = self._adaptor, calls.in_progress.stack
        # A graph that was broken off has not told of none.
        while stack and isinstance(stack[-1], _Told) and stack[-1].is_over(adaptor, self._depth):
            stack.pop()
            if call is None:
                break
        outer = self._locator.frame() if self._depth else None
        if outer is None:
            adaptor.look_after_layer()
        if call is None:
            return
        source = generation.UNTOLD
        if outer is not None:
            call, source = positions.within(outer.call, call), outer.source
        told = _Told()
        told.depths, told.arguments = {adaptor: self._depth}, {}
        told.frames = {adaptor: Frame(call, source, self._depth, None)}
        stack.append(told)

    def respond(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output with values and what was replaced, or None."""
        answer: tuple[Tensor, Tensor] | None = self._adaptor.respond(hidden, output)
        return answer


class _Told(Entered):
    """A call that a graph tells of."""

    def is_over(self, adaptor: Any, depth: int) -> bool:
        """Tell whether this is an adaptor's, and no call around one that lies so deep."""
        return self.depths.get(adaptor, -1) >= depth
