"""The reference's own rule, as a baseline: GRACE with distances from `torch.cdist` as it comes.

    hit = torch.cdist(query, keys).min() <= the radius of that row

From the 26th key on `cdist` takes its distances from a matrix product. An expanded radius was set
to a distance and no longer equals it when the prompt comes back: the edit is lost. Layer, epsilon
and the training of values are those of the task, so that the rule is all that differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast import semantics
from grace_fast.editor import batches, heads
from grace_fast.editor.training import frozen, train
from grace_fast.edits.settings import Settings
from grace_fast.hook import positions
from grace_fast.hook.wrappers import stack_of
from grace_fast.semantics import Rules
from grace_fast.tools.evaluate import answering
from grace_fast.tools.evaluate.editors import per_second
from grace_fast.tools.evaluate.task import Case, Task


class ReferenceRule:
    """The reference's rule on the layer of a task."""

    def __init__(self, task: Task, epsilon: float) -> None:
        self.task = task
        self.rules = Rules(epsilon, semantics="reference")
        settings = Settings(layer=task.layer, epsilon=epsilon, **task.settings)
        self._schedule, self._start = settings.schedule(), settings.value_init
        layer = task.model.get_submodule(task.layer)
        stack, self._in_decoder = stack_of(task.model, layer)
        asks_at_start = self._in_decoder and settings.replacement == "replace_prompt"
        self._mode: semantics.Replacement = (
            "replace_last" if asks_at_start else settings.replacement
        )
        self._decoder_only = heads.kind_of(task.model) == "decoder"
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._radii: list[float] = []
        self._labels: list[Tensor] = []
        self._trial: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] | None = None  # query and output while watching
        self._where: Tensor | None = None
        self._cached = 0
        self._cold = torch.Generator().manual_seed(0)  # its own: what ran before does not matter
        self._held: tuple[Tensor, Tensor] | None = None  # rows and query tokens of a prompt
        self._hooks = [
            stack.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._at_layer),
        ]

    @property
    def keys(self) -> int:
        """Rows in the codebook."""
        return len(self._keys)

    def edit(self, case: Case) -> bool:
        """Edit one case, and tell whether training reached its answer."""
        batch = answering.edit_batch(self.task, case)
        with frozen(self.task.model):
            seen = zip(*self._observe(batch), batch["labels"], strict=True)
            rows = [self._decide(query, output, label) for query, output, label in seen]
            learnt = [self._train(batch, rows, row) for row in dict.fromkeys(rows)]
        return all(learnt)

    def lookups_per_second(self, cases: Sequence[Case]) -> float:
        """Time the rule on random queries of the keys' width, one at a time."""
        if not self._keys:
            return math.nan
        keys, radii = torch.stack(self._keys), torch.tensor(self._radii)

        def ask(query: Tensor) -> bool:
            distance, row = torch.cdist(query, keys).min(1)
            return bool(distance <= radii[row])

        return per_second(ask, keys + 1)

    def close(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()

    def _train(self, batch: dict[str, Any], rows: Sequence[int], row: int) -> bool:
        """Train one value on those of a batch that were decided to be its, [B] rows in all."""
        part = batches.rows(batch, [at for at, one in enumerate(rows) if one == row])
        trained = train(self._values[row], lambda value: self._attempt(value, part), self._schedule)
        self._values[row] = trained.value
        return trained.correct

    def _decide(self, query: Tensor, output: Tensor, label: Tensor) -> int:
        """Apply the edit table with the distance as `cdist` gives it; return the edited row."""
        fresh = output if self._start == "warm" else torch.rand(len(output), generator=self._cold)
        distance, near = math.inf, -1
        if self._keys:
            lowest = torch.cdist(query[None], torch.stack(self._keys)).min(1)
            distance, near = float(lowest.values), int(lowest.indices)
        radius = self._radii[near] if self._keys else 0.0
        alike = bool(self._keys) and semantics.same_label(self.rules, self._labels[near], label)
        decision = semantics.decide(self.rules, distance * distance, radius, alike)
        if decision.outcome in ("added", "split"):
            if decision.nearest_radius is not None:
                self._radii[near] = decision.nearest_radius
            self._keys.append(query)
            self._values.append(fresh)
            self._labels.append(label)
            self._radii.append(decision.radius)
            return len(self._keys) - 1
        if decision.outcome == "expanded":
            self._radii[near] = distance  # to the bit, as the reference sets it
        return near

    def _observe(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self._seen = []
        try:
            with torch.no_grad():
                self.task.model(**batch)
            return self._seen[0]  # [B, D] and [B, V]
        finally:
            self._seen = None

    def _attempt(self, value: Tensor, batch: dict[str, Any]) -> tuple[Tensor, bool]:
        self._trial = value
        try:
            answer = self.task.model(**batch)
        finally:
            self._trial = None
        kind = heads.kind_of(self.task.model)
        return answer.loss, heads.is_correct(answer.logits.detach(), batch["labels"], kind)

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        self._cached = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self._where = (
            None
            if self._in_decoder
            else positions.prompt_end(positions.read(kwargs, self._decoder_only))
        )

    def _at_layer(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        hidden, length = args[0], output.shape[1]
        where = self._where
        if self._in_decoder:
            where = torch.zeros(len(hidden), dtype=torch.int64)
        elif where is None or len(where) != len(hidden):
            where = torch.full((len(hidden),), length - 1)
        every = torch.arange(len(hidden))
        if self._seen is not None:
            self._seen.append((hidden[every, where].detach(), output[every, where].detach()))
            return None
        if self._trial is not None:
            mask = semantics.replacement_mask(self._mode, where, length)
            hit = torch.ones(len(hidden), dtype=torch.bool)
            return semantics.replace(output, hit, self._trial.expand(len(hidden), -1), mask)
        if not self._keys:
            return None
        if not self._cached:
            distance, row = torch.cdist(hidden[every, where], torch.stack(self._keys)).min(1)
            hit = distance <= torch.tensor(self._radii)[row]
            self._held = row.masked_fill(~hit, -1), where
        if self._held is None or len(self._held[0]) != len(hidden):
            return None
        row, asked_at = self._held
        mask = semantics.replacement_mask(self._mode, asked_at - self._cached, length)
        values = torch.stack(self._values)[row.clamp(min=0)]
        return semantics.replace(output, row >= 0, values, mask)
