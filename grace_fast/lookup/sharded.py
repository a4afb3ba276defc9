"""One codebook whose rows are spread over processes: row g is on rank g mod W of W.

Every rank makes the same calls with the same arguments, as in tensor-parallel serving. A look-up
takes two reductions: the least S (its float64 bits, as int64), then the lowest row among the ranks
that have it, with whether it hit. A third brings the value, only where something hit. A rank alone
cannot say "miss": the nearest key of all decides, so each looks for its nearest key within the
widest radius of all, and what no rank has within that is a miss.

An edit goes to the rank that owns the row, and slots are numbered by that rank. Each rank digests
every edit; look-ups and edits compare the digests, so ranks that have drifted apart are told so and
answer nothing. Collectives go by their order: one thread of a rank makes the calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partialmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.checks import DTYPES, MAX_NUMBER
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.pages import PAGE_ROWS
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import RankLost, ShardsDiffer
from grace_fast.lookup import lookup
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.match import Distributed, Match, Nearest
from grace_fast.semantics import Replacement

NOBODY = 2**63 - 1  # what a rank claims that has not the nearest key
_POSITIVE = 2**62 - 1  # numbers that are compared as they are and negated


class Shared(NamedTuple):
    """What every rank knows of a version."""

    version: int = 0
    rows: int = 0  # of all ranks, removed ones included
    live: int = 0
    widest: float = -1.0  # at least every radius
    digest: bytes = b""  # of all that was done
    values: int = MAX_NUMBER  # slots: each rank numbers its own

    def noted(self, name: str, *given: Tensor | float | None) -> Shared:
        """Return this with something done that ranks compare."""
        state = hashlib.blake2b(self.digest, digest_size=16)
        state.update(name.encode())
        for thing in given:
            if isinstance(thing, Tensor):
                plain = thing.detach().cpu().contiguous()
                state.update(str((plain.dtype, tuple(plain.shape))).encode())
                state.update(plain.reshape(-1).view(torch.uint8).numpy().data)
            else:
                state.update(repr(None if thing is None else float(thing)).encode())
        return self._replace(digest=state.digest())


class _Group:
    """The ranks, and what they exchange.

    Raises: RuntimeError without `torch.distributed`.
    """

    def __init__(self, group: Any, timeout: float, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "row shards need torch.distributed: start the ranks with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout, self._device = group, timeout, device
        self._lost = ""

    def turns(self, first: int, count: int) -> Tensor:
        """Return which of `count` rows from row `first` on are this rank's, [M] int64."""
        start = (self.rank - first) % self.ranks
        return torch.arange(min(start, count), count, self.ranks, device="cpu")

    def local(self, row: int, rows: int) -> int | None:
        """Return where one of so many rows is on this rank, None where another has it."""
        if not 0 <= row < rows:
            raise IndexError(f"row must be in [0, {rows}), got {row}")
        return row // self.ranks if row % self.ranks == self.rank else None

    def check(self) -> None:
        """Raise RankLost where a rank was lost before."""
        if self._lost:
            raise RankLost(self._lost)

    def gather(self, numbers: list[int], doing: str) -> list[list[int]]:
        """Return the numbers of every rank."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.ranks)]
        self._wait(lambda: dist.all_gather(gathered, mine, self._group, async_op=True), doing)
        return [other.tolist() for other in gathered]

    def least(self, tensor: Tensor, doing: str) -> None:
        """Let a tensor hold the least of all ranks."""
        self._reduce(tensor, dist.ReduceOp.MIN, doing)

    def brought(self, tensor: Tensor, doing: str) -> Tensor:
        """Return a tensor of which each element is zero on all ranks but one.

        By its bytes: a sum of floats would lose the sign of zero.
        """
        shared = tensor.contiguous().view(torch.uint8)
        self._reduce(shared, dist.ReduceOp.SUM, doing)
        return shared.view(tensor.dtype)

    def _reduce(self, tensor: Tensor, operation: Any, doing: str) -> None:
        if tensor.numel():
            self._wait(
                lambda: dist.all_reduce(tensor, operation, self._group, async_op=True), doing
            )

    def _wait(self, start: Callable[[], Any], doing: str) -> None:
        self.check()
        try:
            start().wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            self._lost = (
                f"a rank was lost while {doing} (rank {self.rank} of {self.ranks} waited up to "
                f"{self._timeout:g} s): {str(error).strip().splitlines()[0]}; start all ranks again"
            )
            raise RankLost(self._lost) from error


class _Shards(Distributed):
    """The look-ups of a codebook that is on many ranks, or of one version of it."""

    def snapshot(self) -> ShardedSnapshot:
        """Return the version that is asked."""
        raise NotImplementedError

    def find(self, queries: Tensor) -> Match:
        """Return what `lookup.find` returns of the whole codebook, on every rank.

        Raises: as `lookup.find`, RankLost, ShardsDiffer.
        """
        now = self.snapshot()
        row, squared, hit = now.decide(queries, now.widest)
        fields = (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, math.inf))
        return Match(int(hit.sum()), fields=fields)

    def nearest(self, queries: Tensor, within: float = math.inf) -> Nearest:
        """Return what `lookup.nearest` returns of the whole codebook, on every rank.

        Raises: as `find`.
        """
        row, squared, _ = self.snapshot().decide(queries, within)
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
        now = self.snapshot()
        lookup.check_replacement(output, queries, now.local, positions, mode)
        match = now.find(queries)
        if not match.hits:
            return output
        positions = lookup.query_positions(positions, output)
        mask = semantics.replacement_mask(mode, positions, output.shape[1])
        return semantics.replace(output, match.hit, now.values_of(match.row), mask)


@dataclass(frozen=True, eq=False, repr=False)
class ShardedSnapshot(_Shards):
    """The codebook of all ranks at one version, for look-ups and single rows as in a `Snapshot`.

    What it tells of a row comes from the rank that owns it: every rank asks.
    """

    shards: ShardedCodebook
    local: Snapshot  # this rank's rows
    shared: Shared
    _rows: dict[int, ShardRow] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "key_dim", "value_dim"):  # as on every rank
            return getattr(self.local, name)
        if name in ("version", "rows"):
            return getattr(self.shared, name)
        raise AttributeError(
            f"{name} of row shards is not in one process; look at shards.codebook, this rank's rows"
        )

    def __len__(self) -> int:
        return self.shared.live

    @property
    def widest(self) -> float:
        """At least every radius, 0 where none was positive."""
        return max(0.0, self.shared.widest)

    @property
    def live(self) -> Tensor:
        """[N] bool, False for a removed row."""
        group = self.shards.group
        mine = torch.zeros(self.shared.rows, dtype=torch.bool, device=self.local.device)
        mine[group.rank :: group.ranks] = self.local.live
        return group.brought(mine, "reading rows")

    def snapshot(self) -> ShardedSnapshot:
        """Return this."""
        return self

    def decide(self, queries: Tensor, within: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest row of all ranks [B], its S [B] and whether it hit [B]."""
        group, snapshot = self.shards.group, self.local
        group.check()
        if graphs.is_capturing(snapshot):
            raise RuntimeError(
                "a CUDA graph cannot hold what ranks tell each other; run a model with row shards "
                "without graphs"
            )
        near = lookup.nearest(queries, snapshot, within=within)
        squared = torch.where(near.squared_distance.isnan(), math.inf, near.squared_distance)
        bits = (squared + 0.0).view(torch.int64)  # -0 would be less than everything
        batch = len(bits)
        least = torch.cat([bits, self._header(queries)])
        group.least(least, "looking up")
        self._check_header(least[batch:].tolist())
        least = least[:batch]
        hit = semantics.in_ball(squared, snapshot.radii_of(near.row).to(squared.device))
        claim = 2 * (near.row * group.ranks + group.rank) + (~hit).long()
        claim = torch.where((near.row >= 0) & (bits == least), claim, NOBODY)
        group.least(claim, "looking up")
        nobody = claim == NOBODY
        row = torch.div(claim, 2, rounding_mode="floor").masked_fill(nobody, -1)
        return row, least.view(torch.float64), (claim % 2 == 0) & ~nobody

    def _header(self, queries: Tensor) -> Tensor:
        rows = queries.detach().contiguous().view(torch.uint8).sum(dim=1, dtype=torch.int64)
        asked = (rows * torch.arange(1, 1 + len(rows), device=rows.device)).sum()
        numbers = torch.tensor(
            [self.shards.number_of(self.shared), self.shared.version],
            device=queries.device,
            dtype=torch.int64,
        )
        numbers = torch.cat([numbers, asked[None]])
        return torch.stack([numbers, -numbers]).flatten()  # one minimum gives least and most

    def _check_header(self, least: list[int]) -> None:
        same = [low == -high for low, high in zip(least[:3], least[3:], strict=True)]
        if not all(same[:2]):
            numbers = [self.shared.version, self.shards.number_of(self.shared)]
            gathered = self.shards.group.gather(numbers, "comparing versions")
            told = ", ".join(f"rank {rank} at {seen[0]}" for rank, seen in enumerate(gathered))
            raise ShardsDiffer(
                f"ranks are at different versions of the codebook ({told}), or a rank's part was "
                "edited without the others; split one saved codebook anew"
            )
        if not same[2]:
            raise ShardsDiffer(
                "ranks ask with different queries; gather them first, so that every rank asks "
                "with the layer's whole input"
            )

    # Rows, by their numbers among all

    def values_of(self, rows: Tensor) -> Tensor:
        """Return the values of rows [B] from the ranks that own them, [B, V]; zeros for -1."""
        return self.fetched(rows, self.local.value_dim, self.local.values_of, "fetching values")

    def row(self, number: int) -> ShardRow:
        """Return one row, as the rank that owns it tells.

        Raises: IndexError where there is no such row, RankLost.
        """
        if number in self._rows:
            return self._rows[number]
        group = self.shards.group
        numbers = torch.zeros(6, dtype=torch.int64, device="cpu")
        if (local := group.local(number, self.shared.rows)) is not None:
            mine = self.local.row(local)
            ball = torch.tensor([mine.radius], dtype=torch.float64, device="cpu")
            numbers[:1] = ball.view(torch.int64)
            label_ids = -1 if mine.label is None else len(mine.label)
            told = (int(mine.live), mine.key_slot, mine.value_slot, mine.label_slot, label_ids)
            numbers[1:] = torch.tensor(told, dtype=torch.int64, device="cpu")
        numbers = group.brought(numbers.to(self.local.device), "reading a row").cpu()
        radius, (live, *slots) = float(numbers[:1].view(torch.float64)), numbers[1:].tolist()
        row = self._rows[number] = ShardRow(self, number, radius, bool(live), *slots)
        return row

    def fetched(
        self, rows: Tensor, width: int, read: Callable[[Tensor], Tensor], doing: str
    ) -> Tensor:
        """Return what the ranks that own rows [B] read of them, [B, width]; zeros for -1."""
        group = self.shards.group
        mine = (rows >= 0) & (rows % group.ranks == group.rank)
        found = self.local.key_slots.new_zeros(len(rows), width)
        if mine.any():
            found[mine] = read(torch.div(rows[mine], group.ranks, rounding_mode="floor"))
        return group.brought(found, doing)


@dataclass(frozen=True, eq=False)
class ShardRow:
    """One row of a version, with the fields of `Row`; slots are of the rank that owns it."""

    _of: ShardedSnapshot
    _number: int
    radius: float
    live: bool
    key_slot: int
    value_slot: int
    label_slot: int
    _label_ids: int  # -1 where it has no label

    @property
    def key(self) -> Tensor:
        """The key, [D]."""
        local = self._of.local
        return self._of.fetched(self._listed, local.key_dim, local.keys_at, "reading a row")[0]

    @property
    def value(self) -> Tensor:
        """The value, [V]."""
        return self._of.values_of(self._listed)[0]

    @property
    def label(self) -> Tensor | None:
        """The label, [L] int64; None where there is none."""
        if self._label_ids < 0:
            return None
        group, rows = self._of.shards.group, self._of.local
        local = group.local(self._number, self._of.rows)
        known = None if local is None else rows.row(local).label
        ids = (
            torch.zeros(self._label_ids, dtype=torch.int64, device="cpu")
            if known is None
            else known
        )
        return group.brought(ids.to(rows.device, copy=True), "reading a row").cpu()

    @property
    def _listed(self) -> Tensor:
        return torch.tensor([self._number], dtype=torch.int64, device=self._of.local.device)


class ShardedCodebook(_Shards):
    """A codebook over the ranks of a process group; every rank makes every call.

    timeout: seconds that a rank waits for the others before it raises `RankLost`.

    Raises: RuntimeError without `torch.distributed`, ValueError as `Codebook`, ShardsDiffer where
    ranks disagree about the widths or the element type.
    """

    was_forked_in_writing = False  # as of a codebook; processes of a group do not fork
    enact: ClassVar[Callable[..., Any]]  # a former name, given by `edits.apply`

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        part = Codebook(key_dim, value_dim, dtype, device)
        self._join(part, _Group(group, timeout, part.device))
        self._check_founding(Shared())

    @classmethod
    def split(cls, codebook: Codebook, group: Any = None, timeout: float = 60.0) -> ShardedCodebook:
        """Return this rank's part of a codebook that every rank has opened.

        Raises: as the class, and ShardsDiffer where ranks have opened different codebooks.
        """
        whole = codebook.snapshot()
        whole.test_files()  # all of it is read
        shards = cls.__new__(cls)
        part = Codebook(codebook.key_dim, codebook.value_dim, codebook.dtype, codebook.device)
        shards._join(part, _Group(group, timeout, part.device))
        shared = Shared(rows=whole.rows, live=len(whole), widest=whole.widest)
        for start in range(0, whole.rows, PAGE_ROWS):
            rows = slice(start, start + PAGE_ROWS)
            shared = shared.noted("row", *(column[rows] for column in (whole.radii, whole.live)))
            shared = shared.noted("row", whole.keys[rows], whole.values[rows])
        labels = whole.labels
        for label in labels:
            shared = shared.noted("label", label)
        shards._check_founding(shared)
        mine = shards.group.turns(0, whole.rows)
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
        shards._publish(shared)
        return shards

    def _join(self, part: Codebook, group: _Group) -> None:
        self.codebook = part  # this rank's rows; only looked at by others
        self.group, self.rank, self.ranks = group, group.rank, group.ranks
        self._draft: ShardDraft | None = None
        self._publish(Shared())

    def _publish(self, shared: Shared) -> None:
        part = self.codebook
        self._known, self._current = part.version, ShardedSnapshot(self, part.snapshot(), shared)

    def _check_founding(self, shared: Shared) -> None:
        part = self.codebook
        facts = {
            "key_dim": part.key_dim,
            "value_dim": part.value_dim,
            "dtype": DTYPES.index(part.dtype),
            "rows": shared.rows,
            "contents": self.number_of(shared),
        }
        gathered = self.group.gather(list(facts.values()), "comparing codebooks")
        for rank, numbers in enumerate(gathered):
            for name, number, first in zip(facts, numbers, gathered[0], strict=True):
                if number == first:
                    continue
                told = [DTYPES[each] if name == "dtype" else each for each in (first, number)]
                odd = f"{name} is {told[0]} on rank 0 and {told[1]} on rank {rank}"
                if name == "contents":
                    odd = f"keys, values, radii or labels of rank {rank} are not those of rank 0"
                raise ShardsDiffer(
                    f"ranks hold different codebooks: {odd}; open the same one on each"
                )

    def number_of(self, shared: Shared) -> int:
        """Return what ranks of one history share; another where the part was edited alone."""
        mine = shared.digest
        if self.codebook.version != self._known:
            mine += b"edited alone"
        return int.from_bytes(hashlib.blake2b(mine, digest_size=8).digest()) & _POSITIVE

    def __repr__(self) -> str:
        return (
            f"ShardedCodebook({self.rows} rows on {self.ranks} ranks, rank {self.rank} with "
            f"{self.codebook!r}, version={self.version})"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._current, name)

    def __len__(self) -> int:
        return len(self._current)

    def snapshot(self) -> ShardedSnapshot:
        """Return the codebook as it is now; what is edited later does not change it."""
        return self._current

    @staticmethod
    def unsaved(asked: str) -> ValueError:
        """Return what says that edits of row shards are in memory alone."""
        return ValueError(
            f"{asked} is for the codebook of one process: row shards are in memory, each rank's "
            "part in its own; save the codebook before ShardedCodebook.split, and make the "
            "edits that are to be kept in one process"
        )

    # Editing

    @contextmanager
    def writing(self) -> Iterator[ShardDraft]:
        """Open a draft on every rank: published by all at the end, or by none.

        Inside another `writing` it is the same draft.

        Raises: RankLost, ShardsDiffer where ranks have drafted different edits, RuntimeError on
        the other ranks where one refuses.
        """
        self.group.check()
        if self._draft is not None:
            yield self._draft
            return
        with self.codebook.writing() as local, self._drafting(local, self._current.shared) as draft:
            yield draft
        self._publish(draft.counts._replace(version=self._current.shared.version + 1))

    @contextmanager
    def sketching(self) -> Iterator[ShardDraft]:
        """Open a draft that is dropped at the end, as `Codebook.sketching` does.

        Raises: as `writing`.
        """
        self.group.check()
        shared = self._current.shared if self._draft is None else self._draft.counts
        with self.codebook.sketching() as local, self._drafting(local, shared) as draft:
            yield draft

    @contextmanager
    def _drafting(self, local: Draft, shared: Shared) -> Iterator[ShardDraft]:
        outer, refused = self._draft, False
        self._draft = draft = ShardDraft(self, local, shared)
        try:
            yield draft
        except BaseException:
            refused = True
            raise
        finally:
            self._draft = outer
            self._agree(draft.counts, refused)

    def _agree(self, shared: Shared, refused: bool) -> None:
        gathered = self.group.gather([int(refused), self.number_of(shared)], "editing")
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

    @contextmanager
    def held(self) -> Iterator[ShardedSnapshot]:
        """Hold writers of this rank off for a moment."""
        with self.codebook.held():
            yield self._current

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


class ShardDraft:
    """Changes by global row; each rank makes those of its own rows and digests all."""

    def __init__(self, shards: ShardedCodebook, local: Draft, shared: Shared) -> None:
        self._shards, self._local, self.counts = shards, local, shared

    def snapshot(self) -> ShardedSnapshot:
        """Return what has been drafted so far, to look up in before it is published."""
        return ShardedSnapshot(self._shards, self._local.snapshot(), self.counts)

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Tensor | None] | None = None,
    ) -> range:
        """Add rows at the end, each on the rank whose turn it is; return their numbers."""
        first, added = self.counts.rows, len(keys)
        self.counts = self.counts.noted("append", keys, values, radii, *(labels or ()))
        mine = self._shards.group.turns(first, added)
        if len(mine):
            listed = None if labels is None else [labels[at] for at in mine.tolist()]
            self._shards.codebook.append(keys[mine], values[mine], radii[mine], listed)
        widest = float(radii.float().max()) if added else -1.0
        self.counts = self.counts._replace(
            rows=first + added,
            live=self.counts.live + added,
            widest=max(self.counts.widest, widest),
        )
        return range(first, first + added)

    def remove(self, row: int) -> None:
        """Take one live row out."""
        self._change("remove", row)
        self.counts = self.counts._replace(live=self.counts.live - 1)

    def set_radius(self, row: int, radius: float) -> None:
        """Give one row another radius."""
        self._change("set_radius", row, radius)
        stored = ctypes.c_float(radius).value  # float32 may be more, of a denormal number much more
        self.counts = self.counts._replace(widest=max(self.counts.widest, stored))

    def _change(self, name: str, row: int, *given: Any) -> None:
        """Digest a change of a row, and make it where that is this rank's."""
        self.counts = self.counts.noted(name, row, *given)
        if (local := self._shards.group.local(row, self.counts.rows)) is not None:
            getattr(self._local, name)(local, *given)

    # As of a `Draft`; slots are those of the rank that owns the row.
    set_key = partialmethod(_change, "set_key")
    set_value = partialmethod(_change, "set_value")
    set_label = partialmethod(_change, "set_label")
    point_key = partialmethod(_change, "point_key")
    point_value = partialmethod(_change, "point_value")
    point_label = partialmethod(_change, "point_label")
