"""Who edits: the authors' algorithm, EasyEdit's, the drop-in and `attach`, one model under each.

All share the weights of one model, and make the same edit: the same token asks, the same tokens
are replaced, a value starts with the same numbers and learns at the same rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import grace_fast as gf
from benchmarks import edit_asking
from benchmarks.adaptor import sharing
from benchmarks.edit_models import Item, Studied
from benchmarks.reference_rule import (
    EasyEditAdaptor,
    PlainAdaptor,
    PlainEditor,
    exact_distances,
)
from grace_fast.compat.reference import GRACEAdapter
from grace_fast.hook.wrappers import stack_of

_TASKS = {"decoder": "hallucination", "classifier": "scotus", "seq2seq": "qa"}


class Contestant:
    """An editor of one kind on a model of its own; `edit` makes one edit of some steps."""

    name = ""

    def __init__(self, studied: Studied, epsilon: float, keys: Tensor | None = None) -> None:
        self.studied, self.epsilon = studied, epsilon
        self.model = sharing(studied.model)
        self.layer = self.model.get_submodule(studied.layer)
        asks_first = stack_of(self.model, self.layer)[1]
        self.at_labels = studied.kind == "decoder"
        self.key_id = 0 if asks_first else -1
        self.rate = float(studied.settings.get("learning_rate", 1.0))
        self.warm = studied.settings.get("value_init") == "warm"
        self.start(keys)

    def start(self, keys: Tensor | None) -> None:
        """Put the editor on the layer, with keys [N, D] in its codebook."""
        raise NotImplementedError

    def edit(self, item: Item, steps: int) -> None:
        """Make one edit by so many steps."""
        raise NotImplementedError

    def decided(self) -> tuple[Tensor, Tensor, int]:
        """Return keys, radii, and the row nearest to the last edit's query."""
        adaptor: Any = self.editor.adaptor
        return adaptor.keys, adaptor.epsilons.reshape(-1), int(adaptor.chosen_key)

    editor: Any


class Authors(Contestant):
    """The algorithm of the authors' code."""

    name = "authors"
    kind: type[PlainAdaptor] = PlainAdaptor
    distances: dict[str, Any] = {}  # noqa: RUF012

    def start(self, keys: Tensor | None) -> None:
        adaptor = self.kind(
            self.layer, self.epsilon, "replace_all", warm=self.warm, **self.distances
        )
        adaptor.key_id = self.key_id
        _load(adaptor, keys, self.epsilon)
        self.editor = PlainEditor(self.model, self.studied.layer, adaptor, self.at_labels)
        self.made = 0

    def edit(self, item: Item, steps: int) -> None:
        self.editor.edit(item, steps, self.rate)

    def learn(self, item: Item, steps: int, stops: bool) -> int:
        """Make one edit, until it is learnt where it stops then; return the steps taken."""
        torch.manual_seed(self.made)  # the cold value that `attach` draws for this edit
        self.made += 1
        until = edit_asking.learnt(self.studied, item) if stops else None
        return self.editor.edit(item, steps, self.rate, str(self.made), until)


class EasyEdit(Authors):
    """The algorithm of EasyEdit's code."""

    name = "EasyEdit"
    kind = EasyEditAdaptor


class Exact(Authors):
    """The authors' rules in exact arithmetic."""

    name = "the law"
    distances = {"distances": exact_distances}  # noqa: RUF012


class DropIn(Contestant):
    """`grace_fast.GRACE`, in the place of the authors'."""

    name = "drop-in"

    def start(self, keys: Tensor | None) -> None:
        edits = {"eps": self.epsilon, "replacement": "replace_all"}
        edits |= {"val_init": "warm" if self.warm else "cold", "eps_expand": "coverage"}
        self.config = {
            "device": "cpu",
            "model": {"inner_params": [self.studied.layer]},
            "experiment": {"task": _TASKS[self.studied.kind]},
            "editor": edits | {"n_iter": 1, "edit_lr": self.rate},
        }
        self.editor = gf.GRACE(self.config, SimpleNamespace(model=self.model, tokenizer=None))
        self.editor.adaptor.key_id = self.key_id
        _load(self.editor.adaptor, keys, self.epsilon)

    def edit(self, item: Item, steps: int) -> None:
        self.editor.edit({"editor": {"n_iter": steps, "edit_lr": self.rate}}, item, None)


class Native(Contestant):
    """`attach` with the reference's rules and schedule: as many steps as asked, the last kept."""

    name = "grace.edit"

    def start(self, keys: Tensor | None) -> None:
        book = None if keys is None else _book(self.layer, keys, self.epsilon)
        self.editor = gf.attach(
            self.model,
            self.studied.layer,
            self.epsilon,
            semantics="reference",
            expand_margin=0.0,
            codebook=book,
            **self.studied.settings | {"stop_loss": None},
        )

    def edit(self, item: Item, steps: int) -> None:
        context = self.editor._context
        context.settings = replace(context.settings, iterations=steps)
        self.editor.edit(item)

    def decided(self) -> tuple[Tensor, Tensor, int]:
        now, query = self.editor.codebook.snapshot(), self.editor.edits()[-1].query
        return now.keys, now.radii, int(gf.nearest(query[None], now).row)


def attached(studied: Studied, epsilon: float, **fields: Any) -> gf.Grace:
    """Return an editor of this package, with its own rules, on a model that shares the weights."""
    settings: Any = studied.settings | fields
    return gf.attach(sharing(studied.model), studied.layer, epsilon, **settings)


def one_by_one(grace: gf.Grace, items: Sequence[Item]) -> list[Any]:
    """Edit items one after the other; return the reports."""
    return [grace.edit(item) for item in items]


def many(grace: gf.Grace, items: Sequence[Item], size: int) -> list[Any]:
    """Edit items so many at once; return the reports."""
    return list(grace.edit_many(items, batch_size=size, progress=False))


def answered_by_reference(editor: Authors, items: Sequence[Item]) -> list[bool]:
    """Tell the same of a reference's algorithm, whose look-ups are its own."""
    found = []
    for item in items:
        if editor.at_labels:
            editor.editor.adaptor.key_id = int((item["labels"] == -100).sum()) - 1
        found += edit_asking.answered(editor.studied, editor.model, [item])
    return found


@torch.no_grad()
def queries(studied: Studied, items: Sequence[Item]) -> Tensor:
    """Return what items ask, each alone, [M, D]."""
    grace = attached(studied, 1.0)
    try:
        return torch.cat([grace.query_of(item) for item in items])
    finally:
        grace.unload()


def _rows_of(layer: Any, keys: Tensor, epsilon: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return values, radii and labels for keys."""
    width = layer.nf if hasattr(layer, "nf") else layer.out_features
    values = torch.rand(len(keys), width, generator=torch.Generator().manual_seed(3))
    labels = [torch.tensor([[-at]]) for at in range(len(keys))]
    return values, torch.full((len(keys),), epsilon), labels


def _book(layer: Any, keys: Tensor, epsilon: float) -> gf.Codebook:
    values, radii, labels = _rows_of(layer, keys, epsilon)
    book = gf.Codebook(keys.shape[1], values.shape[1])
    book.append(keys, values, radii, [label.flatten() for label in labels])
    gf.prepare(book)
    return book


def _load(adaptor: Any, keys: Tensor | None, epsilon: float) -> None:
    if keys is None:
        return
    values, radii, labels = _rows_of(adaptor.layer, keys, epsilon)
    adaptor.keys, adaptor.values = keys.clone(), nn.Parameter(values)
    adaptor.epsilons, adaptor.key_labels = radii[:, None], labels
    if isinstance(adaptor, GRACEAdapter):
        adaptor._settle()
        gf.prepare(adaptor._book)  # as it is once the codebook has been there for a while
    if isinstance(adaptor, EasyEditAdaptor):
        adaptor.edit_ids = [None]
