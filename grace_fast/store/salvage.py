"""Salvage of a codebook's columns: which of them can be trusted, and the columns without the rest.

Rows keep their numbers, so ties are decided as before: a row that is dropped is a removed one. An
edit goes with its row, and a row with its edits: what no edit explains must not answer. What a
dropped edit did to the balls of other rows stays as it left them, so that they decide as before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.codebook.pages import Counts
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import tensor_files
from grace_fast.store.checks import column, row_faults, too_wide
from grace_fast.store.columns import ROW_COLUMNS, row_columns
from grace_fast.store.history_check import HistoryColumns, check, faults, order_faults
from grace_fast.store.schema import BASES, EDITS, EVENTS, Columns

_DEAD = -1.0  # the radius of a row that was dropped
_HISTORY = ("edits.", "events.", "bases")  # how the names of its columns begin


@dataclass(frozen=True)
class Dropped:
    """One thing that a repaired directory does not hold any more."""

    what: str  # row, edit, version, label or file
    number: int | None  # of a row, an edit or a version
    why: str


@dataclass
class Repaired:
    """The report of a repair; where the directory was sound, nothing was changed."""

    path: Path
    kept: Path | None = None  # where the directory lies as it was; None where it was sound
    dropped: list[Dropped] = field(default_factory=list)
    made_again: list[str] = field(default_factory=list)  # what was damaged, and nothing is lost by

    @property
    def was_sound(self) -> bool:
        """Whether there was nothing to repair."""
        return self.kept is None


@dataclass
class Untrusted:
    """Rows that cannot be trusted, each with its reason.

    numbers: their key, value, ball or slots cannot be; unexplained: no edit that fits made them.
    """

    numbers: dict[int, str] = field(default_factory=dict)
    unexplained: dict[int, str] = field(default_factory=dict)

    def gone(self, keep_rows: bool) -> dict[int, str]:
        """Return the rows that answer no more; keep_rows: those stay that are only unexplained."""
        return dict(self.numbers) if keep_rows else self.unexplained | self.numbers

    def dropped(self, keep_rows: bool, live: Tensor) -> list[Dropped]:
        """Return the live rows among them, for the report."""
        gone = sorted(self.gone(keep_rows).items())
        return [Dropped("row", row, why) for row, why in gone if bool(live[row])]


@dataclass(frozen=True)
class CorruptSlots:
    """Which slots of keys and values are not to be used, [slots] bool each."""

    keys: Tensor
    values: Tensor

    def among(self, slots: Tensor, name: str) -> Tensor:
        """Tell which slots [n] of keys or values are among them; none is what is outside."""
        corrupt: Tensor = getattr(self, name)
        inside = (slots >= 0) & (slots < len(corrupt))
        return inside & corrupt[slots.masked_fill(~inside, 0)] if len(corrupt) else inside


def read_columns(folder: Path, described: Any, report: Repaired) -> tuple[dict[str, Tensor], bool]:
    """Return the columns of a directory that are what was saved, and whether its history is.

    Raises: CodebookCorrupt where rows cannot be told without one that is not.
    """
    wrong: set[str] = set()
    columns = tensor_files.read_file(folder, described, wrong)
    history = {name for name in wrong if name.startswith(_HISTORY)}
    labels = wrong & {"labels.length", "labels.ids"}
    needed = sorted(wrong - history - labels)
    if needed:
        raise CodebookCorrupt(
            f"{folder}: {needed} of {described['file']} are not what was saved (checksum), and "
            "nothing tells which rows are meant; take the directory from a backup",
            field=needed[0],
        )
    if labels and "labels.length" in columns:
        columns["labels.length"] = torch.full_like(columns["labels.length"], -1)
        columns["labels.ids"] = torch.zeros(0, dtype=torch.int64, device="cpu")
        report.dropped.append(Dropped("label", None, "the labels are not what was saved"))
    return columns, not history


def without_rows(live: Tensor, rows: Mapping[int, str]) -> Tensor:
    """Return which rows are live once some are removed."""
    left = live.clone()
    left[list(rows)] = False
    return left


def require_rows(columns: Mapping[str, Tensor]) -> None:
    """Raise CodebookCorrupt, naming it, for a column of rows or labels that cannot be read."""
    try:
        row_columns(columns)
    except CodebookCorrupt as error:
        dtype = ROW_COLUMNS.get(str(error.field).removeprefix("rows."), torch.int64)
        message = f"{error.field} must be {dtype}, one for each row"
        raise CodebookCorrupt(message, field=error.field) from error


def without_corrupt_slots(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys or values [n, width] with zeros for what is not finite, and where that was."""
    corrupt = ~slots.isfinite().all(dim=1)
    return slots.masked_fill(corrupt[:, None], 0), corrupt


def mend_rows(
    columns: Mapping[str, Tensor],
    corrupt: CorruptSlots,
    max_radius: float | None,
    untrusted: Untrusted,
) -> dict[str, Tensor]:
    """Return columns that can be read, and note the live rows that cannot be trusted."""
    mended, live = dict(columns), columns["rows.live"]
    wide = too_wide("rows.radius", columns["rows.radius"], max_radius)
    found = [(wide.wrong, f"its radius {wide.why}")]
    for fault in row_faults(columns, _counts(columns, corrupt)):
        found.append((fault.wrong, f"{fault.field} {fault.why}"))
        if fault.field != "rows.radius":
            mended[fault.field] = columns[fault.field].masked_fill(fault.wrong, 0)
    for name in ("key", "value"):
        wrong = corrupt.among(columns[f"rows.{name}_slot"], f"{name}s")
        found.append((wrong, f"its {name} is not finite or was changed"))
    distrusted = torch.zeros_like(live)
    for wrong, why in found:
        if len(wrong):  # else there was nothing to look for
            distrusted |= wrong
            for row in (wrong & live).nonzero()[:, 0].tolist():
                untrusted.numbers.setdefault(row, why)
    mended["rows.radius"] = columns["rows.radius"].masked_fill(distrusted, _DEAD)
    return mended


def _counts(columns: Mapping[str, Tensor], corrupt: CorruptSlots) -> Counts:
    rows, labels = len(columns["rows.live"]), len(columns["labels.length"])
    return Counts(rows=rows, keys=len(corrupt.keys), values=len(corrupt.values), labels=labels)


class SalvagedHistory:
    """The edits, events and bases of a directory as its columns have them, without those at fault.

    columns: those of a base; untrusted: rows that are known, and to which it adds those that no
    edit explains.

    Raises: CodebookCorrupt where a column of the history is missing or of another form.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        corrupt: CorruptSlots,
        max_radius: float | None,
        untrusted: Untrusted,
    ) -> None:
        self._columns, self._untrusted, self._corrupt = dict(columns), untrusted, corrupt
        self._counts = counts = _counts(columns, corrupt)
        self._edits, self._events = EDITS.from_base(columns), EVENTS.from_base(columns)
        self._bases = column(columns, "bases", torch.int64, None, (len(BASES),))
        kind, count = columns["keys"], len(self._edits["id"])
        self._query = column(columns, "edits.query", kind.dtype, count, kind.shape[1:])
        self._gone: list[tuple[int, str]] = []  # edits, and why
        self._test_columns()
        self._distrust(max_radius)
        history = HistoryColumns.of(counts.rows, self._edits, self._events, self._bases.numpy())
        gone = np.zeros(counts.rows, bool)
        gone[[*untrusted.gone(keep_rows=False)]] = True
        while found := check(history, gone):
            gone[[*found]] = True
            untrusted.unexplained |= {row: f"it {why}" for row, why in found.items()}

    def _test_columns(self) -> None:
        """Drop edits at fault and what is on no row, and note the rows that lose something."""
        edits, events, bases = self._edits, self._events, self._bases
        ids, lost = edits["id"].tolist(), dict[int, str]()
        rows = {"edits": edits["row"], "events": events["row"], "bases": bases[:, 0].numpy()}
        for fault in [
            *order_faults(edits),
            *faults(edits, self._query, events, bases, self._counts),
        ]:
            wrong = fault.wrong.any(dim=1) if fault.wrong.ndim == 2 else fault.wrong
            of = fault.field.split(".")[0]
            for at in wrong.nonzero()[:, 0].tolist():
                why = fault.message(at)
                if of == "edits":
                    why = f"edit {ids[at]}: {why}"
                    lost.setdefault(at, why)
                if 0 <= (on := int(rows[of][at])) < self._counts.rows:
                    self._untrusted.unexplained.setdefault(on, why)
        self._gone = [(ids[at], why) for at, why in sorted(lost.items())]
        self._keep_edits(np.array([at not in lost for at in range(len(ids))], bool))
        inside = (rows["events"] >= 0) & (rows["events"] < self._counts.rows)
        self._events = events = {name: each[inside] for name, each in events.items()}
        row, with_row = events["row"], events["lasts_with"]
        # On a row that is noted: it only has to be one that can be looked at.
        is_there = (with_row >= -1) & (with_row < self._counts.rows)
        events["lasts_with"] = np.where(is_there, with_row, row)
        self._bases = bases[(bases[:, 0] >= 0) & (bases[:, 0] < self._counts.rows)]

    def _keep_edits(self, stay: NDArray[np.bool_]) -> None:
        self._edits = {name: each[stay] for name, each in self._edits.items()}
        self._query = self._query[torch.from_numpy(stay)]

    def _distrust(self, max_radius: float | None) -> None:
        """Note the rows that an undo would give what is not to be used."""
        edit, event = EDITS.to_base(self._edits), EVENTS.to_base(self._events)
        changed = "is not finite or was changed"
        wide = too_wide("events.radius", event["events.radius"], max_radius).wrong
        found = [
            (self._events["row"], wide, "an undo would make its radius wider than max_radius"),
            (
                self._events["row"],
                self._corrupt.among(event["events.key_slot"], "keys"),
                f"a key of its history {changed}",
            ),
            (
                self._bases[:, 0].numpy(),
                self._corrupt.among(self._bases[:, 1], "values"),
                f"a value of its history {changed}",
            ),
        ]
        for name in ("edits.value_after", "edits.value_before"):
            wrong = self._corrupt.among(edit[name], "values")
            found.append((self._edits["row"], wrong, f"a value of an edit {changed}"))
        for rows, wrong, why in found:
            for at in rows[wrong.numpy()].tolist():
                self._untrusted.numbers.setdefault(at, why)

    def without(self, rows: Collection[int]) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """Return the columns without what happened on some rows; the ids of those edits, and why.

        rows: of those that were found untrusted.
        """
        known = self._untrusted.gone(keep_rows=False)
        on = list(zip(self._edits["id"].tolist(), self._edits["row"].tolist(), strict=True))
        gone = [(edit, f"it is on row {row}: {known[row]}") for edit, row in on if row in rows]
        self._keep_edits(np.array([row not in rows for _, row in on], bool))
        bases = self._bases[[row not in rows for row in self._bases[:, 0].tolist()]]
        made = EDITS.to_base(self._edits) | EVENTS.to_base(self._events_without(rows))
        made |= {"edits.query": self._query, "bases": bases}
        return self._columns | made, sorted(self._gone + gone)

    def _events_without(self, rows: Collection[int]) -> Columns:
        """Return the events without those on some rows or owed to them.

        The ball that such an event left is what the one before it on the row leaves from now on.
        """
        events = {name: each.copy() for name, each in self._events.items()}
        stay: list[int] = []
        newest: dict[int, int] = {}  # by row: the place of its last event that stays
        owners = zip(events["row"].tolist(), events["lasts_with"].tolist(), strict=True)
        for at, (own, with_row) in enumerate(owners):
            if own in rows:
                continue
            if with_row in rows:
                for name in ("radius", "key_slot"):
                    events[name][newest[own]] = events[name][at]
                continue
            stay.append(at)
            newest[own] = at
        return {name: each[stay] for name, each in events.items()}
