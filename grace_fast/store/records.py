"""One version as bytes: what changed in the codebook and what was done to its history.

The bytes are those of a safetensors file. Columns that have nothing in them are left out. `order`
says of which kind each step of the history was; every kind has columns of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.diff import Change
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.labels import columns_of
from grace_fast.codebook.mapped import CodebookCorrupt
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import Base, BaseRecorded, Edit, EditRecorded, Event, Reset, Step, Undone
from grace_fast.edits.history import History
from grace_fast.store import files, headers, manifest
from grace_fast.store.columns import OUTCOMES, ascends, check_slots, pack_labels, unpack_labels

_KINDS: tuple[type[Step], ...] = (EditRecorded, Event, BaseRecorded, Undone, Reset)
_NO_SLOT = -1


@dataclass(frozen=True)
class Version:
    """What one version did."""

    change: Change
    steps: list[Step]

    def encode(self) -> bytes:
        """Return it as bytes."""
        change = self.change
        tensors = {
            "keys": change.keys,
            "values": change.values,
            **pack_labels(*columns_of(change.labels)),
            "ids": change.ids,
            "rows": change.rows,
            **{f"rows.{name}": column for name, column in change.columns.items()},
            "order": torch.tensor(
                [_KINDS.index(type(s)) for s in self.steps], dtype=torch.uint8, device="cpu"
            ),
            **_recorded([step for step in self.steps if isinstance(step, EditRecorded)]),
        }
        events = [step for step in self.steps if isinstance(step, Event)]
        bases = [step for step in self.steps if isinstance(step, BaseRecorded)]
        tensors["events"] = _integers([(e.edit, e.row, e.key_slot, e.lasts_with) for e in events])
        tensors["events.radius"] = torch.tensor(
            [e.radius for e in events], dtype=torch.float64, device="cpu"
        )
        tensors["bases"] = _integers([(b.row, b.base.value_slot, b.base.label_slot) for b in bases])
        gone = [step.edit for step in self.steps if isinstance(step, Undone)]
        tensors["forgotten"] = _integers(gone)
        texts = {
            str(step.edit.id): step.edit.text
            for step in self.steps
            if isinstance(step, EditRecorded) and step.edit.text is not None
        }
        full = {name: each.contiguous() for name, each in tensors.items() if each.numel()}
        return files.serialised(full, {"texts": json.dumps(texts)} if texts else None)


def _integers(rows: Sequence[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _recorded(steps: Sequence[EditRecorded]) -> dict[str, Tensor]:
    edits = [step.edit for step in steps]
    if not edits:
        return {}
    return {
        "edits": _integers(
            [
                (
                    edit.id,
                    OUTCOMES.index(edit.outcome),
                    edit.row,
                    _NO_SLOT if edit.value_before is None else edit.value_before,
                    edit.value_after,
                    step.label_slot,
                    edit.steps,
                    int(edit.correct),
                    edit.prompt,
                )
                for step, edit in zip(steps, edits, strict=True)
            ]
        ),
        "edits.number": torch.tensor(
            [(edit.distance, edit.radius, edit.loss) for edit in edits],
            dtype=torch.float64,
            device="cpu",
        ),
        "edits.query": torch.stack([edit.query for edit in edits]).cpu(),
    }


def redo(content: bytes, draft: Draft, history: History) -> None:
    """Do what a version did to a draft and a history of the version before.

    Raises: CodebookCorrupt naming the column that does not fit; draft and history may be changed.
    """
    try:
        tensors, metadata = headers.read(content)
        texts = headers.parse(metadata.get("texts", "{}").encode(), depth=2)
    except ValueError as error:
        raise CodebookCorrupt(f"a version is no safetensors content: {error}") from error
    if not manifest.are_texts(texts):
        raise CodebookCorrupt("a version must hold its texts as prompt and target by edit")
    columns = _Columns(tensors)
    _change(columns, draft.snapshot()).apply(draft)
    now = draft.snapshot()
    for step in _steps(columns, now, texts):
        try:
            if isinstance(step, EditRecorded | Event | BaseRecorded):
                row = step.edit.row if isinstance(step, EditRecorded) else step.row
                if not 0 <= row < now.rows:
                    raise CodebookCorrupt(f"a step is on row {row} of {now.rows}")
            history.follow(step)
        except (LookupError, ValueError) as error:
            raise CodebookCorrupt(f"a version does not follow the one before: {error}") from error


class _Columns:
    """The tensors of a version; those that were left out are empty."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str, dtype: torch.dtype, *widths: int, count: int | None = None) -> Tensor:
        """Return a column [*, *widths].

        Raises: CodebookCorrupt where it has another type or shape.
        """
        found = self.tensors.get(name)
        if found is None:
            found = torch.zeros(0, *widths, dtype=dtype, device="cpu")
        if (
            found.dtype != dtype
            or found.shape[1:] != widths
            or found.ndim != 1 + len(widths)
            or count not in (None, len(found))
        ):
            wanted = ["*" if count is None else count, *widths]
            raise CodebookCorrupt(
                f"{name} must be {dtype} {wanted}, got {found.dtype} {tuple(found.shape)}"
            )
        if dtype.is_floating_point and name not in ("edits.number",) and not found.isfinite().all():
            raise CodebookCorrupt(f"{name} must be finite, got NaN or infinity")
        return found


def _change(columns: _Columns, now: Snapshot) -> Change:
    """Return the change of a version, checked against the codebook that it is made to."""
    keys = columns.get("keys", now.dtype, now.key_dim)
    values = columns.get("values", now.dtype, now.value_dim)
    lengths = columns.get("labels.length", torch.int64)
    filed = unpack_labels(lengths, columns.get("labels.ids", torch.int64))
    labels = filed.between(0, len(filed))
    fresh, counts = columns.get("ids", torch.int64), now.counts
    newest = int(now.ids[-1]) if now.rows else -1
    if len(fresh) and (int(fresh[0]) <= newest or not bool(ascends(fresh).all())):
        raise CodebookCorrupt(f"ids must ascend beyond {newest}")
    check_slots("ids", fresh, manifest.MAX_NUMBER)
    rows, total = columns.get("rows", torch.int64), now.rows + len(fresh)
    if not bool(ascends(rows).all()) or (
        len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < total
    ):
        raise CodebookCorrupt(f"rows must ascend within the {total} there are")
    if int((rows >= now.rows).sum()) != len(fresh):
        raise CodebookCorrupt("rows must hold every row that is new")
    count = len(rows)
    fields = {
        "radius": columns.get("rows.radius", torch.float32, count=count),
        "live": columns.get("rows.live", torch.bool, count=count),
    }
    slots = {
        "key_slot": counts.keys + len(keys),
        "value_slot": counts.values + len(values),
        "label_slot": counts.labels + len(labels),
    }
    for name, there in slots.items():
        fields[name] = column = columns.get(f"rows.{name}", torch.int64, count=count)
        check_slots(f"rows.{name}", column, there)
    return Change(keys, values, labels, fresh, rows, fields)


def _steps(columns: _Columns, now: Snapshot, texts: Any) -> Iterator[Step]:
    """Yield the steps of a version in their order, each one checked.

    now: the codebook that the version left.
    """
    counts = now.counts
    edits = columns.get("edits", torch.int64, 9)
    for name, at, there, least in (
        ("outcome", 1, len(OUTCOMES), 0),
        ("value_before", 3, counts.values, _NO_SLOT),
        ("value_after", 4, counts.values, 0),
        ("label_slot", 5, counts.labels, 0),
    ):
        check_slots(f"edits.{name}", edits[:, at], there, least)
    check_slots("edits.id", edits[:, 0], manifest.MAX_NUMBER)
    check_slots("edits.steps", edits[:, 6], manifest.MAX_NUMBER)
    numbers = columns.get("edits.number", torch.float64, 3, count=len(edits))
    if not bool((numbers[:, 0] >= 0).all() & numbers[:, 1].isfinite().all()):
        raise CodebookCorrupt("edits.number must be distances >= 0 and finite radii")
    queries = columns.get("edits.query", now.dtype, now.key_dim, count=len(edits)).to(now.device)
    events = columns.get("events", torch.int64, 4)
    radii = columns.get("events.radius", torch.float64, count=len(events))
    check_slots("events.key_slot", events[:, 2], counts.keys)
    check_slots("events.lasts_with", events[:, 3], counts.rows, -1)
    bases = columns.get("bases", torch.int64, 3)
    check_slots("bases", bases[:, 1], counts.values)
    check_slots("bases", bases[:, 2], counts.labels)
    order, of_kind = columns.get("order", torch.uint8).tolist(), dict.fromkeys(range(5), 0)
    forgotten = columns.get("forgotten", torch.int64).tolist()
    listed = edits.tolist(), events.tolist(), bases.tolist()
    counted = (*map(len, listed), len(forgotten))
    for kind in order:
        if kind >= len(_KINDS):
            raise CodebookCorrupt(f"order must hold kinds below {len(_KINDS)}, got {kind}")
        at = of_kind[kind]
        of_kind[kind] += 1
        if kind < 4 and at >= counted[kind]:
            raise CodebookCorrupt("order names more steps than there are")
        if kind == 0:
            label = now.label_slots[listed[0][at][5]]
            yield _edit(listed[0][at], numbers[at].tolist(), queries[at], label, texts)
        elif kind == 1:
            edit, row, slot, lasts_with = listed[1][at]
            yield Event.read(edit, row, float(radii[at]), slot, lasts_with)
        elif kind == 2:
            row, value, label = listed[2][at]
            yield BaseRecorded(row, Base(value, label))
        else:
            yield Undone(forgotten[at]) if kind == 3 else Reset()


def _edit(
    fields: list[int],
    numbers: list[float],
    query: Tensor,
    label: Tensor | None,
    texts: Any,
) -> EditRecorded:
    number, outcome, row, before, after, label_slot, steps, correct, prompt = fields
    distance, radius, loss = numbers
    text = texts.get(str(number))
    edit = Edit(
        id=number,
        outcome=OUTCOMES[outcome],
        row=row,
        distance=distance,
        radius=radius,
        query=query,
        label=label,
        value_before=None if before == _NO_SLOT else before,
        value_after=after,
        loss=loss,
        steps=steps,
        correct=bool(correct),
        prompt=prompt,
        text=None if text is None else (str(text[0]), str(text[1])),
    )
    return EditRecorded(edit, label_slot)
