"""What is measured on a GPU, the most telling cells first.

A cell is one contestant on one question. Three passes: `first` answers whether the goals are met
(fixed costs, dense, codes, other types, many queries, a NaN, beside a layer), `second` sets peers
and hits beside it, `third` is the rest. A run that is short of time ends with the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

# Whole level-2 nodes, sixteen at a time, so that aliased codebooks hold copies of the boxes as they
# are (`gpu_problems`): 2 % less than 1e6.
MILLION = 240 * 4096
DENSE_ROWS = (1_000, 10_000, 100_000, MILLION)
CODED_ROWS = (100_000, MILLION, 10 * MILLION)
ALIASED = {10 * MILLION: 10, 100 * MILLION: 100}  # N -> rows that share one key
BF16, WIDTH = "bfloat16", 4096

CUDA_DENSE, TRITON_DENSE = "cuda dense", "triton dense"
LINEAR = ("cuda codes, linear", "triton codes, linear")
BOXES = ("cuda codes, boxes", "triton codes, boxes")
TILES, CODE_TILES, AUTO = "triton tiles", "triton code tiles", "auto"
OURS = (CUDA_DENSE, TRITON_DENSE, *LINEAR, *BOXES, TILES, CODE_TILES, AUTO)
PRODUCT, FUSED, CUVS, FAISS = (
    "product and min, compiled",
    "fused arg-min, triton",
    "cuVS brute force",
    "faiss-gpu flat",
)
PEERS = (PRODUCT, FUSED, CUVS, FAISS)
MACHINE = (
    "bytes read",
    "graph of one node",
    "one node",
    "two nodes",
    "memset node",
    "product of 8192 x 8192",
    "layer alone",
)
MOST_OF_CUDA = 32  # queries of one call

MISSES, WRITTEN, SUMS = "misses", "hits, written", "hits, S"
NAN, BESIDE = "misses, one NaN", "misses, beside a layer"
ASKS = (MISSES, WRITTEN, SUMS, NAN, BESIDE)
SWEPT, WARM = "swept", "warm"


@dataclass(frozen=True)
class Cell:
    """One contestant on one question."""

    stage: str
    path: str  # of OURS, PEERS or MACHINE
    N: int = 0
    D: int = 0
    B: int = 0
    dtype: str = "-"
    asks: str = "-"  # of ASKS
    caches: str = SWEPT  # whether the second-level cache is swept by reading before each look-up

    @property
    def key(self) -> str:
        """The cell in words; no two cells share one."""
        sizes = f"N={self.N} D={self.D} B={self.B} {self.dtype}"
        return f"{self.path}; {sizes}; {self.asks}; {self.caches}"

    @property
    def is_ours(self) -> bool:
        """Whether it is one of our look-ups, all of whose decisions have to be the law's."""
        return self.path in OURS

    @property
    def key_bytes(self) -> int:
        """The bytes of all N keys, as if none were aliased."""
        return self.N * self.D * {"float32": 4}.get(self.dtype, 2)


def cells() -> list[Cell]:
    """Return every cell once, in the order in which they are measured."""
    order: dict[str, Cell] = {}
    for cell in (*first(), *second(), *third()):
        order.setdefault(cell.key, cell)
    return list(order.values())


def first() -> Iterator[Cell]:
    """Yield what says whether the goals are met."""
    for path in MACHINE[:6]:
        yield Cell("fixed cost", path)
    for path, asks in product((CUDA_DENSE, TRITON_DENSE), (MISSES, WRITTEN)):
        yield _bf16("fixed cost", path, 64, 1, asks)
    for rows, batch in product(DENSE_ROWS, (4, 1, 8)):
        for path in (CUDA_DENSE, TRITON_DENSE):
            yield _bf16("dense", path, rows, batch)
    for rows, path in product((10_000, 100_000), (CUDA_DENSE, TRITON_DENSE)):
        yield _bf16("dense", path, rows, 4, WRITTEN)
    for rows, batch, paths in product(CODED_ROWS, (1, 8), (BOXES, LINEAR)):
        for path in paths:
            yield _bf16("codes", path, rows, batch)
    for dtype, width in (("float32", 1536), ("float16", 100)):
        for batch, path in product((1, 4), (CUDA_DENSE, TRITON_DENSE, *BOXES)):
            yield Cell("other types", path, 100_000, width, batch, dtype, MISSES)
    for batch in (32, 256, 4096):
        for path in (TILES, CODE_TILES, PRODUCT, FUSED):
            yield _bf16("many queries", path, 100_000, batch)
        if batch <= MOST_OF_CUDA:
            for path in (CUDA_DENSE, BOXES[0]):
                yield _bf16("many queries", path, 100_000, batch)
    for path in (TILES, CODE_TILES):
        yield _bf16("one NaN", path, 100_000, 4096, NAN)
    yield Cell("beside a layer", MACHINE[6], D=WIDTH, B=1, dtype=BF16)
    for path, rows in ((CUDA_DENSE, 1_000), *product(BOXES, (100_000,)), (BOXES[0], MILLION)):
        yield _bf16("beside a layer", path, rows, 1, BESIDE)


def second() -> Iterator[Cell]:
    """Yield hits, peers and the public calls."""
    for rows, batch in product(DENSE_ROWS, (4, 1)):
        for path in (CUDA_DENSE, TRITON_DENSE):
            yield _bf16("dense", path, rows, batch, WRITTEN)
        for path in (PRODUCT, FUSED):
            yield _bf16("dense", path, rows, batch)
    for rows, batch, path in product((100_000, MILLION), (1, 8), BOXES):
        yield _bf16("codes", path, rows, batch, WRITTEN)
    for rows, batch, asks in product((1_000, 100_000), (1, 4), (WRITTEN, MISSES)):
        yield _bf16("public calls", AUTO, rows, batch, asks)
    for path, batch in product((CUVS, FAISS), (1, 32, 4096)):
        yield _bf16("many queries", path, 100_000, batch)


def third() -> Iterator[Cell]:
    """Yield warm caches, hits with their S, small codebooks by codes and the largest."""
    for rows, path in product(DENSE_ROWS[:3], (CUDA_DENSE, TRITON_DENSE)):
        yield _bf16("dense", path, rows, 4, caches=WARM)
    for rows, path in product((100_000, MILLION), (*BOXES, *LINEAR)):
        yield _bf16("codes", path, rows, 1, caches=WARM)
    for rows, path in product((10_000, 100_000), (CUDA_DENSE, TRITON_DENSE, *BOXES)):
        yield _bf16("dense" if "dense" in path else "codes", path, rows, 4, SUMS)
    for rows, path in product((1_000, 10_000), (*BOXES, *LINEAR)):
        yield _bf16("codes", path, rows, 1)
    for path in (PRODUCT, FUSED):
        yield _bf16("codes", path, MILLION, 8)
    for path in (TILES, CODE_TILES):
        yield _bf16("many queries", path, MILLION, 4096)
    for paths, batch in product((BOXES, LINEAR), (1, 8)):
        for path in paths:
            yield _bf16("codes", path, 100 * MILLION, batch)


def _bf16(
    stage: str, path: str, rows: int, batch: int, asks: str = MISSES, caches: str = SWEPT
) -> Cell:
    return Cell(stage, path, rows, WIDTH, batch, BF16, asks, caches)
