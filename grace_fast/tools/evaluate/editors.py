"""GRACE as a stream of edits drives it; the baselines are in `baselines`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

import grace_fast as gf
from grace_fast.tools.evaluate import answering
from grace_fast.tools.evaluate.task import Case, Task
from grace_fast.tools.timing import times_us

LOOKUPS = 200  # timed, one query at a time


class GraceEditor:
    """GRACE attached to the layer of a task, empty or as it was saved."""

    def __init__(self, task: Task, epsilon: float, saved: Path | None = None) -> None:
        self.task = task
        if saved is None:
            self.grace = gf.attach(task.model, task.layer, epsilon, task.tokenizer, **task.settings)
        else:
            self.grace = gf.from_pretrained(task.model, saved, task.tokenizer)

    @property
    def keys(self) -> int:
        """Rows in the codebook."""
        return len(self.grace.codebook)

    def edit(self, case: Case) -> bool:
        """Edit one case, and tell whether training reached its answer in every phrasing."""
        made = self.grace.edit_batch(answering.edit_batch(self.task, case))
        return all(edit.correct for edit in made)

    def decisions(self) -> list[Any]:
        """Return outcome, row, distance and radius of every edit."""
        return [[edit.outcome, edit.row, edit.distance, edit.radius] for edit in self.grace.edits()]

    def lookups_per_second(self, cases: Sequence[Case]) -> float:
        """Time `find` of the prompts' queries, one at a time."""
        if not cases or not self.keys:
            return math.nan
        layer = self.task.layer
        asked = answering.queries_by_layer(self.task, [layer], cases[:LOOKUPS])[layer]
        turns = islice(cycle(query[None] for query in asked), LOOKUPS)
        return 1e6 / float(
            np.median(times_us(partial(gf.find, codebook=self.grace.codebook), turns))
        )

    def save(self, path: Path) -> None:
        """Save codebook and edits."""
        self.grace.save_pretrained(path)

    @contextmanager
    def standing_aside(self) -> Iterator[None]:
        """Let the model answer as before any edit, within a `with` block."""
        with self.grace.disable_adapter():
            yield

    def close(self) -> None:
        """Give the model back as it was."""
        self.grace.unload()
