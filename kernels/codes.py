"""The certified look-up on a GPU: most misses are proved from a few code bytes a key.

    encode   one program a query and 16 slots: z(q), and everything that may be wrong with it
    collect  super boxes -> leaf boxes -> near codes -> far codes -> the query's ring; for many
             queries tensor cores read all positions for it (`code_tiles`)
    decide   one program a query: float32 sums, canonical sums within their band, the verdict

`grace_fast/codes.py` has the proof and `csrc/lookup.h` the contract; both are kept to the letter.
Each step drops only keys that are farther than the reach of their leaf, so the nearest key of those
left is the nearest of all if it is in its ball within `floor`, which every reach is at least. A hit
farther than that is looked up once more, everywhere, at its own distance, unless it is isolated.

A query too large for float32, not finite, or with more candidates than its ring holds is doubtful:
`dense.find` looks it up among all keys. Nothing waits for the host, and nothing is specialised on
how many keys there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from grace_fast.kernels import code_tiles, dense
from grace_fast.kernels.code_cuts import (
    ERRORS,
    ETA,
    FLOOR,
    LIPSCHITZ,
    NOTES,
    PER_STEP,
    ROW_NORM,
    SLOPE,
    box_sums,
    cut_of,
    query_errors,
    root,
    within_cuts,
)
from grace_fast.kernels.exact import Found, Keys, any_of, slack_of, write_verdict
from grace_fast.kernels.nearest import CHUNK_BYTES, OPTIONS
from grace_fast.kernels.ring import CHUNK, LANES, WARPS, append, settle
from torch import Tensor

NEAR, FAR, SLOTS = 16, 48, 64
LEAF = 64  # keys of a leaf, and leaves of a super leaf
RING = 1024  # candidates of a query; more and it is looked up densely
SUPERS = 8  # super leaves that a program tests together; neighbours go to different programs
LINEAR = 256  # positions without boxes that a program reads together
PROGRAMS_PER_PROCESSOR = 16  # of one warp; not measured

REGISTERS = 168  # of a lane of `decide`: three programs to a multiprocessor
ENCODE_CHUNK, ENCODE_WARPS = 256, 8  # a lane adds 16 numbers of a row, then lanes are added
_UNIT = tl.constexpr(2.0**-24)
_SLOT_LIMIT = tl.constexpr(2.0**21)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it leaves a whole number
_POINT_LIMIT = tl.constexpr(16000)


@dataclass(frozen=True, eq=False)
class DeviceCodes:
    """A certificate as the kernels read it: the map, and one space of positions.

    The ordered positions come first, whole super leaves of them; what has no boxes follows. A
    position that nothing uses has row -1.
    """

    centre: Tensor  # [Dp] float32
    rows: Tensor  # [64, Dp] bfloat16, in order
    turn: Tensor  # [16, 16] float64
    numbers: Tensor  # [10] float64: PER_STEP .. ERRORS + 3
    counts: Tensor  # [3] int64: rows with a position, super leaves, positions after them
    near: Tensor  # [positions, 4] int32, four code bytes each
    far: Tensor  # [positions, 12] int32
    row: Tensor  # [positions] int32
    folded: Tensor  # [positions + 64, 32] int8, what `code_tiles` multiplies
    half_norm: Tensor  # [positions + 64] int32, half the squares of their norms
    reach: Tensor  # [leaves] float32
    super_reach: Tensor  # [supers] float32
    leaf_boxes: Tensor  # [leaves in order, 2, 16] int16, low and high
    super_boxes: Tensor  # [supers, 2, 16] int16
    isolated: Tensor  # [positions / 8] uint8; bits of ordered positions only
    norm_slot: bool
    has_far: bool

    @property
    def nbytes(self) -> int:
        """The memory that it takes on the device."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what lies on the device, by name."""
        return {name: field for name, field in vars(self).items() if isinstance(field, Tensor)}


def device_codes(
    phi: Any,
    parts: list[Any],
    covered: int,
    floor: float,
    device: torch.device | str,
    room: int = 0,
) -> DeviceCodes:
    """Return a host certificate as tensors on a device.

    phi: codes.Map; parts: order.Part, every run and then the tail; covered: rows below have a
    position; floor: every reach is at least this; room: positions to keep for the tail to grow.
    """
    ordered = [part for part in parts if part.leaf_boxes is not None]
    linear = [part for part in parts if part.leaf_boxes is None]
    supers = sum(_whole(part.count, LEAF * LEAF) // (LEAF * LEAF) for part in ordered)
    near_error, far_error = _errors(ordered)
    near_linear, far_linear = _errors(linear)
    laid = [_laid_out(part, _whole(part.count, LEAF * LEAF)) for part in ordered]
    laid += [_laid_out(part, _whole(part.count, LEAF)) for part in linear[:-1]]
    laid += [_laid_out(part, max(_whole(part.count, LEAF), room)) for part in linear[-1:]]
    positions = sum(len(fields["row"]) for fields in laid)
    boxes = [
        _box_rows(part.leaf_boxes, _whole(part.count, LEAF * LEAF) // LEAF) for part in ordered
    ]
    super_boxes = [
        _box_rows(part.node_boxes, _whole(part.count, LEAF * LEAF) // (LEAF * LEAF))
        for part in ordered
    ]
    # Steps for a unit, a power of two, and steps for a unit of radius.
    numbers = [1 / phi.step, phi.lipschitz * (1 + 1e-6) / phi.step]
    numbers += [phi.lipschitz, phi.row_norm, phi.eta, floor]
    numbers += [near_error, far_error, near_linear, far_linear]
    padded = phi.padded_centre
    rows = torch.zeros(SLOTS, len(padded), dtype=torch.bfloat16, device="cpu")
    rows[:, : phi.rows.shape[1]] = phi.rows
    fields = {name: torch.cat([part[name] for part in laid]) for name in laid[0]}
    fields |= {
        "centre": padded,
        "rows": rows,
        "turn": phi.turn.contiguous(),
        "numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu"),
        "counts": torch.tensor([0, supers, 0], dtype=torch.int64, device="cpu"),
        "leaf_boxes": torch.cat([*boxes, torch.zeros(1, 2, NEAR, dtype=torch.int16, device="cpu")]),
        "super_boxes": torch.cat(
            [*super_boxes, torch.zeros(1, 2, NEAR, dtype=torch.int16, device="cpu")]
        ),
        "super_reach": torch.zeros(supers + 1, dtype=torch.float32, device="cpu"),
        "isolated": torch.zeros(max(1, positions // 8), dtype=torch.uint8, device="cpu"),
    }
    moved = {name: field.to(device) for name, field in fields.items()}
    moved |= code_tiles.folded_room(positions, device)
    made = DeviceCodes(**moved, norm_slot=phi.norm_slot, has_far=phi.far)
    code_tiles.fold_positions(made, 0, positions)
    assert refresh(made, parts, covered)
    return made


def refresh(codes: DeviceCodes, parts: list[Any], covered: int) -> bool:
    """Bring what changes about the same parts to the device: reaches, isolated bits, the tail.

    Every earlier version may still be looked up: reaches only grow, bits are only cleared, and the
    tail grows where those versions have no rows. False where the tail has no room.
    """
    ordered = [part for part in parts if part.leaf_boxes is not None]
    linear = [part for part in parts if part.leaf_boxes is None]
    at = at_super = 0
    for part in ordered:
        leaves = _whole(part.count, LEAF) // LEAF
        supers = _whole(part.count, LEAF * LEAF) // (LEAF * LEAF)
        codes.reach[at // LEAF :][:leaves] = torch.from_numpy(part.leaf_max_radius[:leaves])
        codes.super_reach[at_super:][:supers] = torch.from_numpy(part.node_max_radius[:supers])
        at, at_super = at + supers * LEAF * LEAF, at_super + supers
    # Of several ordered runs an isolated key of one says nothing about the others.
    if len(ordered) == 1 and ordered[0].isolated is not None:
        bits = ordered[0].isolated
        codes.isolated[: len(bits)] = torch.from_numpy(bits)
    first = at
    for part in linear:
        whole = _whole(part.count, LEAF)
        if at + whole > len(codes.row):
            return False
        here = slice(at // LEAF, (at + whole) // LEAF)
        codes.reach[here] = torch.from_numpy(part.leaf_max_radius[: whole // LEAF])
        at += whole
    if linear:
        tail, whole = linear[-1], _whole(linear[-1].count, LEAF)
        laid = _laid_out(tail, whole)
        for name in ("near", "far", "row"):
            getattr(codes, name)[at - whole : at] = laid[name]
        code_tiles.fold_positions(codes, at - whole, at)
    codes.counts[2] = at - first
    codes.counts[0] = covered
    return True


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step


def _errors(parts: list[Any]) -> tuple[float, float]:
    near = max((part.near_error for part in parts), default=0.0)
    return near, max((part.far_error for part in parts), default=0.0)


def _laid_out(part: Any, room: int) -> dict[str, Tensor]:
    """Return the codes of a part, key by key, with room for so many positions."""
    count = part.count
    leaves = _whole(count, LEAF)
    blocks = torch.from_numpy(part.near[: leaves // NEAR])  # [blocks, 4, 16 keys, 4]
    near = torch.zeros(room, NEAR, dtype=torch.uint8, device="cpu")
    near[:leaves] = blocks.transpose(1, 2).reshape(-1, NEAR)
    far = torch.zeros(room, FAR, dtype=torch.uint8, device="cpu")
    far[:leaves] = torch.from_numpy(part.far[:leaves])
    row = torch.full((room,), -1, dtype=torch.int32, device="cpu")
    row[:count] = torch.from_numpy(part.rows[:count])
    reach = torch.zeros(room // LEAF, dtype=torch.float32, device="cpu")
    reach[: leaves // LEAF] = torch.from_numpy(part.leaf_max_radius[: leaves // LEAF])
    words = (near.view(torch.int32), far.view(torch.int32))
    return {"near": words[0], "far": words[1], "row": row, "reach": reach}


def _box_rows(boxes: Any, count: int) -> Tensor:
    """Return `count` boxes [count, 2, 16] of groups of 16; the room after them is far away."""
    groups = torch.from_numpy(boxes)  # [groups, 8 slot pairs, 2, 16 boxes, 2]
    known = groups.permute(0, 3, 2, 1, 4).reshape(-1, 2, NEAR)[:count]
    away = torch.full((count - len(known), 2, NEAR), 32000, dtype=torch.int16, device="cpu")
    return torch.cat([known, away])


@triton.jit(do_not_specialize=["width"])
def encode(
    queries,  # [B, D] fp32, bf16 or fp16
    centre,  # [Dp] float32
    rows,  # [64, Dp] bfloat16
    turn,  # [16, 16] float64
    numbers,  # float64
    code,  # [B, 64] uint8, written
    point,  # [B, 16] int16, written
    notes,  # [B, 8] float64, written
    doubtful,  # [B] int32, written
    entries,  # [B] int32, set to 0
    width,  # D
    padded,  # Dp
    NORM_SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write the codes of 16 slots of one query, and what may be wrong with them."""
    query = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    slot = tl.arange(0, 16)
    sums = tl.zeros((16, CHUNK), dtype=tl.float32)
    squares = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in tl.range(0, padded, CHUNK, num_stages=3):
        j = first + tl.arange(0, CHUNK)
        q = tl.load(queries + query * width + j, mask=j < width, other=0).to(tl.float32)
        x = q - tl.load(centre + j, mask=j < padded, other=0)
        at = (group * 16 + slot)[:, None] * padded + j[None, :]
        w = tl.load(rows + at, mask=(j < padded)[None, :], other=0).to(tl.float32)
        sums += w * x[None, :]
        squares += x * x
    square = tl.sum(squares, axis=0).to(tl.float64)
    known = square < 1e30  # false for NaN
    if group == 0:
        tl.store(doubtful + query, tl.where(known, 0, 1))
        tl.store(entries + query, 0)
    if not known:
        return
    per_step = tl.load(numbers + PER_STEP)
    lipschitz, row_norm = tl.load(numbers + LIPSCHITZ), tl.load(numbers + ROW_NORM)
    norm = tl.sqrt(square) * 1.0001 + 1e-16
    relative = (48.0 + width / 256.0) * (_UNIT * 1.0001)
    value = tl.sum(sums, axis=1).to(tl.float64)
    residual_note = notes + query * NOTES + 2 + group
    if group > 0:
        whole, residual = rounded(value * per_step)
        tl.store(residual_note, tl.sum(residual, axis=0))
        tl.store(code + query * 64 + group * 16 + slot, (whole & 255).to(tl.uint8))
        return
    far_error = norm * (8.0 * relative * row_norm + _UNIT * lipschitz)
    error = norm * (4.0 * relative * row_norm + _UNIT * lipschitz)
    matrix = tl.load(turn + slot[:, None] * 16 + slot[None, :])  # symmetric
    turned = tl.sum(matrix * value[:, None], axis=0)
    of_rows = slot < (15 if NORM_SLOT else 16)
    if NORM_SLOT:
        inside = tl.sum(tl.where(of_rows, turned * turned, 0.0), axis=0)
        eta = tl.load(numbers + ETA)
        wrong = (relative + 4.0 * _UNIT) * norm * norm + 2.0 * tl.sqrt(inside) * error
        wrong = 1.001 * (wrong + error * error + 2.0 * eta * inside) + 1e-30
        left = tl.sqrt(tl.maximum(square - inside, 0.0))
        apart = wrong / tl.maximum(left, tl.sqrt(wrong)) + left * (2.0 * _UNIT)
        turned = tl.where(of_rows, turned, left)
        error = tl.sqrt(error * error + apart * apart)
    whole, residual = rounded(turned * per_step)
    tl.store(code + query * 64 + slot, (whole & 255).to(tl.uint8))
    clamped = tl.minimum(tl.maximum(whole, -_POINT_LIMIT), _POINT_LIMIT)
    tl.store(point + query * 16 + slot, clamped.to(tl.int16))
    near_error = tl.sqrt(tl.sum(residual, axis=0)) + error * per_step
    tl.store(notes + query * NOTES, near_error)
    tl.store(notes + query * NOTES + 1, far_error * per_step)
    tl.store(residual_note, tl.sum(tl.where(of_rows, residual, 0.0), axis=0))


@triton.jit
def rounded(steps) -> tuple[tl.tensor, tl.tensor]:
    """Return the whole numbers next to float64 steps as int32, and the squares of what is left."""
    t = tl.minimum(tl.maximum(steps, -_SLOT_LIMIT), _SLOT_LIMIT).to(tl.float32)
    whole = (t + _ROUNDER) - _ROUNDER
    apart = (t - whole).to(tl.float64)
    return whole.to(tl.int32), apart * apart


@triton.jit
def reach_at(reach, index, here, distance) -> tl.tensor:
    """Return the reach at each index as float64, or `distance` everywhere where that is >= 0."""
    kept = tl.load(reach + index, mask=here, other=0).to(tl.float64)
    return tl.where(distance < 0, kept, distance)


@triton.jit
def touched(boxes, reach, index, here, point, distance, slope, offset) -> tl.tensor:
    """Tell which boxes a key within their reach, or within `distance`, may be in."""
    limit = cut_of(reach_at(reach, index, here, distance), slope, offset)
    return here & (box_sums(boxes, index, here, point) <= limit)


@triton.jit
def scan_positions(
    position,
    here,
    radius,
    slope,
    near_offset,
    far_offset,
    code,
    near,
    far,
    ring,
    entries,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
    RING: tl.constexpr,
) -> None:
    """Append the positions whose codes are within the cut of their radius [n] float64."""
    keep = within_cuts(
        position,
        here,
        radius,
        slope,
        near_offset,
        far_offset,
        code,
        near,
        far,
        NORM_SLOT,
        HAS_FAR,
        NATIVE,
    )
    if any_of(keep):
        append(ring, entries, position.to(tl.int32), keep, RING)


@triton.jit
def collect_part(
    query,
    program,
    programs,
    distance,  # float64: what is nearer is collected; < 0: what is within the reach of its leaf
    skip_ordered,
    code,
    point,
    notes,
    numbers,
    counts,
    near,
    far,
    reach,
    super_reach,
    leaf_boxes,
    super_boxes,
    count,
    ring,
    entries,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
    RING: tl.constexpr,
    SUPERS: tl.constexpr,
    LINEAR: tl.constexpr,
) -> None:
    """Append to a query's ring what one of `programs` programs finds."""
    code, ring, entries = code + query * 16, ring + query * RING, entries + query
    slope = tl.load(numbers + SLOPE)
    near_error, far_error = query_errors(notes + query * NOTES, HAS_FAR)
    supers = tl.load(counts + 1)
    wanted = tl.load(point + query * 16 + tl.arange(0, 16)).to(tl.int32)[None, :]
    near_offset = near_error + tl.load(numbers + ERRORS)
    far_offset = far_error + tl.load(numbers + ERRORS + 1)
    groups = tl.cdiv(supers, SUPERS)
    for group in range(program.to(tl.int64), tl.where(skip_ordered, 0, groups), programs):
        one = group + tl.arange(0, SUPERS) * groups
        here = one < supers
        open_super = touched(
            super_boxes, super_reach, one, here, wanted, distance, slope, near_offset
        )
        while any_of(open_super):
            chosen = tl.min(tl.where(open_super, one, supers), axis=0)
            open_super = open_super & (one != chosen)
            leaf = chosen * 64 + tl.arange(0, 64)
            open_leaf = touched(
                leaf_boxes, reach, leaf, leaf >= 0, wanted, distance, slope, near_offset
            )
            while any_of(open_leaf):
                first_leaf = tl.min(tl.where(open_leaf, leaf, supers * 64), axis=0)
                open_leaf = open_leaf & (leaf != first_leaf)
                of_leaf = first_leaf * 64 + tl.arange(0, 64)
                scan_positions(
                    of_leaf,
                    of_leaf >= 0,
                    reach_at(reach, first_leaf, first_leaf >= 0, distance),
                    slope,
                    near_offset,
                    far_offset,
                    code,
                    near,
                    far,
                    ring,
                    entries,
                    NORM_SLOT,
                    HAS_FAR,
                    NATIVE,
                    RING,
                )
    start = supers * 4096
    stop = start + tl.load(counts + 2)
    near_offset = near_error + tl.load(numbers + ERRORS + 2)
    far_offset = far_error + tl.load(numbers + ERRORS + 3)
    for first in range(start + program * LINEAR, stop, programs * LINEAR):
        position = first + tl.arange(0, LINEAR)
        scan_positions(
            position,
            position < stop,
            reach_at(reach, position // 64, position < stop, distance),
            slope,
            near_offset,
            far_offset,
            code,
            near,
            far,
            ring,
            entries,
            NORM_SLOT,
            HAS_FAR,
            NATIVE,
            RING,
        )
    # Rows that have no code yet are read as they are.
    rows = tl.load(count)
    for first in range(tl.load(counts) + program * LINEAR, rows, programs * LINEAR):
        row = first + tl.arange(0, LINEAR)
        append(ring, entries, (-1 - row).to(tl.int32), row < rows, RING)


@triton.jit(do_not_specialize=["batch", "programs"])
def collect(
    code,  # [B, 16] int32, the bytes that `encode` wrote
    point,  # [B, 16] int16
    notes,  # [B, 8] float64
    doubtful,  # [B] int32
    numbers,
    counts,
    near,
    far,
    reach,
    super_reach,
    leaf_boxes,
    super_boxes,
    count,  # [1] int64, N
    ring,  # [B, RING] int32, written
    entries,  # [B] int32, added to
    batch,
    programs,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
    RING: tl.constexpr,
    SUPERS: tl.constexpr,
    LINEAR: tl.constexpr,
) -> None:
    """Append what may be the nearest key of one query to its ring: a program's share of it."""
    query = (tl.program_id(0) % batch).to(tl.int64)
    if tl.load(doubtful + query) != 0:
        return
    nowhere = -1.0 - tl.load(numbers + FLOOR)  # below 0: every leaf has its own reach
    collect_part(
        query,
        tl.program_id(0) // batch,
        programs,
        nowhere,
        query < 0,
        code,
        point,
        notes,
        numbers,
        counts,
        near,
        far,
        reach,
        super_reach,
        leaf_boxes,
        super_boxes,
        count,
        ring,
        entries,
        NORM_SLOT,
        HAS_FAR,
        NATIVE,
        RING,
        SUPERS,
        LINEAR,
    )


@triton.jit
def decide(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,  # [slots, D] fp32, bf16 or fp16
    key_slot,  # [capacity] int64 or None
    live,  # [capacity] bool
    radius,  # [capacity] float32
    count,  # [1] int64, N
    widest,  # [1] float32
    code,
    point,
    notes,
    doubtful,  # [B] int32, set where the ring was too small
    numbers,
    counts,
    near,
    far,
    reach,
    super_reach,
    leaf_boxes,
    super_boxes,
    row_at,  # [positions] int32
    isolated,  # [positions / 8] uint8
    ring,  # [B, RING] int32
    entries,  # [B] int32
    sums,  # [B, RING] float32, written: scratch
    hit,  # [B] bool, written
    row,  # [B] int64, written
    squared,  # [B] float64, written
    width,  # D
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
    RING: tl.constexpr,
    SUPERS: tl.constexpr,
    LINEAR: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Write the verdict on one query from its ring, after a second collection where one is due."""
    query = tl.program_id(0).to(tl.int64)
    if tl.load(doubtful + query) != 0:
        return
    floor = tl.load(numbers + FLOOR)
    distance = -1.0 - floor
    is_hit = query < 0  # false, as a tensor
    best_row = query * 0 - 1
    best = distance
    again = query >= 0
    while again:
        held = tl.atomic_add(entries + query, 0)
        again = query < 0
        if held > RING:
            tl.store(doubtful + query, 1)
            is_hit = query < 0
        else:
            is_hit, best_row, best, entry = settle(
                queries + query * width,
                keys,
                key_slot,
                live,
                radius,
                count,
                widest,
                ring + query * RING,
                sums + query * RING,
                row_at,
                held,
                width,
                LANES,
                CHUNK,
                COLUMNS,
                RING,
                SUMS,
            )
            if is_hit & (distance < 0) & (best > floor * floor):
                # Nothing nearer than a hit may be hidden behind a shorter reach.
                bits = tl.load(isolated + entry // 8, mask=entry >= 0, other=0).to(tl.int32)
                alone = ((bits >> (entry % 8)) & 1) != 0
                distance = root(best * (1.0 + 2.0 * slack_of(width)) + 1e-30)
                again = query >= 0
                collect_part(
                    query,
                    query * 0,
                    query * 0 + 1,
                    distance,
                    alone & (entry >= 0),
                    code,
                    point,
                    notes,
                    numbers,
                    counts,
                    near,
                    far,
                    reach,
                    super_reach,
                    leaf_boxes,
                    super_boxes,
                    count,
                    ring,
                    entries,
                    NORM_SLOT,
                    HAS_FAR,
                    NATIVE,
                    RING,
                    SUPERS,
                    LINEAR,
                )
                tl.debug_barrier()  # the ring is read by other lanes than wrote it
    write_verdict(hit, row, squared, query, is_hit, best_row, best)


def _limits(device: torch.device) -> dict[str, int]:
    """Return the options of `decide`; left alone, ptxas takes 128 registers and spills."""
    return {"maxnreg": REGISTERS} if _is_native(device) else {}


def _is_native(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def places_of(codes: DeviceCodes) -> tuple[Tensor, ...]:
    """Return what a scan reads of codes, in the kernels' order."""
    return (
        codes.numbers,
        codes.counts,
        codes.near,
        codes.far,
        codes.reach,
        codes.super_reach,
        codes.leaf_boxes,
        codes.super_boxes,
    )


def programs_of(keys: Keys, codes: DeviceCodes, batch: int) -> int:
    """Return among how many programs the codes of one query are shared."""
    supers = len(codes.super_boxes) - 1
    after = len(codes.row) - supers * LEAF * LEAF
    most = max(triton.cdiv(supers, SUPERS), triton.cdiv(after, LINEAR), 1)
    room = triton.cdiv(PROGRAMS_PER_PROCESSOR * dense.processors(keys), batch)
    return int(max(1, min(most, room)))


def find(
    queries: Tensor,
    keys: Keys,
    codes: DeviceCodes,
    sums: bool = True,
    ring: int = RING,
    tiled: bool | None = None,
) -> Found:
    """Return whether each query [B, D] is in the ball of its nearest key, by the law (R64).

    queries: contiguous, on the keys' device, B at least 1. ring: room for candidates, a power of
    two. Without `sums` the S of a hit is the law's only to within float32. `tiled` says whether
    tensor cores read the codes; None leaves it to how many queries there are.
    """
    batch, width = queries.shape
    device = queries.device
    found = Found.room(queries)
    code = torch.empty(batch, SLOTS, dtype=torch.uint8, device=device)
    point = torch.empty(batch, NEAR, dtype=torch.int16, device=device)
    notes = torch.empty(batch, 8, dtype=torch.float64, device=device)
    doubtful, entries = torch.empty(2, batch, dtype=torch.int32, device=device)
    candidates = torch.empty(batch, ring, dtype=torch.int32, device=device)
    scratch = torch.empty(batch, ring, device=device, dtype=torch.float32)
    native = _is_native(device)
    shape: dict[str, Any] = {
        "NORM_SLOT": codes.norm_slot,
        "HAS_FAR": codes.has_far,
        "NATIVE": native,
        "RING": ring,
        "SUPERS": SUPERS,
        "LINEAR": LINEAR,
    }
    places = places_of(codes)
    words = code.view(torch.int32)
    with torch.cuda.device_of(queries):
        encode[(batch, 4 if codes.has_far else 1)](
            queries,
            codes.centre,
            codes.rows,
            codes.turn,
            codes.numbers,
            code,
            point,
            notes,
            doubtful,
            entries,
            width,
            codes.rows.shape[1],
            NORM_SLOT=codes.norm_slot,
            CHUNK=ENCODE_CHUNK,
            num_warps=ENCODE_WARPS,
            **OPTIONS,
        )
        if batch >= code_tiles.TILED if tiled is None else tiled:
            code_tiles.collect(
                code,
                point,
                notes,
                doubtful,
                codes,
                keys.count,
                candidates,
                entries,
                dense.processors(keys),
                native,
            )
        else:
            programs = programs_of(keys, codes, batch)
            collect[(programs * batch,)](
                words,
                point,
                notes,
                doubtful,
                *places,
                keys.count,
                candidates,
                entries,
                batch,
                programs,
                **shape,
                num_warps=1,
                **OPTIONS,
            )
        decide[(batch,)](
            queries,
            keys.slots,
            keys.key_slot,
            keys.live,
            keys.radius,
            keys.count,
            keys.widest,
            words,
            point,
            notes,
            doubtful,
            *places,
            codes.row,
            codes.isolated,
            candidates,
            entries,
            scratch,
            *found,
            width,
            LANES=LANES,
            CHUNK=CHUNK,
            COLUMNS=CHUNK_BYTES // keys.slots.element_size(),
            **shape,
            SUMS=sums,
            num_warps=WARPS,
            **_limits(device),
            **OPTIONS,
        )
    return dense.find(queries, keys, doubtful, found, sums)
