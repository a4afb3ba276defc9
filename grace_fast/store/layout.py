"""A codebook and its edits as named tensors, and back.

Columns are indexed by row (`rows.*`), by slot (`keys`, `values`, `labels.*`), by edit (`edits.*`)
or by event (`events.*`). Texts, where they are kept, are in the JSON beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from grace_fast.codebook import Codebook, Snapshot
from grace_fast.edits import Base, Edit, Event, History
from grace_fast.semantics import Outcome
from grace_fast.store.files import CodebookCorrupt

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
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
    labels = snapshot.stored_labels()
    lengths = [-1 if label is None else len(label) for label in labels]
    present = [label for label in labels if label is not None]
    return {
        "keys": snapshot.key_slots[: counts.keys],
        "values": snapshot.value_slots[: counts.values],
        "labels.length": torch.tensor(lengths, dtype=torch.int64),
        "labels.ids": torch.cat(present) if present else torch.zeros(0, dtype=torch.int64),
        "rows.id": snapshot.ids,
        "rows.radius": snapshot.radii,
        "rows.live": snapshot.live,
        "rows.key_slot": snapshot.column("key_slot"),
        "rows.value_slot": snapshot.column("value_slot"),
        "rows.label_slot": snapshot.column("label_slot"),
    }


def unpack_codebook(tensors: Mapping[str, Tensor], device: torch.device) -> Codebook:
    """Return the codebook of `pack_codebook`.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    keys, values, lengths = (_get(tensors, name) for name in ("keys", "values", "labels.length"))
    if keys.ndim != 2 or values.ndim != 2 or keys.dtype != values.dtype:
        raise CodebookCorrupt("keys and values must be matrices of one element type")
    columns = {
        name: _get(tensors, f"rows.{name}")
        for name in ("id", "radius", "live", "key_slot", "value_slot", "label_slot")
    }
    count = len(columns["id"])
    for name, column in columns.items():
        if column.shape != (count,):
            raise CodebookCorrupt(f"rows.{name} must be [{count}], got {tuple(column.shape)}")
    for name, slots in (("key_slot", keys), ("value_slot", values), ("label_slot", lengths)):
        column = columns[name]
        if count and (int(column.min()) < 0 or int(column.max()) >= len(slots)):
            raise CodebookCorrupt(f"rows.{name} points outside the {len(slots)} slots there are")
    for name, tensor in (("keys", keys), ("values", values), ("rows.radius", columns["radius"])):
        if not tensor.isfinite().all():
            row = int((~tensor.isfinite()).nonzero()[0][0])
            raise CodebookCorrupt(f"{name} must be finite, got NaN or infinity in row {row}")
    if count and not bool((columns["id"].diff() > 0).all()):
        raise CodebookCorrupt("rows.id must ascend")
    return Codebook.restore(keys, values, _labels(tensors, lengths), columns, device)


def _labels(tensors: Mapping[str, Tensor], lengths: Tensor) -> list[Tensor | None]:
    ids, used = _get(tensors, "labels.ids"), lengths.clamp(min=0)
    if int(used.sum()) != len(ids):
        raise CodebookCorrupt("labels.length does not add up to the label ids there are")
    parts = torch.split(ids, used.tolist())
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
            [_OUTCOMES.index(edit.outcome) for edit in edits], dtype=torch.int64
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
    queries = _get(tensors, "edits.query").to(snapshot.device)
    if queries.ndim != 2 or queries.shape[1] != snapshot.key_dim:
        raise CodebookCorrupt(f"edits.query must be [*, {snapshot.key_dim}]")
    outcomes = [_OUTCOMES[number] for number in _get(tensors, "edits.outcome").tolist()]
    before = _get(tensors, "edits.value_before").tolist()
    slots = _get(tensors, "edits.label_slot").tolist()
    numbers = [_get(tensors, f"edits.{name}").tolist() for name in _EDIT_NUMBERS]
    for at, values in enumerate(zip(*numbers, strict=True)):
        fields = dict(zip(_EDIT_NUMBERS, values, strict=True))
        text = texts.get(str(fields["id"]))
        edit = Edit(
            **fields,
            outcome=outcomes[at],
            query=queries[at],
            label=labels[slots[at]],
            value_before=None if before[at] < 0 else before[at],
            text=None if text is None else (str(text[0]), str(text[1])),
        )
        if not 0 <= edit.row < snapshot.rows:
            raise CodebookCorrupt(f"edit {edit.id} is on row {edit.row} of {snapshot.rows}")
        history.record(edit, slots[at])
    event_numbers = [_get(tensors, f"events.{name}").tolist() for name in _EVENT_NUMBERS]
    for values in zip(*event_numbers, strict=True):
        history.add_event(Event(**dict(zip(_EVENT_NUMBERS, values, strict=True))))
    for row, value_slot, label_slot in _get(tensors, "bases").tolist():
        history.set_base(row, Base(value_slot, label_slot))
    history.next_id = next_id
    return history


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CodebookCorrupt(f"the tensor {name} is missing")
    return tensors[name]
