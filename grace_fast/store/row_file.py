"""Writing the rows of a codebook to a file of their own, in one pass; `mapped` reads it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES, Shape, open_regular
from grace_fast.errors import CodebookCorrupt


@dataclass(frozen=True)
class Written:
    """A file of rows that is whole and on the disk."""

    path: Path
    shape: Shape
    checks: Tensor  # [blocks, 32] uint8, the SHA-256 of each


class RowWriter:
    """A file of rows in the making; what was checkpointed can be gone on with.

    known: what `checkpoint` returned last; what the file holds beyond that is cut off.

    Raises: CodebookCorrupt where the block that goes on is not as it was then.
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
        self._checks: list[str] = list(known["checks"]) if known else []
        # Nothing is buffered, and places are told: a fork that ends writes nothing here.
        self._file = os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        if self.rows and size < HEADER_BYTES + self._shape.nbytes:
            self._file.close()
            raise CodebookCorrupt(f"{path} has fewer rows than were written; remove {path.parent}")
        self._file.truncate(HEADER_BYTES + self._shape.nbytes)
        full = self._shape.nbytes // BLOCK_BYTES * BLOCK_BYTES
        self._last_check = sha256(self._pread(full, self._shape.nbytes))
        if known and self._last_check.hexdigest() != known["last_check"]:
            self._file.close()
            raise CodebookCorrupt(f"{path} is not what was written; remove {path.parent}")

    @property
    def rows(self) -> int:
        """The number of rows written."""
        return self._shape.rows

    def append(self, rows: Tensor) -> None:
        """Write rows [M, width] of the file's element type behind the others.

        Raises: OSError where they cannot be written; what was checkpointed stays valid.
        """
        content = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self._pwrite(content, HEADER_BYTES + self._shape.nbytes)
        at = self._shape.nbytes % BLOCK_BYTES
        while len(content):
            part = content[: BLOCK_BYTES - at]
            self._last_check.update(part)
            content = content[len(part) :]
            at += len(part)
            if at == BLOCK_BYTES:
                self._checks.append(self._last_check.hexdigest())
                self._last_check, at = sha256(), 0
        shape = self._shape
        self._shape = Shape(shape.rows + len(rows), shape.width, shape.dtype)

    def checkpoint(self) -> dict[str, Any]:
        """Put everything on the disk and return what is needed to go on from here."""
        os.fsync(self._file.fileno())
        last_check = self._last_check.hexdigest()
        return {"rows": self.rows, "checks": self._checks.copy(), "last_check": last_check}

    def finish(self) -> Written:
        """Write the header and put everything on the disk."""
        self._pwrite(memoryview(self._shape.header(self.name)), 0)
        self.checkpoint()
        self.close()
        short = self._shape.nbytes % BLOCK_BYTES > 0
        checks = bytearray.fromhex("".join(self._checks + [self._last_check.hexdigest()] * short))
        none = torch.empty(0, dtype=torch.uint8, device="cpu")
        found = torch.frombuffer(checks, dtype=torch.uint8) if checks else none
        return Written(self.path, self._shape, found.reshape(-1, 32))

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes of rows [first, last) that were written."""
        size = self._shape.row_bytes
        return self._pread(first * size, last * size)

    def _pwrite(self, content: memoryview, at: int) -> None:
        while len(content):
            written = os.pwrite(self._file.fileno(), content, at)
            content, at = content[written:], at + written

    def _pread(self, first: int, last: int) -> bytes:
        return os.pread(self._file.fileno(), last - first, HEADER_BYTES + first)

    def close(self) -> None:
        """Leave the file as it is; what was checkpointed is on the disk."""
        with suppress(OSError):  # of a disk that says only now that it failed
            self._file.close()
