"""The work that the package does behind its look-ups, made to happen when a life says so.

The package gives every build as steps (`maintained.background`). Here they are done one at a time,
between operations and questions, the same at every run; or in threads, as where codebooks serve;
or up to some step and never further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from grace_fast.index import builder, maintained, segments

MODES = ("threads", "stepped", "parked", "none", "at once")
USUAL = {
    (maintained, "SMALLEST"): 48,
    (maintained, "INLINE_ROWS"): 1024,
    (maintained, "DELTA_ROWS"): 16384,
    (maintained, "MERGE_RATIO"): 4,
    (builder, "_CHUNK"): 512,
    (builder, "OUTLIERS"): 4096,
    (segments, "ORDER_ROWS"): 4096,
}


class Background:
    """How the builds of one life go.

    threads: in the package's own. stepped: a few steps now and then. parked: so, but not beyond
    some step, unless somebody waits for them. none: never begun. at once: done where they begin.
    """

    def __init__(self, mode: str, rng: np.random.Generator) -> None:
        self.mode, self._rng = mode, rng
        self._going: list[Iterator[str]] = []
        self._named: dict[int, str] = {}  # by build: the step that it does next
        self._left = int(rng.integers(0, 16))  # steps until a parked build stays where it is
        self.done: dict[str, int] = {}  # steps, by name

    @contextmanager
    def installed(self, codes_pay: bool | None, thresholds: dict[Any, int]) -> Iterator[Background]:
        """Let builds go this way, and codebooks be small ones at which all stages are reached.

        codes_pay: whether look-ups go by the codes; None for what is predicted.
        """
        kept = {place: getattr(*place) for place in USUAL}
        predict, background = builder.Build._predict, maintained.background
        try:
            for (module, name), number in thresholds.items():
                setattr(module, name, number)
            if codes_pay is not None:
                builder.Build._predict = _predicting(1.0 if codes_pay else float("inf"))
            if self.mode != "threads":
                maintained.background = self._take
            yield self
        finally:
            for known in list(maintained._builders):
                known.settle()
            maintained.background, builder.Build._predict = background, predict
            for (module, name), number in kept.items():
                setattr(module, name, number)

    def _take(self, steps: Iterator[str]) -> Callable[[], None]:
        """Begin a build; return what waits for its end."""
        self._going.append(steps)

        def wait() -> None:
            while steps in self._going:
                self._step(steps)

        return wait

    def _step(self, steps: Iterator[str]) -> None:
        name = self._named.pop(id(steps), None)
        if name is not None:
            self.done[name] = self.done.get(name, 0) + 1
        try:
            self._named[id(steps)] = next(steps)
        except StopIteration:
            self._going.remove(steps)

    def advance(self, most: int) -> None:
        """Let up to so many steps of whichever builds are going be done."""
        if self.mode in ("threads", "none"):
            return
        if self.mode == "at once":
            most = 1000
        for _ in range(most):
            if not self._going or (self.mode == "parked" and not self._left):
                return
            self._left = max(0, self._left - 1)
            self._step(self._going[int(self._rng.integers(len(self._going)))])


def _predicting(number: float) -> Any:
    def predict(build: Any, _: Any) -> None:
        if build.state is None:
            build.predicted_bytes = number

    return predict
