"""Writing the rows of a codebook to a file of their own, in one pass; `mapped` reads it."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.mapped import BLOCK_BYTES, HEADER_BYTES, Shape


@dataclass(frozen=True)
class Written:
    """A file of rows that is whole and on the disk."""

    path: Path
    shape: Shape
    checks: Tensor  # [blocks] int64


class RowWriter:
    """A file of rows in the making; what was checkpointed can be gone on with.

    known: what `checkpoint` returned last; what the file holds beyond that is cut off.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        width: int,
        dtype: torch.dtype,
        known: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.name = path, name
        self._shape = Shape(known["rows"] if known else 0, width, dtype)
        self._checks: list[int] = list(known["checks"]) if known else []
        self._last_check = int(known["last_check"]) if known else 0
        self._file = path.open("r+b" if known else "wb")
        self._file.truncate(HEADER_BYTES + self._shape.nbytes)
        self._file.seek(0, os.SEEK_END)

    @property
    def rows(self) -> int:
        """The number of rows written."""
        return self._shape.rows

    def append(self, rows: Tensor) -> None:
        """Write rows [M, width] of the file's element type behind the others.

        Raises: OSError where they cannot be written; what was checkpointed stays valid.
        """
        content = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self._file.write(content)
        at = self._shape.nbytes % BLOCK_BYTES
        while len(content):
            part = content[: BLOCK_BYTES - at]
            self._last_check = zlib.crc32(part, self._last_check)
            content = content[len(part) :]
            at += len(part)
            if at == BLOCK_BYTES:
                self._checks.append(self._last_check)
                self._last_check = at = 0
        shape = self._shape
        self._shape = Shape(shape.rows + len(rows), shape.width, shape.dtype)

    def checkpoint(self) -> dict[str, Any]:
        """Put everything on the disk and return what is needed to go on from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"rows": self.rows, "checks": self._checks.copy(), "last_check": self._last_check}

    def finish(self) -> Written:
        """Write the header and put everything on the disk."""
        self._file.seek(0)
        self._file.write(self._shape.header(self.name))
        self.checkpoint()
        self.close()
        short = self._shape.nbytes % BLOCK_BYTES > 0
        checks = torch.tensor(self._checks + [self._last_check] * short, dtype=torch.int64)
        return Written(self.path, self._shape, checks)

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes of rows [first, last) that were written."""
        self._file.flush()
        size = self._shape.row_bytes
        return os.pread(self._file.fileno(), (last - first) * size, HEADER_BYTES + first * size)

    def close(self) -> None:
        """Leave the file as it is; what was checkpointed is on the disk."""
        with suppress(OSError):  # a full disk refuses what is still in the buffer, too
            self._file.close()
