"""Faults of memory, put into the package one at a time, and how soon a life finds each.

    python -m life.mutants [WORDS OF A NAME]     with tests on the path; prints a table

A mutant is a few words of a function's source put otherwise. It is found when a life ends with an
answer that is not the law's, or without an answer. What is not found within the time has to be
understood: either lives miss something, or nobody could tell.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from grace_fast.codebook import caches, draft
from grace_fast.compat import live
from grace_fast.index import builder, maintained, native_view, segments
from grace_fast.lookup import prepared, sharded
from grace_fast.lookup.backends import cpu, cuda, faiss, faiss_bounds, faiss_index
from grace_fast.store.large import resident
from life import ranks, tables
from life.dropin import DropIn
from life.edited import Edited
from life.living import Life, Plan
from life.operations import FAMILIES, OPERATIONS

SECONDS = 20.0  # of this process's own time, for one mutant


# What is done in two lives of three: without what takes rows away or has all begun anew.
FOCUSED = (
    *("append", "append many", "append and narrow", "widen again", "look back"),
    *("move", "take back", "widen", "narrow", "one draft", "over a neighbour", "over a neighbour"),
)
OTHERS = {"drop-in": DropIn, "edited": Edited}  # lives of their own kind
QUICK = (
    *("find", "find one", "prepared before", "prepared now"),
    *("nearest", "nearest within", "replace", "old version"),
)


@dataclass(frozen=True)
class Mutant:
    """One fault: in a function, what is put in the place of what."""

    name: str
    owner: Any  # a class or a module
    function: str
    old: str
    new: str
    by: str = ""  # the ways that can find it; all by default
    quick: bool = False  # found within a few seconds, for the tests
    more: tuple[Any, str, str, str] | None = None  # what goes with it: owner, function, old, new


C, S, D = maintained.Index, native_view, draft.Draft
_STALE_WIDEST = """_stale_widest(self, snapshot)"""
# The version that was told last, whatever its age; the newest where codes were published since.
_LAST = (
    'last = self.__dict__.get("_last", (None, None)); '
    "last = last[1] if last[0] is state else newest; self._last = (state, snapshot); "
)
_BOTH = "both = min(snapshot.rows, newest.rows, state.covered)"
_PAGES = """{}
    for number in range(-(-both // PAGE_ROWS)):
        page, known = snapshot.pages[number], {}"""
_TAKES_ALL = (C, "_take_in", "elif self._can_be_told_of(snapshot)", "else")

MUTANTS = (
    # The two faults that were there, put back.
    Mutant(
        "known fault: a page that an append fills in place brings no wider radius",
        *(C, "view", "view.widest = snapshot.counts.widest", f"view.widest = {_STALE_WIDEST}"),
        quick=True,
    ),
    Mutant(
        "known fault: versions are compared with the one asked last, be it an old one",
        *(C, "_take_changes_in", _BOTH),
        f"{_LAST}newest = last; both = min(snapshot.rows, 4096 * len(last.pages), state.covered)",
        "old",
        quick=True,
        more=_TAKES_ALL,
    ),
    Mutant(
        "of these, only radii are",
        *(C, "_take_changes_in", _PAGES.format(_BOTH, "newest.pages[number]")),
        _PAGES.format(_LAST + _BOTH, "_page_with(newest, last, number, 'radius')"),
        "old",
        quick=True,
        more=_TAKES_ALL,
    ),
    Mutant(
        "of these, only slots of keys are: a key that is put back is not seen",
        *(C, "_take_changes_in", _PAGES.format(_BOTH, "newest.pages[number]")),
        _PAGES.format(_LAST + _BOTH, "_page_with(newest, last, number, 'key_slot')"),
        "old",
        quick=True,
        more=_TAKES_ALL,
    ),
    Mutant(
        "pages that the version asked last does not have are not compared",
        *(C, "_take_changes_in", _BOTH),
        f"{_LAST}{_BOTH[:-1]}, 4096 * len(last.pages))",
        "pages",
    ),
    # What a certificate says.
    Mutant(
        "a reach is not raised",
        C,
        "_raise_max_radius",
        "for segment in state.segments:",
        "return\n    for segment in state.segments:",
        quick=True,
    ),
    Mutant("the reach of the tail is not raised", C, "_raise_max_radius", "== row", "< 0"),
    Mutant(
        "the reach of runs is not raised",
        *(C, "_raise_max_radius", "segment.first <= row < segment.last", "False"),
        quick=True,
    ),
    Mutant(
        "the reach of a super leaf is not raised",
        *(
            segments.Segment,
            "raise_max_radius",
            "self.node_max_radius is not None and",
            "False and",
        ),
    ),
    Mutant(
        "a radius that grew leaves its isolated bit",
        *(segments.Segment, "raise_max_radius", "self.clear_isolated(position)", "pass"),
        "over",
    ),
    Mutant(
        "a key that moved leaves its isolated bit",
        *(C, "_encode_rows", "segment.clear_isolated(", "("),
        "beside",
    ),
    Mutant("a move is missed", C, "_take_page_in", "if len(moved)", "if False", quick=True),
    Mutant(
        "of several moves one is missed",
        *(C, "_take_page_in", "first + moved.astype", "first + moved[-1:].astype"),
    ),
    Mutant("all rows count as covered", maintained, "plan_of", "min(state.covered, rows)", "rows"),
    Mutant(
        "one row too many counts as covered",
        *(C, "_take_rows_in", "state.covered = last", "state.covered = last + 1"),
    ),
    Mutant(
        "new rows count as covered without codes",
        *(
            C,
            "_take_rows_in",
            "np.arange(state.covered, last)",
            "np.arange(state.covered, last)[:-1]",
        ),
    ),
    Mutant(
        "the tail is dropped at publication",
        C,
        "_publish",
        "keep = np.arange(old.count)",
        "keep = np.arange(0)",
    ),
    Mutant(
        "what was put into the tail during a build is dropped",
        *(C, "_publish", "keep >= build.delta_count", "keep >= old.count"),
    ),
    Mutant(
        "edits during a build are not taken in",
        *(C, "_publish", "self.current, self._newest = now, snapshot", "self.current = now"),
        quick=True,
    ),
    Mutant(
        "the oldest version is ignored",
        C,
        "_can_be_told_of",
        "snapshot.version >= state.oldest",
        "True",
    ),
    Mutant(
        "old versions are not taken in",
        C,
        "_take_in",
        "    self._take_changes_in(snapshot)\n        self._older.add(snapshot)",
        "    self._older.add(snapshot)",
        "old",
    ),
    Mutant("a key that codes cannot hold is kept", segments, "append", "return None", "pass"),
    Mutant(
        "a new row's reach is not set",
        segments,
        "append_codes",
        "np.maximum.at",
        "(lambda *_: 0)",
        quick=True,
    ),
    Mutant(
        "a tail that grows loses its reaches",
        *(segments, "append_codes", ', "leaf_max_radius"):', "):"),
    ),
    Mutant(
        "a run's reaches are the floor",
        segments,
        "sorted_segment",
        "max_radius_of_each(radii[order], min_radius)",
        "max_radius_of_each(0 * radii, min_radius)",
    ),
    Mutant(
        "all wide balls of a run are isolated",
        *(
            builder.Build,
            "_look_around",
            "segment.isolated = bits",
            "segment.isolated = bits | 255",
        ),
    ),
    Mutant(
        "codes opened from a disk have no reaches",
        resident,
        "unpack_state",
        "snapshot.radii.numpy()",
        "0 * snapshot.radii.numpy()",
    ),
    # What a version is read by.
    Mutant(
        "the page table is not refreshed",
        S.NativeView,
        "_page_table",
        "number < shared and page is known[number]",
        "number < shared",
        quick=True,
    ),
    Mutant(
        "moved slots are not read",
        S.NativeView,
        "_fields",
        "if self.key_moves",
        "if False",
        quick=True,
    ),
    Mutant(
        "half of the widest radius",
        maintained,
        "plan_of",
        "widest=widest",
        "widest=widest / 2",
        quick=True,
    ),
    Mutant(
        "a draft trusts its version's radii",
        S.NativeView,
        "use_keys_of",
        "base.predicted_bytes, False",
        "base.predicted_bytes, True",
    ),
    Mutant(
        "a draft trusts its version's codes of keys that moved",
        cpu,
        "_view_of_draft",
        "base.counts.key_moves == snapshot.counts.key_moves",
        "True",
    ),
    Mutant(
        "one version's view serves another",
        caches.Cache,
        "of",
        "known[0] is snapshot",
        "True",
        quick=True,
    ),
    # What a codebook itself keeps.
    Mutant(
        "an append does not widen",
        D,
        "append",
        "widest=max(self.counts.widest, float(radii.max()) if added else -1.0)",
        "widest=self.counts.widest",
    ),
    Mutant(
        "a radius does not widen",
        D,
        "set_radius",
        "max(self.counts.widest, ctypes.c_float(radius).value)",
        "self.counts.widest",
    ),
    Mutant(
        "versions that a reader takes up do not widen",
        D,
        "set_columns",
        'max(self.counts.widest, float(columns["radius"].max()))',
        "self.counts.widest",
        "edited",
    ),
    Mutant(
        "a move is not counted",
        D,
        "point_key",
        "self.counts.key_moves + 1",
        "self.counts.key_moves",
    ),
    Mutant("pages are written in place", D, "_writable", ".copy()", "", quick=True),
    # What is asked again and again.
    Mutant(
        "a prepared call keeps its version",
        prepared.Prepared,
        "__call__",
        "self._book.current is not snapshot",
        "False",
        quick=True,
    ),
    Mutant(
        "a prepared call keeps its view",
        prepared.Prepared,
        "_renew",
        "cpu.view_of(snapshot)",
        "self._made[1] or cpu.view_of(snapshot)",
        quick=True,
    ),
    # Followers.
    Mutant(
        "FAISS misses what is new",
        faiss_index.Filled,
        "_add",
        "self._index.add(moved)",
        "self.count or self._index.add(moved)",
        "faiss",
    ),
    Mutant(
        "FAISS keeps the selection of another version",
        faiss_index.Filled,
        "_selection",
        "known[0] is snapshot",
        "True",
        "faiss",
    ),
    Mutant(
        "FAISS keeps moved keys where they were",
        faiss_index,
        "used_slots",
        "if not snapshot.counts.key_moves",
        "if True",
        "faiss",
    ),
    Mutant(
        "FAISS does not see how far new keys are",
        faiss_index.Filled,
        "_add",
        "self.bounds.longest = longest",
        "pass",
        "faiss",
    ),
    Mutant(
        "FAISS takes a draft's widest radius from before",
        faiss,
        "find",
        "snapshot.widest * (1 + 1e-6)",
        "0.5 * snapshot.widest",
        "faiss",
    ),
    Mutant(
        "CUDA's table is that of the version before",
        cuda,
        "table_of",
        "_tables.of(snapshot, _newest)",
        "_tables.of(snapshot, lambda version, known: known or _newest(version, None))",
        "cuda",
    ),
    Mutant(
        "CUDA's table keeps old reaches",
        cuda.Table,
        "_segments",
        "changing = changing_arrays(segment).items()",
        "old = {name: array.copy() for name, array in changing_arrays(segment).items()}\n"
        "        kept = old if is_delta else vars(placed).setdefault('old', {})\n"
        "        changing = (old if is_delta else kept.setdefault(segment, old)).items()",
        "cuda",
    ),
    Mutant(
        "CUDA's graphs keep the first version",
        cuda.Listener,
        "hold",
        "self._book.copy_(table.book)",
        "hasattr(self, 'table') or self._book.copy_(table.book)",
        "cuda",
    ),
    Mutant(
        "shards do not widen by an append",
        sharded.ShardDraft,
        "append",
        "max(self.counts.widest, widest)",
        "self.counts.widest",
        "shards",
    ),
    Mutant(
        "shards do not widen by a radius",
        sharded.ShardDraft,
        "set_radius",
        "max(self.counts.widest, stored)",
        "self.counts.widest",
        "shards",
    ),
    Mutant(
        "the drop-in does not see what is written in place",
        live.LiveCodebook,
        "_settle",
        "tensor._version != version",
        "False",
        "drop-in",
        True,
    ),
    Mutant(
        "the drop-in asks the codebook from before",
        live.LiveCodebook,
        "_take",
        "prepare(book, build_index=False)",
        "self._find or prepare(book, build_index=False)",
        "drop-in",
        True,
    ),
)


def _stale_widest(known: Any, snapshot: Any) -> float:
    """Return the widest radius of pages that were other objects when they were looked at."""
    pages, widest = known.__dict__.get("_looked_at", ((), -1.0))
    for number, page in enumerate(snapshot.pages):
        if number >= len(pages) or pages[number] is not page:
            here = page.radius[: max(0, snapshot.rows - 4096 * number)]
            widest = max(widest, float(here.max()))
    known.__dict__["_looked_at"] = (snapshot.pages, widest)
    return widest


def _page_with(newest: Any, last: Any, number: int, column: str) -> Any:
    """Return a page of the newest version that holds one column of the version told last."""
    page = newest.pages[number]
    if last is newest or number >= len(last.pages):
        return page
    return replace(page, **{column: getattr(last.pages[number], column)})


@contextmanager
def put_in(mutant: Mutant) -> Iterator[None]:
    """Let the package have a fault.

    Raises: ValueError where the package no longer has what the mutant changes.
    """
    changes = [(mutant.owner, mutant.function, mutant.old, mutant.new)]
    changes += [mutant.more] if mutant.more is not None else []
    with ExitStack() as stack:
        for owner, name, old, new in changes:
            usual = inspect.getattr_static(owner, name)
            setattr(owner, name, _otherwise(usual, name, old, new))
            stack.callback(setattr, owner, name, usual)
        yield


def _otherwise(usual: Any, name: str, old: str, new: str) -> Any:
    """Return a function made of another's source with some words put otherwise."""
    function = usual.__func__ if isinstance(usual, staticmethod) else usual
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:
        raise ValueError(f"{name} is without {old!r}")
    names = dict(vars(sys.modules[function.__module__]))
    names.update(_stale_widest=_stale_widest, _page_with=_page_with)
    scope: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<{name}, otherwise>", "exec"), names, scope)
    return scope[name]


def found_after(mutant: Mutant, seconds: float, first: int = 0) -> tuple[int, str] | None:
    """Return after how many decisions a mutant is found, and by which way; None if it is not."""
    ways: Sequence[str] = QUICK
    if mutant.by in ("faiss", "cuda", "shards"):
        ways = [mutant.by] * 8  # each with its own chance
    end, decisions, seed = time.process_time() + seconds, 0, first
    with put_in(mutant):
        while time.process_time() < end:
            one: Any
            mode = ("stepped", "at once")[seed % 2]
            if mutant.by in OTHERS:
                one = OTHERS[mutant.by](seed)
            else:
                one = Life(seed, _plan(mutant, seed, ways, mode))
            try:
                one.live(40) if mutant.by in OTHERS else one.live()
            except Exception as error:
                told = str(error).split(":")[0] if isinstance(error, AssertionError) else ""
                return decisions + sum(one.counts.values()), told or type(error).__name__
            decisions += sum(one.counts.values())
            seed += 1
    return None


def _plan(mutant: Mutant, seed: int, ways: Sequence[str], mode: str) -> Plan:
    """Return what a life is drawn from that looks for a mutant."""
    focused = (tuple(OPERATIONS), FOCUSED, FAMILIES["old"])[seed % 3]
    plan = Plan(focused, ways, most_rows=60 if mutant.by == "cuda" else 300, steps=40, mode=mode)
    if mutant.by == "old":
        plan.operations = FAMILIES["old"]
    elif mutant.by == "over":
        plan.operations, plan.small = ("append many", "append", *["over a neighbour"] * 6), True
    elif mutant.by == "beside":
        beside = ["append apart", "beside a neighbour", "beside a neighbour"] * 2
        plan.operations, plan.small = ("append many", *beside), True
    elif mutant.by == "pages":
        plan = Plan(FAMILIES["old"], ways, mode, first_rows=4095, most_rows=4500, steps=6)
    return plan


def main(words: str = "") -> int:
    """Print what becomes of each mutant; return how many were not found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [mutant for mutant in MUTANTS if words in mutant.name or words == mutant.by]
    if any(mutant.by == "cuda" for mutant in chosen):
        from cuda_build import host_module

        tables.use(host_module())
    missed = 0
    print("| mutant | found after decisions | by | seconds |\n| --- | ---: | --- | ---: |")
    for mutant in chosen:
        start = time.process_time()
        found = found_after(mutant, SECONDS)
        spent = time.process_time() - start
        missed += found is None
        after, by = ("not found", "") if found is None else (f"{found[0]:,}", found[1])
        print(f"| {mutant.name} | {after} | {by} | {spent:.1f} |", flush=True)
    return missed


__all__ = ["MUTANTS", "faiss_bounds", "found_after", "ranks"]

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
