"""Columns of a history, of which edits and what happened on rows are made when they are asked for.

A history that is read stays columns: an edit, or what happened on a row, is made an object when
somebody looks at it. So what any of them could break is tested before, of all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.codebook.ascending import Ascending
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.lazy_table import ColumnSource, LazyTable
from grace_fast.codebook.once import cached_property
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import Base, Edit, RowLife
from grace_fast.edits.history import History
from grace_fast.store import schema
from grace_fast.store.checks import check_radii, column, refuse
from grace_fast.store.history_check import (
    HistoryColumns,
    faults,
    order_faults,
    places,
    refuse_inconsistent,
)
from grace_fast.store.schema import EDITS, EVENTS, Columns


@dataclass(frozen=True)
class _Edits:
    """Edits in columns."""

    history: HistoryColumns
    query: Tensor  # [E, D]
    labels: Labels  # by slot
    texts: Mapping[str, Any]  # by id

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[E] ids."""
        return self.history.edits["id"]

    def make(self, at: int) -> Edit:
        """Return one edit."""
        query = self.query[at].clone()  # which does not keep all of them in memory
        return schema.recorded(self.history.edits, at, query, self.labels, self.texts).edit


@dataclass(frozen=True)
class _LabelSlots:
    """The label slots of edits in columns."""

    numbers: NDArray[np.int64]  # [E] ids
    make: Callable[[int], int]  # the slot of one edit's label


@dataclass(frozen=True)
class RowHistories:
    """The histories of rows, in columns."""

    history: HistoryColumns

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[R] rows."""
        return self.history.rows

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """[3, R + 1] where events, edits and bases of each row begin."""
        history, ends = self.history, np.append(self.history.rows, np.iinfo(np.int64).max)
        by_row = history.edits["row"][history.edits_by_row]
        of = (history.events["row"], by_row, history.bases[:, 0])
        return np.stack([np.searchsorted(rows, ends) for rows in of])

    @cached_property
    def make(self) -> Callable[[int], RowLife]:
        """Return what happened on one row; it is asked for again and again where there is much."""
        return lru_cache(maxsize=64)(self._made)

    def _made(self, at: int) -> RowLife:
        history, row = self.history, int(self.history.rows[at])
        events, edits, bases = (slice(*each[at : at + 2].tolist()) for each in self._starts)
        changes = [schema.event(history.events, each) for each in range(events.start, events.stop)]
        base = history.bases[bases].tolist()
        made, split = history.splits
        by = places(made, np.array([row]))[0]
        ids = history.edits["id"][history.edits_by_row[edits]].tolist()
        return RowLife(
            edits=Ascending(ids, ids),
            events=Ascending([event.edit for event in changes], changes),
            base=Base(*base[0][1:]) if base else None,
            neighbour=-1 if by < 0 else int(split[by]),
        )


def _columns_of(history: History, row_count: int) -> HistoryColumns:
    """Return a history as columns: those it came in, with what was changed since."""
    edits, rows = history.edits.source, history.rows.source
    lives = history.rows.later
    added = [(edit, history.label_slots[edit.id]) for edit in history.edits.later.values()]
    changed = [vars(event) for life in lives.values() for event in life.events]
    found = [
        (row, life.base.value_slot, life.base.label_slot)
        for row, life in lives.items()
        if life.base is not None
    ]
    edit_columns, events = schema.edit_columns(added), EVENTS.numbers(changed)
    bases = np.array(found, np.int64).reshape(-1, len(schema.BASES))
    if isinstance(edits, _Edits):
        stay = history.edits.source_positions()
        edit_columns = _joined(edits.history.edits, stay, edit_columns)
    if isinstance(rows, RowHistories):
        known, stay = rows.history, rows.numbers[history.rows.source_positions()]
        events = _joined(known.events, np.isin(known.events["row"], stay), events)
        bases = np.concatenate([known.bases[np.isin(known.bases[:, 0], stay)], bases])
    order = np.argsort(edit_columns["id"], kind="stable")
    edit_columns = {name: each[order] for name, each in edit_columns.items()}
    return HistoryColumns.of(row_count, edit_columns, events, bases)


def _joined(known: Columns, stay: NDArray[Any], later: Columns) -> Columns:
    """Return what stays of columns, by position or truth, and what came later."""
    return {name: np.concatenate([known[name][stay], each]) for name, each in later.items()}


def pack_history(history: History, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the edits and events as tensors."""
    columns = _columns_of(history, snapshot.rows)
    return {
        **EDITS.to_base(columns.edits),
        **EVENTS.to_base(columns.events),
        "edits.query": _queries(history, snapshot),
        "bases": torch.from_numpy(columns.bases),
    }


def _queries(history: History, snapshot: Snapshot) -> Tensor:
    """Return the queries of all edits by id, [E, D]."""
    edits, source = history.edits, history.edits.source
    parts = [snapshot.key_slots.new_zeros(0, snapshot.key_dim)]
    numbers = [np.fromiter(edits.later, np.int64, len(edits.later))]
    if isinstance(source, _Edits):
        stay = edits.source_positions()
        parts.append(source.query[torch.from_numpy(stay)])
        numbers.insert(0, source.numbers[stay])
    if edits.later:
        parts.append(torch.stack([edit.query for edit in edits.later.values()]))
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(numbers), kind="stable"))]


def texts_of(history: History) -> dict[str, tuple[str, str]]:
    """Return the texts that were stored, by the edits' ids."""
    source, texts = history.edits.source, {}
    if isinstance(source, _Edits) and source.texts:
        stay = {*source.numbers[history.edits.source_positions()].tolist()}
        texts = {number: text for number, text in source.texts.items() if int(number) in stay}
    later = history.edits.later.values()
    return texts | {str(edit.id): edit.text for edit in later if edit.text is not None}


def unpack_history(
    tensors: Mapping[str, Tensor], snapshot: Snapshot, texts: Mapping[str, Any], next_id: int
) -> History:
    """Return the history of `pack_history`.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    edits, events = EDITS.from_base(tensors), EVENTS.from_base(tensors)
    bases = column(tensors, "bases", torch.int64, None, (len(schema.BASES),))
    width, count = snapshot.key_dim, len(edits["id"])
    queries = column(tensors, "edits.query", snapshot.dtype, count, (width,))
    refuse(order_faults(edits))
    refuse(faults(edits, queries, events, bases, snapshot.counts))
    columns = HistoryColumns.of(snapshot.rows, edits, events, bases.numpy())
    refuse_inconsistent(columns, next_id)
    source: ColumnSource[Edit] = _Edits(
        columns, queries.to(snapshot.device), snapshot.label_slots, texts
    )
    return History(
        LazyTable(source),
        LazyTable(RowHistories(columns)),
        LazyTable(_LabelSlots(edits["id"], edits["label_slot"].item)),
        next_id,
    )


def check_replayed(snapshot: Snapshot, history: History, max_radius: float | None) -> None:
    """Raise CodebookCorrupt where a journal led to what no files may hold: as when they are read.

    Each of its versions was checked for itself; this is about all of them together.
    """
    columns = _columns_of(history, snapshot.rows)
    refuse_inconsistent(columns, history.next_id)
    events = torch.from_numpy(columns.events["radius"])
    check_radii({"rows.radius": snapshot.radii, "events.radius": events}, max_radius)
