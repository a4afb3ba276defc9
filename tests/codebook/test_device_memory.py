"""Rows in a device's virtual memory, over a driver that maps host memory instead."""

import gc
import mmap
from contextlib import nullcontext

import pytest
import torch

from grace_fast.codebook import buffers, device_memory
from grace_fast.codebook.device_memory import DeviceRows, Driver


class HostDriver:
    """The calls of `Driver` on host memory; it refuses once it has given `limit` bytes."""

    step = 1 << 16

    def __init__(self, limit=1 << 30):
        self.limit, self.mapped, self.released = limit, 0, []

    def reserve(self, size):
        return buffers._reserve_address_space(size)[0]

    def map(self, address, size):
        if self.mapped + size > self.limit:
            raise MemoryError("cuMemCreate: out of memory (2)")
        assert not buffers._libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.mapped += size

    def release(self, address, mapped, reserved):
        self.released.append((address, mapped, reserved))
        buffers._libc.munmap(address, reserved)

    def tensor(self, owner):
        found = owner.__cuda_array_interface__
        array = type("Array", (), {"__array_interface__": {**found, "version": 3}, "owner": owner})
        import numpy as np

        return torch.from_numpy(np.asarray(array()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_rows_keep_their_address_while_they_grow(dtype):
    driver = HostDriver()
    rows = DeviceRows(24, dtype, driver, rows=50_000)
    start = rows.tensor.data_ptr()
    view = rows.tensor[:10]
    rows.commit(10)
    view.fill_(3)
    rows.commit(40_000)
    rows.tensor[39_999] = 5
    assert rows.tensor.data_ptr() == start
    assert rows.tensor.dtype == dtype
    assert bool((view == 3).all())
    assert bool((rows.tensor[39_999] == 5).all())
    assert rows.committed_bytes == driver.mapped
    assert rows.committed_bytes <= 1.2 * 40_000 * 24 * dtype.itemsize + 2 * driver.step


def test_commits_are_few():
    driver = HostDriver()
    rows, sizes = DeviceRows(64, torch.float32, driver, rows=100_000), []
    for count in range(0, 100_000, 100):
        rows.commit(count)
        if rows.committed_bytes not in sizes:
            sizes.append(rows.committed_bytes)
    assert len(sizes) < 60


def test_memory_that_is_not_there_is_refused_before_anything_changes():
    driver = HostDriver(limit=10 << 16)
    rows = DeviceRows(64, torch.float32, driver, rows=1 << 20)
    rows.commit(2000)
    rows.tensor[:2000] = 7
    before = rows.committed_bytes
    with pytest.raises(MemoryError, match=r"out of memory \(2\)"):
        rows.commit(4000)
    assert rows.committed_bytes == before
    assert bool((rows.tensor[:2000] == 7).all())
    rows.commit(2500)  # what is left without the eighth more still fits


def test_a_full_reservation_says_what_to_do():
    rows = DeviceRows(64, torch.float32, HostDriver(), rows=256)
    with pytest.raises(
        MemoryError, match="reservation holds 256 rows, wanted 257; make the codebook"
    ):
        rows.commit(257)


def test_memory_goes_back_when_the_last_tensor_does():
    driver = HostDriver()
    rows = DeviceRows(8, torch.float32, driver, rows=10_000)
    address, view = rows.address, rows.tensor[2:4]
    del rows
    gc.collect()
    assert driver.released == []
    view[0] = 1
    del view
    gc.collect()
    assert [released[0] for released in driver.released] == [address]


def test_a_driver_that_refuses_leaves_rows_that_move(monkeypatch, caplog):
    monkeypatch.setattr(buffers, "driver_of", lambda device: HostDriver(limit=0))
    rows = buffers.reserve(4, torch.float32, torch.device("meta"))
    assert isinstance(rows, buffers.GrowingRows)
    assert "rows on meta will move as they grow: cuMemCreate: out of memory (2)" in caplog.text


def test_a_driver_that_is_not_there_leaves_rows_that_move():
    assert device_memory.driver_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert device_memory.driver_of(torch.device("cuda")) is None


class Library:
    """libcuda, as far as `Driver` calls it; the call named `refuses` returns an error."""

    def __init__(self, refuses="", error=801):
        self.refuses, self.error, self.calls = refuses, error, []

    def __getattr__(self, name):
        if name == "cuGetErrorString":
            return lambda error, text: setattr(text._obj, "value", b"not supported")

        def call(*arguments):
            self.calls.append(name)
            if name == self.refuses:
                return self.error
            if name == "cuMemGetAllocationGranularity":
                arguments[0]._obj.value = 1 << 21
            return 0

        return call


@pytest.fixture
def library(monkeypatch):
    """Return what puts a library in the place of the driver's."""

    def put(made):
        device_memory.driver_of.cache_clear()
        monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda name: made)
        monkeypatch.setattr(device_memory, "_context_of", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        return made

    yield put
    device_memory.driver_of.cache_clear()


def test_virtual_memory_is_taken_once_and_given_back_before_rows_rely_on_it(library):
    made = library(Library())
    assert device_memory.driver_of(torch.device("cuda")) is not None
    assert made.calls == [
        *("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap"),
        *("cuMemRelease", "cuMemSetAccess", "cuMemUnmap", "cuMemAddressFree"),
    ]


@pytest.mark.parametrize(
    "refuses",
    [
        "cuMemGetAllocationGranularity",
        "cuMemAddressReserve",
        "cuMemCreate",
        "cuMemMap",
        "cuMemSetAccess",
    ],
)
def test_virtual_memory_that_is_refused_at_any_step_leaves_rows_that_move(library, caplog, refuses):
    made = library(Library(refuses))
    assert device_memory.driver_of(torch.device("cuda")) is None
    assert f"cuda has no virtual memory ({refuses}: not supported (801)): rows move" in caplog.text
    for taken, given in (
        ("cuMemAddressReserve", "cuMemAddressFree"),
        ("cuMemCreate", "cuMemRelease"),
        ("cuMemMap", "cuMemUnmap"),
    ):
        if taken in made.calls and refuses != taken:
            assert given in made.calls


def test_a_device_that_is_full_for_now_is_asked_again(library, monkeypatch):
    made = library(Library("cuMemCreate", error=2))
    with pytest.raises(MemoryError, match="cuMemCreate"):
        device_memory.driver_of(torch.device("cuda"))
    made.refuses = ""
    assert device_memory.driver_of(torch.device("cuda")) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_s_own_driver():
    rows = DeviceRows(96, torch.bfloat16, Driver(torch.device("cuda")), rows=1 << 20)
    start = rows.tensor.data_ptr()
    graph, total = torch.cuda.CUDAGraph(), torch.zeros((), device="cuda")
    rows.commit(10)
    rows.tensor[:10] = 1
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total.copy_(rows.tensor[:10].float().sum())
    rows.commit(1 << 19)
    rows.tensor[: 1 << 19] = 2
    assert rows.tensor.data_ptr() == start
    graph.replay()
    assert float(total) == 10 * 96 * 2
    with pytest.raises(MemoryError):
        Driver(torch.device("cuda")).map(rows.address + rows.committed_bytes, 1 << 50)
