"""Rows of a codebook that lie in a file: mapped, and tested block by block before they are used.

The file is a safetensors file of one matrix. Its header is filled up to a page, so that the rows
can be mapped where they lie. Nobody reads 30 GB to open a codebook: a block of 4 MiB is read by
`pread` and held against its checksum when one of its rows is first fetched. A file that shrank is
seen there. What shrinks after that is a bus error where the mapping is read, which the extension
turns into CodebookCorrupt (csrc/cpu/bus_error.cpp); without the extension it ends the process.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grace_fast import _native
from grace_fast.codebook import forks
from grace_fast.errors import CodebookCorrupt as CodebookCorrupt

BLOCK_BYTES = 1 << 22
HEADER_BYTES = 4096  # a page: mappings begin at a multiple of it
_EXPONENT = {  # an element whose exponent bits are all set is NaN or infinite
    torch.float32: (np.uint32, 0x7F800000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
}
_SAFETENSORS_NAME = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file; a link is not followed, a device not opened.

    flags: as for `os.open`; a file that is to be created need not be there. One that is to be
        written must have no other name: what is written would be seen there too.

    Raises: CodebookCorrupt where something else has its name, OSError as `os.open`.
    """
    refuse_special(path)
    # What takes its place in between is opened without waiting for it, and refused then.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _refuse(path, os.fstat(descriptor), bool(flags & (os.O_RDWR | os.O_WRONLY)))
    except CodebookCorrupt:
        os.close(descriptor)
        raise
    return descriptor


def refuse_special(path: Path, writes: bool = False) -> None:
    """Raise CodebookCorrupt where a link, a device or a folder has the name of a file.

    For files that others open by their path: SQLite, safetensors.

    writes: it will be written, so it must have no other name either.
    """
    with suppress(FileNotFoundError):
        _refuse(path, path.lstat(), writes)


def _refuse(path: Path, found: os.stat_result, writes: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise CodebookCorrupt(f"{path} is {what}: a codebook's files are regular files")
    if writes and found.st_nlink > 1:
        raise CodebookCorrupt(
            f"{path} has another name somewhere (a hard link), and what is written to it would be "
            "seen there; copy the directory (cp -r) and use the copy"
        )


@dataclass(frozen=True)
class Shape:
    """The matrix that a file holds."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def blocks(self) -> int:
        """The number of blocks, the last one perhaps short."""
        return -(-self.nbytes // BLOCK_BYTES)

    def header(self, name: str) -> bytes:
        """Return the safetensors header of a file that holds this matrix under a name."""
        described = {
            "dtype": _SAFETENSORS_NAME[self.dtype],
            "shape": [self.rows, self.width],
            "data_offsets": [0, self.nbytes],
        }
        text = json.dumps({name: described}).encode().ljust(HEADER_BYTES - 8)
        return len(text).to_bytes(8, "little") + text


class MappedFile:
    """A file of rows as it was saved, and which blocks of it were found to be so.

    checks: [blocks, 32] uint8, the SHA-256 of each; of format 2 [blocks] int64, their CRC-32.

    Raises: CodebookCorrupt where the file is missing, of another size, or has another header.
    """

    def __init__(self, path: Path, name: str, shape: Shape, checks: Tensor) -> None:
        self.path, self.name, self.shape = path, name, shape
        self._checks = checks
        # Kept open: whoever replaces the file leaves this one to us.
        self.descriptor = open_rows(path, shape, checks)
        weakref.finalize(self, os.close, self.descriptor)
        self._check_size("is truncated or was changed")
        if os.pread(self.descriptor, HEADER_BYTES, 0) != shape.header(name):
            raise CodebookCorrupt(f"{path} does not begin with the header of its {name}")
        # One more: an empty file has a table too.
        self.tested: npt.NDArray[np.uint8] = np.zeros(shape.blocks + 1, np.uint8)
        self._testing = threading.Lock()
        forks.guard(self, "_testing")  # a block is marked last: half tested is not tested
        self._for_extension: Any = None
        self._guarded = -1

    def _check_size(self, what: str) -> None:
        found, wanted = os.fstat(self.descriptor), HEADER_BYTES + self.shape.nbytes
        if not stat.S_ISREG(found.st_mode) or found.st_size != wanted:
            raise CodebookCorrupt(f"{self.path} {what}: {found.st_size} bytes, wanted {wanted}")

    def guard(self, region: Any, address: int) -> None:
        """Let a file that shrinks under its mapping be seen, as long as `region` is alive."""
        if _native.cpu is not None and self.shape.rows:
            self._guarded = _native.cpu.guard(first=address, bytes=self.shape.nbytes)
            self._for_extension = None  # it knows the mapping that it was made for
            weakref.finalize(region, _native.cpu.unguard, self._guarded)

    def check_not_lost(self) -> None:
        """Raise CodebookCorrupt where something was read that the file no longer holds."""
        if self._guarded >= 0 and _native.cpu.is_lost(self._guarded):
            self._lose()

    def _lose(self) -> None:
        self._check_size("shrank while it was in use")
        raise CodebookCorrupt(f"{self.path} could not be read where it is mapped")

    def for_extension(self) -> Any:
        """Return what the extension asks before it reads a row."""
        if self._for_extension is None:
            # No cycle: the extension's object is not seen by the collector of cycles.
            known = weakref.ref(self)
            self._for_extension = _native.cpu.MappedKeys(
                slots=self.shape.rows,
                block_bytes=BLOCK_BYTES,
                tested=self.tested.ctypes.data,
                test=lambda block: _alive(known).test_block(block),
                lose=lambda: _alive(known)._lose(),
                guarded=self._guarded,
            )
        return self._for_extension

    def test_block(self, block: int) -> None:
        """Read one block and hold it against its checksum, unless that was done.

        Raises: CodebookCorrupt where it is not what was saved, or not finite.
        """
        with self._testing:
            if self.tested[block]:
                return
            first = block * BLOCK_BYTES
            size = min(BLOCK_BYTES, self.shape.nbytes - first)
            content = os.pread(self.descriptor, size, HEADER_BYTES + first)
            if len(content) != size:
                self._check_size("shrank while it was in use")
            row = first // self.shape.row_bytes
            if not is_saved(content, self._checks[block]):
                raise CodebookCorrupt(
                    f"{self.path}: block {block}, from row {row} on, is not what was saved "
                    "(checksum)",
                    field=self.name,
                    row=row,
                )
            if len(at := not_finite(content, self.shape.dtype)):
                row = (first + int(at[0]) * self.shape.dtype.itemsize) // self.shape.row_bytes
                raise CodebookCorrupt(
                    f"{self.path}: {self.name} must be finite, got NaN or infinity in row {row}",
                    field=self.name,
                    row=row,
                )
            self.tested[block] = 1

    def test_rows(self, first: int, last: int) -> None:
        """Test the blocks of rows [first, last); rows past the file are none of its business."""
        last = min(last, self.shape.rows)
        if first >= last:
            return
        begin = first * self.shape.row_bytes // BLOCK_BYTES
        end = -(-last * self.shape.row_bytes // BLOCK_BYTES)
        for block in np.flatnonzero(self.tested[begin:end] == 0):
            self.test_block(begin + int(block))

    def test_slots(self, slots: Tensor) -> None:
        """Test the blocks of some rows [n] int64."""
        row_bytes = self.shape.row_bytes
        inside = slots[slots < self.shape.rows].cpu()
        begin = torch.div(inside * row_bytes, BLOCK_BYTES, rounding_mode="floor")
        end = torch.div((inside + 1) * row_bytes - 1, BLOCK_BYTES, rounding_mode="floor")
        for first, last in {*zip(begin.tolist(), end.tolist(), strict=True)}:
            for block in range(first, last + 1):
                if not self.tested[block]:
                    self.test_block(block)

    def read(self, first: int, last: int) -> Tensor:
        """Return a copy of rows [first, last), which are read in one go and tested.

        Raises: CodebookCorrupt where they are not what was saved.
        """
        self.test_rows(first, last)
        shape, size = self.shape, (last - first) * self.shape.row_bytes
        content = bytearray(size)
        begin = HEADER_BYTES + first * shape.row_bytes
        if os.preadv(self.descriptor, [content], begin) != size:
            self._check_size("shrank while it was in use")
        if not size:
            return torch.empty(0, shape.width, dtype=shape.dtype, device="cpu")
        return torch.frombuffer(content, dtype=shape.dtype).view(last - first, shape.width)

    def test_all(self, each: Callable[[int], object] = lambda size: None) -> None:
        """Test every block that was not, and that the file is whole; tell `each` their bytes."""
        self._check_size("shrank while it was in use")
        for block in range(self.shape.blocks):
            self.test_block(block)
            each(min(BLOCK_BYTES, self.shape.nbytes - block * BLOCK_BYTES))


def _alive(known: weakref.ref[MappedFile]) -> MappedFile:
    file = known()
    assert file is not None, "a version keeps the files that it reads"
    return file


def open_rows(path: Path, shape: Shape, checks: Tensor) -> int:
    """Return a descriptor of a file of rows that has a check for each of its blocks.

    Raises: CodebookCorrupt where it has not, is missing or is no regular file.
    """
    if len(checks) != shape.blocks:
        raise CodebookCorrupt(
            f"{path} has {shape.blocks} blocks, and there are {len(checks)} checksums"
        )
    try:
        return open_regular(path)
    except OSError as error:
        raise CodebookCorrupt(f"{path} is missing: the codebook is not complete") from error


def is_saved(content: bytes, check: Tensor) -> bool:
    """Tell whether a block is as saved; its check: SHA-256 [32] uint8, or CRC-32 [] int64."""
    if check.ndim:
        return sha256(content).digest() == bytes(check.tolist())
    return zlib.crc32(content) == int(check)


def not_finite(content: bytes, dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Return every element of a buffer that is NaN or infinite."""
    kind, exponent = _EXPONENT[dtype]
    return np.flatnonzero(np.frombuffer(content, kind) & kind(exponent) == exponent)
