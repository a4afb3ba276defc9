"""Keys, radii and questions where shortcuts go wrong: ties, roundings, ends of the types."""

from __future__ import annotations

import numpy as np
import torch

from life.law import Array, Model

KINDS = (
    *("normal", "clusters", "lattice", "one slot", "own scales", "far away", "far and close"),
    *("tiny", "subnormal", "huge", "wide and small"),
)
WIDEST = {torch.float32: 3.4e38, torch.bfloat16: 3.38e38, torch.float16: 65504.0}


class Drawing:
    """What the keys of one codebook look like."""

    def __init__(self, kind: str, width: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
        self.kind, self.width, self.dtype, self._rng = kind, width, dtype, rng
        self.giants = bool(rng.random() < 0.4)  # else no ball is much wider than the others
        # A leaf reaches as far as its widest ball, so what is forgotten shows where all are small.
        self.small = not self.giants and bool(rng.random() < 0.4)
        self._base = rng.standard_normal(width)
        self._centres = rng.standard_normal((16, width))
        self._slot = int(rng.integers(width))
        some = self.keys(48).astype(np.float64)
        apart = np.sqrt(((some[:, None] - some[None]) ** 2).sum(axis=2))
        apart[apart == 0] = np.inf
        nearest = apart.min(axis=1)
        nearest = nearest[np.isfinite(nearest)]
        self.spacing = min(1e38, float(np.median(nearest))) if len(nearest) else 1.0

    def keys(self, count: int) -> Array:
        """Return keys [count, D] float32, each exact in the element type."""
        rng, shape = self._rng, (count, self.width)
        normal = rng.standard_normal(shape)
        near = self._centres[rng.integers(16, size=count)]
        drawn = {
            "normal": lambda: normal + 2 * self._base,
            "clusters": lambda: near + normal * 10.0 ** rng.integers(-6, 0, (count, 1)),
            "lattice": lambda: rng.integers(-2, 3, shape) * 0.5,
            "one slot": lambda: np.where(
                np.arange(self.width) == self._slot, rng.integers(-200, 200, (count, 1)) / 7, 0.25
            ),
            "own scales": lambda: normal * 10.0 ** rng.integers(-5, 4, (count, 1)),
            "far away": lambda: 3e4 * self._base + rng.integers(-40, 41, shape) / 16,
            "far and close": lambda: near * 1e3 + rng.integers(-3, 4, shape) * 2.0**-12,
            "tiny": lambda: normal * 1e-20,
            "subnormal": lambda: rng.integers(-9, 10, shape) * 1.4e-45,
            "huge": lambda: normal.clip(-3, 3) * 1e38,
            "wide and small": lambda: self._base * 1e18 + normal * 1e14,
        }[self.kind]()
        return exact(drawn, self.dtype)

    def radii(self, count: int) -> Array:
        """Return radii [count] float32: of the spacing, none, negative, signed zero, huge."""
        rng = self._rng
        scale = 0.02 if self.small else rng.choice([0.02, 0.3, 1.0])
        radii = self.spacing * np.exp(rng.standard_normal(count)) * scale
        odd = rng.random(count)
        radii = np.where(odd < 0.06, 0.0, radii)
        radii = np.where((odd >= 0.06) & (odd < 0.09), -0.0, radii)
        radii = np.where((odd >= 0.09) & (odd < 0.13), -radii, radii)
        if self.giants:
            radii = np.where((odd >= 0.13) & (odd < 0.14), 30 * radii, radii)
            radii = np.where((odd >= 0.14) & (odd < 0.143), 3e38, radii)
        return radii.clip(-3e38, 3e38).astype(np.float32)

    def on_spheres(self, keys: Array, radii: Array) -> Array:
        """Return points [n, D] about as far from keys as radii say."""
        rng = self._rng
        away = rng.standard_normal(keys.shape)
        along = rng.random(len(keys)) < 0.4  # along one axis distances are often exact
        axes = np.eye(self.width)[rng.integers(self.width, size=len(keys))]
        axes *= rng.choice([-1.0, 1.0], (len(keys), 1))
        away = np.where(along[:, None], axes, away / np.linalg.norm(away, axis=1, keepdims=True))
        fine = 1 + rng.choice([0, 0, 1, -1, -3e3, 3e5], len(keys)) * 10.0 ** rng.integers(-9, -5)
        return keys + (np.abs(radii.astype(np.float64)) * fine)[:, None] * away

    def questions(self, count: int, model: Model, places: list[Array]) -> Array:
        """Return points [count, D] float64 to ask at, some of them where something changed."""
        rng = self._rng
        asked = self.keys(count).astype(np.float64)
        kind = rng.random(count)
        if places:
            known = np.concatenate(places)
            take = kind < 0.4
            asked[take] = known[rng.integers(len(known), size=int(take.sum()))]
            kind = np.where(take, 1.0, kind)
        if model.rows:
            rows = rng.integers(model.rows, size=count)
            keys = model.columns[:, rows].T.astype(np.float64)
            other = model.columns[:, rng.integers(model.rows, size=count)].T
            radii = np.where(model.radius[rows] == 0, np.float32(self.spacing), model.radius[rows])
            ulps = rng.integers(-2, 3, keys.shape) * np.spacing(np.abs(keys.astype(np.float32)))
            spheres = self.on_spheres(keys, radii)
            asked = np.where((kind < 0.5)[:, None], keys, asked)
            asked = np.where(((kind >= 0.5) & (kind < 0.6))[:, None], keys + ulps, asked)
            between = (keys + other) / 2
            asked = np.where(((kind >= 0.6) & (kind < 0.7))[:, None], between, asked)
            asked = np.where(((kind >= 0.7) & (kind < 0.9))[:, None], spheres, asked)
        if rng.random() < 0.1:
            spoilt = int(rng.integers(count)), int(rng.integers(self.width))
            asked[spoilt] = rng.choice([np.nan, np.inf, -np.inf])
        return asked

    def cast(self, points: Array, dtype: torch.dtype) -> torch.Tensor:
        """Return points as queries of an element type; only what was not finite is not."""
        finite = np.isfinite(points)
        top = WIDEST[dtype]
        safe = np.where(finite, np.where(finite, points, 0).clip(-top, top), points)
        with np.errstate(over="ignore"):
            return torch.from_numpy(safe.astype(np.float32)).to(dtype)


def exact(points: Array, dtype: torch.dtype) -> Array:
    """Return points as an element type holds them, float32."""
    top = WIDEST[dtype]
    cast = torch.from_numpy(np.clip(points, -top, top).astype(np.float32)).to(dtype)
    return np.asarray(cast.float())
