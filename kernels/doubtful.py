"""Every key read, for the few queries of many that another look-up gave up.

Which queries those are is known on the device only. One launch has as many programs as the device
runs at once, and one for each group of TOGETHER queries at least. Each counts the doubtful ones,
and where there are none it ends. Otherwise they share the keys, as `dense` does for queries that
are all asked: the doubtful make groups, each group gets an equal share of the programs, and the one
that finishes last, by a ticket, decides the queries of its group.

The ticket of a group is `doubtful` of its first query: 1 before, and more as programs finish, so
that who is doubtful stays the same meanwhile and nothing has to be set to 0. Ties and masks are
those of `dense`, and so is what is specialised, but for the number of queries.
"""

import torch
import triton
import triton.language as tl
from grace_fast.kernels.dense import (
    MOST_TOGETHER,
    PROGRAMS,
    PROGRAMS_PER_PROCESSOR,
    WARPS,
    Pairs,
    decide_by_pairs,
    one_of,
    processors,
    tile_of,
    write_best_two,
)
from grace_fast.kernels.exact import Found, Keys
from grace_fast.kernels.nearest import OPTIONS
from torch import Tensor

_SEEN = tl.constexpr(1024)  # queries that are looked through together


@triton.jit
def count_of(doubtful, batch) -> tl.tensor:
    """Return how many queries are doubtful."""
    number = batch * 0
    for first in range(0, batch, _SEEN):
        query = first + tl.arange(0, _SEEN)
        is_doubtful = tl.load(doubtful + query, mask=query < batch, other=0) > 0
        # Chunk by chunk: of a sum over what a loop leaves, Triton 3.9 knows so little that it reads
        # the rows of every program that follows from it 2 bytes at a time.
        number += tl.sum(is_doubtful.to(tl.int32), axis=0)
    return number


@triton.jit
def doubtful_at(doubtful, batch, rank) -> tl.tensor:
    """Return the doubtful queries of the given ranks [n], in ascending order, as int64."""
    chosen = tl.zeros(rank.shape, dtype=tl.int32)
    before = batch * 0
    for first in range(0, batch, _SEEN):
        query = first + tl.arange(0, _SEEN)
        is_doubtful = tl.load(doubtful + query, mask=query < batch, other=0) > 0
        ranks = before + tl.cumsum(is_doubtful.to(tl.int32), axis=0) - 1
        is_it = is_doubtful[:, None] & (ranks[:, None] == rank[None, :])
        chosen += tl.sum(tl.where(is_it, query[:, None], 0), axis=0)
        before = tl.max(ranks, axis=0) + 1
    return chosen.to(tl.int64)


@triton.jit(do_not_specialize=["batch"])
def look_up_doubtful(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    doubtful,  # [B] int32, 1 for the queries to look up, not above 0 for others; counted up
    pairs,  # scratch
    found,  # written, of these queries
    batch,  # B
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Take a share of the keys for the doubtful queries; decide those that it is the last for."""
    number = count_of(doubtful, batch)
    groups = tl.maximum(tl.cdiv(number, TOGETHER), 1)
    blocks = tl.minimum(tl.cdiv(tl.load(keys.rows), ROWS), PROGRAMS).to(tl.int32)
    programs = tl.maximum(tl.minimum(tl.num_programs(0) // groups, blocks), 1)
    # Groups run fastest: the programs that read the same keys are close in time.
    group, program = tl.program_id(0) % groups, tl.program_id(0) // groups
    if (program < programs) & (number > 0):
        # The last group repeats a query where it is short of them.
        rank = tl.minimum(group * TOGETHER + tl.arange(0, TOGETHER), number - 1)
        query = doubtful_at(doubtful, batch, rank)
        to = group * programs
        write_best_two(
            queries, keys, query, pairs, to + program, program, programs, ROWS, CHUNK, TOGETHER
        )
        tl.debug_barrier()  # the ticket is drawn by one lane, for what all have written
        ticket = tl.atomic_add(doubtful + one_of(query, 0), 1, sem="acq_rel")
        if ticket == programs:
            tl.debug_barrier()
            for i in range(0, tl.minimum(number - group * TOGETHER, TOGETHER)):
                decide_by_pairs(
                    queries,
                    keys,
                    one_of(query, i),
                    pairs,
                    to * TOGETHER + i,
                    programs,
                    found,
                    ROWS,
                    TOGETHER,
                    PROGRAMS,
                    SUMS,
                )


def find(queries: Tensor, keys: Keys, doubtful: Tensor, found: Found, sums: bool = True) -> Found:
    """Return `found` with the verdict, by the law (R64), on queries [B, D] where `doubtful` is 1.

    It keeps what it says of the others. doubtful: [B] int32, above 0 afterwards where it was;
    queries: contiguous, beginning at a multiple of 16 bytes, on the keys' device.
    """
    groups = triton.cdiv(len(queries), MOST_TOGETHER)
    programs = max(PROGRAMS_PER_PROCESSOR * processors(keys), groups)
    pairs = Pairs.room(programs, MOST_TOGETHER, queries.device)
    with torch.cuda.device_of(queries):
        look_up_doubtful[(programs,)](
            queries,
            keys,
            doubtful,
            pairs,
            found,
            len(queries),
            **tile_of(keys.width, MOST_TOGETHER),
            PROGRAMS=PROGRAMS,
            SUMS=sums,
            num_warps=WARPS,
            **OPTIONS,
        )
    return found
