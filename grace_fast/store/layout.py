"""A codebook and its edits as named tensors, and back.

Columns are indexed by row (`rows.*`), by slot (`keys`, `values`, `labels.*`), by edit (`edits.*`)
or by event (`events.*`). Texts, where they are kept, are in the JSON beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from grace_fast.codebook import DTYPES, Codebook, Snapshot
from grace_fast.edits import NO_EDIT, Base, Edit, Event, History
from grace_fast.mapped import MappedFile
from grace_fast.semantics import Outcome
from grace_fast.store import manifest
from grace_fast.store.files import CodebookCorrupt

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_ROW_COLUMNS = {
    "id": torch.int64,
    "radius": torch.float32,
    "live": torch.bool,
    "key_slot": torch.int64,
    "value_slot": torch.int64,
    "label_slot": torch.int64,
}
_EDIT_NUMBERS = {
    "id": torch.int64,
    "row": torch.int64,
    "distance": torch.float64,
    "radius": torch.float64,
    "value_after": torch.int64,
    "loss": torch.float64,
    "steps": torch.int64,
    "correct": torch.bool,
    "prompt": torch.int64,
}
_EVENT_NUMBERS = {
    "edit": torch.int64,
    "row": torch.int64,
    "radius": torch.float64,
    "key_slot": torch.int64,
    "lasts_with": torch.int64,
}


def pack_codebook(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return a codebook as tensors."""
    counts = snapshot.counts
    slots = {
        "keys": snapshot.key_slots[: counts.keys],
        "values": snapshot.value_slots[: counts.values],
    }
    return slots | pack_rows(snapshot)


def pack_labels(labels: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Return labels as tensors; a length of -1 is that of none."""
    lengths = [-1 if label is None else len(label) for label in labels]
    present = [label for label in labels if label is not None]
    return {
        "labels.length": torch.tensor(lengths, dtype=torch.int64),
        "labels.ids": torch.cat(present) if present else torch.zeros(0, dtype=torch.int64),
    }


def pack_rows(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return what a codebook says of its rows as tensors: all but the slots of keys and values."""
    return pack_labels(snapshot.stored_labels()) | {
        "rows.id": snapshot.ids,
        "rows.radius": snapshot.radii,
        "rows.live": snapshot.live,
        "rows.key_slot": snapshot.column("key_slot"),
        "rows.value_slot": snapshot.column("value_slot"),
        "rows.label_slot": snapshot.column("label_slot"),
    }


def unpack_codebook(
    tensors: Mapping[str, Tensor], device: torch.device, version: int = 0
) -> Codebook:
    """Return the codebook of `pack_codebook`, at the version that it was.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    keys, values = _get(tensors, "keys"), _get(tensors, "values")
    if "keys.blocks" in tensors:  # they came from files of their own
        tensors = with_the_usual(tensors)
    if keys.ndim != 2 or values.ndim != 2 or keys.dtype != values.dtype:
        raise CodebookCorrupt("keys and values must be matrices of one element type")
    if keys.dtype not in DTYPES or not keys.shape[1] or not values.shape[1]:
        raise CodebookCorrupt(f"keys and values must be numbers [*, >= 1] in one of {DTYPES}")
    for name, slots in (("keys", keys), ("values", values)):
        _check_finite(name, slots)
    return unpack_rows(tensors, keys, values, device, version)


def unpack_rows(
    tensors: Mapping[str, Tensor],
    keys: Tensor | MappedFile,
    values: Tensor | MappedFile,
    device: torch.device,
    version: int = 0,
) -> Codebook:
    """Return the codebook of `pack_rows` and the slots of its keys and values.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    lengths = _column(tensors, "labels.length", torch.int64)
    count = len(_column(tensors, "rows.id", torch.int64))
    columns = {
        name: _column(tensors, f"rows.{name}", dtype, count) for name, dtype in _ROW_COLUMNS.items()
    }
    slots = (("key_slot", _slots(keys)), ("value_slot", _slots(values)))
    for name, there in (*slots, ("label_slot", len(lengths))):
        check_slots(f"rows.{name}", columns[name], there)
    _check_finite("rows.radius", columns["radius"])
    _check_ids("rows.id", columns["id"])
    labels = unpack_labels(lengths, _column(tensors, "labels.ids", torch.int64))
    return Codebook.restore(keys, values, labels, columns, device, version)


def check_radii(tensors: Mapping[str, Tensor], max_radius: float | None) -> None:
    """Raise CodebookCorrupt where a ball is wider than allowed, or an undo would make it so.

    max_radius: None allows every finite radius. Anything below 0 is a dead key's, and allowed.
    """
    for name in ("rows.radius", "events.radius") if max_radius is not None else ():
        if name not in tensors:
            continue
        # As wide as a radius is kept when it is the widest that is allowed.
        widest = torch.tensor(max_radius, dtype=torch.float32).to(tensors[name].dtype)
        wide = tensors[name] > widest
        if bool(wide.any()):
            row = int(wide.nonzero()[0][0])
            raise CodebookCorrupt(
                f"{name} must be at most {max_radius}, got {float(tensors[name][row])} "
                f"in row {row}",
                field=name,
                row=row,
            )


def drop_the_usual(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `pack_rows` without the columns that `with_the_usual` knows: most of the bytes."""
    usual = _usual(len(tensors["rows.radius"]))
    labels = ("labels.length", "rows.label_slot")
    if bool((tensors["labels.length"] < 0).all()):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in labels}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in usual or name in labels or not torch.equal(tensor, usual[name])
    }


def with_the_usual(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the columns that were left out: row i is in slot i, live, unlabelled.

    Raises: CodebookCorrupt where there are no radii to tell how many rows there are.
    """
    return _usual(len(_column(tensors, "rows.radius", torch.float32))) | dict(tensors)


def _usual(count: int) -> dict[str, Tensor]:
    numbers = torch.arange(count)
    return {
        "labels.length": torch.full((1,), -1),
        "labels.ids": torch.zeros(0, dtype=torch.int64),
        "rows.id": numbers,
        "rows.live": torch.ones(count, dtype=torch.bool),
        "rows.key_slot": numbers,
        "rows.value_slot": numbers,
        "rows.label_slot": torch.zeros_like(numbers),
    }


def _slots(slots: Tensor | MappedFile) -> int:
    return slots.shape.rows if isinstance(slots, MappedFile) else len(slots)


def unpack_labels(lengths: Tensor, ids: Tensor) -> list[Tensor | None]:
    """Return the labels of `pack_labels`.

    Raises: CodebookCorrupt where the lengths are not those of the ids.
    """
    used = lengths.clamp(min=0)
    # Each one first: a sum of huge lengths wraps around.
    if bool((used > len(ids)).any()) or int(used.sum()) != len(ids):
        raise CodebookCorrupt(
            "labels.length does not add up to the label ids there are", field="labels.length"
        )
    parts = torch.split(ids, used.tolist()) if len(used) else ()
    pairs = zip(lengths.tolist(), parts, strict=True)
    return [None if length < 0 else part for length, part in pairs]


def pack_history(history: History, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the edits and events as tensors."""
    edits = list(history.edits.values())
    events = [event for life in history.rows.values() for event in life.events]
    bases = [(row, life.base) for row, life in history.rows.items() if life.base is not None]
    tensors = {
        f"edits.{name}": torch.tensor([getattr(edit, name) for edit in edits], dtype=dtype)
        for name, dtype in _EDIT_NUMBERS.items()
    }
    tensors |= {
        f"events.{name}": torch.tensor([getattr(event, name) for event in events], dtype=dtype)
        for name, dtype in _EVENT_NUMBERS.items()
    }
    before = [-1 if edit.value_before is None else edit.value_before for edit in edits]
    queries = [edit.query for edit in edits]
    empty = snapshot.key_slots.new_zeros(0, snapshot.key_dim)
    return tensors | {
        "edits.outcome": torch.tensor(
            [OUTCOMES.index(edit.outcome) for edit in edits], dtype=torch.int64
        ),
        "edits.value_before": torch.tensor(before, dtype=torch.int64),
        "edits.label_slot": torch.tensor(
            [history.label_slots[edit.id] for edit in edits], dtype=torch.int64
        ),
        "edits.query": torch.stack(queries) if queries else empty,
        "bases": torch.tensor(
            [(row, base.value_slot, base.label_slot) for row, base in bases], dtype=torch.int64
        ).reshape(-1, 3),
    }


def unpack_history(
    tensors: Mapping[str, Tensor], snapshot: Snapshot, texts: Mapping[str, Any], next_id: int
) -> History:
    """Return the history of `pack_history`.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    history = History()
    labels = snapshot.stored_labels()
    columns = _edit_columns(tensors, snapshot)
    queries = _get(tensors, "edits.query").to(snapshot.device)
    before, slots, outcomes = (
        columns.pop(name).tolist() for name in ("value_before", "label_slot", "outcome")
    )
    numbers = [column.tolist() for column in columns.values()]
    for at, values in enumerate(zip(*numbers, strict=True)):
        fields = dict(zip(columns, values, strict=True))
        text = texts.get(str(fields["id"]))
        edit = Edit(
            **fields,
            outcome=OUTCOMES[outcomes[at]],
            query=queries[at],
            label=labels[slots[at]],
            value_before=None if before[at] < 0 else before[at],
            text=None if text is None else (str(text[0]), str(text[1])),
        )
        history.record(edit, slots[at])
    if next_id < history.next_id:
        raise CodebookCorrupt(
            f"the next id is {next_id}, and there is an edit {max(history.edits)}"
        )
    history.next_id = next_id
    events = [column.tolist() for column in _event_columns(tensors, snapshot).values()]
    for values in zip(*events, strict=True):
        history.add_event(Event(**dict(zip(_EVENT_NUMBERS, values, strict=True))))
    for row, value_slot, label_slot in _bases(tensors, snapshot).tolist():
        history.set_base(row, Base(value_slot, label_slot))
    check_history(history)
    return history


def _edit_columns(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the columns of the edits by name, each one checked."""
    count = len(_column(tensors, "edits.id", torch.int64))
    kinds = _EDIT_NUMBERS | dict.fromkeys(("value_before", "label_slot", "outcome"), torch.int64)
    columns = {
        name: _column(tensors, f"edits.{name}", dtype, count) for name, dtype in kinds.items()
    }
    queries, wanted = _get(tensors, "edits.query"), (count, snapshot.key_dim)
    if queries.shape != wanted or queries.dtype != snapshot.dtype:
        raise CodebookCorrupt(
            f"edits.query must be {snapshot.dtype} {list(wanted)}, "
            f"got {queries.dtype} {tuple(queries.shape)}",
            field="edits.query",
        )
    _check_finite("edits.query", queries)
    _check_ids("edits.id", columns["id"])
    counts = snapshot.counts
    for at, row in enumerate(columns["row"].tolist()):
        if not 0 <= row < snapshot.rows:
            number = int(columns["id"][at])
            raise CodebookCorrupt(
                f"edit {number} is on row {row} of {snapshot.rows}", field="edits.row", row=at
            )
    check_slots("edits.value_after", columns["value_after"], counts.values)
    check_slots("edits.value_before", columns["value_before"], counts.values, least=-1)
    check_slots("edits.label_slot", columns["label_slot"], counts.labels)
    check_slots("edits.outcome", columns["outcome"], len(OUTCOMES))
    _check_finite("edits.radius", columns["radius"])
    # Infinite where the edit was added: no key was near.
    _refuse(~(columns["distance"] >= 0), "edits.distance", "must be a number >= 0")
    _refuse(columns["steps"] < 0, "edits.steps", "must be at least 0")
    return columns


def _event_columns(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the columns of the events by name, each one checked."""
    count = len(_column(tensors, "events.edit", torch.int64))
    columns = {
        name: _column(tensors, f"events.{name}", dtype, count)
        for name, dtype in _EVENT_NUMBERS.items()
    }
    check_slots("events.row", columns["row"], snapshot.rows)
    check_slots("events.key_slot", columns["key_slot"], snapshot.counts.keys)
    check_slots("events.lasts_with", columns["lasts_with"], snapshot.rows, least=-1)
    _check_finite("events.radius", columns["radius"].float())
    return columns


def _bases(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> Tensor:
    bases = _get(tensors, "bases")
    if bases.ndim != 2 or bases.shape[1] != 3 or bases.dtype != torch.int64:
        raise CodebookCorrupt(
            f"bases must be torch.int64 [*, 3], got {tuple(bases.shape)}", field="bases"
        )
    sizes = (snapshot.rows, snapshot.counts.values, snapshot.counts.labels)
    for column, size in zip(bases.T, sizes, strict=True):
        check_slots("bases", column, size)
    return bases


def check_replayed(snapshot: Snapshot, history: History, max_radius: float | None) -> None:
    """Raise CodebookCorrupt where a journal led to what no files may hold: as when they are read.

    Each of its versions was checked for itself; this is about all of them together.
    """
    check_history(history)
    events = [event.radius for life in history.rows.values() for event in life.events]
    radii = {
        "rows.radius": snapshot.radii,
        "events.radius": torch.tensor(events, dtype=torch.float64),
    }
    check_radii(radii, max_radius)


def check_history(history: History) -> None:
    """Raise where a row has no event to go back to, or an event nothing that it lasts with.

    So every edit can be undone, in any order, and every row told what it is owed to.
    """

    def refuse(why: str) -> NoReturn:
        raise CodebookCorrupt(why, field="events")

    split_by: set[int] = set()
    if sum(len(life.edits) for life in history.rows.values()) != len(history.edits):
        refuse("an edit is on two rows, or twice on one")
    for row, life in history.rows.items():
        for each in life.edits:
            if each not in history.edits or history.edits[each].row != row:
                refuse(f"row {row} has edit {each}, which is not on it")
        if not life.events or life.events[0].lasts_with != row:
            refuse(f"row {row} has edits, and no event says how it came to be")
        if not life.edits and life.base is None:
            refuse(f"row {row} has events, and neither an edit nor what it held before any")
        for event in life.events:
            if event.lasts_with == -1:
                edit = history.edits.get(event.edit)
                if edit is None or edit.row != row:
                    refuse(f"row {row} was changed by edit {event.edit}, unknown here")
                continue
            maker = history.rows.get(event.lasts_with)
            if event.edit != NO_EDIT and (maker is None or not maker.edits or maker.base):
                refuse(f"row {row} was changed by edit {event.edit}, unknown here")
            if event.lasts_with != row:
                if event.lasts_with in split_by:
                    refuse(f"row {event.lasts_with} has split two others, as no edit does")
                split_by.add(event.lasts_with)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CodebookCorrupt(f"the tensor {name} is missing", field=name)
    return tensors[name]


def _column(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int | None = None
) -> Tensor:
    """Return a tensor that must be a column of one element type, and of one length if given."""
    column = _get(tensors, name)
    if column.dtype != dtype or column.ndim != 1 or count not in (None, len(column)):
        wanted = "*" if count is None else count
        raise CodebookCorrupt(
            f"{name} must be {dtype} [{wanted}], got {column.dtype} {tuple(column.shape)}",
            field=name,
        )
    return column


def check_slots(name: str, column: Tensor, slots: int, least: int = 0) -> None:
    """Raise CodebookCorrupt where a column [n] or [n, m] points outside of what there is."""
    _refuse(
        (column < least) | (column >= slots), name, f"points outside the {slots} slots there are"
    )


def _check_finite(name: str, tensor: Tensor) -> None:
    finite = tensor.isfinite()
    _refuse(~finite, name, "must be finite, got NaN or infinity")


def _check_ids(name: str, ids: Tensor) -> None:
    order = torch.cat((ids[:1] < 0, ids.diff() <= 0))
    _refuse(order, name, "must ascend from 0 or more")
    _refuse(ids >= manifest.MAX_NUMBER, name, f"must be below {manifest.MAX_NUMBER}")


def _refuse(wrong: Tensor, name: str, why: str) -> None:
    """Raise CodebookCorrupt for the first row of a column where it is wrong [n] or [n, m]."""
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0][0])
        raise CodebookCorrupt(f"{name} {why} in row {row}", field=name, row=row)
