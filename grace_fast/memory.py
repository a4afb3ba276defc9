"""Memory that grows in place: address space is reserved once and committed as rows arrive.

The first row keeps its address for life, so compiled graphs, snapshots and pointers stay valid
while edits arrive, and an append never copies what is there. On the host a reservation costs
nothing until it is committed (PROT_NONE, then mprotect); refusal comes at the commit, as ENOMEM.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

# 128 GiB an array: 22 million fp32 keys of width 1536, and 500 codebooks fit 47 bits of address.
RESERVED_BYTES = 1 << 37
COMMIT_STEP = 1 << 20  # bytes; a commit also grows by an eighth, so commits stay rare

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


class Rows(Protocol):
    """An append-only array of rows; `tensor` may be read up to the rows that were committed."""

    tensor: Tensor  # [capacity, width]

    def commit(self, rows: int) -> None:
        """Make the first `rows` rows writable.

        Raises: MemoryError where they cannot be had; nothing has changed then.
        """


def reserve(width: int, dtype: torch.dtype, device: torch.device, rows: int | None = None) -> Rows:
    """Return an empty array of rows of `width` elements, on the host at one address for life."""
    if device.type == "cpu":
        return ReservedRows(width, dtype, rows)
    return GrowingRows(width, dtype, device)


class ReservedRows:
    """Rows in reserved host address space."""

    def __init__(self, width: int, dtype: torch.dtype, rows: int | None = None) -> None:
        self.row_bytes = width * dtype.itemsize
        self.committed_bytes = 0
        wanted = RESERVED_BYTES if rows is None else max(rows * self.row_bytes, COMMIT_STEP)
        self.address, self.reserved_bytes = _reserve_address_space(wanted, rows is not None)
        region_type: Any = type(
            "Region", (ctypes.Array,), {"_type_": ctypes.c_char, "_length_": self.reserved_bytes}
        )
        region = region_type.from_address(self.address)
        # The tensor keeps the region alive, the region the mapping.
        weakref.finalize(region, _libc.munmap, self.address, self.reserved_bytes).atexit = False
        capacity = self.reserved_bytes // self.row_bytes
        self.tensor = torch.frombuffer(region, dtype=dtype, count=capacity * width)
        self.tensor = self.tensor.view(capacity, width)

    def commit(self, rows: int) -> None:
        """Make the first `rows` rows writable (see `Rows.commit`)."""
        needed = rows * self.row_bytes
        if needed <= self.committed_bytes:
            return
        if rows > len(self.tensor):
            raise MemoryError(
                f"the codebook's reservation holds {len(self.tensor)} rows, wanted {rows}; "
                "make the codebook with a larger reserve_rows"
            )
        grown = needed + max(COMMIT_STEP, needed // 8)
        grown = min(-(-grown // mmap.PAGESIZE) * mmap.PAGESIZE, self.reserved_bytes)
        fresh = self.address + self.committed_bytes
        size = grown - self.committed_bytes
        if _libc.mprotect(fresh, size, mmap.PROT_READ | mmap.PROT_WRITE):
            reason = os.strerror(ctypes.get_errno())
            raise MemoryError(
                f"could not commit {size} bytes for row {rows} of the codebook: {reason}"
            )
        self.committed_bytes = grown


class GrowingRows:
    """Rows in a buffer that doubles, for devices without reserved addresses.

    A snapshot keeps the buffer it was taken from, so readers never see a move.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(64, width, dtype=dtype, device=device)
        self.committed = 64

    def commit(self, rows: int) -> None:
        """Make the first `rows` rows writable (see `Rows.commit`)."""
        if rows <= self.committed:
            return
        capacity = max(rows, 2 * self.committed)
        grown = self.tensor.new_empty(capacity, self.tensor.shape[1])
        grown[: self.committed] = self.tensor
        self.tensor, self.committed = grown, capacity


def _reserve_address_space(wanted: int, exact: bool) -> tuple[int, int]:
    size = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    while True:
        address = _libc.mmap(None, size, _PROT_NONE, flags, -1, 0)
        if address != _MAP_FAILED:
            return address, size
        if exact or size <= COMMIT_STEP:
            reason = os.strerror(ctypes.get_errno())
            raise MemoryError(f"could not reserve {size} bytes of address space: {reason}")
        size //= 2  # a limit on address space: take what there is
