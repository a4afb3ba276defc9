"""Keys or values in a file of which some blocks may not be what was saved: the others of it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.mapped import (
    BLOCK_BYTES,
    HEADER_BYTES,
    Shape,
    is_saved,
    not_finite,
    open_rows,
)
from grace_fast.errors import CodebookCorrupt
from grace_fast.store.row_file import RowWriter, Written


class DamagedRowFile:
    """A file of rows as a directory has it.

    checks: of its blocks, as in `MappedFile`.

    Raises: CodebookCorrupt where it is missing, no regular file, or its checks are not of it.
    """

    def __init__(self, path: Path, shape: Shape, checks: Tensor, name: str) -> None:
        self._path, self._shape, self._checks, self._name = path, shape, checks, name
        self._file = open_rows(path, shape, checks)
        weakref.finalize(self, os.close, self._file)
        if not os.fstat(self._file).st_size and shape.nbytes:
            raise CodebookCorrupt(f"{path} is empty: there is nothing to repair")

    def corrupt_rows(self) -> Tensor:
        """Return where a row is not finite, or in a block that is not what was saved, [rows] bool.

        What a file that was cut off does not hold any more is not what was saved either.
        """
        corrupt = torch.zeros(self._shape.rows, dtype=torch.bool, device="cpu")
        size, item = self._shape.row_bytes, self._shape.dtype.itemsize
        for block in range(self._shape.blocks):
            first = block * BLOCK_BYTES
            last = min(first + BLOCK_BYTES, self._shape.nbytes)
            content = os.pread(self._file, last - first, HEADER_BYTES + first)
            if len(content) != last - first or not is_saved(content, self._checks[block]):
                corrupt[first // size : -(-last // size)] = True
                continue
            at = not_finite(content, self._shape.dtype)
            corrupt[torch.from_numpy((first + at * item) // size)] = True
        return corrupt

    def write(self, target: Path, corrupt: Tensor) -> Written:
        """Return the file where it can stay, else another one with zeros for corrupt rows [rows].

        Raises: OSError where it cannot be written.
        """
        if not bool(corrupt.any()) and self._is_whole():
            return Written(self._path, self._shape, self._checks)
        writer = RowWriter(target, self._name, self._shape.width, self._shape.dtype)
        step = max(1, BLOCK_BYTES // self._shape.row_bytes)
        try:
            for first in range(0, self._shape.rows, step):
                rows = self._read(first, min(first + step, self._shape.rows))
                writer.append(rows.masked_fill(corrupt[first : first + len(rows), None], 0))
            return writer.finish()
        finally:
            writer.close()

    def _is_whole(self) -> bool:
        header = os.pread(self._file, HEADER_BYTES, 0)
        size = os.fstat(self._file).st_size
        is_of_today = self._checks.ndim == 2
        return (
            is_of_today
            and header == self._shape.header(self._name)
            and size == HEADER_BYTES + self._shape.nbytes
        )

    def _read(self, first: int, last: int) -> Tensor:
        size = self._shape.row_bytes
        room = np.zeros((last - first) * size, np.uint8)
        os.preadv(self._file, [room.data], HEADER_BYTES + first * size)
        return torch.from_numpy(room).view(self._shape.dtype).view(last - first, -1)
