"""Check of a history: every edit can be undone, and every row has edits that explain it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.codebook.checks import MAX_COUNTER
from grace_fast.codebook.once import cached_property
from grace_fast.codebook.pages import Counts
from grace_fast.edits.edit import NO_EDIT
from grace_fast.errors import CodebookCorrupt
from grace_fast.store.checks import Fault, not_ascending, not_finite, outside
from grace_fast.store.schema import NONE, OUTCOMES, Columns

_Rows = NDArray[np.int64]
LIMIT = MAX_COUNTER - 1  # of ids: the next one is a number, too


@dataclass(frozen=True)
class HistoryColumns:
    """The columns of a history, without its queries and texts."""

    row_count: int  # of the codebook: every row below is less
    edits: Columns  # [E] each, by ascending id
    events: Columns  # [M] each, by row and, of one row, oldest first
    bases: _Rows  # [n, 3] row, value slot and label slot, by row

    @staticmethod
    def of(row_count: int, edits: Columns, events: Columns, bases: _Rows) -> HistoryColumns:
        """Return columns whose events and bases may be in another order of rows."""
        order = np.argsort(events["row"], kind="stable")
        return HistoryColumns(
            row_count,
            edits,
            {name: each[order] for name, each in events.items()},
            bases[np.argsort(bases[:, 0], kind="stable")],
        )

    @cached_property
    def edits_by_row(self) -> _Rows:
        """[E] positions of the edits, by row and, of one row, oldest first."""
        return np.argsort(self.edits["row"], kind="stable")

    @cached_property
    def rows(self) -> _Rows:
        """[R] the rows that something happened on, ascending."""
        row = self.events["row"]
        return row[np.diff(row, prepend=-1) > 0]

    @cached_property
    def splits(self) -> tuple[_Rows, _Rows]:
        """[S] and [S]: the rows that were made by splitting, ascending, and those they split."""
        lasts_with, row = self.events["lasts_with"], self.events["row"]
        split = (lasts_with >= 0) & (lasts_with != row)
        order = np.argsort(lasts_with[split], kind="stable")
        return lasts_with[split][order], row[split][order]


def places(numbers: _Rows, wanted: _Rows) -> _Rows:
    """Return where ascending numbers hold those wanted, -1 for what is not among them."""
    at = np.searchsorted(numbers, wanted)
    there = at < len(numbers)
    there[there] = numbers[at[there]] == wanted[there]
    return np.where(there, at, -1)


def faults(
    edits: Columns, queries: Tensor, events: Columns, bases: Tensor, counts: Counts
) -> Iterator[Fault]:
    """Tell where edits, events and bases cannot be, each by itself."""
    edit = {name: torch.from_numpy(each) for name, each in edits.items()}
    event = {name: torch.from_numpy(each) for name, each in events.items()}
    yield Fault(
        "edits.row",
        outside("edits.row", edit["row"], counts.rows).wrong,
        "points outside the rows there are",
        lambda at: f"edit {edit['id'][at]} is on row {edit['row'][at]} of {counts.rows}",
    )
    yield outside("edits.id", edit["id"], LIMIT)
    yield outside("edits.value_after", edit["value_after"], counts.values)
    yield outside("edits.value_before", edit["value_before"], counts.values, NONE)
    yield outside("edits.label_slot", edit["label_slot"], counts.labels)
    yield outside("edits.outcome", edit["outcome"], len(OUTCOMES))
    yield not_finite("edits.radius", edit["radius"])
    # Infinite where the edit was added: no key was near.
    yield Fault("edits.distance", ~(edit["distance"] >= 0), "must be a number >= 0")
    yield Fault("edits.steps", edit["steps"] < 0, "must be at least 0")
    yield not_finite("edits.query", queries)
    yield outside("events.row", event["row"], counts.rows)
    yield outside("events.edit", event["edit"], LIMIT, NO_EDIT)
    yield outside("events.key_slot", event["key_slot"], counts.keys)
    yield outside("events.lasts_with", event["lasts_with"], counts.rows, NONE)
    yield not_finite("events.radius", event["radius"].float())
    for at, there in enumerate((counts.rows, counts.values, counts.labels)):
        yield outside("bases", bases[:, at], there)


def order_faults(edits: Columns) -> Iterator[Fault]:
    """Tell where the ids of edits do not ascend."""
    return not_ascending("edits.id", torch.from_numpy(edits["id"]), LIMIT)


def check(history: HistoryColumns, gone: NDArray[np.bool_] | None = None) -> dict[int, str]:
    """Return the rows whose history does not hang together, each with the reason.

    A row must have an event to go back to, and an event something that it lasts with. So every
    edit can be undone, in any order, and every row told what it is owed to.

    gone: [N] rows that are not looked at, nor what happened elsewhere for their sake.
    """
    count, found = history.row_count, dict[int, str]()
    gone = np.zeros(count, bool) if gone is None else gone
    edit, row, lasts_with = (history.events[name] for name in ("edit", "row", "lasts_with"))

    def among(rows: _Rows) -> NDArray[np.bool_]:
        there = np.zeros(count, bool)
        there[rows] = True
        return there & ~gone

    def note(rows: _Rows, why: str) -> None:
        for each in rows.tolist():
            found.setdefault(each, why)

    first = np.searchsorted(row, history.rows)  # the first event of each row
    edited, changed = among(history.edits["row"]), among(history.rows)
    based = among(history.bases[:, 0])
    begun = among(history.rows[lasts_with[first] == history.rows])
    note(
        ((edited | based | changed) & ~begun).nonzero()[0],
        "has edits, and no event says how it came to be",
    )
    note(
        (changed & ~(edited | based)).nonzero()[0],
        "has events, and neither an edit nor what it held before any",
    )
    looked_at = ~gone[row]
    by_edit = looked_at & (lasts_with == NONE)
    by_row = looked_at & (lasts_with != NONE) & ~gone[lasts_with]
    at = places(history.edits["id"], edit)
    on = np.where(at < 0, NONE, history.edits["row"][at] if len(history.edits["row"]) else NONE)
    unknown = "was changed by an edit that is unknown here"
    note(row[by_edit & (on != row)], unknown)
    note(row[by_row & (edit != NO_EDIT) & ~(edited & ~based)[lasts_with]], unknown)
    later = looked_at[1:] & (row[1:] == row[:-1])
    note(row[1:][later & (edit[1:] <= edit[:-1])], "was changed by edits that do not ascend")
    maker = np.full(count, NO_EDIT - 1)
    maker[history.rows] = edit[first]
    note(
        row[by_row & (maker[lasts_with] != edit)],
        "was changed for another row by an edit that did not make that",
    )
    split = (by_row & (lasts_with != row)).nonzero()[0]
    _, once = np.unique(lasts_with[split], return_index=True)
    note(row[np.delete(split, once)], "was split for a row that has split another one, too")
    based_on = history.bases[:, 0]
    again = (based_on[1:] == based_on[:-1]) & ~gone[based_on[1:]]
    note(based_on[1:][again], "was there before its edits twice")
    return found


def refuse_inconsistent(history: HistoryColumns, next_id: int) -> None:
    """Raise CodebookCorrupt for the first row of `check`, and for an edit that is yet to come."""
    for row, why in check(history).items():
        raise CodebookCorrupt(f"row {row} {why}", field="events")
    newest = max(history.edits["id"].max(initial=-1), history.events["edit"].max(initial=-1))
    if next_id <= newest:
        raise CodebookCorrupt(f"the next id is {next_id}, and there is an edit {newest}")
