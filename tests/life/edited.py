"""A durable codebook as it lives: edits, undo, versions, compaction, a reader in its directory.

What an edit does to rows is said by `grace_model`, what a look-up answers by `law`. The reader
follows the directory as another process would, by `refresh`, and keeps what it remembers meanwhile.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import workload
from grace_model import Model as Rules

import grace_fast as gf
from grace_fast.index import maintained
from life import asking
from life.background import Background
from life.law import Model
from life.living import Wrong, thresholds

EPSILON, MARGIN = 1.0, 1e-5
WIDTH = workload.WIDTH


class Edited:
    """An editor with a directory, a reader beside it, and what both have to answer."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()
        self.rules = Rules(EPSILON, MARGIN)
        self.versions: dict[int, Rules] = {}
        self.step, self.operation = 0, ""
        mode = str(self.rng.choice(["stepped", "at once", "threads"]))
        self.background = Background(mode, self.rng)
        self.seen: Rules | None = None  # what the reader has taken up
        self.prepared: dict[str, Any] = {}

    def live(self, steps: int) -> Edited:
        """Change and ask; raise `Wrong` where an answer is not the law's."""
        small = thresholds(self.rng) | {(maintained, "SMALLEST"): 5}
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(dir=memory) as folder,
            self.background.installed(True, small),
        ):
            warnings.simplefilter("ignore", gf.GraceWarning)
            self.folder = Path(folder) / "book"
            self.grace = workload.attach(self.folder, epsilon=EPSILON, expand_margin=MARGIN)
            self.reader: Any = None
            try:
                self._live(steps)
            finally:
                self.grace.unload()
                if self.reader is not None:
                    self.reader.unload()
        return self

    def _live(self, steps: int) -> None:
        changes = [self.edit] * 6 + [self.undo] * 3 + [self.checkout, self.checkout, self.remove]
        changes += [self.compact, self.reopen, self.refresh, self.refresh]
        self.keep()
        for self.step in range(steps):
            change = changes[int(self.rng.integers(len(changes)))]
            self.operation = change.__name__
            change()
            self.background.advance(int(self.rng.integers(0, 4)))
            self.ask("editor", self.grace, self.rules)
            if self.reader is not None and self.seen is not None:
                self.ask("reader", self.reader, self.seen)

    def keep(self) -> None:
        self.versions[self.grace.codebook.version] = deepcopy(self.rules)

    def edit(self) -> None:
        for _ in range(int(self.rng.integers(1, 7))):
            place = np.zeros(WIDTH, np.float32)
            place[:2] = 0.3 * self.rng.integers(-6, 7, 2)
            label = int(self.rng.integers(3))
            batch = {
                "inputs_embeds": torch.from_numpy(place)[None, None],
                "labels": torch.tensor([label]),
            }
            done = self.grace.edit(batch)
            assert (done.outcome, done.row) == self.rules.edit(place, label)
            self.keep()

    def undo(self) -> None:
        if self.rules.labels:
            edit = int(self.rng.choice(list(self.rules.labels)))
            self.grace.undo(edit)
            self.rules.undo(edit)
            self.keep()

    def remove(self) -> None:
        live = [number for number, row in enumerate(self.rules.rows) if row.is_live]
        if live:
            row, book = int(self.rng.choice(live)), self.grace.codebook
            book.remove(int(book.ids[row]))
            self.rules.rows[row].is_live = False
            self.keep()

    def checkout(self) -> None:
        version = int(self.rng.choice(list(self.versions)))
        self.grace.checkout(version)
        self.rules.go_back(deepcopy(self.versions[version]))
        self.keep()

    def compact(self) -> None:
        self.grace.compact()
        self.versions = {self.grace.codebook.version: deepcopy(self.rules)}

    def reopen(self) -> None:
        self.grace.unload()
        self.grace = workload.attach(self.folder)
        self.prepared.pop("editor", None)

    def refresh(self) -> None:
        """The reader takes up what was made since, or a reader begins."""
        if not self.rules.rows:
            return
        if self.reader is None:
            self.reader = workload.attach(self.folder, read_only=True)
        else:
            self.reader.refresh()
        self.seen = deepcopy(self.rules)

    def ask(self, who: str, grace: Any, rules: Rules) -> None:
        model = Model(WIDTH, 1)
        if rules.rows:
            alive = np.array([row.is_live for row in rules.rows])
            radii = [rules.radius(at) if row.is_live else -1 for at, row in enumerate(rules.rows)]
            keys = np.stack([row.key for row in rules.rows])
            model.append(keys, np.zeros((len(keys), 1)), np.asarray(radii, np.float32))
            model.live[: len(keys)] = alive
        places = np.zeros((10, WIDTH))
        places[:, :2] = 0.3 * self.rng.integers(-7, 8, (10, 2))
        if model.rows:
            rows = self.rng.integers(model.rows, size=10)
            away = np.eye(WIDTH)[self.rng.integers(WIDTH, size=10)] * model.radius[rows][:, None]
            places[5:] = (model.columns[:, rows].T + away)[5:]
        queries = torch.from_numpy(places.astype(np.float32))
        told = model.ask(queries.double().numpy())
        book = grace.codebook
        prepared, of = self.prepared.get(who, (None, None))
        if of is not book:  # a reader of a compacted directory has another one
            prepared = gf.prepare(book, build_index=False)
            self.prepared[who] = (prepared, book)
        near = gf.nearest(queries, book, within=0.7)
        wrong = {
            "find": asking.wrong_finds(told, *asking.fields(gf.find(queries, book))),
            "prepared": asking.wrong_finds(told, *asking.fields(prepared(queries))),
            "nearest within": asking.wrong_nearest(told, 0.7, near),
        }
        for way, each in wrong.items():
            self.counts[who] += len(each)
            if each.any():
                at = int(np.flatnonzero(each)[0])
                raise Wrong(
                    f"{who}, {way}: {int(each.sum())} of {len(each)} answers wrong, query {at} "
                    f"first, by the law row {told.row[at]}; seed {self.seed}, step {self.step} "
                    f"({self.operation!r}), {model.rows} rows, {self.background.mode}"
                )
