"""Measure look-ups against their peers: `python -m benchmarks.run [--quick | --million | --full]`.

Every timing comes after a comparison with the law; where ours decides wrongly no speed is reported
and the command fails. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import datetime
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from benchmarks import machine, report, runner
from benchmarks.measure import Work, run_all
from benchmarks.peers import ADDMM, DENSE, FAISS_FLAT, PEERS
from benchmarks.workloads import Spec

SIZES = {
    "quick": "N = 1e3 only, about a minute",
    "million": "N = 1e6 only; 20 GB of memory",
    "full": "adds N = 1e6 and the slow peers",
}
FAST_PEERS = tuple(peer for peer in PEERS if not peer.slow)
NONE = ()


def works(size: str) -> list[Work]:
    """Return what is measured: one of `SIZES`, or of "" what takes some minutes."""
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


def options(parser: ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    for name, said in SIZES.items():
        how = {"dest": "size", "action": "store_const", "const": name}
        size.add_argument(f"--{name}", help=said, default="", **how)
    parser.add_argument("--threads", type=int, default=1, help="of everyone, ours and peers")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of calls a contestant")
    parser.add_argument("--only", default="", help="works whose source holds this word")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    listed = [work for work in works(given.size) if given.only in work.spec.source]
    rows: list[report.Row] = []
    with _pinned(given.threads):
        for work, some in run_all(listed, given.budget):
            report.print_work(work, some)
            rows += some
            yield {"rows": list(map(asdict, rows))}
    if given.out:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        described = machine.describe(given.threads)
        name = f"{machine.short_name(described)}-{today}{_more(given)}.png"
        report.plot(given.out / name, described, rows)


def _more(given: Namespace) -> str:
    return "-" * bool(given.size) + given.size


def verdict(found: runner.Found) -> int:
    """Return 1 where a decision of ours was wrong."""
    failed = [row for row in found["rows"] if report.Row(**row).failed]
    for row in failed:
        said = f"{row['wrong']} of {row['checked']} decisions"
        print(f"WRONG: {row['contestant']}: {said}, {row['work']}")
    return int(bool(failed))


def _pinned(threads: int):  # noqa: ANN202 (a context manager of either kind)
    """Hold the threads of the peers' own libraries to the same number."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        from contextlib import nullcontext

        return nullcontext()
    return threadpool_limits(threads)


main = runner.Program(
    "",
    __doc__,
    options,
    _measure,
    report.markdown,
    verdict,
    runner.RESULTS,
    more=_more,
    module="run",
).main


if __name__ == "__main__":
    sys.exit(main())
