"""Columns of a codebook as named tensors, and back.

Columns are indexed by row (`rows.*`) or by slot (`keys`, `values`, `labels.*`). What was edited is
in columns of its own (`history_columns`).

A label is `labels.length` of the ids in `labels.ids`, one label after the other. One that begins
with -2^63 is of numbers: every further id is the bits of one, as float64 (`semantics.score_label`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import MappedFile
from grace_fast.codebook.pages import Counts
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import CodebookCorrupt
from grace_fast.store.checks import column, get, not_ascending, not_finite, refuse, row_faults

ROW_COLUMNS = {
    "id": torch.int64,
    "radius": torch.float32,
    "live": torch.bool,
    "key_slot": torch.int64,
    "value_slot": torch.int64,
    "label_slot": torch.int64,
}


def pack_codebook(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return a codebook as tensors."""
    return {
        "keys": snapshot.key_slots[: snapshot.counts.keys],
        "values": snapshot.value_slots[: snapshot.counts.values],
    } | pack_rows(snapshot)


def pack_rows(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return what a codebook says of its rows as tensors: all but the slots of keys and values."""
    lengths, ids = snapshot.label_slots.columns(snapshot.counts.labels)
    return {"labels.length": lengths, "labels.ids": ids} | {
        f"rows.{name}": snapshot.ids if name == "id" else snapshot.column(name)
        for name in ROW_COLUMNS
    }


def unpack_codebook(
    tensors: Mapping[str, Tensor], device: torch.device, version: int = 0
) -> Codebook:
    """Return the codebook of `pack_codebook`, at the version that it was.

    Raises: CodebookCorrupt naming the column that does not fit.
    """
    keys, values = get(tensors, "keys"), get(tensors, "values")
    if "keys.blocks" in tensors:  # they came from files of their own
        tensors = fill_defaults(tensors)
    if keys.ndim != 2 or values.ndim != 2 or keys.dtype != values.dtype:
        raise CodebookCorrupt("keys and values must be matrices of one element type")
    if keys.dtype not in DTYPES or not keys.shape[1] or not values.shape[1]:
        raise CodebookCorrupt(f"keys and values must be numbers [*, >= 1] in one of {DTYPES}")
    refuse(not_finite(name, slots) for name, slots in (("keys", keys), ("values", values)))
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
    columns = row_columns(tensors)
    count, lengths = len(columns["id"]), tensors["labels.length"]
    keys_there, values_there = (
        each.shape.rows if isinstance(each, MappedFile) else len(each) for each in (keys, values)
    )
    counts = Counts(rows=count, keys=keys_there, values=values_there, labels=len(lengths))
    refuse(row_faults(tensors, counts))
    refuse(not_ascending("rows.id", columns["id"]))
    labels = unpack_labels(lengths, tensors["labels.ids"])
    return Codebook.restore(keys, values, labels, columns, device, version)


def row_columns(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of rows by their names, of their types and as long as each other.

    Raises: CodebookCorrupt naming one that is not, or a column of labels of another type.
    """
    for name in ("labels.length", "labels.ids"):
        column(tensors, name, torch.int64)
    count = len(column(tensors, "rows.id", torch.int64))
    return {
        name: column(tensors, f"rows.{name}", dtype, count) for name, dtype in ROW_COLUMNS.items()
    }


def omit_defaults(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `pack_rows` without the columns that `fill_defaults` knows: most of the bytes."""
    defaults = _defaults(len(tensors["rows.radius"]))
    labels = ("labels.length", "rows.label_slot")
    if bool((tensors["labels.length"] < 0).all()):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in labels}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in defaults or name in labels or not torch.equal(tensor, defaults[name])
    }


def fill_defaults(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the columns that were left out: row i is in slot i, live, unlabelled.

    Raises: CodebookCorrupt where there are no radii to tell how many rows there are.
    """
    return _defaults(len(column(tensors, "rows.radius", torch.float32))) | dict(tensors)


def _defaults(count: int) -> dict[str, Tensor]:
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


def unpack_labels(lengths: Tensor, ids: Tensor) -> Labels:
    """Return the labels of lengths, -1 for none, and ids: `labels.length` and `labels.ids`.

    Raises: CodebookCorrupt where the lengths are not those of the ids.
    """
    used = lengths.clamp(min=0)
    # Each one first: a sum of huge lengths wraps around.
    if bool((used > len(ids)).any()) or int(used.sum()) != len(ids):
        raise CodebookCorrupt(
            "labels.length does not add up to the label ids there are", field="labels.length"
        )
    return Labels(lengths, ids)
