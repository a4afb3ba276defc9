"""A codebook larger than memory, from a stream to look-ups: `python -m benchmarks.out_of_core`.

Keys are activations tiled up by mixed differences and noise, made block by block, fp16. Look-ups
are timed in a process of their own that opens the directory; every decision is held against a scan
of all keys, and where one is wrong no time is reported and the command fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

import grace_fast as gf
from benchmarks import runner
from benchmarks.activations import activations
from benchmarks.workloads import jitter, median_spacing
from grace_fast.codebook.codebook import Codebook
from grace_fast.lookup.backends import cpu
from grace_fast.store import columns
from grace_fast.tools.bench.large import Scan, chunks_of, scan
from grace_fast.tools.timing import times_us

THREADS = os.cpu_count() or 1
BLOCK_ROWS = 1 << 14
VALUE_DIM = 16
HIT_RATE = 0.05
RATIOS = (0.1, 0.2, 0.3)  # epsilon as a fraction of the median nearest-neighbour distance
DTYPE = torch.float16


class Source:
    """Real keys tiled up: the same rows from any row on."""

    def __init__(self, rows: int) -> None:
        keys, unseen = activations("all")
        mixed = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
        self._base, self.rows = keys[mixed].contiguous(), rows
        self.spacing = median_spacing(self._base)
        self.unseen = unseen
        self.seconds = 0.0  # spent here

    def __call__(self, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the blocks from a row on, with radii of 0.1 of the spacing."""
        numbers = range(first // BLOCK_ROWS, -(-self.rows // BLOCK_ROWS))
        with ThreadPoolExecutor(THREADS) as pool:  # a block's numbers are drawn by one thread
            for at in range(0, len(numbers), THREADS):
                start = time.perf_counter()
                made = list(pool.map(self._block, numbers[at : at + THREADS]))
                self.seconds += time.perf_counter() - start
                for begin, parts in made:
                    yield tuple(part[max(0, first - begin) :] for part in parts)

    def _block(self, number: int) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
        begin = number * BLOCK_ROWS
        count = min(BLOCK_ROWS, self.rows - begin)
        generator = torch.Generator().manual_seed(number + 1)
        keys = self._base[begin : begin + count]
        if len(keys) < count:
            fresh = jitter(self._base, count - len(keys), self.spacing / 2, generator)
            keys = torch.cat([keys, fresh])
        values = torch.randn(count, VALUE_DIM, generator=generator)
        radii = torch.full((count,), RATIOS[0] * self.spacing)
        return begin, (keys.to(DTYPE), values.to(DTYPE), radii)

    def queries(self, book: Codebook, epsilon: float, count: int) -> Tensor:
        """Return unseen rows, some of them replaced by near hits, [count, D] float32."""
        generator = torch.Generator().manual_seed(1)
        mixed = torch.randperm(len(self.unseen), generator=generator)[:count]
        asked = self.unseen[mixed].clone()
        hits = round(HIT_RATE * count)
        rows = torch.randint(len(book), (hits,), generator=generator)
        near = book.snapshot().keys_at(rows).float()
        away = normalize(torch.randn(near.shape, generator=generator), dim=1)
        # Half of them far outside of a ball of their own, or on its edge.
        reach = 1.2 * torch.rand(hits, 1, generator=generator)
        asked[:hits] = near + epsilon * reach * away
        return asked[torch.randperm(len(asked), generator=generator)].contiguous()


def with_radii(book: Codebook, radius: float) -> Codebook:
    """Return the keys of a book that was just opened, with one radius and codes that suit it."""
    snapshot = book.snapshot()
    tensors = columns.fill_defaults({"rows.radius": torch.full((snapshot.rows,), radius)})
    files = (snapshot.key_file, snapshot.value_file)
    return columns.unpack_rows(tensors, *files, torch.device("cpu"))


def serve(folder: Path, asked: Path, epsilon: float) -> dict[str, Any]:
    """Open a directory in this process and time look-ups; return figures and answers."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    book = gf.Codebook.open(folder)
    opened_s = time.perf_counter() - start
    if float(book.radii[0]) != np.float32(epsilon):
        torch.set_num_threads(THREADS)
        book = with_radii(book, epsilon)
        gf.prepare(book)
        torch.set_num_threads(1)
    find = gf.prepare(book)
    queries = load_file(asked)["queries"]
    singles = list(queries.split(1))
    rows: list[int] = []

    def ask(query: Tensor) -> None:
        rows.append(int(find(query).row[0]))

    first = times_us(ask, singles)  # the blocks that survivors lie in are tested on the way
    again = np.concatenate([times_us(find, singles) for _ in range(5)])
    effort = cpu.view_of(book.snapshot()).effort(queries)
    return {
        "opened_s": opened_s,
        "us_p50": float(np.percentile(again, 50)),
        "us_p95": float(np.percentile(again, 95)),
        "first_us_p50": float(np.percentile(first, 50)),
        "first_us_p95": float(np.percentile(first, 95)),
        "codes": effort.codes,
        "survivors": effort.candidates,
        "rechecks": effort.exact_reranks,
        "tested_blocks": int(book.snapshot().key_file.tested.sum()),
        "anonymous_mib": _anonymous_mib(),
        "rows": rows,
    }


def _anonymous_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) // 1024


def forget(folder: Path) -> None:
    """Drop a directory's files from the page cache, as far as the system does it."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(source: Source, folder: Path, decisions: int, whole: int) -> dict[str, Any]:
    """Build, open, ask and check one size; return its figures."""
    start = time.perf_counter()
    book = gf.Codebook.build(folder, source, rows=source.rows, threads=THREADS)
    built_s = time.perf_counter() - start
    found: dict[str, Any] = {
        "keys": source.rows,
        "width": book.key_dim,
        "gb": sum(path.stat().st_size for path in folder.iterdir()) / 1e9,
        "built_s": built_s,
        "stream_s": source.seconds,
        "epsilons": [],
    }
    each = -(-decisions // len(RATIOS))
    asked = {ratio: source.queries(book, ratio * source.spacing, each) for ratio in RATIOS}
    del book
    for ratio, queries in asked.items():
        found["epsilons"].append(
            {"ratio": ratio, **_served(folder, queries, ratio * source.spacing)}
        )
    _check(found, gf.Codebook.open(folder), asked, source.spacing, whole)
    return found


def _served(folder: Path, queries: Tensor, epsilon: float) -> dict[str, Any]:
    """Return what `serve` says in a process of its own, the files out of the page cache first."""
    forget(folder)
    with tempfile.TemporaryDirectory() as temporary:
        asked = Path(temporary, "asked.safetensors")
        save_file({"queries": queries}, asked)
        command = [sys.executable, "-m", "benchmarks.out_of_core", "--serve"]
        command += [str(folder), str(asked), repr(epsilon)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(said)


def _check(
    found: dict[str, Any], book: Codebook, asked: dict[float, Tensor], spacing: float, whole: int
) -> None:
    """Count the decisions that a scan of all keys contradicts, into the figures."""
    sizes = [len(queries) for queries in asked.values()]
    queries = torch.cat(list(asked.values()))
    radius = torch.cat([torch.full((n,), r * spacing) for n, r in zip(sizes, asked, strict=True)])
    law = scan(queries, chunks_of(book), radius).hits(radius)
    some = torch.linspace(0, len(queries) - 1, whole).long()
    again = _scan_whole(queries[some], book).hits(radius[some])
    found["scans_disagree"] = int((again != law[some]).sum())
    found["whole"] = whole
    for figures, rows in zip(found["epsilons"], law.split(sizes), strict=True):
        answered = torch.tensor(figures.pop("rows"))
        figures |= {
            "decisions": len(rows),
            "hits": int((rows >= 0).sum()),
            "wrong": int((answered != rows).sum()),
        }


def _scan_whole(queries: Tensor, book: Codebook) -> Scan:
    """Return the nearest rows by float64 differences of all pairs; queries [B, D]."""
    found, wide = Scan(queries), queries.double()
    for first, keys in chunks_of(book):
        distance = torch.cdist(wide, keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
        least = torch.minimum(distance.amin(dim=1), found.squared.sqrt())
        # Sums in another order are not off by a relative 1e-9.
        found.offer(keys, first, distance <= least[:, None] * (1 + 1e-9))
    return found


def wrong(sizes: list[dict[str, Any]]) -> int:
    """Return how many decisions a scan contradicts."""
    asked = sum(figures["wrong"] for size in sizes for figures in size["epsilons"])
    return asked + sum(size["scans_disagree"] for size in sizes)


def markdown(found: dict[str, Any]) -> str:
    """Return the figures as a page."""
    whole = sum(size["whole"] for size in found["sizes"])
    asked = sum(figures["decisions"] for size in found["sizes"] for figures in size["epsilons"])
    page = (
        f"# Codebooks larger than memory\n\n{runner.where(found)}, {found['memory_gib']} GiB; all "
        "cores build, one looks up. Real activations of MiniLM (D = "
        f"{found['sizes'][0]['width']}, fp16), tiled up by mixed differences and noise at half "
        "their spacing (synthetic); epsilon is a fraction of that spacing.\n\n"
        f"**{wrong(found['sizes'])} wrong of {asked:,} decisions**, each held against a scan of "
        f"all keys in float32 with a proven bound, {whole} of them against float64 differences of "
        "all.\n\n"
    )
    heads = "keys, on disk, built, of it the stream, epsilon, opened, p50, p95, first time p50, p95"
    more = "codes touched, rechecks, memory, wrong"
    rows = []
    for size in found["sizes"]:
        built = f"{size['gb']:.1f} GB", f"{size['built_s']:.0f} s", f"{size['stream_s']:.0f} s"
        for figures in size["epsilons"]:
            times = ("us_p50", "us_p95", "first_us_p50", "first_us_p95")
            rows.append(
                [
                    f"{size['keys']:,}",
                    *built,
                    f"{figures['ratio']:g}",
                    f"{figures['opened_s']:.1f} s",
                    *(f"{figures[name]:,.1f} us" for name in times),
                    f"{figures['codes']:,.0f} ({100 * figures['codes'] / size['keys']:.3f} %)",
                    f"{figures['rechecks']:.2f}",
                    f"{figures['anonymous_mib']:,} MiB",
                    f"{figures['wrong']} of {figures['decisions']}",
                ]
            )
    lines = [page + runner.table([*heads.split(", "), *more.split(", ")], rows)]
    for one, other in pairwise(found["sizes"]):
        grown = ", ".join(
            f"{more['codes'] / few['codes']:.1f}x at {more['ratio']:g}"
            for few, more in zip(one["epsilons"], other["epsilons"], strict=True)
        )
        lines += ["", f"Codes touched, from {one['keys']:,} to {other['keys']:,} keys: {grown}."]
    lines += [
        "",
        "`opened` is from files that were dropped from the page cache. `first time` is each "
        "query's first look-up, which tests the 4 MiB around every key that it reads. `memory` is "
        "anonymous memory of the process, torch included; what is mapped is page cache. The codes "
        "for the larger epsilons are made by the process that looks up.",
    ]
    return "\n".join(lines) + "\n"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument(
        "--folder", type=Path, help="where the codebooks go for the time of the run"
    )
    parser.add_argument("--decisions", type=int, default=2_000)
    parser.add_argument(
        "--whole", type=int, default=50, help="of them, by differences of all pairs"
    )


def _measure(given: Namespace) -> Iterator[runner.Found]:
    sizes = []
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        for rows in given.rows:
            folder = Path(temporary, str(rows))
            sizes.append(run(Source(rows), folder, given.decisions, given.whole))
            shutil.rmtree(folder)
            yield {"memory_gib": memory, "sizes": sizes}


PROGRAM = runner.Program(
    "out-of-core",
    __doc__,
    options,
    _measure,
    markdown,
    lambda found: int(wrong(found["sizes"]) > 0),
    threads=None,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command, or serve one directory of it in this process."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--serve"]:
        folder, asked, epsilon = words[1:]
        print(json.dumps(serve(Path(folder), Path(asked), float(epsilon))))
        return 0
    return PROGRAM.main(words)


if __name__ == "__main__":
    sys.exit(main())
