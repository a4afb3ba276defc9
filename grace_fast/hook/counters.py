"""Counters of look-ups, kept beside the codebook: a look-up writes nothing to it.

Every thread counts in a cell of its own, so that no look-up waits for another one; whoever reads
adds the cells up. Each figure is exact once the look-ups before it are over; while others run, one
figure may be a look-up ahead of another.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from grace_fast import _native
from grace_fast.codebook import forks, printable
from grace_fast.errors import LookupWarning
from grace_fast.lookup.backends.cpu import EFFORT
from grace_fast.lookup.match import Match

# Upper bounds of the buckets in seconds, each inclusive; what takes longer is in one more. A proved
# miss takes microseconds, and every key of a large codebook tens of milliseconds.
BOUNDS = (
    2e-6,
    5e-6,
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    1e-1,
    1.0,
)


@dataclass(frozen=True)
class Latency:
    """How long look-ups took, from a call's queries to its answers.

    On a GPU it is the time until the work was handed over: nobody waits for it.
    """

    bounds: tuple[float, ...]  # seconds, inclusive upper ends of all buckets but the last
    counts: tuple[int, ...]  # of calls, one more than the bounds: longer than the last of them
    seconds: float  # of all calls together

    @property
    def mean(self) -> float:
        """Seconds a call; NaN before the first."""
        calls = sum(self.counts)
        return self.seconds / calls if calls else float("nan")


@dataclass(frozen=True)
class Counters:
    """What the forward calls of a model asked one codebook since it was attached in this process.

    Edits, `explain` and `verify` are not counted, nor what `generate` holds from an earlier call.
    What a back end does not tell is None as soon as it has been asked: on a GPU nobody waits for
    its hits, and the back ends in torch and Triton do not say what they read.
    """

    calls: int  # look-ups that were answered, of a batch each
    queries: int  # of those calls; with `every_token` every token is one
    hits: int | None  # queries that got a value
    certified_misses: int | None  # queries proved outside every ball without reading a key
    rechecks: int | None  # keys read whole, once for each query; all of them where codes do not pay
    latency: Latency
    versions: int  # that were published of the codebook, by whomever; its version number
    keys: int  # of the codebook now
    failures: dict[str, int] = field(default_factory=dict)  # calls left unedited, by type of error

    @property
    def failed(self) -> int:
        """The number of all failures."""
        return sum(self.failures.values())


@dataclass(slots=True)
class _Cell:
    """What one thread counted, and those whose cell it took over."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    queries: int = 0
    hits: int = 0
    certified_misses: int = 0
    rechecks: int = 0
    seconds: float = 0.0
    without_effort: bool = False  # a back end did not tell
    without_hits: bool = False


class _Lease:
    """A cell in the hands of one thread; when the thread ends, another one may go on with it."""

    def __init__(self, cell: _Cell, free: list[_Cell]) -> None:
        self.cell, self._free = cell, free

    def __del__(self) -> None:
        self._free.append(self.cell)


class Tally:
    """Where an adaptor counts; `read` gives the sums."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._cells: list[_Cell] = []
        self._free: list[_Cell] = []  # appends and pops are atomic: no lock, nothing to fork with
        # Where the extension counts what it answers alone; None without it.
        self.plain: Any = None if _native.cpu is None else _native.cpu.Counts(list(BOUNDS))
        self._failing = threading.Lock()
        self._failures: Counter[str] = Counter()
        forks.guard(self, "_failing")

    def add(self, match: Match, queries: int, hits: int | None, seconds: float) -> None:
        """Count one call that was answered.

        hits: how many of its queries got a value; None where only the device knows.
        """
        try:
            cell = self._local.lease.cell
        except AttributeError:
            cell = self._take_cell()
        cell.queries += queries
        cell.seconds += seconds
        cell.buckets[bisect_left(BOUNDS, seconds)] += 1
        if hits is None:
            cell.without_hits = True
        else:
            cell.hits += hits
        answers = match.answers
        if answers:  # `match.effort`, unpacked here: this is called in every forward call
            proved, read = EFFORT.unpack_from(answers, len(answers) - EFFORT.size)
            cell.certified_misses += proved
            cell.rechecks += read
        elif answers is None:
            cell.without_effort = True

    def _take_cell(self) -> _Cell:
        try:
            cell = self._free.pop()
        except IndexError:
            cell = _Cell()
            self._cells.append(cell)
        self._local.lease = _Lease(cell, self._free)
        return cell

    def fail(self, layer: str, error: Exception) -> None:
        """Count a call that goes on unedited, and warn of the first of each kind of error."""
        kind = type(error).__name__
        with self._failing:
            self._failures[kind] += 1
            is_first = self._failures[kind] == 1
        if is_first:
            warnings.warn(
                f"a look-up at {printable.spelt(layer)} failed, and the model answered as without "
                f"edits: {kind}: {printable.spelt(error)}; further ones are counted in "
                "grace.counters.failures",
                LookupWarning,
                stacklevel=2,
            )

    def read(self, versions: int, keys: int) -> Counters:
        """Return the sums; versions, keys: the codebook's version number and size."""
        cells = list(self._cells)
        if self.plain is not None:
            counted = self.plain
            cells.append(
                _Cell(
                    counted.buckets,
                    counted.queries,
                    counted.hits,
                    counted.certified_misses,
                    counted.rechecks,
                    counted.seconds,
                )
            )
        none = [0] * (len(BOUNDS) + 1)
        buckets = tuple(map(sum, zip(none, *(cell.buckets for cell in cells), strict=True)))
        tells = not any(cell.without_effort for cell in cells)
        sees = not any(cell.without_hits for cell in cells)
        seconds = sum(cell.seconds for cell in cells)
        with self._failing:
            failures = dict(self._failures)
        return Counters(
            calls=sum(buckets),
            queries=sum(cell.queries for cell in cells),
            hits=sum(cell.hits for cell in cells) if sees else None,
            certified_misses=sum(cell.certified_misses for cell in cells) if tells else None,
            rechecks=sum(cell.rechecks for cell in cells) if tells else None,
            latency=Latency(BOUNDS, buckets, seconds),
            versions=versions,
            keys=keys,
            failures=failures,
        )
