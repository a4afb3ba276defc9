"""How wide the balls are, and how often they are hit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grace_fast.tools.report.charts import Bar, Chart, Scale, span
from grace_fast.tools.report.reading import Reading, Told
from grace_fast.tools.report.texts import compact

BINS = 32
MOST_HIT = 50  # rows in the table
NEVER_HIT = 20


@dataclass(frozen=True)
class Radii:
    """The radii of the balls that can be hit; a row with a negative one is dead."""

    chart: Chart | None  # of those that are not epsilon; None where there are none
    balls: int
    dead: int
    smallest: float
    median: float
    largest: float
    wider: int  # than epsilon
    narrower: int
    off_chart: int  # so much wider than the others that the chart ends before them


@dataclass(frozen=True)
class Hits:
    """How often rows were hit, as the directory has it."""

    chart: Chart | None  # None where nothing was counted
    total: int
    rows: int
    hit: int
    most: tuple[Told, ...]
    never: tuple[Told, ...]  # the oldest ones


def radii_of(reading: Reading) -> Radii:
    """Return what a page says of the radii."""
    # A codebook keeps radii in float32: so an epsilon beyond that is infinite.
    epsilon = float(torch.tensor(reading.rules.epsilon, dtype=torch.float32, device="cpu"))
    balls = reading.radii[reading.radii >= 0].astype(np.float64)
    if not len(balls):
        return Radii(None, 0, len(reading.radii), math.nan, math.nan, math.nan, 0, 0, 0)
    changed = balls[balls != epsilon]
    chart = _chart_of(changed, epsilon if math.isfinite(epsilon) else 0) if len(changed) else None
    return Radii(
        chart,
        len(balls),
        len(reading.radii) - len(balls),
        float(balls.min()),
        float(np.median(balls)),
        float(balls.max()),
        int((balls > epsilon).sum()),
        int((balls < epsilon).sum()),
        0 if chart is None else int((changed > chart.x.high).sum()),
    )


def _chart_of(radii: NDArray[np.float64], epsilon: float) -> Chart:
    """Return a histogram of radii that ends where few are left, and holds epsilon."""
    end = min(float(radii.max()), 3 * max(float(np.quantile(radii, 0.99)), epsilon))
    x = Scale.linear(0, 1.05 * max(end, epsilon), "radius")
    counts, edges = np.histogram(radii, BINS, (0, x.high))
    names = [span(low, high) for low, high in _pairs(edges)]
    return _histogram(counts, edges, x, "balls", names)


def hits_of(reading: Reading) -> Hits:
    """Return what a page says of the hits."""
    hits, live = reading.hits, reading.live
    order = np.argsort(-hits, kind="stable")  # the oldest first of equals
    most = live[order[:MOST_HIT]][hits[order[:MOST_HIT]] > 0]
    never = live[hits == 0][:NEVER_HIT]
    return Hits(
        _by_doublings(hits) if hits.any() else None,
        int(hits.sum()),
        len(live),
        int((hits > 0).sum()),
        tuple(reading.tell(row) for row in most.tolist()),
        tuple(reading.tell(row) for row in never.tolist()),
    )


def _by_doublings(hits: NDArray[np.int64]) -> Chart:
    """Return how many rows were hit never, once, 2 to 3 times, 4 to 7 times, ..."""
    doublings = np.frexp(hits.astype(np.float64))[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, ...
    counts = np.bincount(doublings)
    ranges = [f"{1 << at}-{(2 << at) - 1}" for at in range(1, len(counts))]
    names = ["0", "1", *ranges][: len(counts)]
    edges = np.arange(len(counts) + 1).astype(np.float64)
    x = Scale.of_names([_short(name) for name in names], "hits of a row")
    return _histogram(counts, edges, x, "rows", [f"{name} hits" for name in names])


def _short(name: str) -> str:
    """Return the name of a range for an axis: only where it begins, where it would be long."""
    low = int(name.split("-")[0])
    return name if low < 64 else f"{compact(low)}+"


def _pairs(edges: NDArray[np.float64]) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _histogram(
    counts: NDArray[np.int64], edges: NDArray[np.float64], x: Scale, of: str, names: list[str]
) -> Chart:
    y = Scale.linear(0, float(counts.max()) * 1.05, of, whole=True)
    bars = [
        Bar(low, high, count, f"{name}: {count:,} {of}")
        for (low, high), count, name in zip(_pairs(edges), counts.tolist(), names, strict=True)
        if count
    ]
    return Chart(x, y, bars=tuple(bars))
