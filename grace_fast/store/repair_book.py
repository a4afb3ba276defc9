"""Repair of a codebook by itself, whose keys, values and codes have files of their own."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.mapped import (
    BLOCK_BYTES,
    HEADER_BYTES,
    MappedFile,
    Shape,
    is_saved,
    not_finite,
    open_rows,
)
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import atomic, files, tensor_files
from grace_fast.store.columns import fill_defaults, unpack_rows
from grace_fast.store.large import resident
from grace_fast.store.row_file import RowWriter, Written
from grace_fast.store.salvage import (
    CorruptSlots,
    Repaired,
    Untrusted,
    mend_rows,
    read_columns,
    require_rows,
    without_rows,
)

_HOST = torch.device("cpu")


class BookRepair:
    """The repair of a codebook alone: keys, values and codes in files of their own.

    Raises: CodebookCorrupt where there is nothing to stand on.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        hmac_key: bytes | None,
        max_radius: float | None,
        report: Repaired,
    ) -> None:
        self._folder, self._key, self._report = folder, hmac_key, report
        found, _ = read_columns(folder, config.get("tensors"), report)
        columns = fill_defaults(found)
        require_rows(columns)
        self._files = {
            name: _DamagedRows(*tensor_files.described_rows(folder, config, name, columns), name)
            for name in files.MAPPED
        }
        self._corrupt = {name: file.corrupt_rows() for name, file in self._files.items()}
        for name, rows in self._corrupt.items():
            if bool(rows.any()):
                report.made_again.append(f"the {name}, with zeros in the place of what was changed")
        untrusted, live = Untrusted(), columns["rows.live"]
        columns = mend_rows(columns, CorruptSlots(**self._corrupt), max_radius, untrusted)
        report.dropped += untrusted.dropped(True, live)
        self._columns = columns | {"rows.live": without_rows(live, untrusted.numbers)}

    def write(self) -> None:
        """Write keys and values anew where they must be, and the codes, and let them be it."""
        token = secrets.token_hex(8)
        places = {name: self._folder / f"{name}-{token}.safetensors" for name in self._files}
        with atomic.removed_on_failure(*places.values()):
            written = {
                name: file.write(places[name], self._corrupt[name])
                for name, file in self._files.items()
            }
            keys, values = (
                MappedFile(each.path, name, each.shape, each.checks)
                for name, each in written.items()
            )
            book = unpack_rows(self._columns, keys, values, _HOST)
            snapshot, coded = resident.with_codes(book)
            resident.publish(self._folder, token, written, snapshot, coded, self._key)
        if coded:
            self._report.made_again.append("the codes")


class _DamagedRows:
    """A file of keys or values of which some blocks may not be what was saved.

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
        step = max(1, BLOCK_BYTES // self._shape.row_bytes)
        with closing(RowWriter(target, self._name, self._shape.width, self._shape.dtype)) as writer:
            for first in range(0, self._shape.rows, step):
                rows = self._read(first, min(first + step, self._shape.rows))
                writer.append(rows.masked_fill(corrupt[first : first + len(rows), None], 0))
            return writer.finish()

    def _is_whole(self) -> bool:
        return (
            self._checks.ndim == 2  # as of today
            and os.pread(self._file, HEADER_BYTES, 0) == self._shape.header(self._name)
            and os.fstat(self._file).st_size == HEADER_BYTES + self._shape.nbytes
        )

    def _read(self, first: int, last: int) -> Tensor:
        size = self._shape.row_bytes
        room = np.zeros((last - first) * size, np.uint8)
        os.preadv(self._file, [room.data], HEADER_BYTES + first * size)
        return torch.from_numpy(room).view(self._shape.dtype).view(last - first, -1)
