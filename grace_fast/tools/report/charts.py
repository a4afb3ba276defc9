"""Charts as numbers: what lies where, for the templates to draw.

Coordinates are those of the SVG, in a frame that a phone shows about as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grace_fast.tools.report.texts import compact

TICKS = 5
NAMES = 7  # on an axis of names
TINY = 1e-300  # no axis is shorter


@dataclass(frozen=True)
class Tick:
    """A value on an axis."""

    value: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis: from where to where, how, and what it is called."""

    low: float
    high: float
    name: str
    ticks: tuple[Tick, ...]
    is_log: bool = False

    @staticmethod
    def linear(low: float, high: float, name: str, unit: str = "", whole: bool = False) -> Scale:
        """Return an axis of even steps; whole: of counts."""
        high = high if high - low > TINY else low + 1
        rough = (high - low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough)) * power
        step = max(step, 1) if whole else step
        first = math.ceil(low / step - 1e-9)
        values = [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]
        return Scale(low, high, name, tuple(Tick(v, f"{_plain(v)}{unit}") for v in values))

    @staticmethod
    def log(low: float, high: float, name: str) -> Scale:
        """Return an axis of even factors, low > 0."""
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if math.log10(high) - math.log10(low) < 2.5 else (1,)
        every = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [value for value in every if low <= value <= high]
        ticks = inside[:: max(1, math.ceil(len(inside) / NAMES))]
        return Scale(low, high, name, tuple(Tick(v, _plain(v)) for v in ticks), is_log=True)

    @staticmethod
    def of_names(names: Sequence[str], name: str) -> Scale:
        """Return an axis of names, each in the middle of a step of 1."""
        every = max(1, math.ceil(len(names) / NAMES))
        ticks = tuple(Tick(at + 0.5, names[at]) for at in range(0, len(names), every))
        return Scale(0, len(names), name, ticks)

    def part(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Bar:
    """A bar from one value to another, as high as its count."""

    low: float
    high: float
    count: float
    title: str


@dataclass(frozen=True)
class Line:
    """A line of points (x, y)."""

    name: str
    style: str  # a class of the style sheet
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Two axes and what lies between them."""

    x: Scale
    y: Scale
    bars: tuple[Bar, ...] = ()
    lines: tuple[Line, ...] = ()

    width, height = 420.0, 250.0
    left, right, top, bottom = 46.0, 410.0, 20.0, 210.0  # of the plot: around it ticks and names

    def across(self, value: float) -> float:
        """Return the x of a value."""
        return self.left + (self.right - self.left) * self.x.part(value)

    def up(self, value: float) -> float:
        """Return the y of a value."""
        return self.bottom - (self.bottom - self.top) * self.y.part(value)


def _plain(value: float) -> str:
    return compact(value) if 1000 <= value < 1e15 else f"{value:.3g}"
