"""Every key read, for few queries: whether each is in the ball of its nearest key.

    limit = min(above(widest radius squared), above(least float32 sum))

`scan_keys`: programs share the keys, in blocks of ROWS rows, and each keeps its best two in float32
as packed pairs. `decide`: one program takes one query and the best pairs of all programs. Those
within `limit` are summed again in the canonical order; where a program's second best is within it
too, all of its rows are looked through again.

A packed minimum alone would lose what the bound needs: row 5 at 1 + 1e-9 beats row 1000 at 1. Ties:
the lowest row. Masks: rows past N, removed rows and queries past B are NONE. N is read from the
device, nothing is specialised on it, and nothing waits for the host.
"""

# A tuple of tensors grows in a loop that is unrolled.
# mypy: disable-error-code="assignment"
import torch
import triton
import triton.language as tl
from grace_fast.kernels.exact import (
    NONE,
    Found,
    Keys,
    above,
    above_every_ball,
    any_of,
    bits_of,
    distance_of,
    float_sums,
    in_ball,
    is_finite,
    is_live,
    nearer_of,
    nearest_of_rows,
    packed,
    radius_of,
    slots_of,
    sure_of,
    write_verdict,
)
from grace_fast.kernels.nearest import OPTIONS
from torch import Tensor

# By room for rows: up to so many rows, rows of a block and columns read at a time. Not measured.
TILES = ((4096, 8, 256), (1 << 62, 32, 64))
WARPS = 4  # with these tiles a lane adds 16 numbers of a row at most before lanes are added
STAGES = tl.constexpr(4)  # chunks in flight; not measured
PROGRAMS_PER_PROCESSOR = 4  # not measured
MOST_TOGETHER = 4  # queries that share a read of the keys; arithmetic outweighs memory beyond


@triton.jit
def asked_for(doubtful, query, here) -> tl.tensor:
    """Tell which queries are to be looked up: all, or those that another look-up gave up."""
    return here if doubtful is None else tl.load(doubtful + query, mask=here, other=0) != 0


@triton.jit(do_not_specialize=["batch", "programs"])
def scan_keys(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    doubtful,  # [B] int32, not 0 for the queries to look up; None for all
    best,  # [B, programs] int64 packed, written
    second,  # [B, programs] int64 packed, written
    batch,  # B
    programs,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """Write the best two of TOGETHER queries among every programs-th block of ROWS rows."""
    # Queries run fastest: the programs that read the same keys are close in time.
    groups = tl.cdiv(batch, TOGETHER)
    program = tl.program_id(0) // groups
    first_query = (tl.program_id(0) % groups).to(tl.int64) * TOGETHER
    query = first_query + tl.arange(0, TOGETHER)
    if not any_of(asked_for(doubtful, query, query < batch)):
        return
    width, rows = keys.width, tl.load(keys.rows)
    firsts, seconds = (), ()
    for _ in tl.static_range(TOGETHER):
        firsts += (tl.full((ROWS,), NONE, dtype=tl.int64),)
        seconds += (tl.full((ROWS,), NONE, dtype=tl.int64),)
    for at in range(program.to(tl.int64) * ROWS, rows, programs.to(tl.int64) * ROWS):
        row = at + tl.arange(0, ROWS)
        here = is_live(keys, row, row < rows)
        slot = slots_of(keys, row, here)
        totals = ()
        for _ in tl.static_range(TOGETHER):
            totals += (tl.zeros((ROWS, CHUNK), dtype=tl.float32),)
        for first in tl.range(0, width, CHUNK, num_stages=STAGES):
            j = first + tl.arange(0, CHUNK)
            k = tl.load(
                keys.slots + slot[:, None] * width + j[None, :],
                mask=here[:, None] & (j < width)[None, :],
                other=0,
            ).to(tl.float32)
            sums = ()
            for i in tl.static_range(TOGETHER):
                one = tl.minimum(first_query + i, batch - 1)
                q = tl.load(queries + one * width + j, mask=j < width, other=0)
                difference = q.to(tl.float32)[None, :] - k
                sums += (totals[i] + difference * difference,)
            totals = sums
        nearer, next_nearer = (), ()
        for i in tl.static_range(TOGETHER):
            pair = packed(tl.sum(totals[i], axis=1), row, here)
            next_nearer += (tl.minimum(seconds[i], tl.maximum(firsts[i], pair)),)
            nearer += (tl.minimum(firsts[i], pair),)
        firsts, seconds = nearer, next_nearer
    for i in tl.static_range(TOGETHER):
        least = tl.min(firsts[i], axis=0)
        others = tl.where(firsts[i] == least, seconds[i], firsts[i])
        to = (first_query + i) * programs + program
        tl.store(best + to, least, mask=first_query + i < batch)
        tl.store(second + to, tl.min(others, axis=0), mask=first_query + i < batch)


@triton.jit(do_not_specialize=["programs"])
def decide(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    doubtful,  # [B] int32, not 0 for the queries to decide; None for all
    best,  # [B, programs] int64 packed
    second,  # [B, programs] int64 packed
    found,  # written
    programs,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of two, >= programs
    SUMS: tl.constexpr,  # whether the canonical S of a hit is wanted
) -> None:
    """Write the verdict on one query, given the best two rows of each program."""
    query = tl.program_id(0).to(tl.int64)
    if not asked_for(doubtful, query, query >= 0):
        return
    lane, width = tl.arange(0, PROGRAMS), keys.width
    firsts = tl.load(best + query * programs + lane, mask=lane < programs, other=NONE)
    seconds = tl.load(second + query * programs + lane, mask=lane < programs, other=NONE)
    least = tl.min(firsts, axis=0)
    limit = tl.minimum(above_every_ball(keys), above(distance_of(least), width))
    within = (bits_of(tl.maximum(limit, 0.0)) << 32) | 0xFFFFFFFF  # at most `limit`
    is_hit = query < 0  # false, as a tensor
    nearest = query - query - 1
    nearest_squared = nearest.to(tl.float64)
    vector = queries + query * width
    # False for NONE, which is a NaN.
    if distance_of(least) <= limit and is_finite(vector, width, CHUNK):
        nearest = least & 0xFFFFFFFF
        nearest_squared = distance_of(least).to(tl.float64)
        sure, is_hit = sure_of(distance_of(least), radius_of(keys, nearest), width, SUMS)
        open_ = firsts <= within
        alone = tl.sum((open_ | (seconds <= within)).to(tl.int32), axis=0) == 1
        alone = alone & (not any_of(seconds <= within))
        if not (alone & sure):
            rows = tl.load(keys.rows)
            nearest = query - query - 1
            nearest_squared = float("inf") - nearest.to(tl.float64)
            while any_of(open_):
                # The program of the least pair that is left: its own row, or all of its rows.
                taken = tl.min(tl.where(open_, firsts, NONE), axis=0)
                mine = open_ & (firsts == taken)
                open_ = open_ & (firsts != taken)
                program = tl.max(tl.where(mine, lane, 0), axis=0).to(tl.int64)
                whole = any_of(mine & (seconds <= within))
                first = tl.where(whole, program * ROWS, taken & 0xFFFFFFFF)
                last = tl.where(whole, rows, first + 1)
                for at in range(first, last, programs.to(tl.int64) * ROWS):
                    row = at + tl.arange(0, ROWS)
                    here = is_live(keys, row, row < last)
                    slot = slots_of(keys, row, here)
                    here = here & (float_sums(vector, keys, slot, here, ROWS, CHUNK) <= limit)
                    if any_of(here):
                        exact, exact_row = nearest_of_rows(vector, keys, row, slot, here, ROWS)
                        nearest_squared, nearest = nearer_of(
                            nearest_squared, nearest, exact, exact_row
                        )
            is_hit = in_ball(nearest_squared, radius_of(keys, nearest))
    write_verdict(found, query, is_hit, nearest, nearest_squared)


def tile_of(keys: Keys) -> tuple[int, int]:
    """Return the rows of a block and the columns read at a time."""
    return next((rows, chunk) for most, rows, chunk in TILES if keys.capacity <= most)


def programs_of(keys: Keys, groups: int) -> int:
    """Return among how many programs the keys are shared, for so many groups of queries."""
    blocks = triton.cdiv(max(1, keys.capacity), tile_of(keys)[0])
    room = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(keys), groups)
    return int(max(1, min(blocks, room)))


def processors(keys: Keys) -> int:
    """Return how many multiprocessors the device has; 1 for the interpreter."""
    device = keys.slots.device
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def find(
    queries: Tensor,
    keys: Keys,
    doubtful: Tensor | None = None,
    into: Found | None = None,
    sums: bool = True,
) -> Found:
    """Return whether each query [B, D] is in the ball of its nearest key, by the law (R64).

    queries: contiguous, on the keys' device, B at least 1. doubtful: [B] int32; queries where it is
    0 are left alone, so that `into` keeps what it says of them. Without `sums` the S of a hit is
    the law's only to within float32.
    """
    found = Found.room(queries) if into is None else into
    batch = len(queries)
    rows, chunk = tile_of(keys)
    together = min(MOST_TOGETHER, triton.next_power_of_2(batch))
    groups = triton.cdiv(batch, together)
    programs = programs_of(keys, groups)
    best, second = (queries.new_empty(batch, programs, dtype=torch.int64) for _ in range(2))
    with torch.cuda.device_of(queries):
        scan_keys[(programs * groups,)](
            queries,
            keys,
            doubtful,
            best,
            second,
            batch,
            programs,
            ROWS=rows,
            CHUNK=chunk,
            TOGETHER=together,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        decide[(batch,)](
            queries,
            keys,
            doubtful,
            best,
            second,
            found,
            programs,
            ROWS=rows,
            CHUNK=chunk,
            PROGRAMS=triton.next_power_of_2(programs),
            SUMS=sums,
            num_warps=WARPS,
            **OPTIONS,
        )
    return found
