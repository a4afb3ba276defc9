"""A task of an evaluation: a model, the stream of its edits, and what they must not disturb."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Answer = str | int  # a text, or a class
Metric = Literal["exact", "f1", "perplexity"]


@dataclass(frozen=True)
class Case:
    """One prompt, the answer it should get, and what it asks about."""

    prompt: str
    answer: Answer
    about: str  # cases about one thing have one answer, until an edit changes it
    also: tuple[str, ...] = ()  # of an edit: other phrasings that its value is trained on

    @property
    def phrasings(self) -> list[Case]:
        """The prompt and every other phrasing, as cases of their own."""
        return [Case(prompt, self.answer, self.about) for prompt in (self.prompt, *self.also)]


@dataclass(frozen=True)
class Sample:
    """Inputs to calibrate on; no reported figure is about any of them."""

    edits: Sequence[Case]  # in order
    paraphrases: Sequence[Case]  # of the edits, by `about`, with the newest answer
    unrelated: Sequence[Case]  # with the model's own answers


@dataclass(frozen=True)
class Task:
    """A model, its edits in order, and the inputs that tell what they did."""

    name: str
    model: Any
    tokenizer: Any
    layer: str  # where the edits go; calibration measures `layers`
    layers: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)  # of `attach`, but layer and epsilon
    edits: Sequence[Case] = ()
    held_out: Sequence[Case] = ()  # other phrasings of edits; their answer is the newest edit's
    unrelated: Sequence[Case] = ()  # TRR; the answers are those before any edit
    calibration: Sample = field(default_factory=lambda: Sample((), (), ()))
    accurate: Sequence[Case] = ()  # ARR: true answers of the kind that is edited
    rehearsal: Sequence[Case] = ()  # what the model was trained on, for retraining
    metric: Metric = "exact"
    budget: float = 0.01  # of unrelated inputs that calibration may disturb
    longest: int = 16  # tokens of an answer at most
    batch: int = 256  # prompts answered at once
    cut: int | None = None  # tokens of a prompt at most
    tuning_rate: float = 1e-4  # of AdamW, in fine-tuning on one edit
    retraining_rate: float = 1e-3  # and on all edits so far among what was learnt before
    perplexity: bool = False  # report perplexities too, of a decoder
    facts: dict[str, Any] = field(default_factory=dict)  # of the data, for the report


def phrased(answers: Iterable[tuple[str, Answer]], forms: Sequence[str]) -> list[Case]:
    """Return what is asked about, with its answer, in every form of the question."""
    return [Case(form.format(about), answer, about) for about, answer in answers for form in forms]


def layers_like(model: Any, pattern: str) -> list[str]:
    """Return the layers that a dotted name with {} for the block names, in the model's order."""
    wanted = re.compile(re.escape(pattern).replace(r"\{\}", r"\d+"))
    return [name for name, _ in model.named_modules() if wanted.fullmatch(name)]
