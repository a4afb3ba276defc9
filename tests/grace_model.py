"""GRACE's rules in numpy, as plainly as they can be said: the model of the stateful tests.

A row is a key and the edits that live on it. What an edit did to balls is a list of events, of
which those count whose cause is still there; a row's radius is what the last of its events says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

GAP = 1e-5  # between the two balls of a split


@dataclass
class Row:
    """One row of the codebook."""

    key: np.ndarray  # [D] float32
    made_by: int  # the edit whose value it was given
    edits: list[int] = field(default_factory=list)  # that remain, oldest first
    is_live: bool = True


@dataclass
class Model:
    """A codebook and the edits that remain."""

    epsilon: float
    margin: float
    rows: list[Row] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)  # by edit that remains
    # Edit, row, its radius from then on, the row it lasts with: -1 for as long as its edit does.
    events: list[tuple[int, int, float, int]] = field(default_factory=list)
    next_id: int = 0

    def radius(self, row: int) -> float:
        """Return a live row's radius."""
        return [
            radius
            for edit, on, radius, lasts_with in self.events
            if on == row
            and (self.rows[lasts_with].edits if lasts_with >= 0 else edit in self.labels)
        ][-1]

    def nearest(self, query: np.ndarray) -> tuple[int, float]:
        """Return the nearest live row and S; -1 and inf where there is none."""
        best, least = -1, math.inf
        for at, row in enumerate(self.rows):
            difference = query.astype(np.float64) - row.key.astype(np.float64)
            squared = float(np.add.accumulate(difference * difference)[-1])
            if row.is_live and squared < least:
                best, least = at, squared
        return best, least

    def hit(self, query: np.ndarray) -> int:
        """Return the row that answers a query, -1 for a miss."""
        row, squared = self.nearest(query)
        radius = self.radius(row) if row >= 0 else -1.0
        return row if radius >= 0 and squared <= radius * radius else -1

    def edit(self, query: np.ndarray, label: int) -> tuple[str, int]:
        """Make one edit; return what it came to and the row it lives on."""
        row, squared = self.nearest(query)
        distance, edit = math.sqrt(squared), self.next_id
        radius = self.radius(row) if row >= 0 else 0.0
        repeat = max(2 * GAP, self.margin * self.epsilon)
        self.next_id += 1
        if distance > self.epsilon + radius:
            outcome, row = "added", self._add(query, self.epsilon)
        elif label == self.labels[self.rows[row].edits[-1]]:
            outcome = "reused"
            if not (radius >= 0 and squared <= radius * radius):
                outcome = "expanded"
                self._event(row, covering(squared, self.margin), -1)
        elif distance <= repeat:
            outcome = "replaced"
            opened = max(radius, covering(max(repeat**2, squared), 0.0))
            if opened != radius:
                self._event(row, opened, -1)
        else:
            outcome, split = "split", row
            row = self._add(query, distance / 2)
            self._event(split, distance / 2 - GAP, row)
        self.rows[row].edits.append(edit)
        self.labels[edit] = label
        return outcome, row

    def _add(self, query: np.ndarray, radius: float) -> int:
        self.rows.append(Row(query, self.next_id - 1))
        self._event(len(self.rows) - 1, radius, len(self.rows) - 1)
        return len(self.rows) - 1

    def _event(self, row: int, radius: float, lasts_with: int) -> None:
        self.events.append((self.next_id - 1, row, float(np.float32(radius)), lasts_with))

    def undo(self, edit: int) -> None:
        """Take one edit back, and its row with the last edit on it."""
        row = next(row for row in self.rows if edit in row.edits)
        row.edits.remove(edit)
        del self.labels[edit]
        row.is_live &= bool(row.edits)

    def go_back(self, then: Model) -> None:
        """Be what an earlier version was; rows and ids given since are not given again."""
        since = [Row(row.key, row.made_by, [], False) for row in self.rows[len(then.rows) :]]
        self.rows = then.rows + since
        self.labels, self.events = then.labels, then.events


def covering(squared: float, margin: float) -> float:
    """Return the least float32 that covers a distance and its margin."""
    radius = np.float32(math.sqrt(squared) * (1 + margin))
    while float(radius) ** 2 < squared:
        radius = np.nextafter(radius, np.float32(math.inf))
    return float(radius)
