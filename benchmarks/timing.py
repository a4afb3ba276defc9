"""Timing that the installed package does not need: emptied caches, and a quick median.

Turns, rounds and ratios are those of `grace_fast.tools.timing`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from grace_fast.tools.timing import Ratio, Run, Turn, interleave, ratio, times_us

__all__ = [
    "Ratio",
    "Run",
    "Turn",
    "at_once",
    "flusher",
    "interleave",
    "median_us",
    "ratio",
    "shares",
]


def median_us(call: Callable[[], Any], calls: int) -> float:
    """Return the median time of a few calls after one, in microseconds."""
    call()
    return float(np.median(times_us(lambda _: call(), range(calls))))


def flusher() -> Callable[[], None]:
    """Return a function that pushes everything else out of the processor's caches."""
    junk = np.zeros(4 * max(last_level_cache_bytes(), 1 << 24) // 8, np.int64)

    def flush() -> None:
        np.add(junk, 1, out=junk)

    return flush


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of the first core, 32 MiB where nothing says."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes, default=32 << 20)


def shares(taken: Sequence[float], *percent: float) -> dict[str, float]:
    """Return percentiles of times by names such as `us_p99.9`."""
    return {f"us_p{share:g}": float(np.percentile(taken, share)) for share in percent}


@contextmanager
def at_once(*calls: Callable[[], None]) -> Iterator[None]:
    """Run calls in a thread each, beside a `with` block; its end waits for them."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
