"""Sections on the radii of balls, and on their hits."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray

from grace_fast.tools.report.charts import Bar, Chart, Scale
from grace_fast.tools.report.reading import Reading
from grace_fast.tools.report.texts import compact, number

BINS = 32
MOST_HIT = 50  # rows in the table
NEVER_HIT = 20


def radii_of(reading: Reading) -> SimpleNamespace:
    """Return what a page says of the radii; a row with a negative one is dead."""
    # A codebook keeps radii in float32: so an epsilon beyond that is infinite.
    epsilon = float(torch.tensor(reading.rules.epsilon, dtype=torch.float32, device="cpu"))
    balls = reading.radii[reading.radii >= 0].astype(np.float64)
    changed = balls[balls != epsilon]
    chart = _chart_of(changed, epsilon if math.isfinite(epsilon) else 0) if len(changed) else None
    ends = (balls.min(), np.median(balls), balls.max()) if len(balls) else [math.nan] * 3
    smallest, median, largest = map(float, ends)
    return SimpleNamespace(
        chart=chart,  # of those that are not epsilon; None where there are none
        balls=len(balls),
        dead=len(reading.radii) - len(balls),
        smallest=smallest,
        median=median,
        largest=largest,
        wider=int((balls > epsilon).sum()),  # than epsilon
        narrower=int((balls < epsilon).sum()),
        # So much wider than the others that the chart ends before them.
        off_chart=0 if chart is None else int((changed > chart.x.high).sum()),
    )


def _chart_of(radii: NDArray[np.float64], epsilon: float) -> Chart:
    """Return a histogram of radii that ends where few are left, and holds epsilon."""
    end = min(float(radii.max()), 3 * max(float(np.quantile(radii, 0.99)), epsilon))
    x = Scale.linear(0, 1.05 * max(end, epsilon), "radius")
    counts, edges = np.histogram(radii, BINS, (0, x.high))
    names = [f"{number(low)} to {number(high)}" for low, high in pairwise(edges.tolist())]
    return _histogram(counts, edges, x, "balls", names)


def hits_of(reading: Reading) -> SimpleNamespace:
    """Return what a page says of how often rows were hit, as the directory has it."""
    hits, live = reading.hits, reading.live
    order = np.argsort(-hits, kind="stable")[:MOST_HIT]  # the oldest first of equals
    return SimpleNamespace(
        chart=_by_doublings(hits) if hits.any() else None,
        total=int(hits.sum()),
        rows=len(live),
        hit=int((hits > 0).sum()),
        most=[reading.tell(row) for row in live[order][hits[order] > 0].tolist()],
        never=[reading.tell(row) for row in live[hits == 0][:NEVER_HIT].tolist()],  # the oldest
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


def _histogram(
    counts: NDArray[np.int64], edges: NDArray[np.float64], x: Scale, of: str, names: list[str]
) -> Chart:
    y = Scale.linear(0, float(counts.max()) * 1.05, of, whole=True)
    bins = pairwise(edges.tolist())
    bars = [
        Bar(low, high, count, f"{name}: {count:,} {of}")
        for (low, high), count, name in zip(bins, counts.tolist(), names, strict=True)
        if count
    ]
    return Chart(x, y, bars=tuple(bars))
