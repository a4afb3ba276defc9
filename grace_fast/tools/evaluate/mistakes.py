"""Real mistakes: what MiniLM gets wrong of held-out docstrings becomes the edits. The demo's task.

Layer and epsilon come from distances, on inputs that no reported figure is about:

    epsilon = d / 2, where only 5 % of the inputs have one of another module nearer than d

A ball that takes in another edit of its label can grow to twice its epsilon: so half of d. Of the
middle layers the one is taken whose epsilon holds most rewordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.editor.calibrate import CLOSE_QUANTILE
from grace_fast.tools.evaluate import classifier
from grace_fast.tools.evaluate.classifier import Dealt
from grace_fast.tools.evaluate.docstrings import Rewording, rewordings
from grace_fast.tools.evaluate.task import Case, Task
from grace_fast.tools.terminal import bar


@dataclass(frozen=True)
class Scale:
    """How far apart inputs are at one layer."""

    layer: str
    unrelated: float  # 5 % of the inputs have one of another module nearer than this
    reworded: float  # the median distance from an input to its rewording
    epsilon: float
    inside: float  # the share of rewordings within epsilon


def measure(
    layer: str, queries: Tensor, labels: Tensor, originals: Tensor, reworded: Tensor
) -> Scale:
    """Return the distances of one layer.

    queries: [M, D] of different inputs, labels: [M]; originals and reworded: [R, D], in pairs.
    """
    wide = queries.double()
    apart = torch.cdist(wide, wide).masked_fill(labels[:, None] == labels[None, :], torch.inf)
    unrelated = float(apart.amin(dim=1).quantile(CLOSE_QUANTILE))
    to_rewording = (originals - reworded).norm(dim=1)
    epsilon = unrelated / 2
    inside = float((to_rewording <= epsilon).float().mean())
    return Scale(layer, unrelated, float(to_rewording.median()), epsilon, inside)


def choose(scales: Sequence[Scale]) -> Scale:
    """Return the layer whose epsilon holds most rewordings."""
    return max(scales, key=lambda scale: scale.inside)


def reason(chosen: Scale) -> str:
    """Say in words why this epsilon."""
    return (
        f"epsilon {chosen.epsilon:.3g} at {chosen.layer}: only {CLOSE_QUANTILE:.0%} of the inputs "
        f"have one of another module within {chosen.unrelated:.3g}, and a ball that takes in "
        "another edit of its label can reach twice its epsilon. It holds "
        f"{chosen.inside:.0%} of the rewordings, the most of the middle layers."
    )


@dataclass(frozen=True)
class Mistakes:
    """The task, and what the demo tells of how it came about."""

    task: Task
    dealt: Dealt
    scales: list[Scale]  # of the middle layers
    chosen: Scale
    reworded: list[Rewording]  # of the edits; the task's `held_out`
    queries: Tensor  # [M, D] of the unrelated inputs, at the edited layer


def prepare(seed: int, per_module: int, progress: bool) -> Mistakes:
    """Read the docstrings, run the encoder over them once, fit the head, choose layer and epsilon.

    Only inputs that are not held out are calibrated on: no figure of the stream is about them.
    """
    dealt = classifier.deal(seed, per_module)
    model, encode, splits = dealt.model, dealt.encode, dealt.splits
    # Middle: with a layer before and one after.
    layers = [
        f"encoder.encoder.layer.{at}.output.dense"
        for at in range(1, model.config.num_hidden_layers - 1)
    ]
    parts = vars(splits)
    tokens = {name: encode([doc.text for doc in part]) for name, part in parts.items()}
    labels = {name: torch.tensor([doc.label for doc in part]) for name, part in parts.items()}
    checked = rewordings(splits.validation, encode)
    tokens["reworded"] = encode([one.text for one in checked])
    with bar("features", sum(map(len, tokens.values())), progress) as ticks:
        means, queries = {}, {}
        for name, some in tokens.items():
            means[name], queries[name] = classifier.features_of(model, some, layers, ticks)
    classifier.fit_head(model.head, means["train"], labels["train"])
    scales = [
        measure(
            layer,
            torch.cat([queries["train"][layer], queries["validation"][layer]]),
            torch.cat([labels["train"], labels["validation"]]),
            queries["validation"][layer][[one.of for one in checked]],
            queries["reworded"][layer],
        )
        for layer in layers
    ]
    chosen = choose(scales)
    with torch.no_grad():
        is_right = model.head(means["held_out"]).argmax(dim=1) == labels["held_out"]
    wrong, right = (
        [doc for doc, is_so in zip(splits.held_out, some.tolist(), strict=True) if is_so]
        for some in (~is_right, is_right)
    )
    reworded = rewordings(wrong, encode)
    task = Task(
        name="mistakes",
        model=model,
        tokenizer=dealt.tokenizer,
        layer=chosen.layer,
        layers=layers,
        edits=[Case(doc.text, doc.label, doc.text) for doc in wrong],
        held_out=[Case(one.text, wrong[one.of].label, wrong[one.of].text) for one in reworded],
        unrelated=[Case(doc.text, doc.label, doc.text) for doc in right],
        batch=classifier.BATCH,
        cut=classifier.LENGTH,
    )
    asked = queries["held_out"][chosen.layer][is_right]
    return Mistakes(task, dealt, scales, chosen, reworded, asked)
