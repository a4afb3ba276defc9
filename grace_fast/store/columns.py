"""A codebook and its edits as named tensors, and back.

Columns are indexed by row (`rows.*`) or by slot (`keys`, `values`, `labels.*`). What was edited is
in columns of its own (`past`).

A label is `labels.length` of the ids in `labels.ids`, one label after the other. One that begins
with -2^63 is of numbers: every further id is the bits of one, as float64 (`semantics.score_label`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import MappedFile
from grace_fast.codebook.snapshot import Snapshot
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


def pack_codebook(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return a codebook as tensors."""
    counts = snapshot.counts
    slots = {
        "keys": snapshot.key_slots[: counts.keys],
        "values": snapshot.value_slots[: counts.values],
    }
    return slots | pack_rows(snapshot)


def pack_labels(lengths: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Return the columns of labels as tensors; a length of -1 is that of none."""
    return {"labels.length": lengths, "labels.ids": ids}


def pack_rows(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return what a codebook says of its rows as tensors: all but the slots of keys and values."""
    return pack_labels(*snapshot.label_slots.columns(snapshot.counts.labels)) | {
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
    keys, values = get(tensors, "keys"), get(tensors, "values")
    if "keys.blocks" in tensors:  # they came from files of their own
        tensors = with_the_usual(tensors)
    if keys.ndim != 2 or values.ndim != 2 or keys.dtype != values.dtype:
        raise CodebookCorrupt("keys and values must be matrices of one element type")
    if keys.dtype not in DTYPES or not keys.shape[1] or not values.shape[1]:
        raise CodebookCorrupt(f"keys and values must be numbers [*, >= 1] in one of {DTYPES}")
    for name, slots in (("keys", keys), ("values", values)):
        check_finite(name, slots)
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
    lengths = column(tensors, "labels.length", torch.int64)
    count = len(column(tensors, "rows.id", torch.int64))
    columns = {
        name: column(tensors, f"rows.{name}", dtype, count) for name, dtype in _ROW_COLUMNS.items()
    }
    slots = (("key_slot", _slots(keys)), ("value_slot", _slots(values)))
    for name, there in (*slots, ("label_slot", len(lengths))):
        check_slots(f"rows.{name}", columns[name], there)
    check_finite("rows.radius", columns["radius"])
    check_ids("rows.id", columns["id"])
    labels = unpack_labels(lengths, column(tensors, "labels.ids", torch.int64))
    return Codebook.restore(keys, values, labels, columns, device, version)


def check_radii(tensors: Mapping[str, Tensor], max_radius: float | None) -> None:
    """Raise CodebookCorrupt where a ball is wider than allowed, or an undo would make it so.

    max_radius: None allows every finite radius. Anything below 0 is a dead key's, and allowed.
    """
    for name in ("rows.radius", "events.radius") if max_radius is not None else ():
        if name not in tensors:
            continue
        # As wide as a radius is kept when it is the widest that is allowed.
        widest = torch.tensor(max_radius, dtype=torch.float32, device="cpu").to(tensors[name].dtype)
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
    return _usual(len(column(tensors, "rows.radius", torch.float32))) | dict(tensors)


def _usual(count: int) -> dict[str, Tensor]:
    numbers = torch.arange(count, device="cpu")
    return {
        "labels.length": torch.full((1,), -1, dtype=torch.int64, device="cpu"),
        "labels.ids": torch.zeros(0, dtype=torch.int64, device="cpu"),
        "rows.id": numbers,
        "rows.live": torch.ones(count, dtype=torch.bool, device="cpu"),
        "rows.key_slot": numbers,
        "rows.value_slot": numbers,
        "rows.label_slot": torch.zeros_like(numbers),
    }


def _slots(slots: Tensor | MappedFile) -> int:
    return slots.shape.rows if isinstance(slots, MappedFile) else len(slots)


def unpack_labels(lengths: Tensor, ids: Tensor) -> Labels:
    """Return the labels of `pack_labels`.

    Raises: CodebookCorrupt where the lengths are not those of the ids.
    """
    used = lengths.clamp(min=0)
    # Each one first: a sum of huge lengths wraps around.
    if bool((used > len(ids)).any()) or int(used.sum()) != len(ids):
        raise CodebookCorrupt(
            "labels.length does not add up to the label ids there are", field="labels.length"
        )
    return Labels(lengths, ids)


def get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor by its name.

    Raises: CodebookCorrupt where it is missing.
    """
    if name not in tensors:
        raise CodebookCorrupt(f"the tensor {name} is missing", field=name)
    return tensors[name]


def column(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, count: int | None = None
) -> Tensor:
    """Return a tensor that must be a column of one element type, and of one length if given."""
    column = get(tensors, name)
    if column.dtype != dtype or column.ndim != 1 or count not in (None, len(column)):
        wanted = "*" if count is None else count
        raise CodebookCorrupt(
            f"{name} must be {dtype} [{wanted}], got {column.dtype} {tuple(column.shape)}",
            field=name,
        )
    return column


def check_slots(name: str, column: Tensor, slots: int, least: int = 0) -> None:
    """Raise CodebookCorrupt where a column [n] or [n, m] points outside of what there is."""
    refuse_where(
        (column < least) | (column >= slots), name, f"points outside the {slots} slots there are"
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CodebookCorrupt for the first row of a tensor that is not finite."""
    if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # NaN is both ends
        refuse_where(~tensor.isfinite(), name, "must be finite, got NaN or infinity")


def ascends(numbers: Tensor) -> Tensor:
    """Tell of each of some numbers [n] but the first whether it is more than the one before.

    A difference would not say: that of two numbers at the ends of int64 wraps around.
    """
    return numbers[1:] > numbers[:-1]


def check_ids(name: str, ids: Tensor) -> None:
    """Raise CodebookCorrupt for ids [n] that do not ascend, or are not numbers of ours."""
    order = torch.cat((ids[:1] < 0, ~ascends(ids)))
    refuse_where(order, name, "must ascend from 0 or more")
    refuse_where(ids >= manifest.MAX_NUMBER, name, f"must be below {manifest.MAX_NUMBER}")


def refuse_where(wrong: Tensor, name: str, why: str) -> None:
    """Raise CodebookCorrupt for the first row of a column where it is wrong [n] or [n, m]."""
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0][0])
        raise CodebookCorrupt(f"{name} {why} in row {row}", field=name, row=row)
