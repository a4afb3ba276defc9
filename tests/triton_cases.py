"""Look-ups for the Triton kernels, and what they answer; run as a program under the interpreter.

Every case is a codebook, its queries and how its certificate is made. `answers` runs all look-ups
of `grace_fast.kernels` on a device; `expected` is the law.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from cases import CASES as NAMED
from cases import Case, oracle
from torch import Tensor

from grace_fast import semantics
from grace_fast.index import quantizer as host_codes
from grace_fast.index import segments
from grace_fast.lookup.backends import cpu

MOST_QUERIES = 4  # the interpreter takes a tenth of a second for one
PATHS = ("dense", "tiles", "codes", "code tiles")


@dataclass
class Drawn:
    """Keys, radii and queries; `runs` are the rows at which a part of the certificate ends."""

    keys: Tensor
    radii: Tensor
    queries: Tensor
    runs: tuple[int, ...] = ()  # the last of them in no order, rows after it in no part
    ring: int = 256
    spare: int = 0  # rows past N that equal the first query


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=1)


def clusters(rows: int, width: int, dtype: torch.dtype = torch.float32, **fields) -> Drawn:
    """Keys in clusters, a tenth of them dead, and queries on radii, on keys and between them."""
    centres = normal(rows // 12, width, seed=rows)
    keys = centres[torch.arange(rows) % len(centres)] + 0.05 * normal(rows, width, seed=1)
    radii = 0.02 + 0.4 * torch.rand(rows, generator=torch.Generator().manual_seed(2)).square()
    radii[::10] *= -1
    keys = keys.to(dtype)
    pick = torch.tensor([rows // 3, rows - 2])
    on_radius = keys[pick].float() + unit(2, width, seed=3) * radii[pick].abs()[:, None]
    queries = torch.cat([on_radius, keys[rows // 2][None].float(), normal(1, width, seed=4)])
    return Drawn(keys, radii, queries, **fields)


def within_1e8(above: bool) -> Drawn:
    """Queries whose distance is a radius but for less than 1e-8 of it."""
    width, tries = 24, 6000
    keys, offset = normal(tries, width, seed=5), normal(tries, width, seed=6)
    queries = keys + 0.3 * offset
    distance = (queries.double() - keys.double()).square().sum(dim=1).sqrt()
    apart = (distance / distance.float().double() - 1).numpy()
    close = np.flatnonzero((abs(apart) < 1e-8) & ((apart > 0) == above) & (apart != 0))[:4]
    picked = torch.from_numpy(close)
    radii = torch.full((68,), 0.01)
    radii[:4] = distance.float()[picked]
    return Drawn(torch.cat([keys[picked], normal(64, width, seed=7) + 9]), radii, queries[picked])


def close_ties() -> Drawn:
    """Pairs of keys at distances that differ by less than 1e-8 of them, the later row nearer.

    Only the later one is alive: float32 alone would find the earlier.
    """
    width, pairs = 16, 4
    queries, offset = normal(pairs, width, seed=8).mul(8).round(), unit(pairs, width, seed=9)
    keys = normal(140, width, seed=10) + 50
    radii = torch.full((140,), -1.0)
    for pair, (row, later) in enumerate(((1, 3), (2, 100), (70, 71), (5, 139))):
        keys[row] = queries[pair] + offset[pair]
        keys[later] = keys[row]
        j = int(offset[pair].abs().argmin())
        towards = queries[pair, j]
        for _ in range(3):
            keys[later, j] = torch.nextafter(keys[later, j], towards)
        radii[later] = 1.5
    return Drawn(keys, radii, queries)


def shadowed() -> Drawn:
    """A wide ball whose hit hides a nearer key of small radius, in another leaf."""
    keys = normal(192, 12, seed=11) * 0.3
    keys[:, 0] += torch.arange(192) // 64 * 3.0
    radii = torch.full((192,), 0.05)
    keys[10], keys[100] = 0, 0
    keys[10, 0], keys[100, 0] = 0.9, 2.5
    radii[100] = 5.0
    queries = torch.zeros(2, 12)
    queries[:, 0] = torch.tensor([1.6, 2.4])  # nearest is row 10, which misses; row 100 itself
    return Drawn(keys, radii, queries)


def alone() -> Drawn:
    """Wide balls with nothing else near them: their isolated bit spares the second look."""
    keys = normal(192, 12, seed=12) * 0.1
    keys[:, 0] += torch.arange(192) // 64 * 30.0
    radii = torch.full((192,), 0.05)
    keys[70] = keys[70] + 9
    radii[70] = 2.0
    return Drawn(keys, radii, keys[70][None] + torch.tensor([[0.3], [0.9]]))


def ray() -> Drawn:
    """Keys in a row, two steps of a code from one to the next: some sum is next to every cut."""
    direction = unit(1, 24, seed=14)
    keys = torch.linspace(-1.5, 1.5, 192)[:, None] * direction + 1e-3 * normal(192, 24, seed=15)
    on_it = torch.tensor([[-0.3], [0.1], [1.7], [2.5]]) * direction
    return Drawn(keys, torch.full((192,), 0.25), on_it)


def giant() -> Drawn:
    drawn = clusters(150, 20)
    drawn.radii[75], drawn.radii[30] = 40.0, -1.0
    return drawn


DRAWN = {
    "clusters": clusters(200, 24),
    "clusters in bf16": clusters(150, 24, torch.bfloat16),
    "clusters in fp16": clusters(150, 33, torch.float16),
    "two runs, a tail and rows without codes": clusters(260, 24, runs=(80, 180, 250)),
    "a ring too small": clusters(150, 24, ring=1),
    "more rows without codes than a ring holds": clusters(150, 24, runs=(64, 100), ring=16),
    "better rows past the end": clusters(130, 20, spare=40),
    "a radius missed by 1e-8": within_1e8(above=True),
    "a radius held by 1e-8": within_1e8(above=False),
    "ties within 1e-8, the later row nearer": close_ties(),
    "a wide ball hides a nearer key": shadowed(),
    "wide balls that are isolated": alone(),
    "one giant radius": giant(),
    "keys along a ray": ray(),
}
WITHOUT_SUMS = (
    "clusters in bf16",
    "a radius missed by 1e-8",
    "ties within 1e-8, the later row nearer",
    "a wide ball hides a nearer key",
)
COLLECTED = (
    "two runs, a tail and rows without codes",
    "keys along a ray",
    "width 129",
    "width 7",
)
NAMES = [*(name for name, case in NAMED.items() if len(case.queries) and len(case.keys)), *DRAWN]


def case_of(name: str) -> tuple[Case | Drawn, Tensor]:
    """Return a case and those of its queries that are asked."""
    case = NAMED[name] if name in NAMED else DRAWN[name]
    return case, case.queries[:MOST_QUERIES].contiguous()


def expected(name: str) -> tuple[list[bool], list[int], list[float]]:
    """Return the law's hits, rows and S."""
    case, queries = case_of(name)
    if isinstance(case, Case):
        told = case.expected()
    else:
        told = oracle(queries, case.keys, case.radii, [True] * len(case.keys))
    found = list(zip(told.hit, told.row, told.squared, strict=True))[: len(queries)]
    return (
        [hit for hit, _, _ in found],
        [row if hit else -1 for hit, row, _ in found],
        [squared if hit else math.inf for hit, _, squared in found],
    )


def on_device(name: str, device: str):
    """Return a case's keys for the kernels, and keys, radii and liveness by row on the host."""
    from grace_fast.kernels.exact import Keys

    case, queries = case_of(name)
    if isinstance(case, Case):
        snapshot = case.book().snapshot()
        slots = snapshot.key_slots[: max(1, snapshot.counts.keys)]
        key_slot = snapshot.key_slot if snapshot.counts.key_moves else None
        keys, radii, live = snapshot.keys, snapshot.radii, snapshot.live
        held, alive = radii, live
    else:
        keys, radii, live = case.keys, case.radii, torch.ones(len(case.keys), dtype=torch.bool)
        past = queries[:1].to(keys.dtype).expand(case.spare, -1)
        slots, key_slot = torch.cat([keys, past]), None
        held = torch.cat([radii, torch.full((case.spare,), 99.0)])
        alive = torch.cat([live, live[: case.spare]])
    given = Keys(
        slots=slots.to(device),
        width=slots.shape[1],
        live=alive.contiguous().to(device),
        radius=held.contiguous().to(device),
        rows=torch.tensor([len(keys)], device=device),
        widest=radii.max()[None].to(device),
        key_slot=None if key_slot is None else key_slot.to(device),
    )
    return given, keys, radii, live


def certificate(name: str, device: str):
    """Return a case's codes, runs of 64 keys and more in kd order; None where no map will do."""
    from grace_fast.kernels.code_layout import device_codes

    case, _ = case_of(name)
    _, keys, radii, live = on_device(name, "cpu")
    positive = radii[live & (radii >= 0)]
    floor = float(positive.median()) if len(positive) else 0.0
    phi = host_codes.fit(keys, host_codes.scale_of(positive, keys))
    if phi is None:
        return None
    usual, segments.ORDER_ROWS = segments.ORDER_ROWS, 64
    parts, first = [], 0
    for last in getattr(case, "runs", ()) or (len(keys),):
        encoded = host_codes.encode_keys(phi, keys[first:last])
        if parts and last == case.runs[-1]:
            room = segments.delta_buffer(last - first, floor)
            rows = np.arange(first, last, dtype=np.int32)
            parts.append(segments.append(room, encoded, rows, radii[first:last].numpy(), floor))
        else:
            made = segments.Encoded.room(last - first)
            made.put(encoded)
            part = segments.sorted_segment(made, first, radii[first:last].numpy(), floor, kd_order)
            look_around(part, keys, radii)
            parts.append(part)
        first = last
    segments.ORDER_ROWS = usual
    return device_codes(phi, parts, first, floor, device)


def kd_order(**arguments: int) -> None:
    """Write the order of the extension; any order is right, and without it rows stay in theirs."""
    if cpu._cpu is not None:
        cpu._cpu.kd_order(**arguments)


def look_around(part: segments.Segment, keys: Tensor, radii: Tensor) -> None:
    """Set the isolated bits: no other key of the part within twice the radius."""
    rows = torch.from_numpy(part.rows[: part.count].astype(np.int64))
    apart = semantics.squared_distances(keys[rows], keys[rows]).fill_diagonal_(math.inf).sqrt()
    nothing_near = (apart.amin(dim=1) > 2 * radii[rows].abs() * (1 + 1e-6)) & (radii[rows] >= 0)
    bits = np.zeros(len(part.isolated) * 8, np.uint8)
    bits[: part.count] = nothing_near.numpy()
    part.isolated[:] = np.packbits(bits, bitorder="little")


def found_by(path: str, name: str, device: str, sums: bool = True, floor: float | None = None):
    """Return what one look-up finds of a case: hit, row and S; None where it cannot be asked."""
    from grace_fast.kernels import codes, dense, tiles

    case, queries = case_of(name)
    keys, _, _, _ = on_device(name, device)
    queries, ring = queries.to(device), getattr(case, "ring", 256)
    if path == "dense":
        return dense.find(queries, keys, sums=sums)
    if path == "tiles":
        centre = keys.slots.float().mean(dim=0) if len(name) % 2 else None
        return tiles.find(queries, keys, tiles.filter_keys(keys.slots, centre), sums, ring)
    made = certificate(name, device)
    if made is None:
        return None
    if floor is not None:
        made.numbers[codes.MIN_RADIUS.value] = floor
    return codes.find(queries, keys, made, sums, ring, tiled=path == "code tiles")


@contextmanager
def counted():
    """Collect how many queries each look-up gave up, so that all keys were read for them."""
    from grace_fast.kernels import doubtful

    counts: list[int] = []
    usual = doubtful.find

    def counting(queries, keys, doubtful, found, sums=True):
        counts.append(int((doubtful > 0).sum()))
        return usual(queries, keys, doubtful, found, sums)

    doubtful.find = counting
    try:
        yield counts
    finally:
        doubtful.find = usual


def answers(device: str) -> dict[str, object]:
    """Return what every look-up says of every case, and how often it had to read all keys."""
    from grace_fast.kernels import code_tiles, codes, dense, doubtful, tiles

    # Programs that take several blocks each, as on a full device.
    dense.PROGRAMS_PER_PROCESSOR, codes.PROGRAMS_PER_PROCESSOR = 3, 4
    doubtful.PROGRAMS_PER_PROCESSOR = 7
    if device == "cpu":
        code_tiles.TILE.update(BLOCK_B=16)
        tiles.TILE.update(BLOCK_B=16, BLOCK_N=32, BLOCK_D=32)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN and the largest integer
    found: dict[str, object] = {}
    for name in NAMES:
        for path in PATHS:
            with counted() as doubts:
                told = found_by(path, name, device)
            if told is not None:
                found[f"{path}: {name}"] = (*(field.tolist() for field in told), sum(doubts))
    for name in WITHOUT_SUMS:
        for path in PATHS:
            told = found_by(path, name, device, sums=False)
            found[f"{path}, no sums: {name}"] = tuple(field.tolist() for field in told)
    hasty = found_by("codes", "a wide ball hides a nearer key", device, floor=math.inf)
    found["without a second look"] = hasty.hit.tolist()
    found["given up"] = given_up(device)
    found["encoded"] = encoded(device)
    found["collected"] = collected(device)
    found["replaced"] = replaced(device)
    return found


GIVEN_UP = ("a row that is not finite", "a row too large for float32", "rings that overflow")


def with_odd_rows(what: str) -> tuple[Drawn, tuple[int, ...]]:
    """Return a case of eight queries, and which of them codes cannot decide."""
    drawn = clusters(120, 16, ring=32)
    drawn.queries = torch.cat([drawn.queries, drawn.keys[::35] + 0.01])
    odd: tuple[int, ...] = ()
    if what == "a row that is not finite":
        drawn.queries[3, 7], drawn.queries[6, 0] = torch.nan, torch.inf
    elif what == "a row too large for float32":
        drawn.queries[5] = 2e15 * unit(1, 16, seed=16)[0]
        live = torch.ones(len(drawn.keys), dtype=torch.bool)
        row, _ = semantics.nearest(drawn.queries[5:6], drawn.keys, live)
        drawn.radii[row], drawn.ring = 1e17, 256  # all that share a leaf with it are candidates
        odd = (5,)
    else:  # many keys within a radius of one place: all of them are candidates
        drawn.keys[40:90] = drawn.keys[40] + 1e-3 * normal(50, 16, seed=17)
        odd = (0, 2, 4, 6, 7)
        drawn.queries[list(odd)] = drawn.keys[41:46] + 0.004
    return drawn, odd


def given_up(device: str) -> dict[str, tuple[list[int], object]]:
    """Return which queries of a batch were looked up among all keys, and what was found."""
    from grace_fast.kernels import codes, doubtful, tiles

    told: dict[str, tuple[list[int], object]] = {}
    usual = doubtful.find
    for what in GIVEN_UP:
        DRAWN[what], _ = with_odd_rows(what)
        case, keys = DRAWN[what], on_device(what, device)[0]
        queries, ring = case.queries.to(device), case.ring
        for path in ("tiles", "codes", "code tiles"):
            asked: list[int] = []

            def noting(queries, keys, doubtful, found, sums=True, asked=asked):
                asked += (doubtful > 0).nonzero()[:, 0].tolist()
                return usual(queries, keys, doubtful, found, sums)

            doubtful.find = noting
            if path == "tiles":
                found = tiles.find(queries, keys, tiles.filter_keys(keys.slots), ring_size=ring)
            else:
                made = certificate(what, device)
                found = codes.find(queries, keys, made, ring_size=ring, tiled=path == "code tiles")
            told[f"{path}: {what}"] = asked, tuple(field.tolist() for field in found)
        del DRAWN[what]
    doubtful.find = usual
    return told


def encoded(device: str) -> list[tuple[int, float, float]]:
    """Return how far codes and errors are from the host's: whole numbers apart, and ratios."""

    told = []
    for name in ("clusters", "width 129", "width 7"):
        _, queries = case_of(name)
        _, keys, radii, _ = on_device(name, "cpu")
        phi = host_codes.fit(keys, host_codes.scale_of(radii[radii > 0], keys))
        made = certificate(name, device)
        asked, _ = encoded_by(made, queries.to(device))
        host = host_codes.encode_queries(phi, queries)
        near = (host.whole[:, :16] - asked.point.cpu().int()).abs().max()
        used = 64 if made.has_far else 16
        bytes_apart = (host.whole[:, :used] - asked.code.cpu()[:, :used].int() + 128) % 256 - 128
        ratio = asked.notes[:, 0].cpu() / host.near_error
        apart = max(int(near), int(bytes_apart.abs().max()))
        told.append((apart, float(ratio.min()), float(ratio.max())))
    return told


def encoded_by(made, queries: Tensor):
    """Return queries as codes, and their empty rings."""
    from grace_fast.kernels.encode import encoded
    from grace_fast.kernels.exact import Found
    from grace_fast.kernels.ring import Ring

    ring = Ring.room(len(queries), 1024, queries.device)
    return encoded(queries, made, ring, Found.room(queries)), ring


def collected(device: str) -> list[tuple[list[set[int]], list[set[int]]]]:
    """Return the candidates of several queries, code by code and by products of codes."""
    from grace_fast.kernels import code_tiles, codes

    told = []
    for name in COLLECTED:
        keys, of_rows, _, _ = on_device(name, device)
        made = certificate(name, device)
        picked = of_rows[:: len(of_rows) // 17][:17].float()
        # From the place of a key to beyond its reach, so that sums lie on both sides of a cut.
        away = torch.linspace(0, 0.4, len(picked))[:, None] * unit(*picked.shape, seed=13)
        queries = (picked + away).to(device)
        asked, one_by_one = encoded_by(made, queries)
        one_by_one.doubtful[3] = 1  # it asks for nothing
        by_products = one_by_one._replace(
            candidates=torch.zeros_like(one_by_one.candidates),
            entries=one_by_one.entries.clone(),
        )
        codes.collect[(len(queries),)](
            asked, made, keys, one_by_one, len(queries), 1, num_warps=1, **codes.OPTIONS
        )
        code_tiles.collect(asked, made, keys, by_products, 1)
        rows = made.row.cpu()
        lists = []
        for ring in (one_by_one, by_products):
            counts = enumerate(ring.entries.tolist())
            held = [ring.candidates[b, :n].tolist() for b, n in counts]
            lists.append([{e for e in some if e < 0 or rows[e] >= 0} for some in held])
        told.append((lists[0], lists[1]))
    return told


def replacements(device: str):
    """Yield every mode with output, hits, rows, values and positions."""
    for number, mode in enumerate(("replace_all", "replace_last", "replace_prompt")):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number]
        wide = normal(4, 11, 700, seed=number).to(dtype)
        output = wide[:, :, :600] if number == 1 else wide[:, :, :600].contiguous()
        hit = torch.tensor([True, False, True, True])
        row = torch.tensor([3, -1, 0, 1])
        values = normal(9, 600, seed=9).to(dtype)
        slot = torch.tensor([4, 8, 2, 0]) if number else None
        positions = torch.tensor([10, 4, 0, 9])
        yield (
            mode,
            *(
                part if part is None else part.to(device)
                for part in (output, hit, row, values, slot, positions)
            ),
        )


def replaced(device: str) -> list[Tensor]:
    from grace_fast.kernels import replace

    told = []
    for mode, output, hit, row, values, slot, positions in replacements(device):
        told.append(replace.replace(output, hit, row, values, slot, positions, mode).cpu())
    return told


if __name__ == "__main__":
    torch.save(answers("cpu"), sys.argv[1])
