"""The replay of every stored query: it fires, a later edit answers it, or it is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from grace_fast import semantics
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import NO_EDIT, Edit
from grace_fast.edits.history import History
from grace_fast.lookup import lookup
from grace_fast.semantics import Rules

REPLAY_BATCH = 4096  # stored queries looked up at once


@dataclass(frozen=True)
class Replay:
    """What became of one stored query."""

    id: int
    verdict: Literal["fires", "superseded", "broken"]
    by: int | None = None  # the later edit that superseded it


@dataclass(frozen=True)
class Verification:
    """The replay of every stored query; a broken edit is a failure, and a layer that is gone."""

    replays: tuple[Replay, ...]
    is_asked: bool = True  # false where the layer left the model, so that nobody asks

    def _of(self, verdict: str) -> list[Replay]:
        return [replay for replay in self.replays if replay.verdict == verdict]

    @property
    def fires(self) -> list[int]:
        """Ids whose query still gets their row's value."""
        return [replay.id for replay in self._of("fires")]

    @property
    def superseded(self) -> dict[int, int]:
        """Ids whose query a later edit answers now, and which."""
        return {replay.id: replay.by for replay in self._of("superseded") if replay.by is not None}

    @property
    def broken(self) -> list[int]:
        """Ids whose query gets no answer, or one that no later edit explains."""
        return [replay.id for replay in self._of("broken")]

    @property
    def ok(self) -> bool:
        """True where nothing is broken, and the model asks."""
        return self.is_asked and not self.broken

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return (
            f"Verification(ok={self.ok}, fires={len(self.fires)}, "
            f"superseded={len(self.superseded)}, broken={self.broken}"
            f"{'' if self.is_asked else ', the layer left the model'})"
        )


def verify(history: History, book: Codebook | Snapshot, rules: Rules) -> Verification:
    """Look every stored query up again and say what became of it."""
    snapshot = book.snapshot() if isinstance(book, Codebook) else book
    edits, live = list(history.edits.values()), snapshot.live.tolist()
    replays: list[Replay] = []
    changed: dict[int, int] = {}
    for start in range(0, len(edits), REPLAY_BATCH):
        part = edits[start : start + REPLAY_BATCH]
        queries = torch.stack([edit.query for edit in part])
        near, match = lookup.nearest(queries, snapshot), lookup.find(queries, snapshot)
        for edit, row, hit in zip(part, near.row.tolist(), match.hit.tolist(), strict=True):
            if live[edit.row]:
                replays.append(_replay(history, edit, row, hit, rules, changed))
            else:  # removed, but not by an undo
                replays.append(Replay(edit.id, "broken"))
    return Verification(tuple(replays))


def _replay(
    history: History, edit: Edit, row: int, hit: bool, rules: Rules, changed: dict[int, int]
) -> Replay:
    """Return what became of an edit whose query is nearest to a row.

    changed: by row, what is known of `_last_to_change`.
    """
    if row == edit.row and hit:
        newest = history.edits[history.rows[row].edits[-1]]
        if newest.id == edit.id or _answers_alike(rules, edit, newest):
            return Replay(edit.id, "fires")
        return Replay(edit.id, "superseded", newest.id)
    # A later key is nearer; or its own ball was shrunk or moved away.
    by = NO_EDIT
    for each in (row, edit.row):
        if by <= edit.id:
            if each not in changed:
                changed[each] = _last_to_change(history, each)
            by = changed[each]
    if by <= edit.id:
        return Replay(edit.id, "broken")
    return Replay(edit.id, "superseded", by)


def _last_to_change(history: History, row: int) -> int:
    """Return the newest remaining edit that a row's ball is owed to."""
    by = NO_EDIT
    life = history.rows.get(row)
    for event in () if life is None else life.events:
        if event.edit in history.edits:
            by = max(by, event.edit)
        elif (
            event.owner_row is not None and event.edit != NO_EDIT
        ):  # undone, and kept up by later edits on the row it made
            by = max(by, history.rows[event.owner_row].edits[-1])
    return by


def _answers_alike(rules: Rules, edit: Edit, newest: Edit) -> bool:
    if edit.label is None or newest.label is None:
        return False
    return semantics.same_label(rules, edit.label, newest.label)
