"""Which edits a page lists, and what became of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from grace_fast.edits.edit import Edit
from grace_fast.edits.verify import Verification, verify
from grace_fast.tools.report.reading import Reading, answer_of, spread

NEWEST = 200  # edits in the table
COUNTED = 20_000  # edits at most that are looked at to count outcomes
REPLAYED = 1e10  # products at most to look stored queries up again: edits x keys x D


@dataclass(frozen=True)
class Line:
    """One edit as the page lists it."""

    edit: Edit
    answer: str
    hits: int  # of its row
    verdict: str  # what its stored query gets now; "" where it was not asked


@dataclass(frozen=True)
class Listing:
    """The edits that remain."""

    count: int
    taken_back: int
    newest: tuple[Line, ...]  # newest first
    looked_at: int  # edits that the next three speak of
    outcomes: dict[str, int]
    not_learnt: int
    with_text: int
    verification: Verification | None  # None where looking all of them up would take long


def listing_of(reading: Reading) -> Listing:
    """Return what a page says of the edits."""
    history = reading.history
    numbers = sorted(history.edits)
    sample = [history.edits[numbers[at]] for at in spread(len(numbers), COUNTED)]
    verification = _replay(reading)
    verdicts = {} if verification is None else _verdicts(verification)
    newest = [history.edits[number] for number in reversed(numbers[-NEWEST:])]
    return Listing(
        len(numbers),
        history.next_id - len(numbers),
        tuple(
            Line(
                edit,
                answer_of(edit, edit.label),
                reading.hits_on(edit.row),
                verdicts.get(edit.id, ""),
            )
            for edit in newest
        ),
        len(sample),
        dict(Counter(edit.outcome for edit in sample).most_common()),
        sum(not edit.correct for edit in sample),
        sum(edit.text is not None for edit in sample),
        verification,
    )


def _replay(reading: Reading) -> Verification | None:
    snapshot = reading.snapshot
    if len(reading.history.edits) * snapshot.rows * snapshot.key_dim > REPLAYED:
        return None
    return verify(reading.history, snapshot, reading.rules)


def _verdicts(verification: Verification) -> dict[int, str]:
    return {
        replay.id: replay.verdict if replay.by is None else f"superseded by {replay.by}"
        for replay in verification.replays
    }
