"""What a stream of edits drives: GRACE, and the paper's baselines without a codebook.

Fine-tuning trains every weight on each edit until it is answered. Retraining goes back to the first
weights at every twentieth edit and trains on all edits so far among what the model had learnt.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from grace_fast.editor import heads
from grace_fast.tools.evaluate import answering
from grace_fast.tools.evaluate.task import Case, Task
from grace_fast.tools.timing import times_us

LOOKUPS = 200  # timed, one query at a time
FINE_TUNING_STEPS = 50
RETRAIN_EVERY = 20  # edits
RETRAIN_EPOCHS = 2
RETRAIN_BATCH = 64
REHEARSED = 4  # cases learnt before for each edit, in a retraining


def per_second(ask: Callable[[Tensor], Any], queries: Tensor) -> float:
    """Return how many look-ups of queries [M, D], one at a time, fit into a second."""
    turns = islice(cycle(query[None] for query in queries), LOOKUPS)
    return 1e6 / float(np.median(times_us(ask, turns)))


class GraceEditor:
    """GRACE attached to the layer of a task, empty or as it was saved."""

    def __init__(self, task: Task, epsilon: float, saved: Path | None = None) -> None:
        self.task = task
        if saved is None:
            self.grace = gf.attach(task.model, task.layer, epsilon, task.tokenizer, **task.settings)
        else:
            self.grace = gf.from_pretrained(task.model, saved, task.tokenizer)
        self.standing_aside = self.grace.disable_adapter  # the model answers as before any edit

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
        return per_second(partial(gf.find, codebook=self.grace.codebook), asked)

    def close(self) -> None:
        """Give the model back as it was."""
        self.grace.unload()


class FineTuned:
    """Every weight trained on every edit, one at a time."""

    keys = 0

    def __init__(self, task: Task, steps: int = FINE_TUNING_STEPS) -> None:
        self.task = replace(task, model=copy.deepcopy(task.model))
        self._steps = steps

    def edit(self, case: Case) -> bool:
        """Train on one case until it is answered, and tell whether it is."""
        batch, model = answering.edit_batch(self.task, case), self.task.model
        adam = torch.optim.AdamW(model.parameters(), lr=self.task.tuning_rate, weight_decay=0.0)
        kind = heads.kind_of(model)
        for _ in range(self._steps):
            answer = model(**batch)
            if heads.is_correct(answer.logits.detach(), batch["labels"], kind):
                return True
            adam.zero_grad()
            answer.loss.backward()
            adam.step()
        with torch.no_grad():
            return heads.is_correct(model(**batch).logits, batch["labels"], kind)

    def lookups_per_second(self, cases: Sequence[Case]) -> float:
        """Return NaN: nothing is looked up."""
        return math.nan


class Retrained(FineTuned):
    """Fine-tuning, and at every twentieth edit a training on all edits from the first weights."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__(task)
        self._first = copy.deepcopy(task.model.state_dict())
        self._past: dict[str, Case] = {}
        self._count = 0
        self._dealer = random.Random(seed)

    def edit(self, case: Case) -> bool:
        """Train on one case; at every twentieth on all of them."""
        self._past.update({one.prompt: one for one in case.phrasings})
        self._count += 1
        if self._count % RETRAIN_EVERY:
            return super().edit(case)
        self._retrain()
        batch, model = answering.edit_batch(self.task, case), self.task.model
        with torch.no_grad():
            logits = model(**batch).logits
        return heads.is_correct(logits, batch["labels"], heads.kind_of(model))

    def _retrain(self) -> None:
        model, past = self.task.model, list(self._past.values())
        model.load_state_dict(self._first)
        rate = self.task.retraining_rate
        adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        changed = {case.about for case in past}
        known = [case for case in self.task.rehearsal if case.about not in changed]
        for _ in range(RETRAIN_EPOCHS):
            rehearsed = self._dealer.sample(known, min(len(known), REHEARSED * len(past)))
            mixed = past + rehearsed
            self._dealer.shuffle(mixed)
            for start in range(0, len(mixed), RETRAIN_BATCH):
                batch = answering.training_batch(self.task, mixed[start : start + RETRAIN_BATCH])
                adam.zero_grad()
                model(**batch).loss.backward()
                adam.step()
