"""Measure look-ups against their peers: `python -m benchmarks.run [--quick | --million | --full]`.

Every timing comes after a comparison with the law; where ours decides wrongly no speed is reported
and the command fails. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.measure import Work, run_all
from benchmarks.peers import ADDMM, DENSE, FAISS_FLAT, PEERS
from benchmarks.workloads import Spec

RESULTS = Path(__file__).parent / "results"
FAST_PEERS = tuple(peer for peer in PEERS if not peer.slow)
NONE = ()


def works(size: str) -> list[Work]:
    """Return what is measured: `quick` (a minute), `default`, `million` or `full` (an hour)."""
    real = Spec("minilm", 1_000)
    million = replace(real, rows=1_000_000, value_dim=16, queries=128)
    millions = [
        Work(million, against=DENSE),
        Work(million, flushed=True, against=NONE),
        Work(replace(million, epsilon_ratio=0.3), against=NONE),
        Work(replace(million, epsilon_ratio=0.3), flushed=True, against=NONE),
    ]
    if size == "million":
        return millions
    if size == "quick":
        return [Work(real, against=FAST_PEERS), Work(replace(real, epsilon_ratio=0.3))]
    everyone = PEERS if size == "full" else FAST_PEERS
    listed = [
        Work(real, against=everyone),
        Work(replace(real, rows=10_000), against=everyone),
        Work(replace(real, rows=100_000), against=everyone),
        Work(replace(real, epsilon_ratio=0.3), against=NONE),
        Work(replace(real, hit_rate=1.0), against=NONE),
        Work(replace(real, source="minilm-last", rows=800), against=NONE),
        Work(real, replace=True, against=(FAISS_FLAT,)),
        Work(replace(real, rows=100_000, epsilon_ratio=0.3), against=NONE),
        Work(replace(real, rows=100_000, epsilon_ratio=0.3, queries=512), batch=256),
        Work(replace(real, rows=100_000), flushed=True, against=NONE),
    ]
    wide = replace(real, rows=10_000)
    listed += [
        Work(replace(wide, dtype=torch.bfloat16)),
        Work(replace(wide, radii="lognormal"), against=NONE),
        Work(replace(wide, radii="giant"), against=NONE),
        Work(replace(wide, source="minilm-massive"), against=NONE),
        Work(replace(wide, source="clusters"), against=NONE),
        Work(replace(wide, source="power-1"), against=NONE),
        Work(replace(wide, source="power-2"), against=NONE),
        Work(replace(wide, source="isotropic", epsilon_ratio=1.0), against=(ADDMM, FAISS_FLAT)),
        Work(replace(wide, source="isotropic", epsilon_ratio=1.0), batch=32),
    ]
    if size == "full":
        listed += [
            *millions,
            Work(replace(wide, rows=100_000, source="isotropic", epsilon_ratio=1.0)),
            Work(replace(wide, source="isotropic", width=18944, rows=5_000)),
        ]
    return listed


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code, 1 where a decision of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="N = 1e3 only, about a minute")
    size.add_argument("--million", action="store_true", help="N = 1e6 only; 20 GB of memory")
    size.add_argument("--full", action="store_true", help="adds N = 1e6 and the slow peers")
    parser.add_argument("--threads", type=int, default=1, help="of everyone, ours and peers")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of calls a contestant")
    parser.add_argument("--only", default="", help="works whose source holds this word")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    sizes = [name for name in ("quick", "million", "full") if getattr(given, name)]
    chosen = sizes[0] if sizes else "default"
    threads = given.threads
    torch.set_num_threads(threads)
    listed = [work for work in works(chosen) if given.only in work.spec.source]

    described = machine.describe(threads)
    words = sys.argv[1:] if arguments is None else arguments
    command = machine.command("benchmarks.run", words)
    print(f"{command}\n{described['cpu']}, {threads} threads, commit {described['commit']}")
    rows: list[report.Row] = []
    with _pinned(threads):
        for work, some in run_all(listed, given.budget):
            report.print_work(work, some)
            rows += some
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = "-".join([machine.short_name(described), today, *sizes])
    path = report.save(given.out, name, described, command, today, rows)
    print(f"results: {path}, .md and .png beside it")
    failed = [row for row in rows if row.failed]
    for row in failed:
        print(f"WRONG: {row.contestant}: {row.wrong} of {row.checked} decisions, {row.work}")
    return 1 if failed else 0


def _pinned(threads: int):  # noqa: ANN202 (a context manager of either kind)
    """Hold the threads of the peers' own libraries to the same number."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        from contextlib import nullcontext

        return nullcontext()
    return threadpool_limits(threads)


if __name__ == "__main__":
    sys.exit(main())
