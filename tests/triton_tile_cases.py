"""Many queries at once by tiles, compared with the law; run as a program under the interpreter.

Every case is asked with the small and with the large tile. A case tells what it found wrong and
whether tiles were brought by descriptors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import semantics


@dataclass
class Drawn:
    """Keys by slot, what is known of the rows, and queries."""

    slots: Tensor
    live: Tensor
    radii: Tensor
    queries: Tensor
    key_slot: Tensor | None = None
    rows: int = 0  # all that are live or not; 0 for as many as there are

    def __post_init__(self) -> None:
        self.rows = self.rows or len(self.live)


def drawn(
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 9,
    rows: int = 110,
    moved: bool = False,
) -> Drawn:
    """Keys in clusters, every ninth of them removed, and queries on radii, on keys and far away."""
    dice = torch.Generator().manual_seed(width + rows + batch)
    centres = torch.randn(rows // 12, width, generator=dice)
    keys = centres[torch.arange(rows) % len(centres)]
    keys = (keys + 0.05 * torch.randn(rows, width, generator=dice)).to(dtype)
    radii = 0.02 + 0.4 * torch.rand(rows, generator=dice).square()
    live = torch.arange(rows) % 9 != 4
    offset = torch.nn.functional.normalize(torch.randn(batch, width, generator=dice), dim=1)
    near = torch.randint(rows, (batch,), generator=dice)
    apart = radii[near] * torch.tensor([1 - 1e-7, 0, 40, 1 + 1e-7]).repeat(batch)[:batch]
    queries = keys[near].float() + offset * apart[:, None]
    if not moved:
        return Drawn(keys, live, radii, queries)
    slot = torch.randperm(rows + 7, generator=dice)[:rows]
    slots = torch.full((rows + 7, width), 9.0, dtype=dtype)
    slots[slot] = keys
    return Drawn(slots, live, radii, queries, slot)


def duplicates() -> Drawn:
    """Each key stands in several tiles, and the lowest of its rows that are left has to win."""
    case = drawn(40)
    case.slots = case.slots[:22].repeat(5, 1)
    case.radii[:] = 0.3
    case.queries = case.slots[:9].float()
    return case


def odd_queries() -> Drawn:
    """NaN and infinity are misses; what float32 cannot square is looked up by other means."""
    case = drawn(40)
    case.queries[1, 3], case.queries[4, 0] = torch.nan, torch.inf
    case.queries[6] = 3e25
    return case


def odd_keys() -> Drawn:
    """A key whose square float32 does not hold, and rows past the last one that hold anything."""
    case = drawn(40)
    case.slots[70] = 1e22
    case.slots[100:] = torch.nan
    case.rows = 100
    return case


def crowd() -> Drawn:
    """More candidates than a ring holds, for some of the queries."""
    case = drawn(16, batch=3, rows=320)
    case.slots[:300] = case.slots[0]
    case.queries[1] = case.slots[0].float()
    return case


def cut() -> Drawn:
    """Queries on keys of which a tensor core may lose all but one coordinate: E has to hold it."""
    case = drawn(4096, batch=2, rows=24)
    case.slots[:] = 1.40625 * 2.0**-12
    case.slots[:, 0] = 1 + torch.arange(24) / 128
    case.queries, case.radii[:] = case.slots[:2].float(), 1e-6
    return case


CASES = {
    "bf16": drawn(40),
    "fp32": drawn(40, torch.float32),
    "fp16, rows of 66 bytes": drawn(33, torch.float16),
    "moved keys": drawn(40, moved=True),
    "one query": drawn(24, batch=1),
    "full tiles": drawn(64, batch=8, rows=64),
    "duplicate keys": duplicates(),
    "odd queries": odd_queries(),
    "odd keys": odd_keys(),
    "a crowd": crowd(),
    "sums that are cut": cut(),
}


def wrong(case: Drawn, device: str) -> list[str]:
    """Return what a look-up says that the law does not."""
    from grace_fast.kernels import tiles
    from grace_fast.kernels.exact import Keys

    rows = slice(case.rows)
    keys = Keys(
        slots=case.slots.to(device),
        width=case.slots.shape[1],
        live=case.live.to(device),
        radius=case.radii.to(device),
        rows=torch.tensor([case.rows], device=device),
        widest=case.radii.max()[None].to(device),
        key_slot=None if case.key_slot is None else case.key_slot.to(device),
    )
    queries = case.queries.to(device)
    found = tiles.find(queries, keys, tiles.filter_keys(keys.slots))
    by_row = case.slots if case.key_slot is None else case.slots[case.key_slot]
    row, squared = semantics.nearest(case.queries, by_row[rows].float(), case.live[rows])
    hit = semantics.in_ball(squared, case.radii[row])
    wanted = (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, torch.inf))
    told = zip(("hit", "row", "squared"), found, wanted, strict=True)
    return [name for name, one, other in told if not torch.equal(one.cpu(), other)]


def answers(device: str) -> dict[str, tuple[list[str], bool]]:
    """Return what is wrong with each case by each tile and whether it was by descriptors."""
    from grace_fast.kernels import tiles

    if device == "cpu":
        tiles.TILE.update(BLOCK_B=4, BLOCK_N=32, BLOCK_D=16)
        tiles.LARGE_TILE.update(BLOCK_B=8, BLOCK_N=64, BLOCK_D=32)
        tiles.TOGETHER = 8
    usual, described = tiles.descriptors_of, []

    def descriptors_of(*arguments):
        described.append(usual(*arguments))
        return described[-1]

    tiles.descriptors_of = descriptors_of
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN and the largest integer
    told = {}
    for tile, least in (("small", 1 << 30), ("large", 1)):
        tiles.LARGE = least
        for name, case in CASES.items():
            apart = wrong(case, device)
            told[f"{tile}: {name}"] = apart, described[-1][0] is not None
    return told


if __name__ == "__main__":
    torch.save(answers("cpu"), sys.argv[1])
