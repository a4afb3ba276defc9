"""Slots: keys, values, labels and ids at fixed addresses, only ever added to.

A row's slots are told by its page, so a key that moves or a value that is trained again takes a new
slot, and no reader sees one change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace_fast.codebook.buffers import MappedRows, Rows, reserve
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import HEADER_BYTES, MappedFile


class Slots:
    """The slots of one codebook; its writer adds to them.

    rows: how many keys fit, and as many values; None for as many as there is address space for.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: int | None = None,
    ) -> None:
        self.device = device
        self.keys = reserve(key_dim, dtype, device, rows)
        self.values = reserve(value_dim, dtype, device, rows)
        self.ids = reserve(1, torch.int64, torch.device("cpu"), rows)  # by row
        self.labels = Labels()
        self.next_id = 0

    def fill(
        self, keys: Tensor | MappedFile, values: Tensor | MappedFile, labels: Labels, ids: Tensor
    ) -> None:
        """Take in the first slots: where they lie, if that is a file."""
        self.keys, self.values = _filled(self.keys, keys), _filled(self.values, values)
        self.labels = labels
        add(self.ids, 0, ids[:, None])
        self.next_id = int(ids[-1]) + 1 if len(ids) else 0


def add(store: Rows, first: int, rows: Tensor) -> None:
    """Put rows behind the first ones of a store.

    Raises: MemoryError where they cannot be had.
    """
    store.commit(first + len(rows))
    store.tensor[first : first + len(rows)] = rows


def fetched(store: Tensor, slots: Tensor, file: MappedFile | None) -> Tensor:
    """Return slots [n] of a store, as [n, width], tested where they lie in a file."""
    if file is None:
        return store[slots]
    file.test_slots(slots)
    found = store[slots]
    file.check_not_lost()
    return found


def shape_of(rows: Tensor | MappedFile) -> tuple[int, int, torch.dtype]:
    """Return the number of rows, their width and their element type."""
    if isinstance(rows, MappedFile):
        return rows.shape.rows, rows.shape.width, rows.shape.dtype
    return rows.shape[0], rows.shape[1], rows.dtype


def _filled(store: Rows, rows: Tensor | MappedFile) -> Rows:
    """Return a store whose first slots are some rows: in it, or where they lie in a file."""
    if isinstance(rows, MappedFile):
        shape = rows.shape
        made = MappedRows(rows.descriptor, HEADER_BYTES, shape.rows, shape.width, shape.dtype)
        rows.guard(made.region, made.address)
        return made
    add(store, 0, rows)
    return store
