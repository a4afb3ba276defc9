"""The exactness gate: millions of decisions over a grid, each compared with the law (R64).

`python -m benchmarks.gate --decisions 10000000`. Half of the questions are put where shortcuts go
wrong: a relative 1e-8 .. 1e-4 beside a radius, exactly on it, and half-way between two keys. `find`
is compared on every question, `nearest` (row and S, bit for bit) on every eighth batch. Small
codebooks, where the law is cheap to ask, get most of the questions; none gets less than 2 in 1000.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import grace_fast as gf
from benchmarks import runner
from benchmarks.oracle import Law, pair_squared_distances
from benchmarks.peers import settle
from benchmarks.workloads import SYNTHETIC, median_spacing
from grace_fast.lookup.backends import cpu
from grace_fast.semantics import covering_radius

Change = Callable[[gf.Codebook, float, torch.Generator], None]


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    name: str
    width: int  # D
    rows: int  # N
    source: str = "power-1"
    epsilon_ratio: float = 0.3
    dtype: torch.dtype = torch.float32
    change: Sequence[Change] = ()  # what is done to the codebook before it is asked
    grows: bool = False  # asked after each of many appends
    batch: int = 512
    share: float = 1.0  # of the decisions, relative to the other cases
    fast: bool = True  # the oracle filters in float32 first


@dataclass
class Count:
    """What was found for one case."""

    name: str
    width: int  # D
    rows: int  # N, before the case appends more
    decisions: int = 0
    hits: int = 0
    close: int = 0  # within 1e-3 of a radius or of a tie
    wrong: int = 0
    nearest: int = 0  # `nearest` compared too
    nearest_wrong: int = 0
    examples: list[str] = field(default_factory=list)


def _duplicates(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    """Append keys that are there already, with other radii."""
    rows = torch.randint(len(book), (max(1, len(book) // 4),), generator=generator)
    radii = epsilon * (0.2 + 1.6 * torch.rand(len(rows), generator=generator))
    book.append(book.keys[rows].clone(), book.values[rows].clone(), radii)


def _overlaps(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    """Append keys close beside others: overlapping balls, small ones in the shadow of large."""
    rows = torch.randint(len(book), (max(1, len(book) // 4),), generator=generator)
    away = torch.randn(len(rows), book.key_dim, generator=generator)
    away *= epsilon * torch.rand(len(rows), 1, generator=generator) / away.norm(dim=1, keepdim=True)
    radii = epsilon * torch.randn(len(rows), generator=generator).exp()
    keys = (book.keys[rows].float() + away).to(book.dtype)
    book.append(keys, book.values[rows].clone(), radii)


def _dead(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    """Kill some keys (a negative radius still wins), remove some (a removed row never does)."""
    rows = torch.randperm(len(book), generator=generator)
    some = max(1, len(book) // 8)
    with book.writing() as draft:
        for row in rows[:some].tolist():
            draft.set_radius(row, -1e-5)
        for row in rows[some : 2 * some].tolist():
            draft.remove(row)
        for row in rows[2 * some : 3 * some].tolist():
            draft.set_radius(row, 0.0)


def _giant(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    row = int(torch.randint(len(book), (), generator=generator))
    with book.writing() as draft:
        draft.set_radius(row, 20 * epsilon)


def _lognormal(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    radii = epsilon * torch.randn(book.snapshot().rows, generator=generator).exp()
    with book.writing() as draft:
        for row, radius in enumerate(radii.tolist()):
            draft.set_radius(row, radius)


def _foreign(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    """Append keys of another domain than those a fit was made on."""
    settle(book)
    count = max(1, len(book) // 4)
    keys = SYNTHETIC["isotropic"](count, book.key_dim, generator) * 3 + 5
    radii = torch.full((count,), epsilon)
    book.append(keys.to(book.dtype), torch.zeros(count, book.value_dim).to(book.dtype), radii)


def _moved(book: gf.Codebook, epsilon: float, generator: torch.Generator) -> None:
    """Move some keys half-way to a query, as `moving_average` does."""
    settle(book)
    with book.writing() as draft:
        for row in torch.randperm(len(book), generator=generator)[:32].tolist():
            away = torch.randn(book.key_dim, generator=generator)
            key = book.keys[row].float() + epsilon / 2 * away / away.norm()
            draft.set_key(row, key.to(book.dtype))


GRID = (
    Case("width 384", 384, 2_000, share=4),
    Case("width 768, j^-2 spectrum", 768, 2_000, "power-2", share=3),
    Case("width 1536", 1536, 4_000, share=2),
    Case("width 1536, clusters", 1536, 2_000, "clusters", 0.6, share=2),
    Case("width 4096", 4096, 600, share=0.5, batch=256),
    Case("width 11008", 11008, 300, share=0.15, batch=128),
    Case("width 18944", 18944, 200, share=0.1, batch=64),
    Case("width 1", 1, 60, "isotropic", share=2),
    Case("width 33, one key", 33, 1, share=1),
    Case("25 keys", 384, 25, share=3),
    Case("26 keys", 384, 26, share=3),
    Case("isotropic, wide balls", 384, 2_000, "isotropic", 1.0, share=2),
    Case("duplicates and ties", 384, 1_500, change=(_duplicates,), share=4),
    Case("overlapping and shadowed balls", 384, 1_500, change=(_overlaps,), share=4),
    Case("dead, removed and zero", 384, 1_500, change=(_dead,), share=3),
    Case("one giant radius", 384, 5_000, change=(_giant,), share=2),
    Case("lognormal radii", 384, 3_000, change=(_lognormal,), share=3),
    Case("all at once", 384, 4_000, change=(_overlaps, _duplicates, _dead, _giant), share=3),
    Case("massive dimensions", 768, 1_500, "massive", 0.3, fast=False, share=1),
    Case("bf16", 768, 2_000, dtype=torch.bfloat16, change=(_overlaps,), share=3),
    Case("fp16", 768, 2_000, dtype=torch.float16, change=(_duplicates,), share=1),
    Case("a fit from another domain", 384, 2_000, change=(_foreign,), share=2),
    Case("moved keys", 384, 3_000, change=(_moved,), share=2),
    Case("a growing codebook", 384, 6_000, grows=True, share=2),
    Case("N = 1e5", 384, 100_000, change=(_overlaps, _giant), share=0.6, batch=1024),
)
LEAST = 0.002  # of the decisions go to every case
PLACES = 8  # questions of `_questions` come in blocks of this many kinds


def run(decisions: int, seed: int, grid: Sequence[Case] = GRID) -> list[Count]:
    """Compare about `decisions` decisions with the law; return the counts of each case."""
    from tqdm import tqdm

    counts = [Count(case.name, case.width, case.rows) for case in grid]
    total_share = sum(case.share for case in grid)
    with tqdm(
        total=decisions, unit="decision", unit_scale=True, smoothing=0.05, disable=None
    ) as bar:
        for number, (case, count) in enumerate(zip(grid, counts, strict=True)):
            bar.set_postfix_str(case.name)
            generator = torch.Generator().manual_seed(seed * len(grid) + number)
            wanted = max(case.batch, round(decisions * max(case.share / total_share, LEAST)))
            while count.decisions < wanted:
                # A new codebook now and then, but not for every few questions of a large one.
                here = min(wanted - count.decisions, max(50_000, wanted // 4))
                for book, law, questions in _asked(case, here, generator):
                    _compare(case, book, law, questions, count)
                    bar.update(len(questions))
    return counts


def _asked(
    case: Case, wanted: int, generator: torch.Generator
) -> Iterator[tuple[gf.Codebook, Law, Tensor]]:
    """Yield a codebook, the law for its keys, and batches of questions to it."""
    made = SYNTHETIC[case.source](case.rows + case.batch, case.width, generator)
    keys, unseen = made[: case.rows].to(case.dtype), made[case.rows :]
    spacing = median_spacing(keys) if case.rows > 1 else 1.0
    epsilon = case.epsilon_ratio * spacing
    book = gf.Codebook(case.width, 2, case.dtype)
    batches = -(-wanted // case.batch)
    per_append = -(-case.rows // batches) if case.grows else case.rows
    for number in range(batches):
        start = number * per_append
        if start < case.rows:
            some = keys[start : start + per_append]
            radii = torch.full((len(some),), epsilon)
            book.append(some, torch.zeros(len(some), 2, dtype=case.dtype), radii)
        if number == 0:
            for change in case.change:
                change(book, epsilon, generator)
        if number == 0 or start < case.rows:  # only radii change from here on
            law = Law(book.snapshot().keys, book.snapshot().live, case.fast)
        if number == 1 and not case.grows:
            settle(book)  # the first batch was asked before anything was computed ahead
        count = min(case.batch, wanted - number * case.batch)
        yield book, law, _questions(book, unseen, epsilon, count, generator)


def _questions(
    book: gf.Codebook, unseen: Tensor, epsilon: float, count: int, generator: torch.Generator
) -> Tensor:
    """Return questions [count, D] of every kind; some radii are set to the distance of one."""
    snapshot = book.snapshot()
    rows = torch.randint(snapshot.rows, (count,), generator=generator)
    keys = snapshot.keys[rows].float()
    radii = snapshot.radii[rows].clamp(min=0)
    radii = torch.where(radii > 0, radii, epsilon)
    away = torch.randn(keys.shape, generator=generator)
    away /= away.norm(dim=1, keepdim=True)
    kind = torch.arange(count) % PLACES
    fine = 10 ** (-8 + 4 * torch.rand(count, generator=generator))
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    reach = radii * (1 + sign * fine)  # kinds 0 to 2: beside a radius
    reach = torch.where(kind == 3, 0.8 * radii, reach)  # well inside
    reach = torch.where(kind == 4, 0.0, reach)  # a key itself
    questions = keys + reach[:, None] * away
    other = snapshot.keys[torch.randint(snapshot.rows, (count,), generator=generator)].float()
    between = (keys + other) / 2  # half-way: a tie up to roundings, inside no ball or two
    questions = torch.where((kind == 5)[:, None], between, questions)
    far = unseen[torch.randint(len(unseen), (count,), generator=generator)]
    questions = torch.where((kind == 6)[:, None], far, questions)
    questions = questions.to(book.dtype)
    exact = (kind == 7).nonzero()[:8, 0]  # exactly on a radius, as an expanded ball has it
    squared = pair_squared_distances(questions[exact], snapshot.keys[rows[exact]])
    with book.writing() as draft:
        for row, square in zip(rows[exact].tolist(), squared.tolist(), strict=True):
            draft.set_radius(row, covering_radius(square, 0.0))
    return questions


def _compare(case: Case, book: gf.Codebook, asked: Law, questions: Tensor, count: Count) -> None:
    law = asked.decide(questions, book.radii)
    match = gf.find(questions, book)
    bad = (match.hit != law.hit) | (match.row != law.row)
    for at in bad.nonzero()[:4, 0].tolist():
        if len(count.examples) < 4:
            count.examples.append(
                f"query {at}: ({bool(match.hit[at])}, row {int(match.row[at])}), by the law "
                f"({bool(law.hit[at])}, row {int(law.row[at])}), version {book.version}"
            )
    count.wrong += int(bad.sum())
    if count.decisions // case.batch % 8 == 0:
        found = gf.nearest(questions, book)
        differs = (found.row != law.nearest) | (found.squared_distance != law.squared)
        count.nearest += len(questions)
        count.nearest_wrong += int(differs.sum())
    count.decisions += len(questions)
    count.hits += int(law.hit.sum())
    count.close += int(law.close.sum())


def summary(counts: Sequence[Count]) -> dict[str, Any]:
    """Return the counts of all cases and their sums, as they go into a result file."""
    listed = [asdict(count) for count in counts]
    added = ("decisions", "hits", "close", "wrong", "nearest", "nearest_wrong")
    total = {name: sum(count[name] for count in listed) for name in added}
    total["at_1e5_keys"] = sum(count.decisions for count in counts if count.rows >= 100_000)
    return {"total": total, "counts": listed}


def markdown(found: dict[str, Any]) -> str:
    """Return a summary as a page with one table."""
    total = found["total"]
    page = (
        f"# Exactness gate\n\n{runner.where(found)}; {found['kernels']} kernels, "
        f"{found['seconds']:,} s.\n\n"
        f"**{total['wrong']} wrong of {total['decisions']:,} decisions** and "
        f"{total['nearest_wrong']} wrong of {total['nearest']:,} nearest rows and distances, "
        "each compared with the law (float64, in the canonical order). "
        f"{total['close']:,} decisions were within 1e-3 of a radius or a tie, "
        f"{total['at_1e5_keys']:,} over at least 1e5 keys.\n\n"
    )
    heads = ("case", "D", "N", "decisions", "hits", "close", "wrong", "nearest", "wrong")
    rows = []
    columns = ("decisions", "hits", "close", "wrong", "nearest", "nearest_wrong")
    for count in (*found["counts"], {"name": "all", "width": "", "rows": "", **total}):
        size = [f"{count[name]:,}" if count[name] else "" for name in ("width", "rows")]
        rows.append([count["name"], *size, *(f"{count[name]:,}" for name in columns)])
    lines = [page + runner.table(heads, rows)]
    for count in found["counts"]:
        lines += [f"- {count['name']}: {example}" for example in count["examples"]]
    return "\n".join(lines) + "\n"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--decisions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    parser.add_argument("--kernels", default="", help="portable, avx2 or avx512vnni")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    if given.kernels and not cpu._cpu.use_instruction_set(given.kernels):
        raise SystemExit(f"there are no {given.kernels} kernels for this processor")
    start = time.perf_counter()
    counts = run(given.decisions, given.seed, [case for case in GRID if given.only in case.name])
    yield {
        "kernels": cpu._cpu.instruction_set() if cpu._cpu else "torch",
        "seconds": round(time.perf_counter() - start),
        **summary(counts),
    }


main = runner.Program(
    "gate",
    __doc__,
    options,
    _measure,
    markdown,
    lambda found: int(found["total"]["wrong"] + found["total"]["nearest_wrong"] > 0),
    threads=None,
    more=lambda given: "-" * bool(given.kernels) + given.kernels,
).main


if __name__ == "__main__":
    sys.exit(main())
