"""Codebooks and questions to measure on; what is not real data says so in its name.

A problem is a codebook, queries to time and `edges`: queries that lie exactly on the radius of a
key, as GRACE makes them whenever an edit expands a ball. Their return must hit; float32 shortcuts
lose some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.activations import activations
from benchmarks.oracle import pair_squared_distances
from grace_fast.codebook.codebook import Codebook

Source = Literal[
    "minilm",
    "minilm-last",
    "isotropic",
    "power-1",
    "power-2",
    "clusters",
    "massive",
    "minilm-massive",
]
Radii = Literal["equal", "lognormal", "giant"]
REAL = ("minilm", "minilm-last")
EDGES = 64
_CHUNK = 1 << 16  # rows made at a time


@dataclass(frozen=True)
class Spec:
    """What to make; the words of a row of the results."""

    source: Source
    rows: int  # N
    width: int = 1536  # D; that of the model for real data
    epsilon_ratio: float = 0.1  # epsilon as a fraction of the median nearest-neighbour distance
    radii: Radii = "equal"
    hit_rate: float = 0.05
    dtype: torch.dtype = torch.float32
    queries: int = 256
    value_dim: int = 384
    seed: int = 0


@dataclass
class Problem:
    """A filled codebook and questions to it."""

    spec: Spec
    book: Codebook
    queries: Tensor  # [Q, D], hits and misses mixed
    edges: Tensor  # [E, D], each exactly on a radius
    epsilon: float
    label: str  # names what is synthetic about it

    @property
    def keys(self) -> Tensor:
        """[N, D], where the codebook holds them."""
        return self.book.keys

    @property
    def radii(self) -> Tensor:
        """[N] float32."""
        return self.book.radii


def make(spec: Spec) -> Problem:
    """Return the problem of a spec; the same spec gives the same problem."""
    generator = torch.Generator().manual_seed(spec.seed)
    base, unseen, label = _base(spec, generator)
    spacing = median_spacing(base)
    epsilon = spec.epsilon_ratio * spacing
    book = Codebook(base.shape[1], spec.value_dim, spec.dtype)
    for start in range(0, spec.rows, _CHUNK):
        count = min(_CHUNK, spec.rows - start)
        fresh = base[start : start + count]
        if len(fresh) < count:
            extra = jitter(base, count - len(fresh), spacing / 2, generator)
            fresh = torch.cat([fresh, extra])
        values = torch.randn(count, spec.value_dim, generator=generator).to(spec.dtype)
        book.append(fresh.to(spec.dtype), values, _radii(spec, epsilon, count, generator))
    if spec.rows > len(base):
        label += f", synthetic beyond {len(base)} keys (jitter at half the spacing)"
    if spec.radii == "giant":
        with book.writing() as draft:
            draft.set_radius(spec.rows // 2, 20 * epsilon)
    edges = _expand(book, epsilon, generator)
    queries = _questions(spec, book, unseen, epsilon, generator)
    return Problem(spec, book, queries, edges, epsilon, label)


def median_spacing(keys: Tensor, sample: int = 256) -> float:
    """Return the median distance of a key to its nearest other key."""
    picked = torch.linspace(0, len(keys) - 1, min(sample, len(keys))).long()
    wide = keys.float()
    distance = torch.cdist(wide[picked], wide)
    distance[torch.arange(len(picked)), picked] = torch.inf
    return float(distance.amin(dim=1).median())


def jitter(base: Tensor, count: int, length: float, generator: torch.Generator) -> Tensor:
    """Return count rows at `length` of rows of base, half along differences of rows, half noise."""
    at, one, other = torch.randint(len(base), (3, count), generator=generator)
    along = _unit(base[one] - base[other])
    noise = _unit(torch.randn(count, base.shape[1], generator=generator))
    return base[at] + length * _unit(along + noise)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _base(spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor, str]:
    """Return keys (as many as there are, or rows at most), unseen rows, and a label."""
    if spec.source in (*REAL, "minilm-massive"):
        keys, unseen = activations("last" if spec.source == "minilm-last" else "all")
        mixed = torch.randperm(len(keys), generator=generator)[: spec.rows]
        keys = keys[mixed]
        label = f"real activations ({spec.source})"
        if spec.source == "minilm-massive":
            keys, unseen = _massive(keys), _massive(unseen)
            label = "real activations, 4 dimensions x1000 and shifted (synthetic)"
        return keys.contiguous(), unseen[torch.randperm(len(unseen), generator=generator)], label
    made = SYNTHETIC[spec.source](spec.rows + spec.queries, spec.width, generator)
    return made[: spec.rows], made[spec.rows :], f"synthetic, {spec.source}"


def _normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator)


def _power(exponent: float) -> Callable[[int, int, torch.Generator], Tensor]:
    def make_rows(rows: int, width: int, generator: torch.Generator) -> Tensor:
        variance = torch.arange(1, width + 1).float() ** -exponent
        return _normal(rows, width, generator) * variance.sqrt()

    return make_rows


def _clusters(rows: int, width: int, generator: torch.Generator) -> Tensor:
    centres = _normal(100, width, generator)
    at = torch.randint(100, (rows,), generator=generator)
    return centres[at] + 0.1 * _normal(rows, width, generator)


def _massive(rows: Tensor) -> Tensor:
    heavy = rows.clone()
    heavy[:, :: max(1, rows.shape[1] // 4)] *= 1000
    return heavy + rows.abs().mean() * 10


SYNTHETIC: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "isotropic": _normal,
    "power-1": _power(1.0),
    "power-2": _power(2.0),
    "clusters": _clusters,
    "massive": lambda rows, width, generator: _massive(_normal(rows, width, generator)),
}


def _radii(spec: Spec, epsilon: float, count: int, generator: torch.Generator) -> Tensor:
    radii = torch.full((count,), epsilon)
    if spec.radii == "lognormal":
        radii *= torch.randn(count, generator=generator).mul(0.5).exp()
    return radii


def _expand(book: Codebook, epsilon: float, generator: torch.Generator) -> Tensor:
    """Set some radii to exactly the distance of a query, and return those queries [E, D]."""
    rows = torch.randperm(len(book), generator=generator)[: min(EDGES, max(1, len(book) // 8))]
    keys = book.keys[rows].float()
    away = _unit(torch.randn(keys.shape, generator=generator))
    reach = epsilon * (0.5 + 0.4 * torch.rand(len(rows), 1, generator=generator))
    edges = (keys + reach * away).to(book.dtype)
    squared = pair_squared_distances(edges, book.keys[rows])
    with book.writing() as draft:
        for row, square in zip(rows.tolist(), squared, strict=True):
            draft.set_radius(row, _up(square))
    return edges


def _up(squared: Tensor) -> float:
    """Return the least float32 whose square is not below S."""
    radius = squared.sqrt().float()
    while radius.double().square() < squared:
        radius = torch.nextafter(radius, torch.tensor(torch.inf))
    return float(radius)


def _questions(
    spec: Spec, book: Codebook, unseen: Tensor, epsilon: float, generator: torch.Generator
) -> Tensor:
    """Return unseen rows with near hits among them, [Q, D]; the near hits are synthetic."""
    hits = round(spec.hit_rate * spec.queries)
    repeats = -(-spec.queries // len(unseen))
    questions = unseen.repeat(repeats, 1)[: spec.queries].clone()
    rows = torch.randint(len(book), (hits,), generator=generator)
    near = book.keys[rows].float()
    reach = 0.4 * torch.rand(hits, 1, generator=generator)
    near += epsilon * reach * _unit(torch.randn(near.shape, generator=generator))
    questions[:hits] = near
    mixed = torch.randperm(spec.queries, generator=generator)
    return questions[mixed].to(spec.dtype).contiguous()
