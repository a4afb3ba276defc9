"""Map of the keys: the two directions in which they differ most, by principal components."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from grace_fast.tools.report.reading import Reading, Told, keys_of, spread
from grace_fast.tools.report.texts import inert, number

SIDE = 420.0  # of the map
SHOWN = 1500  # keys
MARKERS = 7  # answers with a marker of their own
MARGIN = 16.0
ROUNDING = 1e-12  # of the largest number: keys that differ by less are the same
TITLE = 80  # characters of a prompt, and of an answer


@dataclass(frozen=True)
class Group:
    """An answer that has a marker of its own, or the others (kind 0)."""

    kind: int
    name: str
    count: int


@dataclass(frozen=True)
class Point:
    """A point of the map."""

    x: float  # in its coordinates
    y: float
    kind: int  # of marker
    title: str


def keymap_of(reading: Reading) -> SimpleNamespace | None:
    """Return a map of the keys; None of fewer than three, or where all are the same."""
    rows = reading.live[spread(len(reading.live), SHOWN)]
    if len(rows) < 3:
        return None
    keys = keys_of(reading.snapshot, rows)
    plane, variance = project(keys)
    if float(plane.abs().max()) <= ROUNDING * float(keys.abs().max()):
        return None
    told = [reading.tell(row) for row in rows.tolist()]
    common = Counter(one.answer for one in told).most_common(MARKERS)
    kinds = {answer: at for at, (answer, count) in enumerate(common, start=1) if count > 1}
    groups = [
        Group(kinds[answer], inert(answer, TITLE), count)
        for answer, count in common
        if answer in kinds
    ]
    others = len(told) - sum(group.count for group in groups)
    if others:
        groups.append(Group(0, "other answers", others))
    places = _placed(plane).tolist()
    points = [
        Point(x, y, kinds.get(one.answer, 0), _title(one))
        for one, (x, y) in zip(told, places, strict=True)
    ]
    points.sort(key=lambda point: point.kind > 0)  # those without a colour below the others
    return SimpleNamespace(
        points=points,
        side=SIDE,
        kinds=sorted({point.kind for point in points}),
        groups=groups,
        shown=len(rows),
        keys=len(reading.live),
        variance=variance,  # the share of it that the plane shows
    )


def project(keys: Tensor) -> tuple[Tensor, float]:
    """Return keys [n, D] on their first two principal components [n, 2], and the share of variance.

    A component points where its largest entry does, so that the same keys always lie alike.
    """
    centred = keys - keys.mean(dim=0)
    tall = centred.shape[0] > centred.shape[1]
    values, vectors = torch.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    values, first = values.clamp(min=0), vectors[:, -2:].flip(1)
    plane = centred @ first if tall else first * values[-2:].flip(0).sqrt()
    if plane.shape[1] < 2:
        plane = torch.cat([plane, torch.zeros_like(plane)], dim=1)
    largest = plane.gather(0, plane.abs().argmax(dim=0, keepdim=True))
    total = float(values.sum())
    return plane * largest.sign(), float(values[-2:].sum()) / total if total > 0 else 0.0


def _placed(plane: Tensor) -> Tensor:
    """Return the plane in the map's coordinates: whole, centred, both axes in one unit."""
    low, high = plane.amin(dim=0), plane.amax(dim=0)
    scale = (SIDE - 2 * MARGIN) / float((high - low).max())
    placed = SIDE / 2 + (plane - (low + high) / 2) * scale
    placed[:, 1] = SIDE - placed[:, 1]
    return placed


def _title(one: Told) -> str:
    prompt = "" if one.prompt is None else f"{inert(one.prompt, TITLE)} → "
    return f"row {one.row}: {prompt}{inert(one.answer, TITLE)}; radius {number(one.radius)}"
