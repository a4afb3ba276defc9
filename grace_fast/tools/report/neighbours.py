"""Section on conflicts: how near keys are, and whose balls of different answers touch.

A product of matrices in float64 finds, for every row that is looked at, what may be nearest; what
is shown is summed again in the canonical order. Where there are too many products not every row is
looked at, but each that is, is compared with all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast import semantics
from grace_fast.tools.report.reading import Reading, Told, keys_of, spread

ROWS = 2048  # looked at, at most
PAIRS = 5e7  # distances at most
PRODUCTS = 2e10  # multiplications at most
FEWEST = 16
BLOCK = 8192  # keys whose distances are held at once
LABELLED = 20_000  # rows at most whose labels are all compared, and not those of the nearest alone
NEAREST = 32  # these
NEARLY = 0.1  # of epsilon: balls that are as close nearly touch
SHOWN = 30


@dataclass(frozen=True)
class Pair:
    """Two rows that call for different answers."""

    one: Told
    other: Told
    distance: float
    gap: float  # between their balls; negative where they overlap
    is_split: bool  # one was made by splitting the other


class _Facing(NamedTuple):
    """A row, and the one of another answer whose ball is nearest to its own."""

    row: int
    other: int
    distance: float  # between their keys
    gap: float


def neighbours_of(reading: Reading) -> SimpleNamespace | None:
    """Return what a page says of keys that lie close; None of fewer than two balls."""
    rows = reading.live[reading.radii >= 0]
    if len(rows) < 2:
        return None
    products = len(rows) * reading.snapshot.key_dim
    affordable = int(min(ROWS, PAIRS / len(rows), PRODUCTS / products))
    asked = spread(len(rows), max(FEWEST, affordable))
    labels = _labels(reading, rows) if len(rows) <= LABELLED else None
    places, facing = _search(reading, rows, asked, labels)
    nearest = _distances(reading, rows[asked], rows[places.numpy()])
    at = int(nearest.argmin())
    pairs = _pairs(reading, rows, asked, facing)
    gaps = [pair.gap for pair in pairs]
    touching, close = semantics.SPLIT_GAP * 2, NEARLY * reading.rules.epsilon
    return SimpleNamespace(
        rows=len(rows),  # that have balls
        looked_at=len(asked),
        # Only these nearest balls had their labels compared; None: all.
        labels_of=NEAREST if labels is None else None,
        # Rows whose ball overlaps one of another answer or touches it, and others that nearly do.
        overlapping=sum(gap <= touching for gap in gaps),
        nearly=sum(touching < gap <= close for gap in gaps),
        pairs=_shown(reading, [pair for pair in pairs if pair.gap <= close]),
        median=float(np.median(nearest)),  # distance to the nearest other key
        within_epsilon=int((nearest <= reading.rules.epsilon).sum()),
        # The two nearest keys, and their distance.
        closest=(int(rows[asked[at]]), int(rows[places[at]]), float(nearest[at])),
    )


def _labels(reading: Reading, rows: NDArray[np.int64]) -> Tensor:
    """Return a number for the answer of each row, [n] int64: equal where the answers are."""
    known: dict[Hashable, int] = {}
    asked = (reading.asks_for(reading.snapshot.row(row).label) for row in rows.tolist())
    return torch.tensor(
        [known.setdefault(answer, len(known)) for answer in asked], dtype=torch.int64, device="cpu"
    )


def _search(
    reading: Reading, rows: NDArray[np.int64], asked: NDArray[np.int64], labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the nearest key and the nearest balls of rows, but for their own; labels: as `_labels`.

    By row that was looked at, positions among the rows with balls: [S] the nearest other key, and
    [S, k] those whose balls are nearest to its own, nearest first; -1 for none. With labels only
    balls of another answer face each other. Balls that are not even nearly touched may be left out.
    """
    radii = reading.snapshot.radii[torch.from_numpy(rows)].double()
    places = torch.from_numpy(asked)
    queries = keys_of(reading.snapshot, rows[asked])
    squares = queries.square().sum(dim=1, keepdim=True)
    close = radii[places] + NEARLY * reading.rules.epsilon  # to a ball, from the key
    nowhere = torch.full((len(asked), 1), -1, dtype=torch.int64, device="cpu")
    nearest = facing = _Least(torch.full_like(nowhere, math.inf, dtype=torch.float64), nowhere)
    count = NEAREST if labels is None else 1
    for first in range(0, len(rows), BLOCK):
        keys = keys_of(reading.snapshot, rows[first : first + BLOCK])
        apart = torch.addmm(keys.square().sum(dim=1), queries, keys.T, alpha=-2)
        apart.add_(squares).clamp_(min=0).sqrt_()
        here = torch.arange(first, first + len(keys), device="cpu")
        own = (places >= first) & (places < first + len(keys))
        apart[own, places[own] - first] = math.inf
        nearest = nearest.or_less(apart, first, 1)
        apart -= radii[here]
        if labels is not None:
            apart.masked_fill_(labels[places][:, None] == labels[here], math.inf)
        facing = facing.or_less(apart, first, count, close)
    return nearest.places[:, 0], facing.places


@dataclass(frozen=True)
class _Least:
    """The least values that were found for each row, ascending, and where."""

    values: Tensor  # [S, k] float64; inf where there are fewer
    places: Tensor  # [S, k]; -1 there

    def or_less(
        self, values: Tensor, first: int, count: int, within: Tensor | float = math.inf
    ) -> _Least:
        """Return the least `count` of these and of values [S, n], which begin at place `first`.

        within: [S], beyond which no value counts.
        """
        if not bool((values.amin(dim=1) <= within).any()):
            return self
        some, at = values.topk(min(count, values.shape[1]), dim=1, largest=False)
        both = torch.cat([self.values, some], dim=1)
        where = torch.cat([self.places, (at + first).masked_fill(some.isinf(), -1)], dim=1)
        least, picked = both.topk(min(count, both.shape[1]), dim=1, largest=False)
        return _Least(least, where.gather(1, picked))


def _distances(
    reading: Reading, ones: NDArray[np.int64], others: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the distances of pairs of rows, [n]."""
    pair = keys_of(reading.snapshot, ones), keys_of(reading.snapshot, others)
    return semantics.pair_squared_distances(*pair).sqrt().numpy()


def _pairs(
    reading: Reading, rows: NDArray[np.int64], asked: NDArray[np.int64], facing: Tensor
) -> list[_Facing]:
    """Return what faces each row that was looked at, if anything does; facing: as of `_search`."""
    found = []
    for one, places in zip(rows[asked].tolist(), facing.tolist(), strict=True):
        own = reading.asks_for(reading.snapshot.row(one).label)
        for other in rows[[place for place in places if place >= 0]].tolist():
            if reading.asks_for(reading.snapshot.row(other).label) != own:
                found.append((one, other))
                break
    if not found:
        return []
    ones, others = np.array(found).T
    distances = _distances(reading, ones, others)
    radii = reading.snapshot.radii.double().numpy()
    gaps = distances - radii[ones] - radii[others]
    columns = (ones.tolist(), others.tolist(), distances.tolist(), gaps.tolist())
    return [_Facing(*pair) for pair in zip(*columns, strict=True)]


def _shown(reading: Reading, pairs: list[_Facing]) -> tuple[Pair, ...]:
    """Return the closest pairs, each once."""
    once = {(min(pair.row, pair.other), max(pair.row, pair.other)): pair for pair in pairs}
    closest = sorted(once.items(), key=lambda item: item[1].gap)[:SHOWN]
    shown = []
    for (older, newer), pair in closest:
        life = reading.history.rows.get(newer)
        is_split = life is not None and life.neighbour == older
        told = reading.tell(older), reading.tell(newer)
        shown.append(Pair(*told, pair.distance, pair.gap, is_split))
    return tuple(shown)
