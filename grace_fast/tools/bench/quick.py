"""Benchmark of look-ups in about a minute: synthetic keys, checked before they are timed.

What `grace-fast bench --quick` runs; torch and numpy are enough, faiss is a peer where it is
installed. Everyone has one thread and takes turns, as `timing` says. Real activations and more
peers are in the source tree (`benchmarks/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import grace_fast as gf
from grace_fast.semantics import covering_radius
from grace_fast.tools.terminal import say
from grace_fast.tools.timing import Turn, cpu_model, interleave, one_thread, ratio

DATA = "synthetic keys (normal, variance 1/j); real activations differ"
WIDTH = 768
SIZES = (1_000, 10_000, 100_000)
QUERIES = 64
EPSILON_RATIO = 0.1  # of the median nearest-neighbour distance


@one_thread()
def run(
    as_json: bool = False, sizes: Sequence[int] = SIZES, budget_s: float = 1.0
) -> dict[str, Any]:
    """Return the figures, and print them as a table unless they are wanted as JSON.

    `passed` is False where a decision differed from the law; no speed is given then.
    """
    rows: list[dict[str, Any]] = []
    cpu = cpu_model()
    if not as_json:
        for line in (f"{DATA}; D = {WIDTH}, one query, one thread", cpu, ""):
            say(line)
        say(f"{'N':>9}  {'':22}{'p50':>12}{'p95':>12}  {'wrong':>8}  ratio (least to most)")
    for size in sizes:
        for row in _measure(size, budget_s):
            rows.append(row)
            if not as_json:
                say(_line(row))
    return {
        "data": DATA,
        "cpu": cpu,
        "threads": 1,
        "version": gf.__version__,
        "torch": torch.__version__,
        "width": WIDTH,
        "rows": rows,
        "passed": not any(row["ours"] and row["wrong"] for row in rows),
    }


def _measure(size: int, budget_s: float) -> list[dict[str, Any]]:
    """Check every contestant on the same questions, then time those that may be timed."""
    book, queries = _problem(size)
    law = gf.find(queries, book, backend="reference")
    contestants = _contestants(book)
    batches = [query[None] for query in queries]
    rows: list[dict[str, Any]] = []
    for name, (call, decides) in contestants.items():
        ours = name.startswith("grace_fast")
        wrong = 0
        for at, batch in enumerate(batches):
            hit, place = decides(call(batch))
            same = hit == bool(law.hit[at]) and (not hit or place == int(law.row[at]))
            wrong += not same
        counts = {"wrong": wrong, "checked": len(batches)}
        rows.append({"rows": size, "contestant": name, "ours": ours, **counts})
    if any(row["ours"] and row["wrong"] for row in rows):
        return rows
    turns = {name: Turn(call, batches) for name, (call, _) in contestants.items()}
    runs = interleave(turns, budget_s)
    fastest = min(
        (name for name in runs if name.startswith("grace_fast")), key=lambda name: runs[name].p50
    )
    for row in rows:
        taken = runs[row["contestant"]]
        row |= {f"us_p{share}": taken.percentile(share) for share in (5, 50, 95)}
        if not row["ours"]:
            behind = ratio(taken, runs[fastest])
            row |= {"ratio": behind.median, "least": behind.least, "most": behind.most}
    return rows


def _problem(size: int) -> tuple[gf.Codebook, Tensor]:
    """Return a codebook, and queries: unseen, near a key, and exactly on an expanded radius."""
    generator = torch.Generator().manual_seed(size)
    made = drawn(size + QUERIES, generator)
    keys, queries = made[:size], made[size:]
    apart = torch.cdist(keys[:64], keys)
    apart[torch.arange(min(64, size)), torch.arange(min(64, size))] = torch.inf
    epsilon = EPSILON_RATIO * float(apart.amin(dim=1).median())
    book = gf.Codebook(WIDTH, 1)
    book.append(keys, torch.zeros(size, 1), torch.full((size,), epsilon))
    away = torch.nn.functional.normalize(torch.randn(QUERIES, WIDTH, generator=generator), dim=1)
    near = slice(0, QUERIES // 8)
    edge = slice(QUERIES // 8, QUERIES // 4)
    queries[near] = keys[near] + 0.4 * epsilon * away[near]
    queries[edge] = keys[edge] + 0.8 * epsilon * away[edge]
    found = gf.nearest(queries[edge], book, backend="reference")
    with book.writing() as draft:
        for row, squared in zip(found.row.tolist(), found.squared_distance.tolist(), strict=True):
            draft.set_radius(row, covering_radius(squared, 0.0))
    return book, queries[torch.randperm(QUERIES, generator=generator)].contiguous()


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """Return synthetic keys [count, D]."""
    deviation = torch.arange(1, WIDTH + 1).float().rsqrt()
    return torch.randn(count, WIDTH, generator=generator) * deviation


def _contestants(
    book: gf.Codebook,
) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], tuple[bool, int]]]]:
    """Return for each contestant its call and how a decision is read from the answer."""
    keys, radii = book.keys, book.radii
    limits = radii * radii

    def of_match(match: gf.Match) -> tuple[bool, int]:
        return bool(match.hit[0]), int(match.row[0])

    def of_search(answer: Any) -> tuple[bool, int]:
        row = int(answer[1][0, 0])
        return float(answer[0][0, 0]) <= float(limits[row]), row

    def of_pair(answer: tuple[Tensor, Tensor]) -> tuple[bool, int]:
        return bool(answer[0][0]), int(answer[1][0])

    @torch.inference_mode()
    def reference_rule(batch: Tensor) -> tuple[Tensor, Tensor]:
        distance, row = torch.cdist(keys, batch).min(dim=0)
        return distance <= radii[row], row

    found: dict[str, Any] = {}
    found["grace_fast prepared"] = (gf.prepare(book), of_match)
    found["grace_fast find"] = (lambda batch: gf.find(batch, book), of_match)
    found["torch cdist rule"] = (reference_rule, of_pair)
    if find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatL2(WIDTH)
        index.add(keys.numpy())
        found["faiss flat, search"] = (lambda batch: index.search(batch.numpy(), 1), of_search)
    return found


def _line(row: dict[str, Any]) -> str:
    wrong = f"{row['wrong']} / {row['checked']}"
    if "us_p50" not in row:
        return f"{row['rows']:9,}  {row['contestant']:22}{'-':>12}{'-':>12}  {wrong:>8}"
    times = f"{row['us_p50']:9.1f} us{row['us_p95']:9.1f} us"
    spread = (
        f"{row['ratio']:.3g}x ({row['least']:.3g} to {row['most']:.3g})" if "ratio" in row else ""
    )
    return f"{row['rows']:9,}  {row['contestant']:22}{times}  {wrong:>8}  {spread}".rstrip()
