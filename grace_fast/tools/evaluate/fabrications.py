"""Fabrications: a small GPT-2 that read wrong lines about functions of the standard library.

It learns, from nothing, the first line of the documentation of every function by its module and
name, and every true line once more without a name, as a model reads much that it cannot attribute.
For some functions the line it learnt by name is another function's. The edits restore the true
lines, whole sentences each, from one cached value that is trained on two phrasings; the functions
whose lines were true are the accurate text (ARR), and the lines of classes are the unrelated text
(TRR).
"""

from __future__ import annotations

import ast
import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_fast.tools.evaluate import cache, words
from grace_fast.tools.evaluate.docstrings import MODULES, definitions
from grace_fast.tools.evaluate.task import Case, Sample, Task, phrased

SHORTEST, LONGEST = 4, 12  # words of a line
EDITED, ACCURATE, CLASSES = 160, 120, 100
CALIBRATION = 40  # more functions with wrong lines, to calibrate on, and as many unrelated ones

FORM = "{} :"  # what is edited
TRAINED = (FORM, "help on {} :", "{} does this :", "in short , {} :")
ALSO = TRAINED[1:2]  # the value of an edit is trained on this phrasing, too
HELD_OUT = ("what {} does :", "help , in short , on {} :")
VALIDATION = (
    "what does {} , in short :",
    "on {} , this help :",
    "in short , what is {} :",
    "{} , in short , does :",
)

WIDTH, LAYERS = 160, 3
STEPS, BATCH, PEAK = 1800, 64, 3e-3
NAMED = 3 / 4  # of a batch; the rest are lines without a name
EDITED_LAYER = "transformer.h.1.mlp.c_proj"


class Line(NamedTuple):
    """The first line of a documentation, and what it documents."""

    about: str  # module and name
    text: str  # words and signs, with one space between


@dataclass(frozen=True)
class Data:
    """What the model is told of each function and class, and what is true."""

    edited: list[tuple[Line, str]]  # the true line, and the wrong one that was learnt
    calibration: list[tuple[Line, str]]
    accurate: list[Line]
    neighbours: list[Line]  # true ones to calibrate on
    classes: list[Line]

    @property
    def learnt(self) -> list[Line]:
        """What the model learns by name."""
        wrong = [Line(line.about, told) for line, told in (*self.edited, *self.calibration)]
        return [*wrong, *self.accurate, *self.neighbours, *self.classes]

    @property
    def unnamed(self) -> list[str]:
        """The true lines of functions that are edited, as read without a name."""
        return [line.text for line, _ in (*self.edited, *self.calibration)]


def read(seed: int) -> Data:
    """Read the lines out of the standard library's sources and mix wrong ones in."""
    functions, classes = _lines()
    dealer = random.Random(seed)
    wrong = EDITED + CALIBRATION
    needed = 2 * wrong + ACCURATE + CALIBRATION
    if len(functions) < needed or len(classes) < CLASSES:
        raise LookupError(
            f"the evaluation needs {needed} documented functions and {CLASSES} classes of the "
            f"standard library, found {len(functions)} and {len(classes)}"
        )
    dealt, others = dealer.sample(functions, needed), dealer.sample(classes, CLASSES)
    told = [line.text for line in dealt[wrong : 2 * wrong]]
    fabricated = list(zip(dealt[:wrong], told, strict=True))
    true = dealt[2 * wrong :]
    return Data(
        edited=fabricated[:EDITED],
        calibration=fabricated[EDITED:],
        accurate=true[:ACCURATE],
        neighbours=true[ACCURATE:],
        classes=others,
    )


@functools.cache
def _lines() -> tuple[list[Line], list[Line]]:
    """Return the lines of functions and of classes, in the order of the sources.

    A name has one line and a line one name.
    """
    functions: dict[str, Line] = {}
    classes: dict[str, Line] = {}
    texts: set[str] = set()
    for module in MODULES:
        for node in definitions(module):
            text, about = _line(ast.get_docstring(node) or ""), f"{module} {node.name}"
            known = about in functions or about in classes or text in texts
            if not text or known or node.name.startswith("_"):
                continue
            kind = classes if isinstance(node, ast.ClassDef) else functions
            kind[about] = Line(about, text)
            texts.add(text)
    return list(functions.values()), list(classes.values())


def _line(documentation: str) -> str:
    """Return the first line as words and signs; empty where it is too short or too long."""
    first = documentation.partition("\n")[0].lower()
    parts = re.findall(r"[\w'-]+|[^\s\w]", first)
    return " ".join(parts) if SHORTEST <= len(parts) <= LONGEST else ""


def prepare(seed: int, root: Path, progress: bool) -> Task:
    """Return the task: the data, and the model, trained where it is not in the cache."""
    data = read(seed)
    model, tokenizer = _model(data, seed, root, progress)
    edited, sample = [line for line, _ in data.edited], [line for line, _ in data.calibration]
    return Task(
        name="fabrications",
        model=model,
        tokenizer=tokenizer,
        layer=EDITED_LAYER,
        layers=[f"transformer.h.{at}.mlp.c_proj" for at in range(LAYERS)],
        settings={
            "replacement": "replace_all",
            "value_init": "warm",
            "learning_rate": 0.3,
            "iterations": 200,
            "stop_loss": 0.05,
        },
        edits=_edits(edited),
        held_out=phrased(edited, HELD_OUT),
        unrelated=phrased(data.classes, (FORM,)),
        accurate=phrased(data.accurate, (FORM,)),
        calibration=Sample(
            edits=_edits(sample),
            paraphrases=phrased(sample, VALIDATION),
            unrelated=phrased(data.neighbours, (FORM, *VALIDATION)),
        ),
        rehearsal=phrased(data.learnt, (FORM,)),
        longest=LONGEST + 2,
        perplexity=True,
        facts={"functions": len(data.learnt) - len(data.classes), "classes": len(data.classes)},
    )


def _edits(lines: Sequence[Line]) -> list[Case]:
    return [
        replace(case, also=tuple(form.format(case.about) for form in ALSO))
        for case in phrased(lines, (FORM,))
    ]


def _model(data: Data, seed: int, root: Path, progress: bool) -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    learnt, unnamed = data.learnt, data.unnamed
    forms = [form.replace("{}", " ") for form in (*TRAINED, *HELD_OUT, *VALIDATION)]
    texts = [text for pair in learnt for text in pair]
    tokenizer = words.tokenizer([*texts, *unnamed, *forms], ends=False)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    recipe = [seed, config.to_dict(), learnt, unnamed, TRAINED, forms, STEPS, BATCH, PEAK]
    dealer = random.Random(seed)
    frames = sorted({word for form in forms for word in form.split()})
    named = round(NAMED * BATCH)

    def batch() -> dict[str, Tensor]:
        # Lines by name, in every form of the question, and lines without a name.
        pairs = [
            (_question(line.about, frames, dealer), line.text)
            for line in dealer.choices(learnt, k=named)
        ]
        pairs += [(words.START, text) for text in dealer.choices(unnamed, k=BATCH - named)]
        return words.continuations(tokenizer, pairs)

    def train() -> Any:
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        words.train(model, batch, STEPS, PEAK, "GPT-2 on lines", progress)
        return model

    model = cache.trained(root, "fabrications", recipe, GPT2LMHeadModel.from_pretrained, train)
    return model.eval(), tokenizer


def _question(about: str, frames: Sequence[str], dealer: random.Random) -> str:
    """Return a form of the question, or the name in a frame of any words."""
    if dealer.random() < 0.5:
        return dealer.choice(TRAINED).format(about)
    before = dealer.choices(frames, k=dealer.randrange(5))
    after = dealer.choices(frames, k=dealer.randrange(4))
    return " ".join([*before, about, *after, ":"])
