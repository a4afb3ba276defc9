"""The stream: mistakes become edits one by one, and at regular steps everything is measured again.

ES    an edit is answered right straight after it was made
ERR   all edits so far are answered right now
TRR   held-out inputs that were right before any edit are right now
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import grace_fast as gf
from grace_fast.tools.demo.model import Inputs, batch_of, logits_of

LOOKUPS = 100  # timed look-ups at each step


@dataclass(frozen=True)
class HeldOut:
    """The held-out inputs as the model answered them before any edit."""

    inputs: Inputs
    logits: Tensor  # [M, C]
    queries: Tensor  # [M, D], at the edited layer
    wrong: list[int]  # the mistakes, which become the edits
    right: list[int]  # the unrelated inputs


@dataclass(frozen=True)
class Point:
    """What was measured after so many edits."""

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
class Final:
    """What the whole held-out set says after the last edit."""

    err: float
    trr: float
    unchanged: float  # the share of unrelated inputs whose logits are the same bit for bit


def run(grace: gf.Grace, held_out: HeldOut, points: int, bar: Any) -> list[Point]:
    """Edit every mistake away, in order, and measure at `points` even steps."""
    mistakes = held_out.inputs.pick(held_out.wrong)
    steps = {len(mistakes) * step // points for step in range(1, points + 1)}
    right, seconds, measured = 0, [], []
    for at, (tokens, label) in enumerate(
        zip(mistakes.tokens, mistakes.labels.tolist(), strict=True), start=1
    ):
        batch = batch_of([tokens], [label])
        start = time.perf_counter()
        grace.edit(batch)
        seconds.append(time.perf_counter() - start)
        right += int(logits_of(grace.model, [tokens]).argmax()) == label
        bar.update()
        if at in steps:
            past = mistakes.pick(range(at))
            measured.append(_measure(grace, past, held_out, right / at, 1e3 * median(seconds)))
            bar.set_postfix(keys=measured[-1].keys, ERR=f"{measured[-1].err:.3f}")
            seconds = []
    return measured


def _measure(grace: gf.Grace, past: Inputs, held_out: HeldOut, es: float, edit_ms: float) -> Point:
    # A miss leaves the layer's output as it is, so only the unrelated inputs that hit are run
    # again; `finish` runs them all.
    queries = held_out.queries[held_out.right]
    hit = gf.find(queries, grace.codebook).hit
    disturbed = [at for at, hits in zip(held_out.right, hit.tolist(), strict=True) if hits]
    lost = _wrong(grace, held_out.inputs.pick(disturbed))
    find_us, reference_us, disagreements = time_lookups(queries, grace.codebook)
    return Point(
        edits=len(past),
        keys=len(grace.codebook),
        es=es,
        err=1 - _wrong(grace, past) / len(past),
        trr=1 - lost / len(held_out.right),
        hit_rate=len(disturbed) / len(held_out.right),
        edit_ms=edit_ms,
        find_us=find_us,
        reference_us=reference_us,
        disagreements=disagreements,
    )


def _wrong(grace: gf.Grace, inputs: Inputs) -> int:
    if not len(inputs):
        return 0
    answers = logits_of(grace.model, inputs.tokens).argmax(dim=1)
    return int((answers != inputs.labels).sum())


def finish(grace: gf.Grace, held_out: HeldOut) -> Final:
    """Run the whole held-out set again, in the same batches as before any edit."""
    now = logits_of(grace.model, held_out.inputs.tokens)
    right = (now.argmax(dim=1) == held_out.inputs.labels).float()
    unchanged = (now == held_out.logits).all(dim=1).float()
    return Final(
        err=float(right[held_out.wrong].mean()),
        trr=float(right[held_out.right].mean()),
        unchanged=float(unchanged[held_out.right].mean()),
    )


def time_lookups(queries: Tensor, book: gf.Codebook) -> tuple[float, float, int]:
    """Return the median us of one look-up by gf.find, by the reference's rule, and how many differ.

    The two take turns on the same queries and codebook; the caller pins the threads.
    """
    keys, radii = book.keys, book.radii

    def by_reference(query: Tensor) -> Tensor:
        distance, row = torch.cdist(query, keys).min(1)
        return distance <= radii[row]

    def by_find(query: Tensor) -> Tensor:
        return gf.find(query, book).hit

    timed: dict[Callable[[Tensor], Tensor], list[float]] = {by_find: [], by_reference: []}
    differ = 0
    for at in range(LOOKUPS):
        query = queries[at % len(queries)][None]
        differ += bool(by_find(query) != by_reference(query))  # also warms both up
        for rule, elapsed_us in timed.items():
            start = time.perf_counter()
            rule(query)
            elapsed_us.append(1e6 * (time.perf_counter() - start))
    return median(timed[by_find]), median(timed[by_reference]), differ
