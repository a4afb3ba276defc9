"""The device's time of one look-up, as it is in decoding: many of them in one captured graph.

    warm    (graph of n look-ups) / n
    swept   (graph of n sweeps and look-ups, less the graph of n sweeps) / n

A graph has the launches without the host; n of them share what starting it costs. A sweep reads
four times the second-level cache and writes nothing, so that the look-up finds the cache full of
clean lines that are not its own. Events are recorded around each replay.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import gpu_kernels

FEWEST, MOST = 20, 50  # look-ups of a graph
GRAPH_US = 20_000.0  # what a graph should take, within those bounds
REPLAYS, FEWEST_REPLAYS = 40, 5
REPLAYED_US = 400_000.0  # and all of its replays
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Times of one look-up, by replay."""

    us: list[float]  # ascending
    count: int  # look-ups of a graph; 1: called from Python
    answer: Any  # of the last look-up

    @property
    def figures(self) -> dict[str, float | int]:
        """What a row says of them."""
        last = len(self.us) - 1
        return {
            "us_p5": self.us[round(0.05 * last)],
            "us_p50": statistics.median(self.us),
            "us_p95": self.us[round(0.95 * last)],
            "in_a_graph": self.count,
            "replays": len(self.us),
        }


class Clock:
    """Times calls on the current device."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        words = max(size, 1 << 25) // gpu_kernels.WORDS * gpu_kernels.WORDS  # of 4 bytes
        self._words = torch.ones(words, dtype=torch.int32, device="cuda")
        self._sink = torch.empty(gpu_kernels.PROGRAMS, dtype=torch.int32, device="cuda")
        self._sweeps: dict[int, float] = {}  # us of a graph of so many

    def sweep(self) -> None:
        """Fill the second-level cache with clean lines of nobody."""
        gpu_kernels.read_all(self._words, self._sink)

    def time(self, call: Callable[[], Any], is_swept: bool, warm_up: int = WARM_UP) -> Timing:
        """Return the time of a call, captured many times in one graph."""
        about = self._about(call, warm_up)
        count = int(min(MOST, max(FEWEST, GRAPH_US / about)))
        before = self.sweep if is_swept else None
        graph, answer = captured(call, count, before)
        found = _replayed(graph, _replays(count * about))
        swept = self._sweep_us(count) if is_swept else 0.0
        return Timing(sorted((us - swept) / count for us in found), count, answer)

    def started(self, call: Callable[[], Any]) -> Timing:
        """Return the time of a whole graph that holds one call: what starting it costs, too."""
        graph, answer = captured(call, 1)
        return Timing(sorted(_replayed(graph, REPLAYS)), 1, answer)

    def eager(self, call: Callable[[], Any], is_swept: bool) -> Timing:
        """Return the time of a call that cannot be captured, from events around it."""
        about, answer, found = self._about(call, WARM_UP), None, []
        for _ in range(_replays(about)):
            if is_swept:
                self.sweep()
            start, end = _events()
            start.record()
            answer = call()
            end.record()
            end.synchronize()
            found.append(1e3 * start.elapsed_time(end))
        return Timing(sorted(found), 1, answer)

    def _about(self, call: Callable[[], Any], warm_up: int) -> float:
        """Return about how many us a call takes, once everything is compiled."""
        for _ in range(warm_up):
            call()
        start, end = _events()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(max(1.0, 1e3 * start.elapsed_time(end)))

    def _sweep_us(self, count: int) -> float:
        if count not in self._sweeps:
            graph, _ = captured(lambda: None, count, self.sweep)
            self._sweeps[count] = statistics.median(_replayed(graph, REPLAYS))
        return self._sweeps[count]


def _replays(graph_us: float) -> int:
    return int(min(REPLAYS, max(FEWEST_REPLAYS, REPLAYED_US / graph_us)))


def _events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def captured(
    call: Callable[[], Any], count: int, before: Callable[[], Any] | None = None
) -> tuple[Any, Any]:
    """Return a graph of `count` calls, each after `before`, and what the last one returned.

    Raises: what the call raises; nothing is being captured afterwards.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is compiled, and what is made for a stream, is made before
            if before is not None:
                before()
            call()
    stream.synchronize()
    graph, answer = torch.cuda.CUDAGraph(), None
    gc.disable()  # what is freed in a capture belongs to nobody
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for _ in range(count):
                    if before is not None:
                        before()
                    answer = call()
            except BaseException:
                with suppress(RuntimeError):  # that it was broken off
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, answer


def _replayed(graph: Any, replays: int) -> list[float]:
    for _ in range(2):
        graph.replay()
    pairs = []
    for _ in range(replays):
        start, end = _events()
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairs]
