"""The history of a codebook as columns, and back.

A history that is read stays columns: an edit, or what happened on a row, is made an object when
somebody looks at it. So what any of them could break is tested here, of all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import starmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.codebook.ascending import Ascending
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.lazy_table import Filed, Kept
from grace_fast.codebook.once import cached_property
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import NO_EDIT, Base, Edit, Event, RowLife
from grace_fast.edits.history import History
from grace_fast.store.columns import (
    OUTCOMES,
    check_finite,
    check_ids,
    check_radii,
    check_slots,
    column,
    get,
    refuse_where,
)
from grace_fast.store.files import CodebookCorrupt

_EDIT_COLUMNS = {
    "id": torch.int64,
    "row": torch.int64,
    "distance": torch.float64,
    "radius": torch.float64,
    "value_after": torch.int64,
    "loss": torch.float64,
    "steps": torch.int64,
    "correct": torch.bool,
    "prompt": torch.int64,
    "value_before": torch.int64,  # -1 for none
    "label_slot": torch.int64,
    "outcome": torch.int64,  # its place in OUTCOMES
}
_EVENT_COLUMNS = {
    "edit": torch.int64,
    "row": torch.int64,
    "radius": torch.float64,
    "key_slot": torch.int64,
    "lasts_with": torch.int64,
}
_NO_SLOT = -1


@dataclass(frozen=True)
class _Past:
    """What there is of a history but for its queries and texts."""

    row_count: int  # of the codebook: every row below is less
    edits: dict[str, NDArray[Any]]  # [E] each, by ascending id
    events: dict[str, NDArray[Any]]  # [M] each, by row and, of one row, oldest first
    bases: NDArray[np.int64]  # [n, 3] row, value slot and label slot, by row

    @cached_property
    def edits_by_row(self) -> NDArray[np.int64]:
        """[E] positions of the edits, by row and, of one row, oldest first."""
        return np.argsort(self.edits["row"], kind="stable")

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[R] the rows that something happened on, ascending."""
        row = self.events["row"]
        return row[np.diff(row, prepend=-1) > 0]

    @cached_property
    def splits(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[S] and [S]: the rows that were made by splitting, ascending, and those they split."""
        lasts_with, row = self.events["lasts_with"], self.events["row"]
        split = (lasts_with >= 0) & (lasts_with != row)
        order = np.argsort(lasts_with[split], kind="stable")
        return lasts_with[split][order], row[split][order]

    def check(self) -> None:
        """Raise where a row has no event to go back to, or an event nothing that it lasts with.

        So every edit can be undone, in any order, and every row told what it is owed to.
        """
        edit, row, lasts_with = (self.events[name] for name in ("edit", "row", "lasts_with"))
        first = np.searchsorted(row, self.rows)  # the first event of each row
        edited, changed = self._among(self.edits["row"]), self._among(self.rows)
        based = self._among(self.bases[:, 0])
        begun = self._among(self.rows[lasts_with[first] == self.rows])
        _refuse_any(
            ((edited | based | changed) & ~begun).nonzero()[0],
            "row {} has edits, and no event says how it came to be",
        )
        _refuse_any(
            (changed & ~(edited | based)).nonzero()[0],
            "row {} has events, and neither an edit nor what it held before any",
        )
        of_edits = lasts_with == -1
        at = _places(self.edits["id"], edit[of_edits])
        on = np.where(at < 0, -1, self.edits["row"][at] if len(self.edits["row"]) else -1)
        unknown = "row {} was changed by an edit that is unknown here"
        _refuse_any(row[of_edits][on != row[of_edits]], unknown)
        made = (edit != NO_EDIT) & ~of_edits
        _refuse_any(row[made][~(edited & ~based)[lasts_with[made]]], unknown)
        of_one_row = row[1:] == row[:-1]
        _refuse_any(
            row[1:][of_one_row & (edit[1:] <= edit[:-1])],
            "row {} was changed by edits that do not ascend",
        )
        maker = np.zeros(self.row_count, np.int64)
        maker[self.rows] = edit[first]
        _refuse_any(
            row[~of_edits][maker[lasts_with[~of_edits]] != edit[~of_edits]],
            "row {} was changed for another row by an edit that did not make that",
        )
        made_by_split = self.splits[0]
        _refuse_any(
            made_by_split[1:][made_by_split[1:] == made_by_split[:-1]],
            "row {} has split two others, as no edit does",
        )
        there = self.bases[:, 0]
        _refuse_any(there[1:][there[1:] == there[:-1]], "row {} was there before its edits twice")

    def _among(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return [N] of each row of the codebook, whether it is among these."""
        found = np.zeros(self.row_count, bool)
        found[rows] = True
        return found


def _refuse_any(rows: NDArray[np.int64], why: str) -> None:
    if len(rows):
        raise CodebookCorrupt(why.format(rows[0]), field="events")


def _places(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where ascending numbers hold those wanted, -1 for what is not among them."""
    at = np.searchsorted(numbers, wanted)
    there = at < len(numbers)
    there[there] = numbers[at[there]] == wanted[there]
    return np.where(there, at, -1)


@dataclass(frozen=True)
class _Edits:
    """Edits in columns."""

    past: _Past
    query: Tensor  # [E, D]
    labels: Labels  # by slot
    texts: Mapping[str, Any]  # by id

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[E] ids."""
        return self.past.edits["id"]

    def make(self, at: int) -> Edit:
        """Return one edit."""
        fields = {name: values.item(at) for name, values in self.past.edits.items()}
        label_slot, before = fields.pop("label_slot"), fields.pop("value_before")
        outcome, text = OUTCOMES[fields.pop("outcome")], self.texts.get(str(fields["id"]))
        return Edit(
            **fields,
            outcome=outcome,
            query=self.query[at].clone(),  # which does not keep all of them in memory
            label=self.labels[label_slot],
            value_before=None if before == _NO_SLOT else before,
            text=None if text is None else (str(text[0]), str(text[1])),
        )


@dataclass(frozen=True)
class _LabelSlots:
    """The label slots of edits in columns."""

    past: _Past

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[E] ids."""
        return self.past.edits["id"]

    def make(self, at: int) -> int:
        """Return the slot of one edit's label."""
        return int(self.past.edits["label_slot"].item(at))


@dataclass(frozen=True)
class _Lives:
    """What happened on rows, in columns."""

    past: _Past

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[R] rows."""
        return self.past.rows

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """[3, R + 1] where events, edits and bases of each row begin."""
        past, ends = self.past, np.append(self.past.rows, np.iinfo(np.int64).max)
        by_row = past.edits["row"][past.edits_by_row]
        of = (past.events["row"], by_row, past.bases[:, 0])
        return np.stack([np.searchsorted(rows, ends) for rows in of])

    def make(self, at: int) -> RowLife:
        """Return what happened on one row; it is asked for again and again where there is much."""
        return self._remembered(at)

    @cached_property
    def _remembered(self) -> Callable[[int], RowLife]:
        return lru_cache(maxsize=64)(self._made)

    def _made(self, at: int) -> RowLife:
        past, row = self.past, int(self.past.rows[at])
        events, edits, bases = (slice(*each[at : at + 2].tolist()) for each in self._starts)
        listed = zip(*(values[events].tolist() for values in past.events.values()), strict=True)
        base = past.bases[bases].tolist()
        made, split = past.splits
        by = _places(made, np.array([row]))[0]
        ids, changes = (
            past.edits["id"][past.edits_by_row[edits]].tolist(),
            [*starmap(Event.read, listed)],
        )
        return RowLife(
            edits=Ascending(ids, ids),
            events=Ascending([event.edit for event in changes], changes),
            base=Base(*base[0][1:]) if base else None,
            neighbour=-1 if by < 0 else int(split[by]),
        )


def _past_of(history: History, row_count: int) -> _Past:
    """Return a history as columns: those it came in, with what was changed since."""
    return _Past(row_count, _edit_columns(history), *_row_columns(history))


def _edit_columns(history: History) -> dict[str, NDArray[Any]]:
    filed, edits = history.edits.filed, list(history.edits.later.values())
    later: dict[str, list[Any]] = {
        name: [getattr(edit, name) for edit in edits]
        for name in _EDIT_COLUMNS
        if name not in ("value_before", "label_slot", "outcome")
    }
    later["value_before"] = [
        _NO_SLOT if edit.value_before is None else edit.value_before for edit in edits
    ]
    later["label_slot"] = [history.label_slots[edit.id] for edit in edits]
    later["outcome"] = [OUTCOMES.index(edit.outcome) for edit in edits]
    stays = history.edits.filed_positions()
    return _joined(
        filed.past.edits if isinstance(filed, _Edits) else {}, stays, later, _EDIT_COLUMNS, "id"
    )


def _row_columns(history: History) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    lives, filed = history.rows.later, history.rows.filed
    changed = [event for life in lives.values() for event in life.events]
    later: dict[str, list[Any]] = {
        name: [getattr(event, name) for event in changed] for name in _EVENT_COLUMNS
    }
    found = [
        (row, life.base.value_slot, life.base.label_slot)
        for row, life in lives.items()
        if life.base is not None
    ]
    bases = np.array(found, np.int64).reshape(-1, 3)
    stays, known = np.zeros(0, np.int64), {}
    if isinstance(filed, _Lives):
        known, rows = filed.past.events, filed.past.rows[history.rows.filed_positions()]
        stays = np.isin(known["row"], rows).nonzero()[0]
        bases = np.concatenate([filed.past.bases[np.isin(filed.past.bases[:, 0], rows)], bases])
    return (
        _joined(known, stays, later, _EVENT_COLUMNS, "row"),
        bases[np.argsort(bases[:, 0], kind="stable")],
    )


def _joined(
    known: Mapping[str, NDArray[Any]],
    stays: NDArray[np.int64],
    later: Mapping[str, Sequence[Any]],
    kinds: Mapping[str, torch.dtype],
    by: str,
) -> dict[str, NDArray[Any]]:
    """Return the positions of columns that stay and what came later, by one of the columns."""
    parts = {
        name: np.asarray(later[name], dtype=torch.zeros(0, dtype=kind, device="cpu").numpy().dtype)
        for name, kind in kinds.items()
    }
    if known:
        parts = {name: np.concatenate([known[name][stays], each]) for name, each in parts.items()}
    order = np.argsort(parts[by], kind="stable")
    return {name: each[order] for name, each in parts.items()}


def pack_history(history: History, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the edits and events as tensors."""
    past = _past_of(history, snapshot.rows)
    return {
        **{f"edits.{name}": torch.from_numpy(each) for name, each in past.edits.items()},
        **{f"events.{name}": torch.from_numpy(each) for name, each in past.events.items()},
        "edits.query": _queries(history, snapshot),
        "bases": torch.from_numpy(past.bases),
    }


def _queries(history: History, snapshot: Snapshot) -> Tensor:
    """Return the queries of all edits by id, [E, D]."""
    edits, filed = history.edits, history.edits.filed
    parts = [snapshot.key_slots.new_zeros(0, snapshot.key_dim)]
    numbers = [np.fromiter(edits.later, np.int64, len(edits.later))]
    if isinstance(filed, _Edits):
        stays = edits.filed_positions()
        parts.append(filed.query[torch.from_numpy(stays)])
        numbers.insert(0, filed.numbers[stays])
    if edits.later:
        parts.append(torch.stack([edit.query for edit in edits.later.values()]))
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(numbers), kind="stable"))]


def texts_of(history: History) -> dict[str, tuple[str, str]]:
    """Return the texts that were stored, by the edits' ids."""
    filed, texts = history.edits.filed, {}
    if isinstance(filed, _Edits):
        stay = {*filed.numbers[history.edits.filed_positions()].tolist()} if filed.texts else set()
        texts = {number: text for number, text in filed.texts.items() if int(number) in stay}
    later = history.edits.later.values()
    return texts | {str(edit.id): edit.text for edit in later if edit.text is not None}


def unpack_history(
    tensors: Mapping[str, Tensor], snapshot: Snapshot, texts: Mapping[str, Any], next_id: int
) -> History:
    """Return the history of `pack_history`.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    past = _Past(
        snapshot.rows,
        _checked_edits(tensors, snapshot),
        _checked_events(tensors, snapshot),
        _checked_bases(tensors, snapshot),
    )
    past.check()
    ids = past.edits["id"]
    _check_next_id(past, next_id)
    queries = _checked_queries(tensors, snapshot, len(ids)).to(snapshot.device)
    edits: Filed[Edit] = _Edits(past, queries, snapshot.label_slots, texts)
    return History(Kept(edits), Kept(_Lives(past)), Kept(_LabelSlots(past)), next_id)


def check_replayed(snapshot: Snapshot, history: History, max_radius: float | None) -> None:
    """Raise CodebookCorrupt where a journal led to what no files may hold: as when they are read.

    Each of its versions was checked for itself; this is about all of them together.
    """
    past = _past_of(history, snapshot.rows)
    past.check()
    _check_next_id(past, history.next_id)
    events = torch.from_numpy(past.events["radius"])
    check_radii({"rows.radius": snapshot.radii, "events.radius": events}, max_radius)


def _check_next_id(past: _Past, next_id: int) -> None:
    newest = max(past.edits["id"].max(initial=-1), past.events["edit"].max(initial=-1))
    if next_id <= newest:
        raise CodebookCorrupt(f"the next id is {next_id}, and there is an edit {newest}")


def _checked_edits(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, NDArray[Any]]:
    count = len(column(tensors, "edits.id", torch.int64))
    columns = {
        name: column(tensors, f"edits.{name}", dtype, count)
        for name, dtype in _EDIT_COLUMNS.items()
    }
    check_ids("edits.id", columns["id"])
    outside = (columns["row"] < 0) | (columns["row"] >= snapshot.rows)
    if bool(outside.any()):
        at = int(outside.nonzero()[0][0])
        number, row = int(columns["id"][at]), int(columns["row"][at])
        raise CodebookCorrupt(
            f"edit {number} is on row {row} of {snapshot.rows}", field="edits.row", row=at
        )
    counts = snapshot.counts
    check_slots("edits.value_after", columns["value_after"], counts.values)
    check_slots("edits.value_before", columns["value_before"], counts.values, least=_NO_SLOT)
    check_slots("edits.label_slot", columns["label_slot"], counts.labels)
    check_slots("edits.outcome", columns["outcome"], len(OUTCOMES))
    check_finite("edits.radius", columns["radius"])
    # Infinite where the edit was added: no key was near.
    refuse_where(~(columns["distance"] >= 0), "edits.distance", "must be a number >= 0")
    refuse_where(columns["steps"] < 0, "edits.steps", "must be at least 0")
    return {name: each.numpy() for name, each in columns.items()}


def _checked_queries(tensors: Mapping[str, Tensor], snapshot: Snapshot, count: int) -> Tensor:
    queries, wanted = get(tensors, "edits.query"), (count, snapshot.key_dim)
    if queries.shape != wanted or queries.dtype != snapshot.dtype:
        raise CodebookCorrupt(
            f"edits.query must be {snapshot.dtype} {list(wanted)}, "
            f"got {queries.dtype} {tuple(queries.shape)}",
            field="edits.query",
        )
    check_finite("edits.query", queries)
    return queries


def _checked_events(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, NDArray[Any]]:
    count = len(column(tensors, "events.edit", torch.int64))
    columns = {
        name: column(tensors, f"events.{name}", dtype, count)
        for name, dtype in _EVENT_COLUMNS.items()
    }
    check_slots("events.row", columns["row"], snapshot.rows)
    check_slots("events.key_slot", columns["key_slot"], snapshot.counts.keys)
    check_slots("events.lasts_with", columns["lasts_with"], snapshot.rows, least=-1)
    check_finite("events.radius", columns["radius"].float())
    order = np.argsort(columns["row"].numpy(), kind="stable")
    return {name: each.numpy()[order] for name, each in columns.items()}


def _checked_bases(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> NDArray[np.int64]:
    bases = get(tensors, "bases")
    if bases.ndim != 2 or bases.shape[1] != 3 or bases.dtype != torch.int64:
        raise CodebookCorrupt(
            f"bases must be torch.int64 [*, 3], got {tuple(bases.shape)}", field="bases"
        )
    sizes = (snapshot.rows, snapshot.counts.values, snapshot.counts.labels)
    for each, size in zip(bases.T, sizes, strict=True):
        check_slots("bases", each, size)
    found = bases.numpy()
    return found[np.argsort(found[:, 0], kind="stable")]
