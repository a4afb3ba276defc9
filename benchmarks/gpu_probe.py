"""Every path once, on small codebooks: what the sanitizers and the profiler look at.

    python -m benchmarks.gpu_probe --out FILE    one line of JSON a path, flushed

Each path is asked for misses, hits that are written and hits with their S, in batches of 1, 4, 8
and 32, at D of 64, 100 and 4 096, before and after edits; each answer is compared with the law.
The exit code is 1 where one is wrong.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import gpu_calls, gpu_cells
from benchmarks.gpu_cells import Cell
from benchmarks.gpu_problems import VALUE_WIDTH, Book, Books, value_of

BATCHES, WIDTHS = (1, 4, 8, 32), (64, 100, 4096)
SHAPES = tuple(zip(WIDTHS, ("float32", "float16", "bfloat16"), strict=True))
ROWS = 4_500  # more than one level-2 node, and not a whole one
PATHS = (
    *(path for path in gpu_cells.OURS if path.startswith("cuda")),
    *(path for path in gpu_cells.OURS if path.startswith("triton")),
    gpu_cells.AUTO,
)
ASKS = (gpu_cells.MISSES, gpu_cells.WRITTEN, gpu_cells.SUMS)


def cells(paths: str = "", rows: int = ROWS, few: bool = False) -> Iterator[Cell]:
    """Yield what is asked of each path whose name holds `paths`, CUDA's first.

    All paths come before the next batch, so that what is stopped has seen most of them. few: only
    misses of the widest keys, one and eight at a time.
    """
    taken = [path for path in PATHS if paths in path]
    shapes, batches, questions = SHAPES, BATCHES, ASKS
    if few:
        shapes, batches, questions = SHAPES[-1:], (1, 8), ASKS[:1]
    for batch, (width, dtype), path, asks in product(batches, shapes, taken, questions):
        if not (path == gpu_cells.AUTO and asks == gpu_cells.SUMS):
            yield Cell("probe", path, rows, width, batch, dtype, asks)


def asked(cell: Cell, book: Book) -> dict[str, Any]:
    """Return the line of a cell."""
    line: dict[str, Any] = {"key": cell.key, "edited": book.codebook.snapshot().version}
    reason = gpu_calls.why_not(cell, book)
    if reason is not None:
        return line | {"skipped": reason}
    answer = gpu_calls.call_of(cell, book)()
    checked, wrong = gpu_calls.wrong(cell, book, answer)
    return line | {"checked": checked, "wrong": wrong}


def edit(book: Book) -> Book:
    """Return the book after edits: rows appended, a radius widened, a key moved, a row removed."""
    codebook = book.codebook
    device, element = codebook.device, codebook.dtype
    first = codebook.snapshot().rows
    keys = book.unseen[-70:] + 8
    values = value_of(torch.arange(first, first + len(keys), device=device)).to(element)
    codebook.append(
        keys, values[:, None].expand(-1, VALUE_WIDTH), torch.full((len(keys),), book.epsilon)
    )
    with codebook.writing() as draft:
        draft.set_radius(3, 1.5 * book.epsilon)
        draft.set_key(5, book.unseen[-80])
    return Book(codebook, book.epsilon, book.unseen)


def main(arguments: Sequence[str] | None = None, device: str = "cuda") -> int:
    """Run the command; return its exit code."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file of the lines; otherwise they are printed")
    parser.add_argument("--paths", default="", help="paths whose name holds this")
    parser.add_argument("--few", action="store_true", help="misses of D = 4096 alone")
    parser.add_argument("--rows", type=int, default=ROWS, help="N")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with given.out.open("w") if given.out else nullcontext(sys.stdout) as file:
        bad = sum(line.get("wrong", 0) for line in _asked_all(given, device, file))
    if device == "cuda":
        torch.cuda.synchronize()
    return int(bad > 0)


def _asked_all(given: Namespace, device: str, file: IO[str]) -> Iterator[dict[str, Any]]:
    """Ask all cells, before and after edits; yield each line once it is written."""
    books, edited = Books(device), dict[tuple[int, str], Book]()
    for is_edited in (False,) if given.few else (False, True):
        for cell in cells(given.paths, given.rows, given.few):
            book = books.of(cell)
            if is_edited:
                shape = (cell.D, cell.dtype)
                if shape not in edited:
                    edited[shape] = edit(book)
                book = edited[shape]
            line = asked(cell, book)
            print(json.dumps(line), file=file, flush=True)
            yield line


if __name__ == "__main__":
    sys.exit(main())
