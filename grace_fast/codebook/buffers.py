"""Memory that grows in place: address space is reserved once and committed as rows arrive.

The first row keeps its address for life, so compiled graphs, snapshots and pointers stay valid
while edits arrive, and an append never copies what is there. On the host a reservation costs
nothing until it is committed (PROT_NONE, then mprotect); refusal comes at the commit, as ENOMEM.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from grace_fast.codebook.device_memory import DeviceRows, driver_of

# An array reserves this part of the address space that is left, so that any number of codebooks
# leaves room for each other and for the process: of 47 bits 128 GiB, or 22 million fp32 keys of
# width 1536. Where a limit is set (ulimit -v) there is little to share, and few to share it.
SHARE, SHARE_OF_A_LIMIT = 1024, 16
ADDRESS_BYTES = 1 << 47
COMMIT_STEP = 1 << 20  # bytes; a commit also grows by an eighth, so commits stay rare
HUGE_PAGE = 1 << 21  # a key read here and there costs a page walk, of huge pages a shorter one

_log = logging.getLogger("grace_fast")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


# What torch and C++ say in a plain RuntimeError where the host has no more memory.
_NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise MemoryError where torch has no more memory, whatever it calls that."""
    try:
        yield
    except RuntimeError as error:
        is_named = isinstance(error, torch.OutOfMemoryError)
        if is_named or any(sign in str(error) for sign in _NO_MEMORY):
            raise MemoryError(str(error)) from error
        raise


class Rows(Protocol):
    """An append-only array of rows; `tensor` may be read up to the rows that were committed."""

    tensor: Tensor  # [capacity, width]

    def commit(self, rows: int) -> None:
        """Make the first `rows` rows writable.

        Raises: MemoryError where they cannot be had; nothing has changed then.
        """


def bounded(view: Tensor) -> Tensor:
    """Return a view of a store as a tensor at the same address whose storage is what it shows.

    `torch.save` and `copy.deepcopy` read the whole storage of a tensor, and most of a store's is
    reserved and not there.
    """
    return from_dlpack(view)


def reserve(width: int, dtype: torch.dtype, device: torch.device, rows: int | None = None) -> Rows:
    """Return an empty array of rows of `width` elements, at one address for life where it can."""
    if device.type == "cpu":
        return ReservedRows(width, dtype, rows)
    try:
        if (driver := driver_of(device)) is not None:
            return DeviceRows(width, dtype, driver, rows)
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        _log.warning("rows on %s will move as they grow: %s", device, error)
    return GrowingRows(width, dtype, device)


class ReservedRows:
    """Rows in reserved host address space."""

    def __init__(self, width: int, dtype: torch.dtype, rows: int | None = None) -> None:
        self.row_bytes = width * dtype.itemsize
        self.committed_bytes = 0
        wanted = _fair_share() if rows is None else rows * self.row_bytes
        wanted = max(wanted, self.row_bytes, COMMIT_STEP)
        self.address, self.reserved_bytes = _reserve_address_space(wanted)
        region_type: Any = type(
            "Region", (ctypes.Array,), {"_type_": ctypes.c_char, "_length_": self.reserved_bytes}
        )
        region = region_type.from_address(self.address)
        # The tensor keeps the region alive, the region the mapping.
        weakref.finalize(region, _libc.munmap, self.address, self.reserved_bytes).atexit = False
        self.region = region
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
        step = HUGE_PAGE if grown > 8 * HUGE_PAGE else mmap.PAGESIZE
        grown = min(-(-grown // step) * step, self.reserved_bytes)
        fresh = self.address + self.committed_bytes
        size = grown - self.committed_bytes
        if _libc.mprotect(fresh, size, mmap.PROT_READ | mmap.PROT_WRITE):
            raise _refused(f"commit {size} bytes for row {rows} of the codebook")
        self.committed_bytes = grown


class MappedRows(ReservedRows):
    """Rows whose first ones are those of a file; later ones are in memory beside them.

    The file is never written: its last page is copied once a row is put behind its end.
    """

    def __init__(
        self, descriptor: int, offset: int, file_rows: int, width: int, dtype: torch.dtype
    ) -> None:
        row_bytes = width * dtype.itemsize
        super().__init__(width, dtype, file_rows + _fair_share() // row_bytes)
        self.committed_bytes = size = -(-file_rows * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if not size:
            return
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        found = _libc.mmap(self.address, size, mmap.PROT_READ, flags, descriptor, offset)
        if found == _MAP_FAILED:
            raise _refused(f"map {size} bytes of a codebook's file")
        # Survivors are a row here and a row there: what lies beside one will not be asked for.
        _libc.madvise(self.address, size, mmap.MADV_RANDOM)
        last_page = self.address + size - mmap.PAGESIZE
        if _libc.mprotect(last_page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise _refused("make room behind a codebook's file")


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


class FixedArrays:
    """Named arrays on a device, each at one address for life, whatever is put into it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: dict[str, Rows] = {}

    def make_room(self, name: str, like: Tensor) -> None:
        """Have room for a tensor [n, ...] under a name; the widths of a name stay the same.

        Raises: MemoryError where it cannot be had at one address; nothing has changed then.
        """
        if name not in self._rows:
            made = reserve(math.prod(like.shape[1:]), like.dtype, self._device)
            if isinstance(made, GrowingRows):
                raise MemoryError(f"{self._device} has no memory that grows at one address")
            self._rows[name] = made
        self._rows[name].commit(max(1, len(like)))

    def put(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Copy a tensor [n, ...] that there is room for to the places from `first` on."""
        store = self._rows[name].tensor
        store[first : first + len(tensor)].copy_(tensor.reshape(len(tensor), store.shape[1]))

    def at(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the first shape[0] places of a name as a tensor of this shape."""
        return self._rows[name].tensor[: shape[0]].view(shape)


def _refused(what: str) -> MemoryError:
    """Return the error for a call that failed just now."""
    return MemoryError(f"could not {what}: {os.strerror(ctypes.get_errno())}")


def _fair_share() -> int:
    """Return how many bytes of address space an array without a stated size may take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = limit != resource.RLIM_INFINITY
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    left = max((limit if limited else ADDRESS_BYTES) - in_use, 0)
    return left // (SHARE_OF_A_LIMIT if limited else SHARE)


def _reserve_address_space(wanted: int) -> tuple[int, int]:
    """Return the address and size of a mapping of at least `wanted` bytes, none of them committed.

    Raises: MemoryError where the address space is full.
    """
    step = HUGE_PAGE if wanted > 8 * HUGE_PAGE else mmap.PAGESIZE
    size = -(-wanted // step) * step
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address = _libc.mmap(None, size, _PROT_NONE, flags, -1, 0)
    if address == _MAP_FAILED:
        raise _refused(f"reserve {size} bytes of address space")
    _libc.madvise(address, size, mmap.MADV_HUGEPAGE)  # refused where there are none: no matter
    return address, size
