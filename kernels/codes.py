"""The proved look-up on a GPU: most misses are proved from a few code bytes a key.

    encode   one program a query and 16 slots: z(q), and everything that may be wrong with it
    collect  one program a query and a share: level-2 nodes -> leaves -> near codes -> far codes ->
             the query's ring; for many queries tensor cores read all positions (`code_tiles`)
    decide   one program a query: float32 sums, canonical sums within their bound, the verdict
    doubtful the device's programs: what was given up, among all keys; they end where nothing was

Each step drops only keys that are farther than the `leaf_max_radius` of their leaf, so the nearest
key of those left is the nearest of all if it is in its ball within `min_radius`, which every
leaf_max_radius is at least. A hit farther than that is looked up once more, everywhere, at its own
distance, unless it is isolated. `grace_fast/index/quantizer.py` has the proof and `csrc/lookup.h`
the contract; both are kept to the letter.

Ties: the lowest row (`ring.settle`). Masks: positions without a row count for nothing. A query that
is not finite is a miss, as `encode` writes. One too large for float32, or with more candidates than
its ring holds, is doubtful: `doubtful.find` looks it up among all keys.

Four launches. They are specialised on types, the width, the kind of codes and the size of a ring;
never on B or N. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from grace_fast.kernels import code_tiles, dense, doubtful, launch
from grace_fast.kernels.code_layout import NODE, Codes
from grace_fast.kernels.code_thresholds import (
    MIN_RADIUS,
    box_sums,
    largest_sum,
    query_threshold,
    root,
    threshold_of,
    within_thresholds,
)
from grace_fast.kernels.encode import encoded
from grace_fast.kernels.exact import Found, Keys, any_of, slack_of, write_verdict
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import WARPS, Ring, append, of_query, settle
from torch import Tensor

RING = 1024  # candidates of a query; more and it is doubtful
NODES = tl.constexpr(8)  # level-2 nodes tested together; neighbours go to different programs
LINEAR = tl.constexpr(256)  # positions without boxes that a program reads together
PROGRAMS_PER_PROCESSOR = 16  # of one warp; not measured
REGISTERS = 168  # of a lane of `decide`: three programs to a multiprocessor


@triton.jit
def radius_at(radius, index, here, distance) -> tl.tensor:
    """Return the radius at each index as float64, or `distance` everywhere where that is >= 0."""
    known = tl.load(radius + index, mask=here, other=0).to(tl.float64)
    return tl.where(distance < 0, known, distance)


@triton.jit
def touched(boxes, radius, index, here, point, distance, threshold) -> tl.tensor:
    """Tell which boxes a key within their radius, or within `distance`, may be in."""
    within = radius_at(radius, index, here, distance)
    limit = largest_sum(within, threshold.slope, threshold.near)
    return here & (box_sums(boxes, index, here, point) <= limit)


@triton.jit
def scan(position, here, radius, threshold, codes, words, ring) -> None:
    """Append the positions whose codes are within the thresholds of their radius [n] float64."""
    keep = within_thresholds(position, here, radius, threshold, codes, words)
    if any_of(keep):
        append(ring, position.to(tl.int32), keep)


@triton.jit
def collect_share(
    query,
    asked,
    codes,
    keys,
    ring,
    program,
    programs,
    distance,  # float64: what is nearer is collected; < 0: what is within the radius of its leaf
    skip_ordered,
) -> None:
    """Append to a query's ring what one of `programs` programs finds."""
    ring, words = of_query(ring, query), asked.words + query * 16
    own = query_threshold(asked, query, codes)
    nodes = tl.load(codes.counts + 1)
    point = tl.load(asked.point + query * 16 + tl.arange(0, 16)).to(tl.int32)[None, :]
    threshold = threshold_of(own, codes, 0)
    groups = tl.cdiv(nodes, NODES)
    for group in range(program.to(tl.int64), tl.where(skip_ordered, 0, groups), programs):
        node = group + tl.arange(0, NODES) * groups
        open_node = touched(
            codes.node_boxes, codes.node_max_radius, node, node < nodes, point, distance, threshold
        )
        while any_of(open_node):
            first_node = tl.min(tl.where(open_node, node, nodes), axis=0)
            open_node = open_node & (node != first_node)
            leaf = first_node * 64 + tl.arange(0, 64)
            open_leaf = touched(
                codes.leaf_boxes, codes.leaf_max_radius, leaf, leaf >= 0, point, distance, threshold
            )
            while any_of(open_leaf):
                first_leaf = tl.min(tl.where(open_leaf, leaf, nodes * 64), axis=0)
                open_leaf = open_leaf & (leaf != first_leaf)
                position = first_leaf * 64 + tl.arange(0, 64)
                radius = radius_at(codes.leaf_max_radius, first_leaf, first_leaf >= 0, distance)
                scan(position, position >= 0, radius, threshold, codes, words, ring)
    start = nodes * 4096
    stop = start + tl.load(codes.counts + 2)
    threshold = threshold_of(own, codes, 2)
    for first in range(start + program * LINEAR, stop, programs * LINEAR):
        position = first + tl.arange(0, LINEAR)
        here = position < stop
        radius = radius_at(codes.leaf_max_radius, position // 64, here, distance)
        scan(position, here, radius, threshold, codes, words, ring)
    # Rows that have no code yet are read as they are.
    rows = tl.load(keys.rows)
    for first in range(tl.load(codes.counts) + program * LINEAR, rows, programs * LINEAR):
        row = first + tl.arange(0, LINEAR)
        append(ring, (-1 - row).to(tl.int32), row < rows)


@triton.jit(do_not_specialize=["batch", "programs"])
def collect(
    asked,  # Query, what `encode` wrote
    codes,
    keys,
    ring,  # appended to
    batch,  # B
    programs,
) -> None:
    """Append what may be the nearest key of one query to its ring: a program's share of it."""
    query = (tl.program_id(0) % batch).to(tl.int64)
    if tl.load(ring.doubtful + query) != 0:
        return
    nowhere = -1.0 - tl.load(codes.numbers + MIN_RADIUS)  # below 0: every leaf has its own radius
    share = tl.program_id(0) // batch
    collect_share(query, asked, codes, keys, ring, share, programs, nowhere, query < 0)


@triton.jit
def decide(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    asked,  # Query, what `encode` wrote
    codes,
    ring,  # `doubtful` is set where the ring was too small
    found,  # written
    SUMS: tl.constexpr,
) -> None:
    """Write the verdict on one query from its ring, after a second collection where one is due."""
    query = tl.program_id(0).to(tl.int64)
    if tl.load(ring.doubtful + query) != 0:
        return
    min_radius = tl.load(codes.numbers + MIN_RADIUS)
    distance = -1.0 - min_radius
    is_hit = query < 0  # false, as a tensor
    best_row = query * 0 - 1
    best = distance
    again = query >= 0
    while again:
        entries = tl.atomic_add(ring.entries + query, 0)
        again = query < 0
        if entries > ring.size:
            tl.store(ring.doubtful + query, 1)
            is_hit = query < 0
        else:
            vector = queries + query * keys.width
            is_hit, best_row, best, position = settle(
                vector, keys, ring, query, entries, codes.row, SUMS
            )
            if is_hit & (distance < 0) & (best > min_radius * min_radius):
                # Nothing nearer than a hit may be hidden behind a smaller leaf_max_radius.
                at = codes.isolated + position // 8
                bits = tl.load(at, mask=position >= 0, other=0).to(tl.int32)
                alone = (position >= 0) & (((bits >> (position % 8)) & 1) != 0)
                distance = root(best * (1.0 + 2.0 * slack_of(keys.width)) + 1e-30)
                again = query >= 0
                none = query * 0
                collect_share(query, asked, codes, keys, ring, none, none + 1, distance, alone)
                tl.debug_barrier()  # the ring is read by other lanes than wrote it
    write_verdict(found, query, is_hit, best_row, best)


def programs_of(keys: Keys, codes: Codes, batch: int) -> int:
    """Return among how many programs the codes of one query are shared."""
    nodes = len(codes.node_boxes) - 1
    after = len(codes.row) - nodes * NODE
    most = max(triton.cdiv(nodes, NODES.value), triton.cdiv(after, LINEAR.value), 1)
    room = triton.cdiv(PROGRAMS_PER_PROCESSOR * dense.processors(keys), batch)
    return int(max(1, min(most, room)))


def find(
    queries: Tensor,
    keys: Keys,
    codes: Codes,
    sums: bool = True,
    ring_size: int = RING,
    tiled: bool | None = None,
) -> Found:
    """Return whether each query [B, D] is in the ball of its nearest key, by the law (R64).

    queries: contiguous, on the keys' device, B at least 1. ring_size: room for candidates, a power
    of two. Without `sums` the S of a hit is the law's only to within float32. `tiled` says whether
    tensor cores read the codes; None leaves it to how many queries there are.
    """
    queries = launch.aligned(queries)
    batch = len(queries)
    found = Found.room(queries)
    ring = Ring.room(batch, ring_size, queries.device)
    # Left alone, ptxas takes 128 registers for `decide` and spills.
    options = {"num_warps": WARPS, **OPTIONS} | ({"maxnreg": REGISTERS} if codes.native else {})
    with torch.cuda.device_of(queries):
        asked = encoded(queries, codes, ring, found)
        if batch >= code_tiles.TILED if tiled is None else tiled:
            code_tiles.collect(asked, codes, keys, ring, dense.processors(keys))
        else:
            programs = programs_of(keys, codes, batch)
            collect[(programs * batch,)](
                asked, codes, keys, ring, batch, programs, num_warps=1, **OPTIONS
            )
        decide[(batch,)](queries, keys, asked, codes, ring, found, SUMS=sums, **options)
    return doubtful.find(queries, keys, ring.doubtful, found, sums)
