"""Rows on a CUDA device that grow in place, through the driver's virtual memory.

The address range is reserved once (`cuMemAddressReserve`) and physical memory is mapped into it as
rows arrive, so a captured graph, a compiled model or a kernel's argument stays valid while edits
are made. Device memory that cannot be had is refused before anything has changed. The driver is
called through ctypes: nothing is linked, and a machine without one keeps `GrowingRows`.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

# An array reserves this much of the address space that every device has (47 bits or more), as on
# the host: 128 GiB, more than today's devices hold.
RESERVED_BYTES = 1 << 37
GROWTH = 8  # a commit also grows by an eighth, so commits stay rare
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_log = logging.getLogger("grace_fast")


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProperties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("allocation_flags", ctypes.c_ubyte * 8),
    )


class _AccessDescription(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Memory:
    """Device memory as torch takes it; the tensors made of it keep it alive."""

    def __init__(self, address: int, shape: tuple[int, int], itemsize: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": f"<i{itemsize}",  # the interface has no bfloat16
            "data": (address, False),
            "version": 2,
        }


class Driver:
    """Virtual memory of one device: reserve, map, give back. Sizes are multiples of `step`."""

    _PINNED, _DEVICE, _READ_WRITE = 1, 1, 3

    def __init__(self, device: torch.device) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._device = device
        where = _Location(self._DEVICE, _context_of(device))
        self._properties = _AllocationProperties(type=self._PINNED, location=where)
        self._access = _AccessDescription(where, self._READ_WRITE)
        step = ctypes.c_size_t()
        recommended = 1
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(step),
            ctypes.byref(self._properties),
            recommended,
        )
        self.step = step.value

    def probe(self) -> None:
        """Take memory the way rows do, and give it back.

        Raises: RuntimeError where a device, or what it runs in, has none to be mapped; MemoryError
        where there is none left.
        """
        address = self.reserve(self.step)
        mapped = 0
        try:
            self.map(address, self.step)
            mapped = self.step
        finally:
            self.release(address, mapped, self.step)

    def reserve(self, size: int) -> int:
        """Return the address of `size` bytes that are not there yet."""
        address = ctypes.c_uint64()
        nowhere, any_alignment, no_flags = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64()
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            ctypes.c_size_t(size),
            any_alignment,
            nowhere,
            no_flags,
        )
        return address.value

    def map(self, address: int, size: int) -> None:
        """Put memory there. Raises: MemoryError; nothing has changed then."""
        handle = ctypes.c_uint64()
        length, at, no_flags = ctypes.c_size_t(size), ctypes.c_uint64(address), ctypes.c_uint64()
        self._call(
            "cuMemCreate", ctypes.byref(handle), length, ctypes.byref(self._properties), no_flags
        )
        try:
            self._call("cuMemMap", at, length, ctypes.c_size_t(), handle, no_flags)
        finally:
            self._call("cuMemRelease", handle)  # what is mapped stays until it is unmapped
        try:
            self._call("cuMemSetAccess", at, length, ctypes.byref(self._access), ctypes.c_size_t(1))
        except BaseException:
            self._call("cuMemUnmap", at, length)
            raise

    def release(self, address: int, mapped: int, reserved: int) -> None:
        """Give memory and address space back, once no kernel uses them."""
        torch.cuda.synchronize(self._device)
        at = ctypes.c_uint64(address)
        if mapped:
            self._call("cuMemUnmap", at, ctypes.c_size_t(mapped))
        self._call("cuMemAddressFree", at, ctypes.c_size_t(reserved))

    def tensor(self, memory: Memory) -> Tensor:
        """Return the memory as a tensor of whole numbers; the first bytes have to be mapped."""
        return torch.as_tensor(memory, device=self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._device):
            error = getattr(self._cuda, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(error, ctypes.byref(text))
            said = f"{name}: {(text.value or b'error').decode()} ({error})"
            raise MemoryError(said) if error == _OUT_OF_MEMORY else RuntimeError(said)


class DeviceRows:
    """Rows in reserved address space of a device; see `memory.Rows`."""

    def __init__(
        self, width: int, dtype: torch.dtype, driver: Any, rows: int | None = None
    ) -> None:
        self.row_bytes = width * dtype.itemsize
        self._driver = driver
        wanted = RESERVED_BYTES if rows is None else rows * self.row_bytes
        self.reserved_bytes = -(-max(wanted, self.row_bytes) // driver.step) * driver.step
        self.address = driver.reserve(self.reserved_bytes)
        self._mapped = [0]  # bytes from the address on
        release = (driver, self.address, self._mapped, self.reserved_bytes)
        try:
            self._map(driver.step)  # torch asks the driver whose memory the first byte is
        except BaseException:
            _release(*release)
            raise
        capacity = self.reserved_bytes // self.row_bytes
        memory = Memory(self.address, (capacity, width), dtype.itemsize)
        weakref.finalize(memory, _release, *release).atexit = False
        self.tensor: Tensor = driver.tensor(memory).view(dtype)

    @property
    def committed_bytes(self) -> int:
        """The bytes that can be read and written."""
        return self._mapped[0]

    def commit(self, rows: int) -> None:
        """Make the first `rows` rows writable.

        Raises: MemoryError where the device has no more, or the reservation is full: a larger one
        has other addresses, so whatever was captured with the old ones has to be captured again.
        """
        needed = rows * self.row_bytes
        if needed <= self.committed_bytes:
            return
        if needed > self.reserved_bytes:
            raise MemoryError(
                f"the codebook's reservation holds {len(self.tensor)} rows, wanted {rows}; "
                "make the codebook with a larger reserve_rows, and capture graphs again"
            )
        step = self._driver.step
        grown = -(-(needed + needed // GROWTH) // step) * step
        try:
            self._map(min(grown, self.reserved_bytes) - self.committed_bytes)
        except MemoryError:  # the eighth more may be what is missing
            self._map(-(-needed // step) * step - self.committed_bytes)

    def _map(self, size: int) -> None:
        self._driver.map(self.address + self.committed_bytes, size)
        self._mapped[0] += size


def _release(driver: Any, address: int, mapped: list[int], reserved: int) -> None:
    driver.release(address, mapped[0], reserved)


def _context_of(device: torch.device) -> int:
    """Have a device's context, which the driver's calls need, and return the device's number."""
    torch.zeros(1, dtype=torch.uint8, device=device)
    index: int = torch.cuda._utils._get_device_index(device, optional=True)
    return index


@cache
def driver_of(device: torch.device) -> Driver | None:
    """Return the virtual memory of a device, or None, said once in the log, where it has none.

    Raises: MemoryError where the device has no memory left to tell by.
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    try:
        driver = Driver(device)
        driver.probe()
    except (OSError, RuntimeError, AttributeError) as error:
        _log.warning(
            "%s has no virtual memory (%s): rows move as they grow, and CUDA graphs cannot be kept",
            device,
            error,
        )
        return None
    return driver
