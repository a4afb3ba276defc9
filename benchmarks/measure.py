"""One work from check to figures: build a peer, compare it with the law, time it, drop it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.oracle import Decisions, decide
from benchmarks.peers import Contestant, Peer
from benchmarks.report import Row
from benchmarks.timing import Run, Turn, flusher, interleave, ratio
from benchmarks.workloads import Problem, Spec, make
from grace_fast.lookup.backends import cpu

OUTPUT_TOKENS = 32  # of the layer's output in a `replace` work
CHECK_S = 4.0  # for comparing a peer with the law, on queries and again on edges


@dataclass(frozen=True)
class Work:
    """A question to time: a problem, how it is asked, and whom."""

    spec: Spec
    batch: int = 1
    against: Sequence[Peer] = peers.DENSE
    flushed: bool = False
    replace: bool = False  # ends with the masked write into an output [B, 32, V]


@dataclass
class _Entry:
    peer: Peer
    contestant: Contestant
    row: dict[str, object]  # what is known before timing


def measure(
    work: Work, budget_s: float, progress: Callable[[str], None] = lambda _: None
) -> tuple[str, list[Row]]:
    """Return the work's name and its rows: ours, the baseline, and the peers that run here."""
    progress("making the problem")
    problem = make(work.spec)
    title = _title(work, problem)
    progress("deciding by the law")
    known = [
        decide(asked, problem.keys, problem.radii) for asked in (problem.queries, problem.edges)
    ]
    enter = partial(_enter, work, problem, known, title)
    rows: list[Row] = []
    ours = [
        enter(peer)
        for peer in (peers.PREPARED, peers.FIND)
        if peer.absent() is None and not (work.replace and peer is peers.PREPARED)
    ]
    if wrong := [entry for entry in ours if entry.row["wrong"]]:
        return title, [
            Row(**entry.row, note="wrong decisions: no speed is reported") for entry in wrong
        ]
    timed = partial(_time, work, problem, budget_s)
    for peer in (peers.BASELINE, *work.against):
        if reason := _left_out(peer, problem):
            rows.append(Row(**_facts(work, problem, title, peer), note=reason))
            continue
        progress(peer.name)
        try:
            entry = enter(peer)
        except Exception as error:  # a peer that breaks is a result, not the end of the run
            rows.append(Row(**_facts(work, problem, title, peer), note=_first_line(error)))
            continue
        # Ours takes turns with each peer, so that a busy neighbour meets both.
        entries = [*ours, entry] if peer is peers.BASELINE else [ours[0], entry]
        runs = timed(entries)
        if peer is peers.BASELINE:
            rows += [_row(one, runs, faster_than=entry) for one in ours]
        rows.append(_row(entry, runs, slower_than=ours[0]))
        del entry, entries
        gc.collect()
    if not any(row.kind == "ours" for row in rows):
        runs = timed(ours)
        rows = [_row(one, runs) for one in ours] + rows
    return title, rows


def _facts(work: Work, problem: Problem, title: str, peer: Peer) -> dict[str, object]:
    spec = work.spec
    return {
        "work": title,
        "contestant": "grace_fast replace" if work.replace and peer.kind == "ours" else peer.name,
        "kind": peer.kind,
        "rows": spec.rows,
        "width": problem.book.key_dim,
        "batch": work.batch,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "epsilon_ratio": spec.epsilon_ratio,
        "radii": spec.radii,
        "hit_rate": spec.hit_rate,
        "caches": "flushed" if work.flushed else "warm",
        "checked": 0,
        "wrong": 0,
        "edges": 0,
        "wrong_at_edges": 0,
    }


def _enter(work: Work, problem: Problem, known: list[Decisions], title: str, peer: Peer) -> _Entry:
    """Build a contestant and compare its decisions with the law."""
    start = time.perf_counter()
    contestant = _build(work, problem, peer)
    facts = _facts(work, problem, title, peer) | {"build_s": time.perf_counter() - start}
    # A slow peer is compared on what takes a few seconds, ours on everything.
    limit_s = math.inf if peer.kind == "ours" else CHECK_S
    wrong, checked = _wrong(contestant, problem.queries, work.batch, known[0], limit_s)
    wrong_at_edges, edges = _wrong(contestant, problem.edges, work.batch, known[1], limit_s)
    facts |= {
        "checked": checked + edges,
        "wrong": wrong + wrong_at_edges,
        "edges": edges,
        "wrong_at_edges": wrong_at_edges,
    }
    if peer is peers.PREPARED:
        facts |= _effort(problem)
    return _Entry(peer, contestant, facts)


def _effort(problem: Problem) -> dict[str, object]:
    """Return what a certified look-up reads, in the mean; nothing where all keys are read."""
    view = cpu.view_of(problem.book.snapshot())
    if view is None or not view.keys_pay:
        return {}
    effort = view.effort(problem.queries)
    return {
        "codes": effort.codes,
        "survivors": effort.candidates,
        "rechecks": effort.exact_reranks,
        "bytes": effort.bytes,
    }


def _build(work: Work, problem: Problem, peer: Peer) -> Contestant:
    if not work.replace:
        return peer.build(problem)
    output = torch.randn(work.batch, OUTPUT_TOKENS, problem.book.value_dim)
    output = output.to(problem.spec.dtype)
    if peer.kind != "ours":
        return peers.with_write(peer.build(problem), problem, output)
    return peers.replacing(problem, output)


def _wrong(
    contestant: Contestant, asked: Tensor, batch: int, known: Decisions, limit_s: float
) -> tuple[int, int]:
    """Return how many decisions were wrong, and of how many that were compared."""
    wrong = checked = 0
    deadline = time.perf_counter() + limit_s
    for some in asked.split(batch):
        hit, row = contestant.decision(contestant.call(contestant.take(some)))
        law = known.part(checked, checked + len(some))
        wrong += law.wrong(torch.from_numpy(np.array(hit)), torch.from_numpy(np.array(row)))
        checked += len(some)
        if checked >= 16 and time.perf_counter() > deadline:
            break
    return wrong, checked


def _time(work: Work, problem: Problem, budget_s: float, entries: list[_Entry]) -> dict[str, Run]:
    batches = [some for some in problem.queries.split(work.batch) if len(some) == work.batch]
    turns = {
        entry.peer.name: Turn(
            entry.contestant.call, [entry.contestant.take(some) for some in batches]
        )
        for entry in entries
    }
    return interleave(turns, budget_s, between=flusher() if work.flushed else None)


def _row(
    entry: _Entry,
    runs: dict[str, Run],
    faster_than: _Entry | None = None,
    slower_than: _Entry | None = None,
) -> Row:
    run = runs[entry.peer.name]
    figures: dict[str, float] = {}
    if faster_than is not None:
        found = ratio(runs[faster_than.peer.name], run)
        figures = {"ratio": found.median, "ratio_least": found.least, "ratio_most": found.most}
    if slower_than is not None:
        found = ratio(run, runs[slower_than.peer.name])
        figures = {"behind": found.median, "behind_least": found.least, "behind_most": found.most}
    return Row(
        **entry.row,
        us_p5=run.percentile(5),
        us_p50=run.p50,
        us_p95=run.percentile(95),
        us_first=run.first_us,
        **figures,
    )


def _left_out(peer: Peer, problem: Problem) -> str | None:
    if reason := peer.absent():
        return reason
    if peer.largest is not None and problem.spec.rows > peer.largest:
        return f"not asked above N = {peer.largest}"
    return None


def _first_line(error: Exception) -> str:
    return (
        f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    )


def _title(work: Work, problem: Problem) -> str:
    spec = work.spec
    verb = "replace" if work.replace else "find"
    words = [
        f"{verb}: {problem.label}",
        f"N = {spec.rows:,}",
        f"D = {problem.book.key_dim}",
        f"B = {work.batch}",
        f"epsilon = {spec.epsilon_ratio:g} spacing",
        f"{spec.radii} radii",
        f"{spec.hit_rate:.0%} hits",
    ]
    if spec.dtype != torch.float32:
        words.append(str(spec.dtype).removeprefix("torch."))
    if work.flushed:
        words.append("caches flushed")
    return ", ".join(words)


def run_all(works: Sequence[Work], budget_s: float) -> Iterator[tuple[str, list[Row]]]:
    """Measure the works one after the other, telling on a progress bar what is under way."""
    from tqdm import tqdm

    with tqdm(works, unit="work", disable=None) as bar:
        for work in bar:
            yield measure(work, budget_s, progress=lambda text: bar.set_postfix_str(text))
            gc.collect()
