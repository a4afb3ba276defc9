"""FAISS's indexes beside the certified look-up: `python -m benchmarks.large [--million]`.

Speed of an approximate index says nothing without its wrong decisions, and neither without what it
took to build. Each index answers the same queries as ours, hits and misses in equal parts, and
queries exactly on a radius; every answer is compared with the law before it is timed, in turns with
ours. Where ours, or an answer that is marked certified, is wrong, the command fails.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import grace_fast as gf
from benchmarks import runner, workloads
from benchmarks.oracle import Law
from benchmarks.timing import Turn, interleave
from benchmarks.workloads import Problem, Spec
from grace_fast.index import maintained
from grace_fast.lookup.backends import cpu, faiss
from grace_fast.lookup.faiss import FaissIndex, drop_index

LARGEST_GRAPH = 100_000  # keys above which HNSW takes too long to build
QUERIES = 2_000
FEW_QUERIES = 500  # at N = 1e6, where the law takes as long as everything else
EVERY_KEY = 8  # there, the share of the queries for an index that reads every key: one in so many


@dataclass(frozen=True)
class Figure:
    """One way to answer, on one problem."""

    work: str
    rows: int  # N
    epsilon_ratio: float
    way: str
    build_s: float
    megabytes: float  # beside the codebook's keys
    asked: int
    hits: int  # of the law
    wrong: int
    lost: int  # of the wrong ones: hits given as misses
    certified: int
    wrong_certified: int
    us_p50: float
    us_p95: float
    behind: float  # its median over that of ours, prepared


def indexes(rows: int) -> list[FaissIndex]:
    """Return what is compared with N keys: every kind; what shares an index stands together."""
    cells = _cells(rows)
    listed = [FaissIndex("Flat"), FaissIndex("FlatL2Panorama8"), FaissIndex("PCA64,Flat")]
    listed += [FaissIndex(f"IVF{cells},Flat", nprobe=nprobe) for nprobe in (1, 8, 64)]
    # IVF with Panorama keeps 1 024 places for each cell: 6 MB a cell at D = 1536.
    codes = f"IVF{cells},PQ192x4"
    listed += [FaissIndex(codes, nprobe=8), FaissIndex(codes, nprobe=64, candidates=64)]
    if rows <= LARGEST_GRAPH:
        listed += [FaissIndex("HNSW32", ef_search=ef) for ef in (16, 128)]
    return listed


def _cells(rows: int) -> int:
    """Return the power of two below sqrt(N): training takes as long as that is large."""
    return int(2 ** (math.isqrt(rows).bit_length() - 1))


def measure(spec: Spec, budget_s: float) -> Iterator[Figure]:
    """Yield the figures of one problem, ours first."""
    problem = workloads.make(spec)
    asked = torch.cat([problem.queries, problem.edges])
    law = Law(problem.keys, problem.book.live, fast=True).decide(asked, problem.radii)
    start = time.perf_counter()
    prepared = gf.prepare(problem.book)
    build_s = time.perf_counter() - start
    known = maintained.of(problem.book.snapshot())
    words = {
        "work": f"{problem.label}, N = {spec.rows:,}, D = {problem.book.key_dim}, "
        f"epsilon = {spec.epsilon_ratio:g} spacing",
        "rows": spec.rows,
        "epsilon_ratio": spec.epsilon_ratio,
    }

    def compared(match: gf.Match, every: int = 1) -> dict[str, int]:
        hit, row = law.hit[::every], law.row[::every]
        wrong = (match.hit != hit) | (match.row != row)
        return {
            "asked": len(hit),
            "hits": int(hit.sum()),
            "wrong": int(wrong.sum()),
            "lost": int((hit & ~match.hit).sum()),
            "certified": int(match.certified.sum()),
            "wrong_certified": int((wrong & match.certified).sum()),
        }

    ours = compared(prepared(asked))
    megabytes = known.nbytes / 1e6 if known is not None else 0.0
    batches = list(problem.queries.split(1))
    first, built = True, None
    for index in indexes(spec.rows):
        if built is not None and built.description != index.description:
            drop_index(problem.book, built)
            gc.collect()
        start = time.perf_counter()
        try:
            kept = faiss.train(problem.book, index)
        except ValueError as refusal:
            print(f"left out: {refusal}", file=sys.stderr)
            continue
        if built is None or built.description != index.description:
            took, built = time.perf_counter() - start, index
        every = EVERY_KEY if kept.bounds.is_exhaustive and spec.rows > LARGEST_GRAPH else 1
        found = compared(_in_parts(problem, asked[::every], index), every)

        def call(batch: Tensor, index: FaissIndex = index) -> gf.Match:
            return gf.find(batch, problem.book, index)

        runs = interleave({"ours": Turn(prepared, batches), "index": Turn(call, batches)}, budget_s)
        p50 = runs["ours"].p50
        if first:
            times = {"us_p50": p50, "us_p95": runs["ours"].percentile(95), "behind": 1.0}
            size = {"build_s": build_s, "megabytes": megabytes}
            yield Figure(**words, way=f"grace_fast, {_way(problem.book)}", **size, **ours, **times)
            first = False
        run = runs["index"]
        times = {"us_p50": run.p50, "us_p95": run.percentile(95), "behind": run.p50 / p50}
        size = {"build_s": took, "megabytes": kept.nbytes / 1e6}
        del kept
        yield Figure(**words, way=f"faiss {_named(index)}", **size, **found, **times)


def _way(book: gf.Codebook) -> str:
    """Say how the keys of a codebook on the host are gone through by now."""
    view = cpu.view_of(book.snapshot())
    if view is None or not view.keys_pay:
        return "dense"
    ordered = any(part.leaf_boxes is not None for part in view.holds[0].segments)
    return "certified, in order" if ordered else "certified, linear"


def _named(index: FaissIndex) -> str:
    return str(index) if index.candidates == 8 else f"{index} candidates={index.candidates}"


def _in_parts(problem: Problem, asked: Tensor, index: FaissIndex) -> gf.Match:
    parts = [gf.find(some, problem.book, index) for some in asked.split(256)]
    names = ("hit", "row", "squared_distance")
    hit, row, squared = (torch.cat([getattr(part, name) for part in parts]) for name in names)
    certified = torch.cat([part.certified for part in parts])
    return gf.Match(None, fields=(hit, row, squared), certified=certified)


HEADINGS = (
    "",
    "p50",
    "p95",
    "to ours",
    "wrong decisions",
    "lost hits",
    "certified",
    "wrong of these",
    "build",
    "memory",
)


def markdown(found: runner.Found) -> str:
    """Return the figures as a page: one table for each problem."""
    figures = [Figure(**row) for row in found["rows"]]
    page = (
        f"# FAISS beside the certified look-up\n\n{runner.where(found)}.\n\n"
        "One query at a time through `gf.find`, every candidate rechecked; times are taken in "
        "turns with ours. Decisions are compared with the law (float64, canonical order); half the "
        "queries are near hits (synthetic), and some lie exactly on a radius. `certified` is the "
        "share of answers marked proved; the memory is that beside the keys. What is searched in "
        f"several ways was built once. Beyond {LARGEST_GRAPH:,} keys an index that reads all of "
        f"them decides one query in {EVERY_KEY}, and HNSW is left out.\n"
    )
    for work in dict.fromkeys(figure.work for figure in figures):
        some = (_cells_of(each) for each in figures if each.work == work)
        page += f"\n## {work}\n\n{runner.table(HEADINGS, some)}\n"
    return page


def _cells_of(each: Figure) -> list[str]:
    return [
        each.way,
        _time(each.us_p50),
        _time(each.us_p95),
        f"{each.behind:,.0f}x" if each.behind > 1 else "1",
        f"{each.wrong} / {each.asked} ({each.wrong / each.asked:.2%})",
        f"{each.lost} / {each.hits}",
        f"{each.certified / each.asked:.1%}",
        str(each.wrong_certified),
        f"{each.build_s:,.1f} s",
        f"{each.megabytes:,.0f} MB",
    ]


def _time(us: float) -> str:
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * size:
            return f"{us / size:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def specs(million: bool) -> list[Spec]:
    """Return the grid: real activations, tiled up with jitter beyond the keys there are."""
    rows = (1_000_000,) if million else (10_000, LARGEST_GRAPH)
    queries = FEW_QUERIES if million else QUERIES
    base = Spec("minilm", 0, hit_rate=0.5, queries=queries, value_dim=16)
    return [
        replace(base, rows=count, epsilon_ratio=ratio) for ratio in (0.1, 0.3) for count in rows
    ]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--million", action="store_true", help="N = 1e6; 16 GB of memory")
    parser.add_argument("--threads", type=int, default=1, help="of everyone, ours and FAISS")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of calls an index")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    rows: list[dict[str, Any]] = []
    for spec in specs(given.million):
        for figure in measure(spec, given.budget):
            print(f"N = {figure.rows:,}: " + " | ".join(_cells_of(figure)), flush=True)
            rows.append(asdict(figure))
            yield {"rows": rows}


def verdict(found: runner.Found) -> int:
    """Return 1 where a proof did not hold, or ours was wrong."""
    failed = [
        row
        for row in found["rows"]
        if row["wrong_certified"] or (row["wrong"] and not row["way"].startswith("faiss"))
    ]
    for row in failed:
        count = row["wrong_certified"] or row["wrong"]
        print(f"WRONG: {row['way']}: {count} decisions, {row['work']}")
    return int(bool(failed))


main = runner.Program(
    "large",
    __doc__,
    options,
    _measure,
    markdown,
    verdict,
    runner.RESULTS,
    more=lambda given: "-million" * given.million,
).main


if __name__ == "__main__":
    sys.exit(main())
