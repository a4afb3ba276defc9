"""What a look-up on an H200 is made of, in us: launches, round trips, bytes, instructions.

A time is a sum of parts: launches by the cost of a node, dependent round trips by their
latency, and the larger of bytes over bandwidth and instructions over the rate they are issued at.
Where a loop does not fetch ahead, the two overlap only in part: half way between the larger and the
sum. Every constant says where it is from; nothing in here was measured by this benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks import gpu_cells
from benchmarks.gpu_cells import BESIDE, BOXES, LINEAR, SUMS, WRITTEN, Cell

# name: (value, where it is from)
CONSTANTS: dict[str, tuple[float, str]] = {
    "bandwidth": (4.32e6, "bytes a us: nine tenths of 4.8 TB/s, the data sheet's HBM3e"),
    "l2_bandwidth": (5.6e6, "bytes a us, read by all multiprocessors: an estimate"),
    "tensor": (790e6, "bf16 operations a us: of 989 by the data sheet, what large products reach"),
    "float32": (60e6, "float32 operations a us: of 67 by the data sheet"),
    "clock": (1980.0, "cycles a us: the boost clock"),
    "issue": (132 * 4 * 1980.0, "warp instructions a us: 132 multiprocessors of 4 schedulers"),
    "l2_trip": (280 / 1980, "us: 280 cycles to the second-level cache and back, an estimate"),
    "hbm_trip": (0.8, "us to memory and back: .65 to 1, an estimate"),
    "node": (1.6, "us of a kernel node after another in a graph, an estimate"),
    "early_node": (0.8, "us of one that is started while the node before it still runs"),
    "memset": (1.3, "us of a memset node, an estimate"),
    "ticket": (1.0, "us of a fence, a ticket and the last block's read of the others' bests"),
    "decide": (1.1, "us: eight trips to the second-level cache"),
    "canonical": (
        19 / 1980,
        "us a column: a float64 product and a sum that waits for the one before",
    ),
    "host_call": (30.0, "us of launching from Python, for what cannot be captured"),
}
C = {name: value for name, (value, _) in CONSTANTS.items()}
Overlapped = Callable[[float, float], float]  # what memory and instructions take together

# Warp instructions of the loops on sm_90a, as nvcc 13.0 and Triton made them.
CUDA_DENSE_STEP = {1: 174, 4: 343, 8: 634}  # for 2 KB of keys, by queries that share them
CUDA_CODES_LEAF = {"linear": 21.3, "boxes": 33.0}  # a leaf of 64 codes and one query
TRITON_DENSE_CHUNK = {1: 124, 4: 300}  # of each of 4 warps for 2 048 elements, by queries
TRITON_CODES_LEAF = 88  # 350 for 256 positions, without the cold part of the loop
BOX = 32  # a box to a lane

# Which part of the codes a query touches under boxes at a tenth of the keys' spacing, by N:
# measured on real activations of width 1 536 from 1e5 to 1e7, extended by hand.
TOUCHED = {1e3: 0.2, 1e4: 0.03, 1e5: 0.005, 1e6: 0.0011, 1e7: 0.0003}


def parts_of(cell: Cell) -> dict[str, float]:
    """Return what a cell takes with the kernels whose machine code was counted, part by part.

    Raises: KeyError for a path that is not known.
    """
    if cell.path in gpu_cells.MACHINE:
        return _machine(cell)
    if cell.path in gpu_cells.PEERS:
        return _PEERS[cell.path](cell)
    if cell.asks == BESIDE:
        return _beside(cell)
    return _OURS[cell.path](cell) | _answering(cell)


# Ours.


def _half_hidden(memory: float, issued: float) -> float:
    """Return what a loop takes that does not fetch ahead of what it computes."""
    return max(memory, issued) + min(memory, issued) / 2


def _memory(cell: Cell, size: float) -> float:
    fits = cell.caches == gpu_cells.WARM and size < 40e6
    return size / C["l2_bandwidth" if fits else "bandwidth"]


def _cuda_dense(cell: Cell) -> dict[str, float]:
    together = 1 if cell.B == 1 else 4 if cell.B <= 4 else 8
    passes = math.ceil(cell.B / together)
    row = cell.key_bytes / cell.N
    steps = row / 2048  # of a warp: a stage of its ring, three of which are in flight
    issued = passes * cell.N * steps * CUDA_DENSE_STEP[together] / C["issue"]
    in_turn = math.ceil(cell.N / (132 * 16)) * math.ceil(steps / 3) * passes * C["hbm_trip"]
    return {
        "node": C["node"],
        "queries": math.ceil(together * cell.D / (8 * 4 * 512)) * 2 * C["l2_trip"],
        "first key": C["hbm_trip"],
        "keys": max(passes * _memory(cell, cell.key_bytes), issued, in_turn),
        "deciding": C["ticket"] + C["decide"],
    }


def _triton_dense(cell: Cell) -> dict[str, float]:
    together = 1 if cell.B == 1 else 4
    passes = math.ceil(cell.B / together)
    chunks = cell.N * cell.D / 2048
    wide = 2 if cell.dtype == "float32" else 1
    issued = passes * chunks * 4 * TRITON_DENSE_CHUNK[together] * wide / C["issue"]
    return {
        "nodes": 2 * C["node"],
        "first key": 2 * C["hbm_trip"],
        "keys": max(passes * _memory(cell, cell.key_bytes), issued),  # six chunks in flight
        "deciding": C["decide"] + 4 * C["l2_trip"],
    }


def _encoding(cell: Cell) -> dict[str, float]:
    """Return what it takes to project a query, an element at a time and each behind a branch."""
    trips = math.ceil(cell.D / 256) + 6
    return {"encoding": trips * C["l2_trip"] + C["hbm_trip"] + C["ticket"]}


def _scanning(cell: Cell, leaf: float, overlapped: Overlapped) -> dict[str, float]:
    """Return what the codes take: every one, or what the boxes leave of them."""
    if cell.path in LINEAR:
        issued = cell.B * cell.N / 64 * leaf / C["issue"]
        return {"codes": C["hbm_trip"] + overlapped(_memory(cell, 16 * cell.N), issued)}
    leaves = cell.B * touched(cell.N) * cell.N / 64
    boxes = cell.B * (cell.N / 4096 + 2 * leaves) / 32 * BOX / C["issue"]
    return {
        "boxes": 2 * C["hbm_trip"] + boxes,
        "codes": 2 * C["hbm_trip"]
        + overlapped(_memory(cell, 1024 * leaves), leaves * leaf / C["issue"]),
    }


def touched(rows: int) -> float:
    """Return which part of N codes a query is expected to touch under boxes."""
    base = rows // gpu_cells.ALIASED.get(rows, 1)
    known = sorted(TOUCHED)
    low = max([n for n in known if n <= base], default=known[0])
    high = min([n for n in known if n >= base], default=known[-1])
    share = 0.0 if low == high else math.log(base / low) / math.log(high / low)
    found = TOUCHED[low] ** (1 - share) * TOUCHED[high] ** share
    return min(1.0, found)


def _cuda_codes(cell: Cell) -> dict[str, float]:
    leaf = CUDA_CODES_LEAF["linear" if cell.path in LINEAR else "boxes"]
    # The book, the query beside the rows, the ticket; then the sums, the turn, and four for it.
    encoding = 2 * C["hbm_trip"] + C["ticket"] + 6 * C["l2_trip"]
    return {
        "nodes": C["node"] + C["early_node"],
        "encoding": encoding,
        **_scanning(cell, leaf, max),  # four leaves are in flight
        "deciding": C["ticket"] + C["decide"],
    }


def _triton_codes(cell: Cell) -> dict[str, float]:
    """Encode, collect, decide, and a node for what is in doubt, which ends at once."""
    deciding = {"deciding": C["decide"] + 3 * C["hbm_trip"]}
    nodes = {"nodes": 4 * C["node"]}
    return nodes | _encoding(cell) | _scanning(cell, TRITON_CODES_LEAF, _half_hidden) | deciding


def _tiles(cell: Cell) -> dict[str, float]:
    """Tiles of queries and keys, which the second-level cache has to deliver."""
    queries, keys = (128, 256) if cell.B >= 128 else (64, 128)
    groups = math.ceil(cell.B / queries)
    delivered = groups * cell.N / keys * (queries + keys) * cell.D * 2 / C["l2_bandwidth"]
    multiplied = 2 * queries * groups * cell.N * cell.D / C["tensor"]
    return {
        "nodes": 4 * C["node"],
        "tiles": max(delivered, multiplied, _memory(cell, cell.key_bytes)),
        "deciding": 2 * C["decide"],
    }


def _code_tiles(cell: Cell) -> dict[str, float]:
    scanned = 340.0 * cell.B / 4096 * cell.N / 1e6  # 156 instructions for 8 192 products
    return {
        "nodes": 4 * C["node"],
        **_encoding(cell),
        "tiles": max(scanned, _memory(cell, 36 * cell.N)),
        "deciding": 2 * C["decide"],
    }


def _auto(cell: Cell) -> dict[str, float]:
    """CUDA by codes, through the public call."""
    return _cuda_codes(Cell(cell.stage, BOXES[0], cell.N, cell.D, cell.B, cell.dtype))


def _answering(cell: Cell) -> dict[str, float]:
    if cell.asks == SUMS:
        return {"S": C["canonical"] * cell.D}
    if cell.asks == WRITTEN:
        has_own_node = cell.path.startswith("triton")
        return {"writing": C["hbm_trip"] + (C["node"] if has_own_node else 0.0)}
    return {}


def limit(cell: Cell) -> float:
    """Return what a path of ours takes at least: its bytes by the bandwidth, or its products."""
    if "dense" in cell.path:
        return _memory(cell, cell.key_bytes)
    if cell.path == gpu_cells.TILES:
        products = 2 * cell.B * cell.N * cell.D / C["tensor"]
        return max(products, _memory(cell, cell.key_bytes))
    if cell.path == gpu_cells.CODE_TILES or cell.path in LINEAR:
        return _memory(cell, (16 if cell.path in LINEAR else 36) * cell.N)
    return _memory(cell, 1024 * cell.B * touched(cell.N) * cell.N / 64)


_OURS = {
    gpu_cells.CUDA_DENSE: _cuda_dense,
    gpu_cells.TRITON_DENSE: _triton_dense,
    **{path: _cuda_codes if "cuda" in path else _triton_codes for path in (*LINEAR, *BOXES)},
    gpu_cells.TILES: _tiles,
    gpu_cells.CODE_TILES: _code_tiles,
    gpu_cells.AUTO: _auto,
}


# Peers and the machine.


def _product(cell: Cell) -> dict[str, float]:
    multiplied = 2 * max(16, cell.B) * cell.N * cell.D / C["tensor"]
    table = 2 * 2 * cell.B * cell.N / C["bandwidth"]  # [B, N] in the keys' type, there and back
    keys = max(multiplied, _memory(cell, cell.key_bytes))
    return {"nodes": 4 * C["node"], "product": keys, "minimum": table}


def _fused(cell: Cell) -> dict[str, float]:
    block = min(128, max(16, 1 << (cell.B - 1).bit_length()))
    groups = math.ceil(cell.B / block)
    delivered = groups * cell.N / 128 * (block + 128) * cell.D * 2 / C["l2_bandwidth"]
    multiplied = 2 * block * groups * cell.N * cell.D / (0.7 * C["tensor"])
    keys = max(delivered, multiplied, _memory(cell, cell.key_bytes) / 0.85)
    return {"nodes": 6 * C["node"], "tiles": keys}


def _float32(cell: Cell) -> dict[str, float]:
    """A library's float32 product and its selection of the nearest."""
    multiplied = 2 * cell.B * cell.N * cell.D / C["float32"]
    keys = max(multiplied, cell.N * cell.D * 4 / C["bandwidth"])
    return {
        "host": C["host_call"],
        "product": keys,
        "selection": 8 * cell.B * cell.N / C["bandwidth"],
    }


_PEERS = {
    gpu_cells.PRODUCT: _product,
    gpu_cells.FUSED: _fused,
    gpu_cells.CUVS: _float32,
    gpu_cells.FAISS: _float32,
}


def _machine(cell: Cell) -> dict[str, float]:
    alone = {
        "bytes read": {"bytes": (4 << 30) / C["bandwidth"]},
        "graph of one node": {"node": C["node"], "start": 3.0},
        "one node": {"node": C["node"]},
        "two nodes": {"nodes": 2 * C["node"]},
        "memset node": {"node": C["memset"]},
        "product of 8192 x 8192": {"product": 2 * 8192**3 / C["tensor"]},
        "layer alone": {"node": C["node"], "weights": 11008 * cell.D * 2 / C["bandwidth"]},
    }
    return alone[cell.path]


def _beside(cell: Cell) -> dict[str, float]:
    """What a look-up adds to a layer: bytes that compete, and blocks that wait for their place."""
    reads = cell.key_bytes / C["bandwidth"] if "dense" in cell.path else 0.0
    return {"waiting": 8.0 if cell.path.startswith("cuda") else 13.0, "bytes": reads}
