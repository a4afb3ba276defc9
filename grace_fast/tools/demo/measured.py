"""Measurements of the demo beside an evaluation: times of look-ups, what inputs become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from grace_fast.tools.evaluate import answering, stream
from grace_fast.tools.evaluate.classifier import batch_of, logits_of
from grace_fast.tools.evaluate.docstrings import MODULES
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.mistakes import Mistakes
from grace_fast.tools.evaluate.task import Case
from grace_fast.tools.timing import times_us

LOOKUPS = 100  # timed at each point


@dataclass(frozen=True)
class Point:
    """What was measured after so many edits; see `evaluate.stream`."""

    edits: int
    keys: int
    es: float
    err: float
    trr: float
    hit_rate: float  # the share of unrelated inputs whose look-up hits
    edit_ms: float  # median of the edits since the last point
    find_us: float  # median look-up of one query by gf.find
    reference_us: float  # the same by the reference's rule
    disagreements: int  # timed look-ups that the reference's rule decides otherwise


@dataclass(frozen=True)
class Example:
    """One input before and after all edits."""

    what: str
    text: str
    wanted: str
    before: str
    after: str
    bit_for_bit: bool  # the logits did not change


@dataclass(frozen=True)
class Generality:
    """What the edits do to rewordings of the edited texts that were wrong before."""

    wrong_before: int
    right_after: float  # the share of them
    shown: list[Example]  # the first rewording that is repaired, after the edit that repairs it


class LookupTimes(NamedTuple):
    """The medians of one look-up, in microseconds, and how many the two decide otherwise."""

    find_us: float
    reference_us: float
    disagreements: int


class TimedEditor(GraceEditor):
    """GRACE whose look-ups are timed beside the reference's rule whenever a stream is measured."""

    def __init__(self, mistakes: Mistakes) -> None:
        super().__init__(mistakes.task, mistakes.chosen.epsilon)
        self._queries = mistakes.queries
        self._times: list[tuple[float, LookupTimes]] = []  # beside the share that hits

    def lookups_per_second(self, cases: object) -> float:
        """Time look-ups of the unrelated inputs."""
        book = self.grace.codebook
        times = time_lookups(self._queries, book)
        self._times.append((float(gf.find(self._queries, book).hit.float().mean()), times))
        return 1e6 / times.find_us

    def points(self, measured: list[stream.Point]) -> list[Point]:
        """Return the points of the stream with the times that belong to them."""
        return [
            Point(one.edits, one.keys, one.ES, one.ERR, one.TRR, hits, 1e3 * one.edit_seconds, *us)
            for one, (hits, us) in zip(measured, self._times, strict=True)
        ]


def time_lookups(queries: Tensor, book: gf.Codebook) -> LookupTimes:
    """Time look-ups by gf.find and by the reference's rule, in turns; the caller pins threads."""
    keys, radii = book.keys, book.radii

    def by_reference(query: Tensor) -> Tensor:
        distance, row = torch.cdist(query, keys).min(1)
        return distance <= radii[row]

    def by_find(query: Tensor) -> Tensor:
        return gf.find(query, book).hit

    asked = [queries[at % len(queries)][None] for at in range(LOOKUPS)]
    differ = sum(bool(by_find(one) != by_reference(one)) for one in asked)  # also warms both up
    taken = [[times_us(rule, [one])[0] for rule in (by_find, by_reference)] for one in asked]
    find_us, reference_us = np.median(taken, axis=0).tolist()
    return LookupTimes(find_us, reference_us, differ)


def unchanged(grace: gf.Grace, mistakes: Mistakes) -> float:
    """Return the share of unrelated inputs whose logits the edits leave as they are, to the bit."""
    tokens = mistakes.dealt.encode([case.prompt for case in mistakes.task.unrelated])
    now = logits_of(grace.model, tokens)
    with grace.disable_adapter():
        before = logits_of(grace.model, tokens)
    return float((now == before).all(dim=1).float().mean())


@torch.no_grad()
def example(grace: gf.Grace, what: str, case: Case, mistakes: Mistakes) -> Example:
    """Ask the model about one text, without the edits and with them."""
    batch = batch_of(mistakes.dealt.encode([case.prompt]))
    after = grace.model(**batch).logits[0]
    with grace.disable_adapter():
        before = grace.model(**batch).logits[0]
    wanted, then, now = (
        MODULES[int(one)] for one in (case.answer, before.argmax(), after.argmax())
    )
    return Example(what, case.prompt, wanted, then, now, torch.equal(before, after))


def generality(grace: gf.Grace, mistakes: Mistakes) -> Generality:
    """Ask a rewording of every edited text, and count answers that were wrong and are right."""
    task = mistakes.task
    with grace.disable_adapter():
        before = answering.answers(task, task.held_out)
    after = answering.answers(task, task.held_out)
    asked = zip(task.held_out, before, after, strict=True)
    wrong = [(at, then) for at, (case, now, then) in enumerate(asked) if now != case.answer]
    repaired = [at for at, then in wrong if then == task.held_out[at].answer]
    first = mistakes.reworded[repaired[0]] if repaired else None
    shown = [example(grace, "edited", task.edits[first.of if first else 0], mistakes)]
    if first is not None:
        shown.append(example(grace, first.how, task.held_out[repaired[0]], mistakes))
    return Generality(len(wrong), len(repaired) / len(wrong) if wrong else 0.0, shown)
