"""The GPU benchmark's clock, on a device that is a list of durations."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_cells, gpu_clock, gpu_machine
from benchmarks.gpu_cells import CUDA_DENSE, Cell


class Device:
    """What torch offers of a device, with a time that work moves on, by what is captured."""

    def __init__(self):
        self.us, self.capturing, self.streams = 0.0, None, 0
        self.cuda = self
        self.uint8, self.int32, self.bfloat16 = torch.uint8, torch.int32, torch.bfloat16
        self.Tensor = torch.Tensor

    def work(self, us):
        if self.capturing is None:
            self.us += us
        else:
            self.capturing.us += us

    def _on_host(self, make):
        return lambda *shape, device=None, **options: make(*shape, **options)

    def __getattr__(self, name):
        if name in ("ones", "empty", "randn"):
            return self._on_host(getattr(torch, name))
        raise AttributeError(name)

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=1 << 10)

    def Event(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = device.us

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()

    def Stream(self):
        self.streams += 1
        return SimpleNamespace(wait_stream=_nothing, synchronize=_nothing, cuda_stream=7)

    current_stream = Stream

    def stream(self, stream):
        return torch.no_grad()

    def synchronize(self):
        pass

    def CUDAGraph(self):
        device = self

        class Graph:
            us = 0.0

            def capture_begin(self):
                device.capturing = self

            def capture_end(self):
                device.capturing = None

            def replay(self):
                device.us += self.us

        return Graph()


def _nothing(*others):
    pass


@pytest.fixture
def device(monkeypatch):
    made = Device()

    compiled = []

    def read_all(words, sink):
        assert compiled or made.capturing is None, "a kernel is loaded while a graph is captured"
        compiled.append(words)
        made.work(words.nbytes / 1e6)

    kernels = SimpleNamespace(read_all=read_all, WORDS=8192, PROGRAMS=4)
    for module in (gpu_clock, gpu_machine):
        monkeypatch.setattr(module, "torch", made)
        monkeypatch.setattr(module, "gpu_kernels", kernels)
    return made


@pytest.mark.parametrize("us", [3.0, 700.0, 90_000.0])
@pytest.mark.parametrize("is_swept", [True, False])
def test_a_graph_of_many_has_the_time_of_one_without_the_sweeps(device, us, is_swept):
    clock = gpu_clock.Clock()
    assert clock._words.nbytes >= 4 * (1 << 25) - 4 * 8192
    timing = clock.time(lambda: device.work(us), is_swept)
    assert timing.us[0] == pytest.approx(us, rel=1e-6)
    assert gpu_clock.FEWEST <= timing.count <= gpu_clock.MOST
    assert timing.figures["us_p5"] <= timing.figures["us_p50"] <= timing.figures["us_p95"]
    assert timing.figures["replays"] == len(timing.us) >= gpu_clock.FEWEST_REPLAYS
    assert clock.eager(lambda: device.work(us), is_swept).us[-1] == pytest.approx(us)
    assert clock.started(lambda: device.work(us)).us == pytest.approx([us] * gpu_clock.REPLAYS)


def test_a_call_that_cannot_be_captured_leaves_no_capture_open(device):
    calls = []

    def refuses():
        calls.append(device.capturing)
        if device.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        gpu_clock.captured(refuses, 20)
    assert device.capturing is None
    assert len(calls) == 3


def test_every_cell_of_the_machine_is_measured(device, monkeypatch):
    monkeypatch.setattr(gpu_machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_machine, "SIDE", 4)
    monkeypatch.setattr(gpu_machine, "LAYER", 8)
    gpu_machine._weight.cache_clear()
    launched = []

    def memset(*arguments):
        launched.append(arguments)
        return len(launched) > 100

    driver = SimpleNamespace(cuMemsetD8Async=memset)
    monkeypatch.setattr(gpu_machine.ctypes, "CDLL", lambda name: driver)
    assert gpu_machine._product(Cell("fixed cost", "product"))().shape == (4, 4)
    timed = {**gpu_machine._MACHINE, gpu_cells.MACHINE[5]: lambda _: lambda: device.work(3.0)}
    monkeypatch.setattr(gpu_machine, "_MACHINE", timed)
    clock = gpu_clock.Clock()
    found = {
        path: gpu_machine.measured(Cell("fixed cost", path, D=16, B=1), clock)
        for path in gpu_cells.MACHINE
    }
    assert found["two nodes"]["us_p50"] == pytest.approx(2 * found["one node"]["us_p50"])
    assert found["bytes read"]["gigabytes_s"] > 0
    assert "TFLOP/s" in found["product of 8192 x 8192"]["note"]
    assert found["graph of one node"]["in_a_graph"] == 1
    launched += [None] * 100
    with pytest.raises(RuntimeError, match="the driver's memset returned"):
        gpu_machine.measured(Cell("fixed cost", "memset node"), clock)
    cell = Cell("beside a layer", CUDA_DENSE, D=16, B=1, asks=gpu_cells.BESIDE)
    timing, note = gpu_machine.beside_a_layer(cell, lambda: device.work(4.0) or "found", clock)
    assert timing.us[0] == pytest.approx(4.0)
    assert timing.answer == "found"
    assert note.endswith("both 4.00 us")
    gpu_machine._weight.cache_clear()
