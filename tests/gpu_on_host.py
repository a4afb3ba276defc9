"""What the GPU benchmark asks of Triton, interpreted.

`TRITON_INTERPRET=1 python gpu_on_host.py FILE`.
Writes, by the key of each cell, how many decisions were held against the law and how many differ.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import gpu_calls, gpu_cells, gpu_kernels, gpu_peers, gpu_problems
from benchmarks.gpu_cells import MISSES, NAN, SUMS, WRITTEN, Cell
from benchmarks.gpu_problems import Books
from grace_fast.index import segments

ROWS, WIDTH, BATCH = 150, 20, 2


class SmallBooks(gpu_problems.Books):
    """Of every shape the same small codebook on the host."""

    def __init__(self):
        super().__init__("cpu")
        self._asked = set()

    def has(self, cell):
        return (cell.N, cell.D, cell.dtype) in self._asked

    def of(self, cell):
        self._asked.add((cell.N, cell.D, cell.dtype))
        return self._book(40, 8, "float32")


def cells(paths, dtypes=("float32",)):
    """The cells of some paths on a small codebook."""
    for dtype, path, asks in product(dtypes, paths, (MISSES, WRITTEN, SUMS)):
        if not (path == gpu_cells.AUTO and asks == SUMS):
            yield Cell("host", path, ROWS, WIDTH, BATCH, dtype, asks)


def cell_of(path):
    """A cell of misses."""
    return Cell("host", path, ROWS, WIDTH, BATCH, "float32", MISSES)


def asked(cell, books):
    """How many answers of a cell were compared, and how many were wrong."""
    book = books.of(cell)
    assert book.ordered.segments[0].leaf_boxes is not None
    return gpu_calls.wrong(cell, book, gpu_calls.call_of(cell, book)())


def reads_every_key(cell, device="cpu"):
    """Whether a path finds a key that its codes do not tell of.

    A query is written over a key behind the back of everything that was computed from it: who reads
    all keys has it hit, who goes by the codes alone does not. Before, all miss.
    """
    book = Books(device).of(cell)
    state = book.ordered
    assert state.covered == cell.N  # the index is there, and of all rows
    assert state.segments[0].leaf_boxes is not None
    call = gpu_calls.call_of(cell, book)
    assert not call().hit.any()
    book.snapshot.key_slots[cell.N // 2] = book.queries(cell.B, MISSES)[-1]
    hit = call().hit.tolist()
    assert not any(hit[:-1])
    return hit[-1]


def fused(books):
    """What the fused arg-min and the product say of the same queries."""
    cell = Cell("host", gpu_cells.FUSED, ROWS, WIDTH, BATCH, "float32", SUMS)
    book = books.of(cell)
    keys, norms, limits = gpu_peers._keys_of(book)
    queries = book.queries(BATCH, SUMS)
    told = gpu_peers.product_and_min(queries, keys, norms, limits)
    answer = gpu_peers.call_of(cell, book)()
    assert torch.equal(told[0], answer.hit)
    assert torch.equal(told[1], answer.row)
    return gpu_calls.wrong(cell, book, answer)


def main(path):
    torch.set_num_threads(1)
    segments.ORDER_ROWS = 100  # so that few keys have boxes
    gpu_calls.why_not = lambda cell, book: None
    books, found = Books("cpu"), {}
    triton = [path for path in gpu_cells.OURS if path.startswith("triton")]
    asks = [cell for cell in cells(triton) if cell.asks != SUMS or cell.path == triton[0]]
    nan = [Cell("host", one, ROWS, WIDTH, BATCH, "float32", NAN) for one in triton[-2:]]
    for cell in [*asks, *nan]:
        found[cell.key] = asked(cell, books)
    found[gpu_cells.FUSED] = fused(books)
    found["reads every key"] = [
        path for path in triton if path != gpu_cells.TILES and reads_every_key(cell_of(path))
    ]
    words, sink = torch.arange(3 * gpu_kernels.WORDS, dtype=torch.int32), torch.zeros(2).int()
    gpu_kernels.read_all(words, sink)
    found["words"] = int(sink.sum()), int(words.sum(dtype=torch.int32))
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
