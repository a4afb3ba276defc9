"""Edits to the learnt answer: greedily right, with the loss below the stop; one by one and at once.

Everybody starts with the same value, learns at the same rate and stops by the same rule. The
authors' algorithm, which never stops, is timed as it is, too; and so is `Schedule.fast()`, which
has a start, a rate and a rule of its own. Every edit of ours has to be answered in the end, and to
be where it is after one by one; else no speed is told.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks import edit_asking
from benchmarks import edit_contestants as contestants
from benchmarks.edit_floor import Clock, Floor
from benchmarks.edit_models import Item, Studied

STEPS = 100  # of the reference
ONE_BY_ONE = "grace.edit, one by one"
NO_STOP = "authors, who do not stop"
REFERENCES: dict[str, type[contestants.Authors]] = {
    "authors": contestants.Authors,
    "EasyEdit": contestants.EasyEdit,
    NO_STOP: contestants.Authors,
}


@dataclass(frozen=True)
class Row:
    """One way to make edits; a ratio is another's seconds an edit over its."""

    model: str
    way: str
    threads: int
    edits: int
    answered: int  # greedily, each alone, after all of them
    wrong: int  # of ours: not answered, or decided otherwise than one by one
    steps: float  # on average
    s_an_edit: float | None = None
    over_authors: float | None = None
    over_authors_100: float | None = None  # who do not stop
    over_easyedit: float | None = None
    over_one_by_one: float | None = None
    floor_products_s: float | None = None  # of an edit
    floor_suffix_s: float | None = None


@dataclass(frozen=True)
class _Way:
    """A way to make edits, on a model of its own."""

    name: str
    size: int  # edits at once
    count: int  # edits in all
    make: Callable[[Sequence[Item]], list[Any]]  # to reports or steps
    answered: Callable[[], list[bool]]


@dataclass(frozen=True)
class _Run:
    name: str
    seconds: list[float]  # of each edit; of edits at once their share
    made: list[Any]
    answered: list[bool]

    @property
    def steps(self) -> list[int]:
        """Of each edit."""
        return [one if isinstance(one, int) else getattr(one, "steps", 0) for one in self.made]

    def first(self, count: int) -> float:
        """Return the seconds of an edit, of the first so many."""
        return float(np.mean(self.seconds[:count]))


def measure(
    studied: Studied,
    sizes: Sequence[int],
    compared: int,
    floor: Floor,
    rounds: int,
    clock: Clock = time.process_time,
    others: bool = True,
) -> Iterator[Row]:
    """Yield a row for each way; compared: how many of the edits the references make, too.

    A reference's seconds are compared with those of ours for the same edits, and from there with
    those of all edits by what they took one by one. rounds: of edits at once; the median counts.
    """
    items, epsilon, threads = studied.items, _apart(studied), torch.get_num_threads()
    own = [(size, False) for size in sizes] + [(max(sizes), True)] * others
    ways = [
        _ours(studied, epsilon, size, is_fast)
        for size, is_fast in own
        for _ in range(rounds if size > 1 else 1)
    ]
    if others:
        ways += [
            _theirs(studied, epsilon, "authors", compared),
            _theirs(studied, epsilon, "EasyEdit", compared),
            _theirs(studied, epsilon, NO_STOP, max(1, compared // 8)),
        ]
    runs = _in_turns(ways, items, clock)
    alone, over = runs[ONE_BY_ONE], {}
    for name in (each.name for each in ways if others and each.name in REFERENCES):
        run = runs[name]
        count = len(run.made)
        # All their edits take the same steps where nobody stops.
        mine = alone.first(len(items) if name == NO_STOP else count)
        over[name] = run.first(count) / mine
        share = (studied.name, name, threads, count, sum(run.answered), 0)
        yield Row(*share, float(np.mean(run.steps)), run.first(count))
    for size, is_fast in own:
        run = runs[_name(size, is_fast)]
        wrong, steps = _wrong(run, alone), float(np.mean(run.steps))
        share = (studied.name, run.name, threads, len(items), sum(run.answered), wrong)
        if wrong:
            yield Row(*share, steps)
            continue
        faster = alone.first(len(items)) / run.first(len(items))
        products, suffix = floor.of_edits(run.steps, size)
        yield Row(
            *share,
            steps,
            run.first(len(items)),
            *(over[name] * faster if others else None for name in ("authors", NO_STOP, "EasyEdit")),
            faster,
            products / 1e6 / len(items),
            suffix / 1e6 / len(items),
        )


def _apart(studied: Studied) -> float:
    """Return a radius with which every item has a row of its own, far above what cdist errs by."""
    asked = contestants.queries(studied, studied.items)
    return edit_asking.spacing(asked, 0.0) / 4


def _name(size: int, is_fast: bool = False) -> str:
    if is_fast:
        return f"Schedule.fast(), {size} at once"
    return ONE_BY_ONE if size == 1 else f"grace.edit_many, {size} at once"


def _ours(studied: Studied, epsilon: float, size: int, is_fast: bool) -> _Way:
    if is_fast:  # a start, a rate and an end of its own
        studied = replace(
            studied, settings={"replacement": studied.settings["replacement"], "schedule": "fast"}
        )
    grace = contestants.attached(studied, epsilon)

    def make(part: Sequence[Item]) -> list[Any]:
        if size == 1:
            return contestants.one_by_one(grace, part)
        return contestants.many(grace, part, size)

    def answered() -> list[bool]:
        return edit_asking.answered(studied, grace.model, studied.items)

    return _Way(_name(size, is_fast), size, len(studied.items), make, answered)


def _theirs(studied: Studied, epsilon: float, name: str, count: int) -> _Way:
    editor = REFERENCES[name](studied, epsilon)

    def make(part: Sequence[Item]) -> list[Any]:
        return [editor.learn(item, STEPS, stops=name != NO_STOP) for item in part]

    def answered() -> list[bool]:
        return contestants.answered_by_reference(editor, studied.items[:count])

    return _Way(name, 1, count, make, answered)


def _in_turns(ways: Sequence[_Way], items: Sequence[Item], clock: Clock) -> dict[str, _Run]:
    """Make the edits of every way, each at about its place in the stream, so that what else the
    machine does falls on all; of ways of one name the one with the median time counts.
    """
    names = [way.name for way in ways]
    parts: list[tuple[float, int, int, int]] = []  # the second: each is first in turn
    for number, way in enumerate(ways):
        before = names[:number].count(way.name) + 1
        share = before / (names.count(way.name) + 1)  # of the part that others make before it
        parts += [
            (at + share * way.size, (number + at) % len(ways), number, at)
            for at in range(0, way.count, way.size)
        ]
    seconds: list[list[float]] = [[] for _ in ways]
    made: list[list[Any]] = [[] for _ in ways]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not learnt is counted
        for _, _, number, at in sorted(parts):
            way = ways[number]
            part, start = items[at : min(at + way.size, way.count)], clock()
            made[number] += way.make(part)
            seconds[number] += [(clock() - start) / len(part)] * len(part)
    runs: dict[str, list[_Run]] = {name: [] for name in names}
    for way, each, reports in zip(ways, seconds, made, strict=True):
        runs[way.name].append(_Run(way.name, each, reports, way.answered()))
    return {
        name: sorted(some, key=lambda run: sum(run.seconds))[len(some) // 2]
        for name, some in runs.items()
    }


def _wrong(run: _Run, alone: _Run) -> int:
    """Return how many edits are not answered, or decided otherwise than one by one."""
    pairs = zip(run.made, alone.made, run.answered, strict=True)
    return sum(
        not (is_answered and _placed(one) == _placed(other)) for one, other, is_answered in pairs
    )


def _placed(report: Any) -> tuple[Any, ...]:
    return tuple(getattr(report, name, None) for name in ("outcome", "row", "radius"))
