"""Records of a journal: what one version changed in the codebook and did to its history.

The bytes are those of a safetensors file. Columns that have nothing in them are left out. `order`
says of which kind each step of the history was; every kind has columns of its own (`schema`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.checks import MAX_NUMBER
from grace_fast.codebook.diff import Change
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.labels import columns_of
from grace_fast.codebook.pages import Counts
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import Base, BaseRecorded, EditRecorded, Event, Reset, Step, Undone
from grace_fast.edits.history import History
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import headers, manifest, schema, strict_json
from grace_fast.store.checks import column_or_empty, not_finite, outside, refuse, row_faults
from grace_fast.store.columns import ROW_COLUMNS, unpack_labels
from grace_fast.store.history_check import faults
from grace_fast.store.schema import EDITS, EVENTS
from grace_fast.store.tensor_files import serialised

_KINDS: tuple[type[Step], ...] = (EditRecorded, Event, BaseRecorded, Undone, Reset)  # as in `order`


@dataclass(frozen=True)
class Version:
    """The change of a codebook and the steps of its history that one version made."""

    change: Change
    steps: list[Step]

    def encode(self) -> bytes:
        """Return it as bytes."""
        change = self.change
        edits = [step for step in self.steps if isinstance(step, EditRecorded)]
        events = [vars(step) for step in self.steps if isinstance(step, Event)]
        bases = [step for step in self.steps if isinstance(step, BaseRecorded)]
        gone = [step.edit for step in self.steps if isinstance(step, Undone)]
        lengths, ids = columns_of(change.labels)
        order = [_KINDS.index(type(step)) for step in self.steps]
        tensors = {
            "keys": change.keys,
            "values": change.values,
            "labels.length": lengths,
            "labels.ids": ids,
            "ids": change.ids,
            "rows": change.rows,
            **{f"rows.{name}": column for name, column in change.columns.items()},
            "order": torch.tensor(order, dtype=torch.uint8, device="cpu"),
            **EDITS.to_record(
                schema.edit_columns([(each.edit, each.label_slot) for each in edits])
            ),
            **EVENTS.to_record(EVENTS.numbers(events)),
            "bases": _integers([(b.row, b.base.value_slot, b.base.label_slot) for b in bases]),
            "forgotten": _integers(gone),
        }
        if edits:
            tensors["edits.query"] = torch.stack([each.edit.query for each in edits]).cpu()
        texts = {str(e.edit.id): e.edit.text for e in edits if e.edit.text is not None}
        full = {name: each.contiguous() for name, each in tensors.items() if each.numel()}
        return serialised(full, {"texts": json.dumps(texts)} if texts else None)


def _integers(rows: Sequence[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def redo(content: bytes, draft: Draft, history: History) -> None:
    """Do what a version did to a draft and a history of the version before.

    Raises: CodebookCorrupt naming the column that does not fit; draft and history may be changed.
    """
    try:
        tensors, metadata = headers.read(content)
        texts = strict_json.parse(metadata.get("texts", "{}").encode(), depth=2)
    except ValueError as error:
        raise CodebookCorrupt(f"a version is no safetensors content: {error}") from error
    if not manifest.are_texts(texts):
        raise CodebookCorrupt("a version must hold its texts as prompt and target by edit")
    _change(tensors, draft.snapshot()).apply(draft)
    for step in _steps(tensors, draft.snapshot(), texts):
        try:
            history.follow(step)
        except (LookupError, ValueError) as error:
            raise CodebookCorrupt(f"a version does not follow the one before: {error}") from error


def _change(tensors: Mapping[str, Tensor], now: Snapshot) -> Change:
    """Return the change of a version, checked against the codebook that it is made to."""
    keys = column_or_empty(tensors, "keys", now.dtype, now.key_dim)
    values = column_or_empty(tensors, "values", now.dtype, now.value_dim)
    lengths = column_or_empty(tensors, "labels.length", torch.int64)
    labels = unpack_labels(lengths, column_or_empty(tensors, "labels.ids", torch.int64))
    fresh, counts = column_or_empty(tensors, "ids", torch.int64), now.counts
    newest = int(now.ids[-1]) if now.rows else -1
    if len(fresh) and (int(fresh[0]) <= newest or not bool(_ascends(fresh))):
        raise CodebookCorrupt(f"ids must ascend beyond {newest}")
    rows, total = column_or_empty(tensors, "rows", torch.int64), now.rows + len(fresh)
    if not _ascends(rows) or (len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < total):
        raise CodebookCorrupt(f"rows must ascend within the {total} there are")
    if int((rows >= now.rows).sum()) != len(fresh):
        raise CodebookCorrupt("rows must hold every row that is new")
    columns = {
        name: column_or_empty(tensors, f"rows.{name}", dtype, count=len(rows))
        for name, dtype in ROW_COLUMNS.items()
        if name != "id"
    }
    after = Counts(
        rows=total,
        keys=counts.keys + len(keys),
        values=counts.values + len(values),
        labels=counts.labels + len(lengths),
    )
    refuse(not_finite(name, each) for name, each in (("keys", keys), ("values", values)))
    refuse([outside("ids", fresh, MAX_NUMBER)])
    refuse(row_faults({f"rows.{name}": each for name, each in columns.items()}, after))
    return Change(keys, values, labels.between(0, len(labels)), fresh, rows, columns)


def _ascends(numbers: Tensor) -> bool:
    """Tell whether numbers [n] ascend; the difference of two at the ends of int64 wraps around."""
    return bool((numbers[1:] > numbers[:-1]).all())


def _steps(
    tensors: Mapping[str, Tensor], now: Snapshot, texts: Mapping[str, Any]
) -> Iterator[Step]:
    """Yield the steps of a version in their order, each one checked.

    now: the codebook that the version left.
    """
    edits, events = EDITS.from_record(tensors), EVENTS.from_record(tensors)
    count = len(edits["id"])
    queries = column_or_empty(tensors, "edits.query", now.dtype, now.key_dim, count=count)
    bases = column_or_empty(tensors, "bases", torch.int64, len(schema.BASES))
    refuse(faults(edits, queries, events, bases, now.counts))
    queries, labels = queries.to(now.device), now.label_slots
    steps: tuple[Iterator[Step], ...] = (
        (schema.recorded(edits, at, queries[at], labels, texts) for at in range(count)),
        (schema.event(events, at) for at in range(len(events["row"]))),
        (BaseRecorded(row, Base(*slots)) for row, *slots in bases.tolist()),
        (Undone(edit) for edit in column_or_empty(tensors, "forgotten", torch.int64).tolist()),
        repeat(Reset()),
    )
    for kind in column_or_empty(tensors, "order", torch.uint8).tolist():
        if kind >= len(_KINDS):
            raise CodebookCorrupt(f"order must hold kinds below {len(_KINDS)}, got {kind}")
        step = next(steps[kind], None)
        if step is None:
            raise CodebookCorrupt("order names more steps than there are")
        yield step
