"""One codebook whose rows are spread over processes: row g is on rank g mod W of W.

Every rank makes the same calls with the same arguments, as in tensor-parallel serving. A look-up
takes two reductions: the least S (its float64 bits, as int64), then the lowest row among the ranks
that have it, with whether it hit. A third brings the value, only where something hit. A rank alone
cannot say "miss": the nearest key of all decides, so each looks for its nearest key within the
widest radius of all, and what no rank has within that is a miss.

An edit goes to the rank that owns the row. Each rank digests every edit; look-ups and edits compare
the digests, so ranks that have drifted apart are told so and answer nothing. Collectives go by
their order: one thread of a rank makes the calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.pages import PAGE_ROWS
from grace_fast.errors import RankLost as RankLost
from grace_fast.errors import ShardsDiffer as ShardsDiffer
from grace_fast.lookup import lookup
from grace_fast.lookup.lookup import Match, Nearest
from grace_fast.semantics import Decision, Replacement, Rules

NOBODY = 2**63 - 1  # what a rank claims that has not the nearest key
_POSITIVE = 2**62 - 1  # numbers that are compared as they are and negated


class ShardedCodebook:
    """A codebook over the ranks of a process group; every rank makes every call.

    timeout: seconds that a rank waits for the others before it raises `RankLost`.

    Raises: RuntimeError without `torch.distributed`, ValueError as `Codebook`, ShardsDiffer where
    ranks disagree about the widths or the element type.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        self._join(Codebook(key_dim, value_dim, dtype, device), group, timeout)
        self._check_founding()

    @classmethod
    def split(cls, codebook: Codebook, group: Any = None, timeout: float = 60.0) -> ShardedCodebook:
        """Return this rank's part of a codebook that every rank has opened.

        Raises: as the class, and ShardsDiffer where ranks have opened different codebooks.
        """
        whole = codebook.snapshot()
        whole.test_files()  # all of it is read
        shards = cls.__new__(cls)
        part = Codebook(codebook.key_dim, codebook.value_dim, codebook.dtype, codebook.device)
        shards._join(part, group, timeout)
        shards.rows, shards._widest = whole.rows, whole.widest
        for start in range(0, whole.rows, PAGE_ROWS):
            rows = slice(start, start + PAGE_ROWS)
            shards._digest("row", *(column[rows] for column in (whole.radii, whole.live)))
            shards._digest("row", whole.keys[rows], whole.values[rows])
        labels = whole.labels
        for label in labels:
            shards._digest("label", *(() if label is None else (label,)))
        shards._check_founding()
        mine = shards._turns(0, whole.rows)
        if len(mine):
            place = mine.to(codebook.device)
            part.append(
                whole.keys[place],
                whole.values[place],
                whole.radii[place],
                [labels[row] for row in mine.tolist()],
            )
            with part.writing() as draft:
                for local in (~whole.live[place]).nonzero()[:, 0].tolist():
                    draft.remove(local)
        shards._known = part.version
        return shards

    def _join(self, part: Codebook, group: Any, timeout: float) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "row shards need torch.distributed: start the ranks with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.codebook = part  # this rank's rows; only looked at by others
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.rows = 0  # of all ranks, removed ones included
        self.version = 0
        self._group, self._timeout = group, timeout
        self._widest = -1.0
        self._known = part.version
        self._state = b""
        self._lost = ""

    def _check_founding(self) -> None:
        part = self.codebook
        facts = {
            "key_dim": part.key_dim,
            "value_dim": part.value_dim,
            "dtype": DTYPES.index(part.dtype),
            "rows": self.rows,
            "contents": self._state_number,
        }
        gathered = self._gather(list(facts.values()), "comparing codebooks")
        for place, name in enumerate(facts):
            seen = [numbers[place] for numbers in gathered]
            for rank, number in enumerate(seen):
                if number != seen[0]:
                    told: tuple[Any, ...] = (seen[0], number)
                    if name == "dtype":
                        told = tuple(DTYPES[number] for number in told)
                    if name == "contents":
                        raise ShardsDiffer(
                            "ranks hold different codebooks: keys, values, radii or labels of "
                            f"rank {rank} are not those of rank 0; open the same one on each"
                        )
                    raise ShardsDiffer(
                        f"ranks hold different codebooks: {name} is {told[0]} on rank 0 and "
                        f"{told[1]} on rank {rank}; open the same one on each"
                    )

    def __repr__(self) -> str:
        return (
            f"ShardedCodebook({self.rows} rows on {self.ranks} ranks, rank {self.rank} with "
            f"{self.codebook!r}, version={self.version})"
        )

    # Looking up

    def find(self, queries: Tensor) -> Match:
        """Return what `lookup.find` returns of the whole codebook, on every rank.

        Raises: as `lookup.find`, RankLost, ShardsDiffer.
        """
        row, squared, hit = self._decide(queries, max(0.0, self._widest) * (1 + 1e-6))
        fields = (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, math.inf))
        return Match(None, fields=fields)

    def nearest(self, queries: Tensor, within: float = math.inf) -> Nearest:
        """Return what `lookup.nearest` returns of the whole codebook, on every rank.

        Raises: as `lookup.nearest`, RankLost, ShardsDiffer.
        """
        row, squared, _ = self._decide(queries, within)
        certified = torch.ones_like(row, dtype=torch.bool)
        return Nearest(row, squared.sqrt().float(), squared, certified)

    def replace(
        self,
        output: Tensor,
        queries: Tensor,
        positions: Tensor | None = None,
        mode: Replacement = "replace_prompt",
    ) -> Tensor:
        """Return what `lookup.replace` returns of the whole codebook, on every rank.

        Raises: as `lookup.replace`, RankLost, ShardsDiffer.
        """
        snapshot = self.codebook.snapshot()
        lookup.check_replacement(output, queries, snapshot, positions, mode)
        match = self.find(queries)
        if not match.hit.any():
            return output
        positions = lookup.query_positions(positions, output)
        mask = semantics.replacement_mask(mode, positions, output.shape[1])
        return semantics.replace(output, match.hit, self.values_of(match.row), mask)

    def values_of(self, rows: Tensor) -> Tensor:
        """Return the values of rows [B] from the ranks that own them, [B, V]; zeros for -1."""
        mine = (rows >= 0) & (rows % self.ranks == self.rank)
        values = self.codebook.values.new_zeros(len(rows), self.codebook.value_dim)
        local = torch.div(rows[mine], self.ranks, rounding_mode="floor")
        values[mine] = self.codebook.snapshot().values_of(local)
        # Bytes: a sum of floats would lose the sign of zero.
        shared = values.view(torch.uint8)
        self._reduce(shared, dist.ReduceOp.SUM, "fetching values")
        return shared.view(values.dtype)

    def _decide(self, queries: Tensor, within: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest row of all ranks [B], its S [B] and whether it hit [B]."""
        self._check_lost()
        snapshot = self.codebook.snapshot()
        near = lookup.nearest(queries, snapshot, within=within)
        squared = torch.where(near.squared_distance.isnan(), math.inf, near.squared_distance)
        bits = (squared + 0.0).view(torch.int64)  # -0 would be less than everything
        batch = len(bits)
        least = torch.cat([bits, self._header(queries)])
        self._reduce(least, dist.ReduceOp.MIN, "looking up")
        self._check_header(least[batch:].tolist())
        least = least[:batch]
        hit = semantics.in_ball(squared, snapshot.radii_of(near.row).to(squared.device))
        claim = 2 * (near.row * self.ranks + self.rank) + (~hit).long()
        claim = torch.where((near.row >= 0) & (bits == least), claim, NOBODY)
        self._reduce(claim, dist.ReduceOp.MIN, "looking up")
        nobody = claim == NOBODY
        row = torch.div(claim, 2, rounding_mode="floor").masked_fill(nobody, -1)
        return row, least.view(torch.float64), (claim % 2 == 0) & ~nobody

    def _header(self, queries: Tensor) -> Tensor:
        rows = queries.detach().contiguous().view(torch.uint8).sum(dim=1, dtype=torch.int64)
        asked = (rows * torch.arange(1, 1 + len(rows), device=rows.device)).sum()
        numbers = torch.tensor(
            [self._state_number, self.version], device=queries.device, dtype=torch.int64
        )
        numbers = torch.cat([numbers, asked[None]])
        return torch.stack([numbers, -numbers]).flatten()  # one minimum gives least and most

    def _check_header(self, least: list[int]) -> None:
        same = [low == -high for low, high in zip(least[:3], least[3:], strict=True)]
        if all(same[:2]):
            if same[2]:
                return
            raise ShardsDiffer(
                "ranks ask with different queries; gather them first, so that every rank asks "
                "with the layer's whole input"
            )
        self._tell_apart()

    def _tell_apart(self) -> NoReturn:
        gathered = self._gather([self.version, self._state_number], "comparing versions")
        told = ", ".join(f"rank {rank} at {seen[0]}" for rank, seen in enumerate(gathered))
        raise ShardsDiffer(
            f"ranks are at different versions of the codebook ({told}), or a rank's part was "
            "edited without the others; split one saved codebook anew"
        )

    # Editing

    @contextmanager
    def writing(self) -> Iterator[ShardDraft]:
        """Open a draft on every rank: published by all at the end, or by none.

        Raises: RankLost, ShardsDiffer where ranks have drafted different edits, RuntimeError on
        the other ranks where one refuses.
        """
        self._check_lost()
        before = (self._state, self.rows, self._widest)
        try:
            with self.codebook.writing() as local:
                refused = False
                try:
                    yield ShardDraft(self, local)
                except BaseException:
                    refused = True
                    raise
                finally:
                    self._agree(refused)
        except BaseException:
            self._state, self.rows, self._widest = before
            raise
        self.version += 1
        self._known = self.codebook.version

    def _agree(self, refused: bool) -> None:
        gathered = self._gather([int(refused), self._state_number], "editing")
        if refused:
            return
        refusing = [rank for rank, seen in enumerate(gathered) if seen[0]]
        if refusing:
            raise RuntimeError(
                f"rank {refusing[0]} refused the edit and says why; nothing was changed"
            )
        if any(seen[1] != gathered[0][1] for seen in gathered):
            raise ShardsDiffer(
                "ranks were given different edits; every rank makes the same calls with the same "
                "arguments. Nothing was changed"
            )

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Tensor | None] | None = None,
    ) -> range:
        """Add rows as `Codebook.append` does; return their numbers."""
        with self.writing() as draft:
            return draft.append(keys, values, radii, labels)

    def remove(self, row: int) -> None:
        """Take a live row out; its number is not given again."""
        with self.writing() as draft:
            draft.remove(row)

    def enact(
        self, rules: Rules, query: Tensor, label: Tensor, fresh_value: Tensor
    ) -> tuple[int, Decision]:
        """Decide one edit by the table and do it but for its value; return its row and how.

        query: [D], fresh_value: [V]; label: [L] int64. The value is then trained and set by
        `set_value`.

        Raises: RankLost, ShardsDiffer.
        """
        within = (rules.epsilon + max(0.0, self._widest)) * (1 + 1e-6)
        near = self.nearest(query[None], within)
        row, squared = int(near.row[0]), float(near.squared_distance[0])
        radius, known = (0.0, None) if row < 0 else self.ball_of(row)
        same = known is not None and semantics.same_label(rules, label, known)
        decision = semantics.decide(rules, squared, radius, same)
        if decision.outcome == "reused":
            return row, decision
        with self.writing() as draft:
            if decision.outcome in ("added", "split"):
                made = torch.tensor([decision.radius], dtype=torch.float32, device="cpu")
                added = draft.append(query[None], fresh_value[None], made, [label])
                if decision.nearest_radius is not None:
                    draft.set_radius(row, decision.nearest_radius)
                return added[0], decision
            if decision.moves_key:
                draft.move_half_way(row, query)
            draft.set_radius(row, decision.radius)
            if decision.outcome == "replaced":
                draft.set_label(row, label)
        return row, decision

    def ball_of(self, row: int) -> tuple[float, Tensor | None]:
        """Return the radius and the label of a row, from the rank that owns it.

        Raises: IndexError where there is no such row, RankLost.
        """
        # The radius' bits, and 1 + L where it has a label.
        told = torch.zeros(2, dtype=torch.int64, device="cpu")
        label: Tensor | None = None
        if (local := self._local(row)) is not None:
            snapshot = self.codebook.snapshot()
            label = snapshot.row(local).label
            ball = torch.tensor([snapshot.row(local).radius], dtype=torch.float64, device="cpu")
            told[:1] = ball.view(torch.int64)
            told[1] = 0 if label is None else 1 + len(label)
        told = told.to(self.codebook.device)
        self._reduce(told, dist.ReduceOp.SUM, "reading a row")
        radius, length = float(told[:1].view(torch.float64)), int(told[1]) - 1
        if length < 0:
            return radius, None
        none = torch.zeros(length, dtype=torch.int64, device="cpu")
        ids = none if label is None else label.clone()
        ids = ids.to(self.codebook.device)
        self._reduce(ids, dist.ReduceOp.SUM, "reading a row")
        return radius, ids.cpu()

    def _turns(self, first: int, count: int) -> Tensor:
        """Return which of `count` rows from row `first` on are this rank's, [M] int64."""
        start = (self.rank - first) % self.ranks
        return torch.arange(min(start, count), count, self.ranks, device="cpu")

    def _local(self, row: int) -> int | None:
        """Return where a row is on this rank, None where another has it."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be in [0, {self.rows}), got {row}")
        return row // self.ranks if row % self.ranks == self.rank else None

    # What ranks know of each other

    def _digest(self, name: str, *given: Tensor | float) -> None:
        state = hashlib.blake2b(self._state, digest_size=16)
        state.update(name.encode())
        for thing in given:
            if isinstance(thing, Tensor):
                plain = thing.detach().cpu().contiguous()
                state.update(str((plain.dtype, tuple(plain.shape))).encode())
                state.update(plain.reshape(-1).view(torch.uint8).numpy().data)
            else:
                state.update(float(thing).hex().encode())
        self._state = state.digest()

    @property
    def _state_number(self) -> int:
        """A number that ranks of one history share; another where the part was edited alone."""
        mine = self._state
        if self.codebook.version != self._known:
            mine += b"edited alone"
        return int.from_bytes(hashlib.blake2b(mine, digest_size=8).digest()) & _POSITIVE

    def _check_lost(self) -> None:
        if self._lost:
            raise RankLost(self._lost)

    def _gather(self, numbers: list[int], doing: str) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.codebook.device)
        gathered = [torch.empty_like(mine) for _ in range(self.ranks)]
        self._wait(lambda: dist.all_gather(gathered, mine, self._group, async_op=True), doing)
        return [other.tolist() for other in gathered]

    def _reduce(self, tensor: Tensor, operation: Any, doing: str) -> None:
        if tensor.numel():
            self._wait(
                lambda: dist.all_reduce(tensor, operation, self._group, async_op=True), doing
            )

    def _wait(self, start: Any, doing: str) -> None:
        self._check_lost()
        try:
            start().wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            self._lost = (
                f"a rank was lost while {doing} (rank {self.rank} of {self.ranks} waited up to "
                f"{self._timeout:g} s): {str(error).strip().splitlines()[0]}; start all ranks again"
            )
            raise RankLost(self._lost) from error


class ShardDraft:
    """Changes by global row; each rank makes those of its own rows and digests all."""

    def __init__(self, shards: ShardedCodebook, local: Draft) -> None:
        self._shards, self._local = shards, local

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Tensor | None] | None = None,
    ) -> range:
        """Add rows at the end, each on the rank whose turn it is; return their numbers."""
        shards, first = self._shards, self._shards.rows
        shards._digest("append", keys, values, radii, *(x for x in labels or () if x is not None))
        mine = shards._turns(first, len(keys))
        if len(mine):
            listed = None if labels is None else [labels[at] for at in mine.tolist()]
            shards.codebook.append(keys[mine], values[mine], radii[mine], listed)
        shards.rows += len(keys)
        if len(keys):
            shards._widest = max(shards._widest, float(radii.float().max()))
        return range(first, shards.rows)

    def remove(self, row: int) -> None:
        """Take one live row out."""
        self._shards._digest("remove", row)
        if (local := self._shards._local(row)) is not None:
            self._local.remove(local)

    def set_radius(self, row: int, radius: float) -> None:
        """Give one row another radius."""
        self._shards._digest("radius", row, radius)
        stored = ctypes.c_float(radius).value  # float32 may be more, of a denormal number much more
        self._shards._widest = max(self._shards._widest, stored)
        if (local := self._shards._local(row)) is not None:
            self._local.set_radius(local, radius)

    def set_key(self, row: int, key: Tensor) -> None:
        """Move the key of one row."""
        self._shards._digest("key", row, key)
        if (local := self._shards._local(row)) is not None:
            self._local.set_key(local, key)

    def move_half_way(self, row: int, query: Tensor) -> None:
        """Move the key of one row half-way to a query."""
        self._shards._digest("half-way", row, query)
        if (local := self._shards._local(row)) is not None:
            key = self._local.snapshot().row(local).key
            self._local.set_key(local, (key.double() + query.double()) / 2)

    def set_value(self, row: int, value: Tensor) -> None:
        """Give one row another value."""
        self._shards._digest("value", row, value)
        if (local := self._shards._local(row)) is not None:
            self._local.set_value(local, value)

    def set_label(self, row: int, label: Tensor | None) -> None:
        """Give one row another label."""
        self._shards._digest("label", row, *(() if label is None else (label,)))
        if (local := self._shards._local(row)) is not None:
            self._local.set_label(local, label)
