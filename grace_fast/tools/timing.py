"""Timing on one thread: contestants in turns, ratios round by round, the machine they ran on.

Contestants take turns in short rounds, so that what disturbs one disturbs the other; a ratio is
taken within each round, and its spread over the rounds is given with it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grace_fast as gf

ROUNDS = 7
_CLOCK = time.perf_counter_ns


@dataclass(frozen=True)
class Run:
    """The times of one contestant."""

    rounds: tuple[Any, ...]  # arrays of microseconds, one for each call
    first_us: float  # the first call, apart

    def percentile(self, share: float) -> float:
        """Return a percentile over all calls, in microseconds."""
        return float(np.percentile(np.concatenate(self.rounds), share))

    @property
    def p50(self) -> float:
        """The median, in microseconds."""
        return self.percentile(50)


@dataclass(frozen=True)
class Ratio:
    """How many times as long another contestant took: the median over the rounds, and its range."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Turn:
    """One contestant's call and what it is called with, in turn."""

    call: Callable[[Any], Any]
    batches: Sequence[Any]


def interleave(
    turns: Mapping[str, Turn],
    budget_s: float,
    rounds: int = ROUNDS,
    between: Callable[[], None] | None = None,
) -> dict[str, Run]:
    """Time contestants in turns, about `budget_s` seconds each, one call a round at least.

    `between` runs before each call, outside its time (it empties the caches).
    """
    streams = {name: cycle(turn.batches) for name, turn in turns.items()}
    first, calls = {}, {}
    for name, turn in turns.items():
        first[name] = float(times_us(turn.call, islice(streams[name], 1))[0])
        again = times_us(turn.call, islice(streams[name], 3), between)
        each = max(float(np.median(again)) / 1e6, 1e-7)
        calls[name] = int(np.clip(budget_s / rounds / each, 1, 8 if between else 2000))
        if calls[name] > 10:  # branch predictors and clocks settle
            times_us(turn.call, islice(streams[name], calls[name] // 4))
    taken: dict[str, list[Any]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            batches = islice(streams[name], calls[name])
            taken[name].append(times_us(turn.call, batches, between))
    return {name: Run(tuple(taken[name]), first[name]) for name in turns}


def ratio(slower: Run, faster: Run) -> Ratio:
    """Return slower / faster by the medians of each round."""
    each = [
        float(np.median(one) / np.median(other))
        for one, other in zip(slower.rounds, faster.rounds, strict=True)
    ]
    return Ratio(float(np.median(each)), min(each), max(each))


def times_us(
    call: Callable[[Any], Any], batches: Iterable[Any], between: Callable[[], None] | None = None
) -> Any:
    """Return the time of a call on each batch, an array of microseconds."""
    taken = []
    for batch in batches:
        if between is not None:
            between()
        start = _CLOCK()
        call(batch)
        taken.append(_CLOCK() - start)
    return np.array(taken) / 1e3


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread within a `with` block: the same sums at every run.

    Beside a busy model it is faster, too, as several wait for each other: of a million keys on two
    cores that others use, two threads took 9.1 s to find what lies close, one 1.3 s (AMD EPYC).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """Return what a result says of where it was measured."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grace_fast": gf.__version__,
    }
