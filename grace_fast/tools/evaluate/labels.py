"""Flipped labels: MiniLM tells modules by their docstrings, and from a day on some count as others.

Six of twenty modules are put under the label of a module nearby, as a taxonomy is
revised; from then on every docstring of theirs that the classifier answers otherwise is an edit.
Docstrings of the other modules that were right before are what the edits must not disturb.
Rewordings of the edited docstrings are held out; layer and epsilon come from the other splits, for
the distances there do not depend on the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from grace_fast.tools.evaluate import answering, cache, classifier, docstrings
from grace_fast.tools.evaluate.docstrings import MODULES, PER_MODULE, Docstring, rewordings
from grace_fast.tools.evaluate.task import Case, Sample, Task
from grace_fast.tools.terminal import bar

RELABELLED = {
    "doctest": "unittest",
    "mailbox": "email",
    "multiprocessing": "threading",
    "pydoc": "inspect",
    "tarfile": "pathlib",
    "wsgiref": "http",
}
NEW_LABEL = {MODULES.index(old): MODULES.index(new) for old, new in RELABELLED.items()}
NEIGHBOURS = 300  # unrelated docstrings to calibrate on
HEAD = "head.safetensors"
DEAD = 1e-6  # of the median spread: MiniLM's last layer scales three features by 1e-9 and less
EDITED_LAYER = "encoder.encoder.layer.5.output.dense"


def prepare(seed: int, root: Path, progress: bool, per_module: int = PER_MODULE) -> Task:
    """Return the task: the docstrings, and the model with its head, trained or from the cache."""
    dealt = classifier.deal(seed, per_module)
    model, encode, splits = dealt.model, dealt.encode, dealt.splits
    recipe = [seed, DEAD, [[doc.text, doc.label] for doc in splits.train]]

    def train() -> _Head:
        tokens = encode([doc.text for doc in splits.train])
        known = torch.tensor([doc.label for doc in splits.train])
        with bar("training a head on MiniLM", len(tokens), progress) as ticks:
            fit_alive(model.head, classifier.features_of(model, tokens, (), ticks)[0], known)
        return _Head(model.head)

    cache.trained(root, "labels", recipe, _Head(model.head).load, train)
    task = Task(
        name="labels",
        model=model,
        tokenizer=dealt.tokenizer,
        layer=EDITED_LAYER,
        layers=[
            f"encoder.encoder.layer.{at}.output.dense"
            for at in range(1, model.config.num_hidden_layers)
        ],
        tuning_rate=1e-5,
        retraining_rate=1e-4,
        batch=32,
        cut=classifier.LENGTH,
    )
    edits, kept = _shift(task, splits.held_out)
    others = [*splits.validation, *splits.train]
    sample = [
        Docstring(doc.text, NEW_LABEL[doc.label]) for doc in others if doc.label in NEW_LABEL
    ][: len(edits)]
    neighbours = [doc for doc in others if doc.label not in NEW_LABEL][:NEIGHBOURS]
    return replace(
        task,
        edits=_cases(edits),
        held_out=_reworded(edits, encode),
        unrelated=_cases(kept),
        calibration=Sample(_cases(sample), _reworded(sample, encode), _cases(neighbours)),
        rehearsal=_cases(splits.train),
        facts={
            "relabelled": RELABELLED,
            "docstrings": sum(map(len, (splits.train, splits.validation, splits.held_out))),
        },
    )


def fit_alive(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Fit a head on the features that vary, [M, H] in all; the others get no weight.

    Standardised like the rest, a feature that hardly varies would get a weight of up to 1e31, and
    the smallest step of fine-tuning would break the model.
    """
    spread = features.std(dim=0)
    alive = spread > DEAD * spread.median()
    part = torch.nn.Linear(int(alive.sum()), len(head.bias))
    classifier.fit_head(part, features[:, alive], labels)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, alive] = part.weight
        head.bias.copy_(part.bias)


class _Head:
    """The trained head as a file beside others."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head

    def save_pretrained(self, place: Path) -> None:
        save_file(self.head.state_dict(), place / HEAD)

    def load(self, place: Path) -> Any:
        return self.head.load_state_dict(load_file(place / HEAD))


def _shift(task: Task, docs: Sequence[Docstring]) -> tuple[list[Docstring], list[Docstring]]:
    """Return the docstrings that the new labels make wrong, and the others that are right."""
    given = answering.answers(task, _cases(docs))
    edits, kept = [], []
    for doc, answer in zip(docs, given, strict=True):
        label = NEW_LABEL.get(doc.label)
        if label is not None and answer != label:
            edits.append(Docstring(doc.text, label))
        elif label is None and answer == doc.label:
            kept.append(doc)
    return edits, kept


def _cases(docs: Sequence[Docstring]) -> list[Case]:
    return [Case(doc.text, doc.label, doc.text) for doc in docs]


def _reworded(docs: Sequence[Docstring], encode: docstrings.Encode) -> list[Case]:
    return [
        Case(one.text, docs[one.of].label, docs[one.of].text) for one in rewordings(docs, encode)
    ]
