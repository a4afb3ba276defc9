"""Measure the GPU look-ups against their peers: `python -m benchmarks.gpu`, or `make gpu`.

Every timing comes after a comparison with the law. Times are those of the device, from events on
the stream, with the second-level cache swept before each call (`cold`) or not (`warm`), and the
call made from Python (`eager`) or replayed from a captured graph (`graph`). All data are synthetic.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_fast as gf
from benchmarks import machine, runner
from benchmarks.workloads import SYNTHETIC, median_spacing
from grace_fast import semantics
from grace_fast.lookup import dispatch, lookup
from grace_fast.lookup.backends import cuda, triton

WARM_UP, ROUNDS = 5, 40
Call = Callable[[Tensor], tuple[Tensor, Tensor]]  # queries -> hit, row


@dataclass(frozen=True)
class Row:
    """One contestant on one problem."""

    device: str
    kernel: str
    kind: str  # "ours", "peer" or "limit"
    N: int
    d: int
    B: int
    dtype: str
    data: str
    epsilon_ratio: float
    caches: str  # "cold" or "warm"
    mode: str  # "eager" or "graph"
    checked: int = 0
    wrong: int = 0
    us_p5: float | None = None
    us_p50: float | None = None
    us_p95: float | None = None
    gigabytes_s: float | None = None  # all keys' bytes over the time
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """A codebook and queries; a few of them hit."""

    book: gf.Codebook
    queries: Tensor
    data: str
    epsilon_ratio: float

    def facts(self) -> dict[str, Any]:
        """Return what a row says of it."""
        return {
            "N": len(self.book),
            "d": self.book.key_dim,
            "B": len(self.queries),
            "dtype": str(self.book.dtype).removeprefix("torch."),
            "data": self.data,
            "epsilon_ratio": self.epsilon_ratio,
        }


def problems(largest: int) -> Iterator[Problem]:
    """Make the grid: one codebook for all the batches that it is asked in."""
    for width, dtype in ((4096, torch.bfloat16), (1536, torch.float32)):
        for rows in (1_000, 10_000, 100_000, 1_000_000):
            if rows > largest or (dtype == torch.float32 and rows > 100_000):
                continue
            book, epsilon, unseen = _book(rows, width, dtype)
            for batch in (1, 4, 8, 32, 256, 4096):
                if batch * rows <= 1 << 29:
                    yield Problem(book, _queries(book, unseen, epsilon, batch), "power-1", 0.1)


def _book(rows: int, width: int, dtype: torch.dtype) -> tuple[gf.Codebook, float, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    made = SYNTHETIC["power-1"](min(rows, 20_000) + 4096, width, generator).cuda()
    base, unseen = made[4096:], made[:4096]
    epsilon = 0.1 * median_spacing(base)
    book = gf.Codebook(width, 16, dtype=dtype, device="cuda", reserve_rows=2 * rows)
    for start in range(0, rows, len(base)):
        keys = base[: rows - start] if start == 0 else _jittered(base[: rows - start], epsilon)
        book.append(
            keys.to(dtype),
            torch.zeros(len(keys), 16, dtype=dtype, device="cuda"),
            torch.full((len(keys),), epsilon),
        )
    return book, epsilon, unseen


def _jittered(keys: Tensor, epsilon: float) -> Tensor:
    away = torch.nn.functional.normalize(torch.randn_like(keys), dim=1)
    return keys + 5 * epsilon * away  # half the spacing


def _queries(book: gf.Codebook, unseen: Tensor, epsilon: float, batch: int) -> Tensor:
    queries = unseen[:batch].clone()
    near = torch.arange(0, batch, 20, device="cuda")
    away = torch.nn.functional.normalize(torch.randn_like(queries[near]), dim=1)
    queries[near] = book.keys[near].float() + 0.5 * epsilon * away
    return queries.to(book.dtype)


def ours(problem: Problem) -> Iterator[tuple[str, Call]]:
    """Yield our look-ups, each forced."""
    from grace_fast.kernels import codes, dense, tiles

    book, snapshot = problem.book, problem.book.snapshot()
    gf.prepare(book)
    table = triton.Table(snapshot, None)

    def taken(found: Any) -> tuple[Tensor, Tensor]:
        return found.hit, found.row

    yield "triton dense", lambda queries: taken(dense.find(queries, table.keys, sums=False))
    if table._codes is not None:
        known = table._codes
        one_by_one = partial(codes.find, keys=table.keys, codes=known, sums=False, tiled=False)
        yield "triton codes", lambda queries: taken(one_by_one(queries))
        if len(problem.queries) >= 32:
            together = partial(codes.find, keys=table.keys, codes=known, sums=False, tiled=True)
            yield "triton code tiles", lambda queries: taken(together(queries))
    if len(problem.queries) >= 32:
        multiplied = tiles.filter_keys(snapshot.key_slots[: snapshot.counts.keys])
        yield "triton tiles", lambda q: taken(tiles.find(q, table.keys, multiplied, sums=False))
    work = lookup.Workload("cuda", book.dtype, len(problem.queries), len(book), book.key_dim)
    if cuda.why_not(work) is None:
        plain = cuda.Table(cuda._cuda, snapshot)
        yield "cuda dense", lambda queries: plain.find(queries)[:2]
        coded = cuda._newest(snapshot, None)
        if coded.indexed:
            yield "cuda codes", lambda queries: coded.find(queries)[:2]


def peers(problem: Problem) -> Iterator[tuple[str, Call]]:
    """Yield other ways to ask the same, resident and with norms precomputed, with the same tail."""
    keys, radii = problem.book.keys.contiguous(), problem.book.radii
    wide, limits = keys.float(), radii.double().square().float()
    norms = wide.square().sum(dim=1)

    def tail(squared: Tensor) -> tuple[Tensor, Tensor]:
        least, row = squared.min(dim=1)
        hit = least <= limits[row]
        return hit, torch.where(hit, row, -1)

    def cdist(queries: Tensor) -> tuple[Tensor, Tensor]:
        return tail(torch.cdist(queries.float(), wide).square())

    def recast(queries: Tensor) -> tuple[Tensor, Tensor]:
        return tail(torch.cdist(queries.float(), keys.float()).square())

    def addmm(queries: Tensor) -> tuple[Tensor, Tensor]:
        asked = queries.float()
        squared = torch.addmm(norms, asked, wide.T, alpha=-2)
        return tail(squared + asked.square().sum(dim=1, keepdim=True))

    def product(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared = norms - 2 * (queries @ keys.T).float()
        return tail(squared + queries.float().square().sum(dim=1, keepdim=True))

    yield "reference rule, cdist", cdist
    yield "reference rule, cdist, compiled", torch.compile(cdist, dynamic=True)
    yield "float cdist of all keys a call", recast
    yield "addmm, cached norms, float32", addmm
    if keys.dtype != torch.float32:
        yield "product in the keys' type, cached norms", product


def wrong(call: Call, problem: Problem, checked: int) -> int:
    """Return how many of the first decisions are not the law's."""
    queries = problem.queries[:checked]
    snapshot = problem.book.snapshot()
    row, squared = dispatch.BACKENDS["reference"].nearest(queries, snapshot)
    hit = semantics.in_ball(squared, snapshot.radii_of(row))
    got_hit, got_row = call(problem.queries)
    differs = (got_hit[:checked] != hit) | (hit & got_hit[:checked] & (got_row[:checked] != row))
    return int(differs.sum())


class Sweeper:
    """Empties the device's second-level cache."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._junk = torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self._junk.zero_()


def times_us(call: Callable[[], Any], before: Callable[[], Any] | None) -> list[float]:
    """Return the device's time of calls, from events around each."""
    for _ in range(WARM_UP):
        call()
    pairs = []
    for _ in range(ROUNDS):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(end) for start, end in pairs)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Return a call as the replay of a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(graph: Any = graph, _kept: Any = kept) -> None:
        graph.replay()

    return replay


def measure(problem: Problem, sweep: Sweeper, device: str) -> Iterator[Row]:
    """Yield the rows of a problem: ours where no decision was wrong, then the peers."""
    checked = min(len(problem.queries), 16 if len(problem.book) > 10_000 else 64)
    key_bytes = len(problem.book) * problem.book.key_dim * problem.book.dtype.itemsize
    for kind, contestants in (("ours", ours), ("peer", peers)):
        if kind == "peer" and len(problem.queries) * len(problem.book) > 1 << 28:
            continue
        for name, call in contestants(problem):
            facts = {"device": device, "kernel": name, "kind": kind, **problem.facts()}
            try:
                bad = wrong(call, problem, checked)
                facts |= {"checked": checked, "wrong": bad}
                if kind == "ours" and bad:
                    yield Row(**facts, caches="-", mode="-", note="wrong: no speed is reported")
                    continue
                asked = partial(call, problem.queries)
                for mode, timed in (("eager", asked), ("graph", captured(asked))):
                    for caches, before in (("cold", sweep), ("warm", None)):
                        yield Row(
                            **facts, caches=caches, mode=mode, **_figures(timed, before, key_bytes)
                        )
            except Exception as error:  # one that breaks is a result, not the end of the run
                text = str(error).splitlines()[0][:100] if str(error) else ""
                note = f"failed: {type(error).__name__}: {text}"
                yield Row(**facts, caches="-", mode="-", note=note)


def _figures(call: Callable[[], Any], before: Any, size: int) -> dict[str, float]:
    found = times_us(call, before)
    middle = statistics.median(found)
    return {
        "us_p5": found[len(found) // 20],
        "us_p50": middle,
        "us_p95": found[-1 - len(found) // 20],
        "gigabytes_s": size / middle / 1e3,
    }


def limits(device: str) -> Iterator[Row]:
    """Yield what the machine itself does: bytes copied, and products of matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    shared = {"device": device, "kind": "limit", "data": "-", "epsilon_ratio": 0.0, "mode": "eager"}
    facts = {**shared, "N": 0, "d": 0, "B": 0, "caches": "cold"}
    yield Row(
        **facts,
        kernel="copy of 1 GiB, bytes read and written",
        dtype="uint8",
        **_figures(partial(target.copy_, source), None, 2 << 30),
    )
    one = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    found = _figures(partial(torch.mm, one, one), None, 3 * 2 << 26)
    rate = 2 * 8192**3 / found["us_p50"] / 1e6
    name = "product of 8192 x 8192"
    yield Row(**facts, kernel=name, dtype="bfloat16", **found, note=f"{rate:.0f} TFLOP/s")


def beside_a_layer(device: str) -> Iterator[Row]:
    """Yield a layer's product alone, and with a look-up beside it on another stream."""
    book, epsilon, unseen = _book(100_000, 4096, torch.bfloat16)
    problem = Problem(book, _queries(book, unseen, epsilon, 1), "power-1", 0.1)
    weight = torch.randn(11008, 4096, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    facts = {"device": device, "kind": "ours", **problem.facts(), "caches": "cold"}
    for name, call in ours(problem):

        def both(call: Call = call) -> tuple[Any, ...]:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = call(problem.queries)
            product = problem.queries @ weight.T
            torch.cuda.current_stream().wait_stream(side)
            return *found, product

        try:
            alone = times_us(captured(lambda: problem.queries @ weight.T), Sweeper())
            together = times_us(captured(both), Sweeper())
        except Exception as error:
            yield Row(**facts, kernel=f"{name} beside a layer", mode="graph", note=str(error)[:100])
            continue
        extra = statistics.median(together) - statistics.median(alone)
        note = f"the layer alone {statistics.median(alone):.2f} us; {extra:+.2f} us"
        middle = statistics.median(together)
        yield Row(**facts, kernel=f"{name} beside a layer", mode="graph", us_p50=middle, note=note)


HEADS = ["kernel", "N", "d", "B", "dtype", "caches", "mode"]
HEADS += ["p50 us", "p5", "p95", "GB/s", "wrong", "note"]


def markdown(found: runner.Found) -> str:
    """Return the results as a page."""
    return (
        f"# Look-ups on a GPU\n\n{runner.where(found)}; {found['machine']['device']}. Synthetic "
        "data, a twentieth of the queries hit. Times are the device's; cold: its second-level "
        "cache swept."
        f"\n\n{runner.table(HEADS, (_cells(Row(**row)) for row in found['rows']))}\n"
    )


def _cells(row: Row) -> list[str]:
    figures = (row.us_p50, row.us_p5, row.us_p95, row.gigabytes_s)
    shown = ("-" if value is None else f"{value:.4g}" for value in figures)
    sizes = (f"{size:,}" for size in (row.N, row.d, row.B))
    how = (row.dtype, row.caches, row.mode)
    return [row.kernel, *sizes, *how, *shown, f"{row.wrong} / {row.checked}", row.note]


def _measure(given: Namespace) -> Iterator[runner.Found]:
    from tqdm import tqdm

    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        raise SystemExit(2)
    device, sweep = torch.cuda.get_device_name(), Sweeper()
    described = machine.describe(torch.get_num_threads()) | {"device": device}
    rows = list(limits(device))
    for problem in tqdm(problems(given.largest), unit="problem", disable=None):
        rows += measure(problem, sweep, device)
        yield {"machine": described, "rows": list(map(asdict, rows))}
    rows += beside_a_layer(device)
    yield {"machine": described, "rows": list(map(asdict, rows))}


main = runner.Program(
    "",
    __doc__,
    lambda parser: parser.add_argument(
        "--largest", type=int, default=1_000_000, help="N of the largest codebook"
    ),
    _measure,
    markdown,
    lambda found: int(any(row["kind"] == "ours" and row["wrong"] for row in found["rows"])),
    runner.RESULTS,
    threads=None,
    module="gpu",
).main


if __name__ == "__main__":
    sys.exit(main())
