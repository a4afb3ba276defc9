"""What the machine itself does: bytes read, nodes of a graph, a product, a layer with a look-up.

Fixed costs are those of a node in a graph of many, which is how a look-up is launched in decoding.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_calls import Answer, Call
from benchmarks.gpu_cells import SWEPT, Cell
from benchmarks.gpu_clock import Timing

READ_BYTES = 4 << 30
SIDE = 8192  # of the matrices
LAYER = 11008  # outputs of the layer; D inputs


def measured(cell: Cell, clock: Any) -> dict[str, Any]:
    """Return the figures of a cell of `gpu_cells.MACHINE`."""
    made = _MACHINE[cell.path](cell)
    if cell.path == "graph of one node":
        timing = clock.started(made)
    else:
        timing = clock.time(made, is_swept=cell.path == "layer alone")
    found = dict(timing.figures)
    if cell.path == "bytes read":
        found["gigabytes_s"] = READ_BYTES / found["us_p50"] / 1e3
    if cell.path.startswith("product"):
        found["note"] = f"{2 * SIDE**3 / found['us_p50'] / 1e6:.0f} TFLOP/s, random bf16"
    return found


def _reading(_: Cell) -> Callable[[], Any]:
    words = torch.ones(READ_BYTES // 4, dtype=torch.int32, device="cuda")
    sink = torch.empty(gpu_kernels.PROGRAMS, dtype=torch.int32, device="cuda")
    return lambda: gpu_kernels.read_all(words, sink)


def _nodes(count: int) -> Callable[[Cell], Callable[[], Any]]:
    def made(_: Cell) -> Callable[[], Any]:
        words = torch.ones(gpu_kernels.WORDS, dtype=torch.int32, device="cuda")
        sink = torch.empty(1, dtype=torch.int32, device="cuda")

        def call() -> None:
            for _ in range(count):
                gpu_kernels.read_all(words, sink)

        return call

    return made


def _memset(_: Cell) -> Callable[[], Any]:
    """A memset of the driver's: torch fills by a kernel."""
    memory = torch.empty(256, dtype=torch.uint8, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")

    def call() -> torch.Tensor:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        size = ctypes.c_size_t(len(memory))
        error = driver.cuMemsetD8Async(
            ctypes.c_uint64(memory.data_ptr()), ctypes.c_ubyte(0), size, stream
        )
        if error:
            raise RuntimeError(f"the driver's memset returned {error}")
        return memory

    return call


def _product(_: Cell) -> Callable[[], Any]:
    one, other = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: one @ other


@cache
def _weight(width: int) -> torch.Tensor:
    return torch.randn(LAYER, width, dtype=torch.bfloat16, device="cuda")


def _layer(cell: Cell) -> Callable[[], Any]:
    weight = _weight(cell.D)
    hidden = torch.randn(cell.B, cell.D, dtype=torch.bfloat16, device="cuda")
    return lambda: hidden @ weight.T


_MACHINE: dict[str, Callable[[Cell], Callable[[], Any]]] = {
    "bytes read": _reading,
    "graph of one node": _nodes(1),
    "one node": _nodes(1),
    "two nodes": _nodes(2),
    "memset node": _memset,
    "product of 8192 x 8192": _product,
    "layer alone": _layer,
}


def beside_a_layer(cell: Cell, call: Call, clock: Any) -> tuple[Timing, str]:
    """Return what a look-up on another stream adds to a layer's product, and a note on both."""
    layer = _layer(cell)
    side = torch.cuda.Stream()

    def both() -> Answer:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            answer = call()
        layer()
        main.wait_stream(side)
        return answer

    is_swept = cell.caches == SWEPT
    alone = statistics.median(clock.time(layer, is_swept).us)
    together = clock.time(both, is_swept)
    extra = Timing([us - alone for us in together.us], together.count, together.answer)
    middle = statistics.median(together.us)
    return extra, f"the layer alone {alone:.2f} us, both {middle:.2f} us"
