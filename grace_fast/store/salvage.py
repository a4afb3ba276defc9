"""What of a codebook's columns can be trusted, and the columns without the rest.

Rows keep their numbers, so ties are decided as before: a row that is dropped is a removed one. An
edit goes with its row, and a row with its edits: what no edit explains must not answer. What a
dropped edit did to the balls of other rows stays as it left them, so that they decide as before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grace_fast.edits.edit import NO_EDIT
from grace_fast.store import manifest
from grace_fast.store.columns import OUTCOMES

_DEAD = -1.0  # the radius of a row that was dropped
HISTORY = ("edits.", "events.", "bases")  # how the names of its columns begin


@dataclass(frozen=True)
class Dropped:
    """One thing that a repaired directory does not hold any more."""

    what: str  # row, edit, version, label or file
    number: int | None  # of a row, an edit or a version
    why: str


@dataclass
class Unsound:
    """Rows that cannot be trusted, each with its reason.

    numbers: their key, value, ball or slots cannot be; untold: no edit that fits explains them.
    """

    numbers: dict[int, str] = field(default_factory=dict)
    untold: dict[int, str] = field(default_factory=dict)

    def gone(self, keep_rows: bool) -> dict[int, str]:
        """Return the rows that answer no more; keep_rows: those stay that are only untold."""
        return dict(self.numbers) if keep_rows else self.untold | self.numbers


def without_odd_slots(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys or values [n, width] with zeros for what is not finite, and where that was."""
    odd = ~slots.isfinite().all(dim=1)
    return slots.masked_fill(odd[:, None], 0), odd


def mend_rows(
    columns: Mapping[str, Tensor],
    odd_keys: Tensor,
    odd_values: Tensor,
    max_radius: float | None,
    unsound: Unsound,
) -> dict[str, Tensor]:
    """Return columns that can be read, and note the live rows that cannot be trusted.

    odd_keys, odd_values: by slot [slots] bool, what is not to be used.
    """
    mended = dict(columns)
    live, radii = mended["rows.live"], mended["rows.radius"]
    widest = torch.tensor(
        torch.inf if max_radius is None else max_radius, dtype=torch.float32, device="cpu"
    )
    reasons = [
        (~radii.isfinite(), "its radius is NaN or infinite"),
        (radii > widest, f"its radius is beyond max_radius = {max_radius}"),
    ]
    labels = len(mended["labels.length"])
    for name, odd in (
        ("key", odd_keys),
        ("value", odd_values),
        ("label", torch.zeros(labels, dtype=torch.bool, device="cpu")),
    ):
        slots = mended[f"rows.{name}_slot"]
        outside = (slots < 0) | (slots >= len(odd))
        inside = slots.masked_fill(outside, 0)
        mended[f"rows.{name}_slot"] = inside
        reasons.append((outside, f"its {name} is in no slot there is"))
        if len(odd):
            reasons.append((odd[inside] & ~outside, f"its {name} is not finite or was changed"))
    wrong = torch.zeros_like(live)
    for where, why in reasons:
        wrong |= where
        for row in (where & live).nonzero()[:, 0].tolist():
            unsound.numbers.setdefault(row, why)
    mended["rows.radius"] = radii.masked_fill(wrong, _DEAD)
    return mended


class Story:
    """The edits, events and bases of a directory as its columns say, tested one by one.

    columns: those of the history and of the rows; odd_keys, odd_values: as in `mend_rows`.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        odd_keys: Tensor,
        odd_values: Tensor,
        max_radius: float | None,
        unsound: Unsound,
    ) -> None:
        self._columns = dict(columns)
        self._odd = {"keys": odd_keys, "values": odd_values}
        widest = torch.inf if max_radius is None else max_radius
        self._widest = float(torch.tensor(widest, dtype=torch.float32, device="cpu"))
        self._unsound = unsound
        self._rows = len(columns["rows.id"])
        self._labels = len(columns["labels.length"])
        self._lost: dict[int, str] = {}  # by place: edits on no row
        self._test_edits()
        self._test_events()
        self._test_bases()
        while self._test_lives():
            pass

    def without(self, rows: Collection[int]) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """Return the columns without what happened on some rows; the ids of those edits, and why.

        rows: of those that were found unsound.
        """
        of_edits, ids = (self._columns[f"edits.{name}"].tolist() for name in ("row", "id"))
        known = self._unsound.numbers | self._unsound.untold
        kept: list[int] = []
        gone: list[tuple[int, str]] = []
        for at, row in enumerate(of_edits):
            if at in self._lost:
                gone.append((ids[at], self._lost[at]))
            elif row in rows:
                gone.append((ids[at], f"it is on row {row}: {known[row]}"))
            else:
                kept.append(at)
        made = self._picked("edits.", kept) | self._events_without(rows)
        bases = self._columns["bases"]
        made["bases"] = bases[[row not in rows for row in bases[:, 0].tolist()]]
        return self._columns | made, gone

    def _events_without(self, rows: Collection[int]) -> dict[str, Tensor]:
        """Return the events without those on some rows or owed to them.

        The ball that such an event left is what the one before it on the row leaves from now on.
        """
        names = ("row", "lasts_with", "radius", "key_slot")
        row, lasts_with, radius, key_slot = (self._columns[f"events.{n}"].tolist() for n in names)
        kept: list[int] = []
        newest: dict[int, int] = {}  # by row: the place of its last event that stays
        for at, (own, with_row) in enumerate(zip(row, lasts_with, strict=True)):
            if own in rows:
                continue
            if with_row in rows:
                before = newest[own]
                radius[before], key_slot[before] = radius[at], key_slot[at]
                continue
            kept.append(at)
            newest[own] = at
        changed = {
            "events.radius": torch.tensor(radius, dtype=torch.float64, device="cpu"),
            "events.key_slot": torch.tensor(key_slot, dtype=torch.int64, device="cpu"),
        }
        self_columns = self._columns | changed
        return {
            name: column[kept] for name, column in self_columns.items() if name.startswith("events")
        }

    def _picked(self, stem: str, kept: list[int]) -> dict[str, Tensor]:
        return {
            name: column[kept] for name, column in self._columns.items() if name.startswith(stem)
        }

    def _outside(self, name: str, count: int, least: int = 0) -> Tensor:
        column = self._columns[name]
        return (column < least) | (column >= count)

    def _in_odd(self, column: Tensor, slots: str) -> Tensor:
        odd = self._odd[slots]
        inside = (column >= 0) & (column < len(odd))
        return inside & odd[column.masked_fill(~inside, 0)] if len(odd) else inside

    def _test_edits(self) -> None:
        columns, values = self._columns, len(self._odd["values"])
        ids, rows = columns["edits.id"].tolist(), columns["edits.row"].tolist()
        newest = -1
        for at, (number, row) in enumerate(zip(ids, rows, strict=True)):
            if not newest < number < manifest.MAX_COUNTER - 1:
                self._lose(at, row, f"edit {number} comes after edit {newest}")
            elif not 0 <= row < self._rows:
                self._lost[at] = f"it is on row {row} of {self._rows}"
            newest = max(newest, number if number < manifest.MAX_COUNTER - 1 else -1)
        for where, why in (
            (~columns["edits.query"].isfinite().all(dim=1), "a query that is NaN or infinite"),
            (~columns["edits.radius"].isfinite(), "a radius that is NaN or infinite"),
            (~(columns["edits.distance"] >= 0), "a distance that is no number >= 0"),
            (columns["edits.steps"] < 0, "fewer than no steps"),
            (self._outside("edits.value_after", values), "a value that is not there"),
            (self._outside("edits.value_before", values, -1), "a value that is not there"),
            (self._outside("edits.label_slot", self._labels), "a label that is not there"),
            (self._outside("edits.outcome", len(OUTCOMES)), "an outcome there is not"),
        ):
            for at in where.nonzero()[:, 0].tolist():
                self._lose(at, rows[at], f"edit {ids[at]} has {why}")
        for name in ("edits.value_after", "edits.value_before"):
            for at in self._in_odd(columns[name], "values").nonzero()[:, 0].tolist():
                self._distrust(rows[at], f"a value of edit {ids[at]} is not finite or was changed")

    def _lose(self, at: int, row: int, why: str) -> None:
        """Drop an edit, and what its row is explained by."""
        self._lost.setdefault(at, why)
        self._untold(row, why)

    def _untold(self, row: int, why: str) -> bool:
        """Note that nothing explains a row; return whether that is new."""
        known = row in self._unsound.untold or row in self._unsound.numbers
        if 0 <= row < self._rows and not known:
            self._unsound.untold[row] = why
            return True
        return False

    def _distrust(self, row: int, why: str) -> None:
        if 0 <= row < self._rows:
            self._unsound.numbers.setdefault(row, why)

    def _test_events(self) -> None:
        columns, rows = self._columns, self._columns["events.row"].tolist()
        keys = len(self._odd["keys"])
        for where, why in (
            (self._outside("events.row", self._rows), "a row that is not there"),
            (
                self._outside("events.edit", manifest.MAX_COUNTER - 1, NO_EDIT),
                "no edit there can be",
            ),
            (self._outside("events.key_slot", keys), "a key that is not there"),
            (self._outside("events.lasts_with", self._rows, -1), "a row that is not there"),
            (~columns["events.radius"].float().isfinite(), "a radius that is NaN or infinite"),
        ):
            for at in where.nonzero()[:, 0].tolist():
                self._untold(rows[at], f"its history tells of {why}")
        wide = columns["events.radius"] > self._widest
        for at in wide.nonzero()[:, 0].tolist():
            self._distrust(rows[at], "an undo would make its radius wider than max_radius")
        for at in self._in_odd(columns["events.key_slot"], "keys").nonzero()[:, 0].tolist():
            self._distrust(rows[at], "a key of its history is not finite or was changed")
        inside = ~self._outside("events.row", self._rows)
        for name in [each for each in columns if each.startswith("events")]:
            columns[name] = columns[name][inside]

    def _test_bases(self) -> None:
        bases = self._columns["bases"]
        for row, value, label in bases.tolist():
            if not (0 <= value < len(self._odd["values"]) and 0 <= label < self._labels):
                self._untold(row, "what it held before any edit is not there")
        for at in self._in_odd(bases[:, 1], "values").nonzero()[:, 0].tolist():
            self._distrust(int(bases[at, 0]), "a value of its history is not finite or was changed")
        inside = (bases[:, 0] >= 0) & (bases[:, 0] < self._rows)
        self._columns["bases"] = bases[inside]

    def _test_lives(self) -> bool:
        """Note the rows whose history does not hang together; return whether there was one.

        The rules are those of `past`, row by row.
        """
        gone = self._unsound.numbers.keys() | self._unsound.untold.keys()
        edits: dict[int, set[int]] = {}
        ids, rows = self._columns["edits.id"].tolist(), self._columns["edits.row"].tolist()
        for at, (number, row) in enumerate(zip(ids, rows, strict=True)):
            if at not in self._lost and row not in gone:
                edits.setdefault(row, set()).add(number)
        bases = {row for row in self._columns["bases"][:, 0].tolist() if row not in gone}
        names = ("edit", "row", "lasts_with")
        told = list(zip(*(self._columns[f"events.{name}"].tolist() for name in names), strict=True))
        found: dict[int, str] = {}
        first: dict[int, int] = {}  # by row: the edit of its first event
        last: dict[int, int] = {}
        split_by: set[int] = set()
        for edit, row, _ in told:
            first.setdefault(row, edit)
        for edit, row, lasts_with in told:
            if row in gone:
                continue
            if row not in last and lasts_with != row:
                found.setdefault(row, "no event says how it came to be")
            if row in last and edit <= last[row]:
                found.setdefault(row, "the edits that changed it do not ascend")
            last[row] = edit
            by_an_edit_here = lasts_with == -1
            if by_an_edit_here and edit not in edits.get(row, ()):
                found.setdefault(row, f"it was changed by edit {edit}, unknown there")
            if by_an_edit_here or lasts_with in gone:
                continue
            if edit != NO_EDIT and (lasts_with not in edits or lasts_with in bases):
                found.setdefault(row, f"it was changed by edit {edit}, unknown there")
            if lasts_with != row:
                if first.get(lasts_with) != edit:
                    found.setdefault(row, f"edit {edit} did not make row {lasts_with}")
                if lasts_with in split_by:
                    found.setdefault(row, f"row {lasts_with} has split another one already")
                split_by.add(lasts_with)
        for row in (edits.keys() | bases) - last.keys():
            found.setdefault(row, "it has edits, and no event says how it came to be")
        for row in last.keys() - edits.keys() - bases:
            found.setdefault(row, "it has events, and neither an edit nor what was before any")
        return sum(self._untold(row, why) for row, why in found.items()) > 0  # each of them
