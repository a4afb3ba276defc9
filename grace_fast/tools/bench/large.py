"""Benchmark of a codebook larger than memory: built, opened, timed. `grace-fast bench --rows 10M`.

Synthetic keys go from a stream to a directory, which is opened and asked. Every decision is held
against the law first, by a scan of all keys that shares nothing with the back ends:

    S~ = |q|^2 + |k|^2 - 2 q.k          in float32, after centring; |S~ - S| <= slack
    a key in its ball, or nearer than one in its ball, has S <= widest^2: S~ <= widest^2 + slack

and what is left is summed in the canonical order. Real activations are in `benchmarks/`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from grace_fast import semantics
from grace_fast.tools.bench.quick import DATA, EPSILON_RATIO, WIDTH, drawn
from grace_fast.tools.terminal import say
from grace_fast.tools.timing import cpu_model, times_us

DTYPE = torch.float16
BLOCK_ROWS = 1 << 14
QUERIES = 256
HITS = 32
DISK_BYTES = 2 * WIDTH + 2 + 4 + 2 * 80  # a row: key, value, radius, codes and those of the build
Chunks = Iterable[tuple[int, Tensor]]  # the first row, and keys [n, D] from there on


class Scan:
    """The nearest row of each query among the keys seen so far, the lowest on a tie."""

    def __init__(self, queries: Tensor) -> None:
        self._queries = queries
        self.squared = torch.full((len(queries),), math.inf, dtype=torch.float64)  # S
        self.row = torch.full((len(queries),), -1)

    def offer(self, keys: Tensor, first: int, candidates: Tensor) -> None:
        """Take in candidates [B, n] bool of keys [n, D] whose first row is `first`."""
        for query in candidates.any(dim=1).nonzero()[:, 0].tolist():
            some = candidates[query].nonzero()[:, 0]
            asked = self._queries[query : query + 1]
            place, squared = semantics.nearest(asked, keys[some], torch.ones_like(some).bool())
            if squared < self.squared[query]:  # rows ascend: a later tie does not take over
                self.squared[query], self.row[query] = squared[0], first + some[place[0]]

    def hits(self, radius: Tensor) -> Tensor:
        """Return the row that hits, [B], -1 where none does; radius [B], that of all keys."""
        return self.row.masked_fill(~semantics.in_ball(self.squared, radius), -1)


def scan(queries: Tensor, chunks: Chunks, widest: Tensor) -> Scan:
    """Return the nearest rows that can matter to queries [B, D]; widest [B] >= every radius."""
    found, moved, most = Scan(queries), queries.float(), widest.double().square()[:, None]
    centre = squares = torch.empty(0)
    for first, keys in chunks:
        wide = keys.float()
        if not len(centre):
            centre = wide.mean(dim=0)
            moved = moved - centre
            squares = moved.double().square().sum(dim=1)[:, None]
        wide -= centre
        key_squares = wide.double().square().sum(dim=1)
        longest = key_squares.max()
        scale = squares + longest + 2 * (squares * longest).sqrt()
        # The product errs by (D + 2) roundings of 2|q||k| <= scale / 2, the moves and additions by
        # a few of the whole.
        slack = (queries.shape[1] + 16) * 2.0**-24 * scale
        limit = (most + slack - squares).float().nextafter(torch.tensor(math.inf))
        rough = torch.addmm(key_squares.float(), moved, wide.T, alpha=-2)
        found.offer(keys, first, rough <= limit)
    return found


def chunks_of(book: gf.Codebook) -> Iterator[tuple[int, Tensor]]:
    """Yield a codebook's keys in the order of rows."""
    snapshot = book.snapshot()
    for first in range(0, snapshot.rows, BLOCK_ROWS):
        yield first, snapshot.keys_between(first, min(first + BLOCK_ROWS, snapshot.rows))


def run(rows: int, folder: Path | None = None, as_json: bool = False) -> dict[str, Any]:
    """Return the figures, and print them unless they are wanted as JSON.

    folder: where the codebook is for the time of the run; by default where temporary files are.
    `passed` is False where a decision differed from the law; no speed is given then.

    Raises: OSError where there is no room for it.
    """
    needed, free = rows * DISK_BYTES, shutil.disk_usage(folder or tempfile.gettempdir()).free
    if needed > free:
        raise OSError(
            f"{rows:,} keys need {needed / 1e9:.1f} GB, there are {free / 1e9:.1f}; "
            "choose another --folder or fewer --rows"
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix="grace-fast-") as temporary:
        figures = _measure(rows, Path(temporary), False if as_json else None)
    if not as_json:
        for line in _lines_of(figures):
            say(line)
    return figures


def _measure(rows: int, folder: Path, progress: bool | None) -> dict[str, Any]:
    queries, epsilon = _questions()
    start = time.perf_counter()
    gf.Codebook.build(
        folder, lambda first: _blocks(rows, epsilon, first), rows=rows, progress=progress
    )
    built_s = time.perf_counter() - start
    start = time.perf_counter()
    book = gf.Codebook.open(folder)
    opened_s = time.perf_counter() - start
    hits = min(HITS, rows)
    own = torch.linspace(0, rows - 1, hits).long()
    queries[:hits] = book.snapshot().keys_at(own).float() + 0.4 * epsilon * queries[:hits]
    find = gf.prepare(book)
    singles = [query[None] for query in queries]
    answers = torch.tensor([int(find(query).row[0]) for query in singles])
    radius = torch.full((len(queries),), epsilon)
    wrong = int((scan(queries, chunks_of(book), radius).hits(radius) != answers).sum())
    taken = np.concatenate([times_us(find, singles) for _ in range(5)]) if not wrong else None
    return {
        "data": DATA,
        "cpu": cpu_model(),
        "version": gf.__version__,
        "torch": torch.__version__,
        "rows": rows,
        "width": WIDTH,
        "gb_of_keys": rows * WIDTH * DTYPE.itemsize / 1e9,
        "built_s": built_s,
        "opened_s": opened_s,
        "checked": len(queries),
        "wrong": wrong,
        "us_p50": None if taken is None else float(np.percentile(taken, 50)),
        "us_p95": None if taken is None else float(np.percentile(taken, 95)),
        "passed": not wrong,
    }


def _questions() -> tuple[Tensor, float]:
    """Return queries [Q, D], unit vectors first, which become near hits, and the radius of all."""
    generator = torch.Generator().manual_seed(1)
    asked = drawn(QUERIES, generator)
    others = drawn(4096, generator)
    epsilon = EPSILON_RATIO * float(torch.cdist(asked, others).amin(dim=1).median())
    asked[:HITS] = torch.nn.functional.normalize(asked[:HITS], dim=1)
    return asked, epsilon


def _blocks(rows: int, epsilon: float, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for number in range(first // BLOCK_ROWS, -(-rows // BLOCK_ROWS)):
        begin = number * BLOCK_ROWS
        count = min(BLOCK_ROWS, rows - begin)
        keys = drawn(count, torch.Generator().manual_seed(2 + number)).to(DTYPE)
        values, radii = torch.zeros(count, 1, dtype=DTYPE), torch.full((count,), epsilon)
        rest = slice(max(0, first - begin), None)
        yield keys[rest], values[rest], radii[rest]


def _lines_of(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"{DATA}; D = {WIDTH}, fp16, one query, one thread",
        figures["cpu"],
        "",
        f"{figures['rows']:,} keys, {figures['gb_of_keys']:.1f} GB: built in "
        f"{figures['built_s']:.0f} s, opened in {figures['opened_s']:.1f} s",
        f"{figures['wrong']} wrong of {figures['checked']} decisions",
    ]
    if figures["us_p50"] is not None:
        lines.append(f"p50 {figures['us_p50']:.1f} us, p95 {figures['us_p95']:.1f} us")
    return lines
