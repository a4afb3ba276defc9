"""The work that the package does behind its look-ups, made to happen when a life says so.

A build is the package's own, in the package's own thread; it stops before each of its stages until
it is let go on. So operations and questions come between any two stages, the same at every run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from grace_fast import building, certificate, order

MODES = ("threads", "stepped", "parked", "none", "at once")
USUAL = {
    (certificate, "SMALLEST"): 48,
    (certificate, "INLINE_ROWS"): 1024,
    (certificate, "TAIL_ROWS"): 16384,
    (certificate, "MERGE_RATIO"): 4,
    (building, "_CHUNK"): 512,
    (building, "OUTLIERS"): 4096,
    (order, "ORDER_ROWS"): 4096,
}
_LONGEST = 60.0  # seconds that one stage may take


class Stages:
    """One build, and the stage that it is about to begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._may_go = 0
        self._at: str | None = None
        self.is_open = self.is_over = False

    def reach(self, stage: str) -> None:
        """Stop before a stage until it may begin; called by the build."""
        with self._changed:
            if self.is_open:
                return
            self._at = stage
            self._changed.notify_all()
            while not self._may_go and not self.is_open:
                self._changed.wait()
            self._may_go = max(0, self._may_go - 1)
            self._at = None

    def end(self) -> None:
        """Say that the build is over."""
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until the build stops before a stage, or is over."""
        with self._changed:
            stopped = self._changed.wait_for(
                lambda: self.is_over or self.is_open or self._at is not None, _LONGEST
            )
        assert stopped, "a build neither stops nor ends"

    def step(self) -> str | None:
        """Let one stage be done; return which, None where there was none."""
        self.settle()
        with self._changed:
            if self.is_over or self.is_open:
                return None
            stage, self._at, self._may_go = self._at, None, 1
            self._changed.notify_all()
        self.settle()
        return stage

    def open(self) -> None:
        """Let the rest be done without a stop."""
        with self._changed:
            self.is_open = True
            self._changed.notify_all()


class Background:
    """How the builds of one life go; only one at a time is installed."""

    def __init__(self, mode: str, rng: np.random.Generator) -> None:
        self.mode, self._rng = mode, rng
        self._going: list[tuple[Any, Stages]] = []
        self._here = threading.local()
        self._left = int(rng.integers(0, 12))  # stages until a parked build stays where it is
        self.done: dict[str, int] = {}  # stages, by name

    @contextmanager
    def installed(self, codes_pay: bool | None, thresholds: dict[Any, int]) -> Iterator[Background]:
        """Let builds go this way, and codebooks be small ones at which all stages are reached.

        codes_pay: whether look-ups go by the codes; None for what is predicted.
        """
        kept = {place: getattr(*place) for place in USUAL}
        known = certificate.Certificate
        usual = {name: vars(known)[name] for name in ("_build", "_build_if_needed", "settle")}
        usual_build = certificate.Build
        try:
            for (module, name), number in thresholds.items():
                setattr(module, name, number)
            certificate.Build = self._stopping(usual_build, codes_pay)
            if self.mode == "none":
                known._build_if_needed = lambda _: None
            elif self.mode in ("stepped", "parked"):
                known._build = self._announced(usual["_build"])
                known.settle = self._unhindered(usual["settle"])
            yield self
        finally:
            self.end()
            for name, function in usual.items():
                setattr(known, name, function)
            certificate.Build = usual_build
            for (module, name), number in kept.items():
                setattr(module, name, number)

    def _stopping(self, base: Any, codes_pay: bool | None) -> Any:
        """Return the build with a stop before each stage."""
        here = self._here

        def reach(stage: str) -> None:
            stages = getattr(here, "stages", None)
            if stages is not None:
                stages.reach(stage)

        class Stopping(base):
            def __init__(self, *given: Any, **named: Any) -> None:
                reach("begin")
                super().__init__(*given, **named)

            def run(self) -> Any:
                made = super().run()
                reach("publish")
                return made

            def fit(self) -> bool:
                reach("fit")
                return super().fit()

            def _encoded(self, first: int) -> Any:
                reach("encode")
                return super()._encoded(first)

            def sort(self, *given: Any, **named: Any) -> Any:
                reach("sort")
                return super().sort(*given, **named)

            def _look_around(self, *given: Any, **named: Any) -> Any:
                reach("look around")
                return super()._look_around(*given, **named)

            def _predict(self, *given: Any, **named: Any) -> None:
                reach("predict")
                super()._predict(*given, **named)
                if codes_pay is not None:
                    self.predicted_bytes = 1.0 if codes_pay else float("inf")

        return Stopping

    def _announced(self, usual: Any) -> Any:
        def build(known: Any, *given: Any, **named: Any) -> None:
            stages = self._here.stages = Stages()
            self._going.append((known, stages))
            stages.reach("start")
            try:
                usual(known, *given, **named)
            finally:
                stages.end()

        return build

    def _unhindered(self, usual: Any) -> Any:
        """Whoever waits for a build lets it go on."""

        def settle(known: Any) -> None:
            while known._builder is not None:
                for one, stages in list(self._going):
                    if one is known:
                        stages.open()
                builder = known._builder
                if builder is not None:
                    builder.join(0.001)

        return settle

    def advance(self, most: int) -> None:
        """Let up to so many stages of whichever builds are going be done."""
        if self.mode not in ("stepped", "parked"):
            return
        for _ in range(most):
            if self.mode == "parked" and not self._left:
                return
            self._left = max(0, self._left - 1)
            self._going = [(known, one) for known, one in self._going if not one.is_over]
            if not self._going:
                return
            stage = self._going[int(self._rng.integers(len(self._going)))][1].step()
            if stage is not None:
                self.done[stage] = self.done.get(stage, 0) + 1

    def end(self) -> None:
        """Let all builds end, and wait for them."""
        for known, stages in self._going:
            stages.open()
            known._cancelled = True
        for known in list(certificate._builders):
            known.settle()
