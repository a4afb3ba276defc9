"""What a codebook is and what it answers, in numpy and C: nothing here is the package's.

`Model` holds keys, liveness, radii and values by row. A copy of one is an old version. Its answers
are the law's: S in float64, one coordinate after the other, the lowest row among equal S, a hit
where S is within the square of that row's own radius.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES = 8  # law.c, KEYS


@dataclass(frozen=True)
class Answers:
    """What the law says of queries [B]."""

    nearest: Array  # int64, the nearest live row, -1 for none
    apart: Array  # float64, S of that row, inf for none
    hit: Array  # bool

    @property
    def row(self) -> Array:
        """[B] int64, the row that hit, -1 where missed."""
        return np.where(self.hit, self.nearest, -1)

    @property
    def squared(self) -> Array:
        """[B] float64, S of the row that hit, inf where missed."""
        return np.where(self.hit, self.apart, np.inf)

    def within(self, distance: float) -> tuple[Array, Array]:
        """Return the nearest rows and S of those that are not beyond a distance."""
        near = self.apart <= distance * distance
        return np.where(near, self.nearest, -1), np.where(near, self.apart, np.inf)

    def some(self, picked: Any) -> Answers:
        """Return the answers to some of the queries."""
        return Answers(self.nearest[picked], self.apart[picked], self.hit[picked])


class Model:
    """A codebook by row, at one version."""

    def __init__(self, width: int, value_width: int) -> None:
        self.width = width
        self.rows = 0
        self.columns = np.zeros((width, 64), np.float32)  # a key in each column
        self.live = np.zeros(64, np.uint8)
        self.radius = np.zeros(64, np.float32)
        self.values = np.zeros((64, value_width), np.float32)

    def copy(self) -> Model:
        """Return the version as it is now."""
        twin = Model(self.width, self.values.shape[1])
        twin.rows = self.rows
        for name in ("columns", "live", "radius", "values"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def append(self, keys: Array, values: Array, radii: Array) -> None:
        """Add rows at the end."""
        last = self.rows + len(keys)
        while last > len(self.live):
            self.columns = np.concatenate([self.columns, np.zeros_like(self.columns)], axis=1)
            for name in ("live", "radius", "values"):
                held = getattr(self, name)
                setattr(self, name, np.concatenate([held, np.zeros_like(held)]))
        here = slice(self.rows, last)
        self.columns[:, here], self.values[here] = keys.T, values
        self.radius[here], self.live[here] = radii, 1
        self.rows = last

    def key(self, row: int) -> Array:
        """Return a row's key, [D] float32."""
        return self.columns[:, row].copy()

    def living(self) -> Array:
        """Return the numbers of the live rows."""
        return np.flatnonzero(self.live[: self.rows])

    def go_back(self, then: Model) -> None:
        """Let every row hold what it held in an earlier version; later ones go."""
        here = slice(0, then.rows)
        self.columns[:, here] = then.columns[:, here]
        for name in ("live", "radius", "values"):
            getattr(self, name)[here] = getattr(then, name)[here]
        self.live[then.rows :] = 0

    def ask(self, queries: Array) -> Answers:
        """Return what the law says of queries [B, D] float64."""
        queries = np.ascontiguousarray(queries, np.float64)
        finite = np.isfinite(queries).all(axis=1)
        nearest = np.full(len(queries), -1, np.int64)
        apart = np.full(len(queries), np.inf)
        if finite.any() and self.rows:
            nearest[finite], apart[finite] = self._nearest(queries[finite])
        radius = np.where(nearest >= 0, self.radius[nearest], -1).astype(np.float64)
        return Answers(nearest, apart, (radius >= 0) & (apart <= radius * radius))

    def _nearest(self, queries: Array) -> tuple[Array, Array]:
        compiled = _compiled()
        if compiled is None:
            return self._nearest_in_numpy(queries)
        queries = np.ascontiguousarray(queries)
        row, squared = np.empty(len(queries), np.int64), np.empty(len(queries))
        columns, live = self.columns, self.live
        compiled(
            *(queries.ctypes.data, len(queries), columns.ctypes.data, columns.shape[1]),
            *(self.width, self.rows, live.ctypes.data, row.ctypes.data, squared.ctypes.data),
        )
        return row, squared

    def _nearest_in_numpy(self, queries: Array) -> tuple[Array, Array]:
        total = np.zeros((len(queries), self.rows))
        for j in range(self.width):
            difference = queries[:, j, None] - self.columns[j, : self.rows].astype(np.float64)
            total += difference * difference
        total[:, self.live[: self.rows] == 0] = np.inf
        row = total.argmin(axis=1)
        squared = total[np.arange(len(queries)), row]
        return np.where(np.isinf(squared), -1, row), squared


@cache
def _compiled() -> Any:
    """Return the law compiled, None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "law.so"
        command = [compiler, "-O3", "-ffp-contract=off", "-shared", "-fPIC"]
        source = Path(__file__).with_name("law.c")
        made = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True)
        if made.returncode:
            return None
        function = ctypes.CDLL(str(library)).nearest_keys
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = None
    function.argtypes = [pointer, number, pointer, *[number] * 3, *[pointer] * 3]
    return function
