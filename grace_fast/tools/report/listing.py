"""Section on the edits: the newest ones, and what became of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

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


def listing_of(reading: Reading) -> SimpleNamespace:
    """Return what a page says of the edits that remain."""
    history = reading.history
    numbers = sorted(history.edits)
    sample = [history.edits[numbers[at]] for at in spread(len(numbers), COUNTED)]
    verification = _replay(reading)
    verdicts = {
        replay.id: replay.verdict if replay.by is None else f"superseded by {replay.by}"
        for replay in (() if verification is None else verification.replays)
    }
    newest = [history.edits[number] for number in reversed(numbers[-NEWEST:])]
    return SimpleNamespace(
        count=len(numbers),
        taken_back=history.next_id - len(numbers),
        newest=[
            Line(
                edit,
                answer_of(edit, edit.label),
                reading.hits_on(edit.row),
                verdicts.get(edit.id, ""),
            )
            for edit in newest
        ],
        looked_at=len(sample),  # edits that the next three speak of
        outcomes=dict(Counter(edit.outcome for edit in sample).most_common()),
        not_learnt=sum(not edit.correct for edit in sample),
        with_text=sum(edit.text is not None for edit in sample),
        verification=verification,  # None where looking all of them up would take long
    )


def _replay(reading: Reading) -> Verification | None:
    snapshot = reading.snapshot
    if len(reading.history.edits) * snapshot.rows * snapshot.key_dim > REPLAYED:
        return None
    return verify(reading.history, snapshot, reading.rules)
