"""One life: a codebook and its model, changed and asked in a drawn order.

A life is made again from its seed, but for builds in free threads. What is wrong ends it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import grace_fast as gf
from grace_fast import _native
from grace_fast.index import builder, maintained, segments
from life import asking, drawing, tables
from life.background import MODES, Background
from life.law import Answers, Array, Model
from life.operations import (
    OPERATIONS,
    Change,
    appended,
    places_of,
    to_book,
    to_draft,
    to_model,
)
from life.ranks import Ranks

WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 128, 129, 257, 384)
SETS = ("portable", "avx2", "avx512vnni")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
KEPT = 10  # old versions
WORK = 20_000_000  # rows times width times queries of one question, unless these are few


class Wrong(AssertionError):
    """An answer is not the law's; it says which life to live again."""


@dataclass
class Plan:
    """What a life is drawn from; None where that is drawn too."""

    operations: Sequence[str] = tuple(OPERATIONS)
    ways: Sequence[str] = tuple(asking.WAYS)
    mode: str | None = None
    kind: str | None = None
    dtype: torch.dtype | None = None
    most_rows: int | None = None
    small: bool | None = None  # radii, all of them
    first_rows: int | None = None  # of the codebook as it begins
    batches: Sequence[int] = (1, 2, 8, 40, 160, 400)  # how many queries are asked at once
    steps: int = 60
    seconds: float = 1e9


class Life:
    """A codebook, its model, and what was asked."""

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        self.seed, self.plan = seed, plan or Plan()
        self.rng = rng = np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()  # decisions, by way
        self.done: Counter[str] = Counter()  # operations
        width = int(rng.choice(WIDTHS))
        if self.plan.first_rows:
            width = min(width, 33)
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        self.dtype = self.plan.dtype or dtype
        kind = str(rng.choice(drawing.KINDS))
        self.drawing = drawing.Drawing(self.plan.kind or kind, width, self.dtype, rng)
        if self.plan.small is not None:
            self.drawing.small = self.plan.small
            self.drawing.giants &= not self.plan.small
        most = int(rng.choice([60, 250, 700, 1500, 5000], p=[0.2, 0.35, 0.25, 0.15, 0.05]))
        self.most_rows = min(self.plan.most_rows or most, max(60, 400_000 // width))
        mode = str(rng.choice(MODES, p=[0.2, 0.4, 0.1, 0.1, 0.2]))
        self.background = Background(self.plan.mode or mode, rng)
        self.codes_pay = [None, True, True, False][int(rng.integers(4))]
        self.thresholds = thresholds(rng)
        self.instructions = str(rng.choice(SETS))
        self.value_width = int(rng.choice([1, 3]))
        self.step, self.operation = 0, "begin"
        self.kept: list[tuple[gf.Codebook, Any, Model]] = []
        self.places: deque[Array] = deque(maxlen=24)
        self.ranks: Ranks | None = None  # that follow the codebook
        self.captured: Any = None  # what a graph of the codebook holds
        self.book: gf.Codebook
        self.model: Model
        self.prepared: Any = None
        self.narrowed: list[tuple[int, Any]] = []  # rows and how wide their balls were
        self.grown: list[tuple[int, Any]] = []  # and how narrow

    def __repr__(self) -> str:
        book = f"{self.model.rows} rows of {self.model.width} {self.drawing.kind!r} {self.dtype}"
        how = f"{self.background.mode}, {self.instructions}, codes_pay={self.codes_pay}"
        return f"Life({self.seed}), step {self.step} ({self.operation!r}), {book}, {how}"

    def live(self) -> Life:
        """Live it, to the end or to the first wrong answer.

        Raises: Wrong.
        """
        end = time.monotonic() + self.plan.seconds
        usual = _native.cpu.instruction_set()
        with ExitStack() as stack:
            stack.callback(_native.cpu.use_instruction_set, usual)
            if not _native.cpu.use_instruction_set(self.instructions):
                self.instructions = usual
            stack.enter_context(tables.installed())
            stack.enter_context(self.background.installed(self.codes_pay, self.thresholds))
            stack.callback(self.leave)
            self.begin()
            chosen = list(self.plan.operations)
            while self.step < self.plan.steps and time.monotonic() < end:
                self.step += 1
                self.operation = str(self.rng.choice(chosen))
                self.done[self.operation] += 1
                OPERATIONS[self.operation](self)
                self.stage()
                self.ask()
        return self

    def begin(self) -> None:
        """Have a new codebook of a few rows."""
        self.leave()
        self.book = gf.Codebook(self.drawing.width, self.value_width, self.dtype)
        self.model = Model(self.drawing.width, self.value_width)
        self.prepared, self.narrowed, self.grown = None, [], []
        first = min(self.most_rows, int(self.rng.choice([0, 1, 12, 60, 200])))
        first = self.plan.first_rows or first
        if first:
            self.write([appended(self, first)])

    def leave(self) -> None:
        """Give back what only this codebook needs."""
        if self.ranks is not None:
            self.ranks.close()
        self.ranks = self.captured = None

    def go_on_with(self, book: gf.Codebook) -> None:
        """Go on with a codebook that holds what this one does."""
        self.leave()
        self.book, self.prepared = book, None

    def exact(self, points: Array) -> Array:
        """Return points as the codebook's element type holds them."""
        return drawing.exact(points, self.dtype)

    # Changing

    def write(self, changes: list[Change], alone: bool | None = None) -> None:
        """Make changes: each a version of its own, or all of them one."""
        if not changes:
            return
        self.note(places_of(self, changes))
        alone = bool(self.rng.random() < 0.4) if alone is None else alone
        if alone:
            for change in changes:
                to_book(self.book, change)
                to_model(self.model, change)
                if self.rng.random() < 0.1:  # a version that nobody has asked yet
                    self.keep()
        else:
            with self.book.writing() as draft:
                for change in changes:
                    to_draft(draft, change, self.dtype)
                    to_model(self.model, change)
        if self.ranks is not None:
            self.ranks.write(changes, self.dtype)

    def shards_begin_anew(self) -> None:
        """Let ranks take the codebook as it is."""
        if self.ranks is not None:
            self.ranks.begin_anew(self.book)

    def note(self, places: list[Array]) -> None:
        """Remember where to ask."""
        self.places.extend(np.asarray(place, np.float64) for place in places if len(place))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let the model be what it was, afterwards."""
        before = self.model.copy()
        try:
            yield
        finally:
            self.model = before

    def earlier(self) -> tuple[Any, Model] | None:
        """Return an old version of this very codebook."""
        mine = [(then, model) for book, then, model in self.kept if book is self.book]
        return mine[int(self.rng.integers(len(mine)))] if mine else None

    def oldest(self) -> tuple[Any, Model] | None:
        """Return the oldest version of this very codebook that is still kept."""
        return next(((then, model) for book, then, model in self.kept if book is self.book), None)

    def stage(self) -> None:
        """Let background work go on, as far as this life has it; then ask old versions, maybe.

        Codes that were just published were told of none of them.
        """
        before = self.background.done.get("publish", 0)
        self.background.advance(int(self.rng.choice([0, 0, 1, 1, 2, 5, 20])))
        if self.background.done.get("publish", 0) > before and self.rng.random() < 0.3:
            for _ in range(2):
                entry = self.earlier()
                if entry is not None:
                    self.ask_version("old version", *entry)

    # Asking

    def questions(self, count: int, model: Model) -> torch.Tensor:
        """Return queries [count, D], most of the codebook's own element type."""
        points = self.drawing.questions(count, model, list(self.places))
        dtype = self.dtype if self.rng.random() < 0.75 else DTYPES[int(self.rng.integers(4))]
        return self.drawing.cast(points, dtype)

    def ask(self) -> None:
        """Ask in some of the ways, and let background work go on between them."""
        batch = int(self.rng.choice(self.plan.batches))
        most = max(40, WORK // max(1, self.model.rows * self.model.width))
        queries = self.questions(min(batch, most), self.model)
        told = self.model.ask(queries.double().numpy())
        for name in self.plan.ways:
            if self.rng.random() < asking.OFTEN[name]:
                asking.WAYS[name](self, queries, told)
                if self.rng.random() < 0.15:
                    self.stage()
        if self.rng.random() < 0.25:
            self.keep()

    def keep(self) -> None:
        """Keep this version, to be asked later."""
        self.kept.append((self.book, self.book.snapshot(), self.model.copy()))
        if len(self.kept) > KEPT:
            del self.kept[int(self.rng.integers(KEPT))]  # never the newest

    def ask_version(
        self, name: str, snapshot: Any, model: Model, queries: torch.Tensor | None = None
    ) -> None:
        """Ask a version with its own model."""
        if queries is None:
            queries = self.questions(int(self.rng.choice([1, 3, 12, 40])), model)
        told = model.ask(queries.double().numpy())
        asking.ask_snapshot(self, name, snapshot, queries, told)

    def check(self, name: str, queries: torch.Tensor, told: Answers, wrong: Array) -> None:
        """Count answers; refuse those that are not the law's.

        Raises: Wrong.
        """
        self.counts[name] += len(wrong)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            said = f"row {told.nearest[at]}, S {told.apart[at]!r}, hit {told.hit[at]}"
            raise Wrong(
                f"{name}: {int(wrong.sum())} of {len(wrong)} answers wrong, query {at} first, "
                f"by the law {said}; {self}"
            )


def thresholds(rng: np.random.Generator) -> dict[Any, int]:
    """Return the usual thresholds, or such that small codebooks reach every stage."""
    if rng.random() < 0.25:
        return {}
    inline = int(rng.choice([4, 16, 64]))
    return {
        (maintained, "SMALLEST"): int(rng.choice([2, 20, 48])),
        (maintained, "INLINE_ROWS"): inline,
        (maintained, "DELTA_ROWS"): int(rng.choice([8, 30, 100])),
        (maintained, "MERGE_RATIO"): int(rng.choice([1, 2, 4])),
        (builder, "_CHUNK"): int(rng.choice([16, 64])),
        (builder, "OUTLIERS"): int(rng.choice([8, 4096])),
        (segments, "ORDER_ROWS"): int(rng.choice([40, 130, 4096])),
    }
