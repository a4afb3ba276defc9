"""Editors of the references' kind on the tiny models, and streams of edits for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from models import FAMILIES, Family, build, edit_batch, prompts
from torch import Tensor

import grace_fast as gf

TASKS = {"gpt2": "hallucination", "t5-encoder": "qa", "bert": "scotus"}
# Of a prompt with another first token some balls are in reach, those of other prompts are not.
EPSILON = {"gpt2": 1.0, "t5-encoder": 1.0, "bert": 2.0}
STEPS, RATE = 3, 0.5


def config(layer: str, task: str, epsilon: float, replacement: str, **more: Any) -> dict[str, Any]:
    """Return a configuration as the authors' code nests it."""
    edits = {"eps": epsilon, "dist_fn": "euc", "replacement": replacement, "num_pert": 8}
    edits |= {"val_init": "cold", "val_train": "sgd", "eps_expand": "coverage"}
    edits |= {"n_iter": STEPS, "edit_lr": RATE} | more
    return {
        "device": "cpu",
        "model": {"inner_params": [f"{layer}.weight"]},
        "experiment": {"task": task},
        "editor": edits,
    }


def wrapped(model: Any) -> Any:
    """Return a model as the authors' code passes it on."""
    return SimpleNamespace(model=model, tokenizer=None)


def editor(name: str, replacement: str = "replace_all", **more: Any) -> gf.GRACE:
    """Return a new editor of the authors' kind on a tiny model."""
    family = FAMILIES[name]
    given = config(family.layer, TASKS[name], more.pop("eps", EPSILON[name]), replacement, **more)
    return gf.GRACE(given, wrapped(build(name)))


@dataclass
class Stream:
    """Prompts that come back: with their answer, with another one, and changed a little."""

    family: Family
    prompts: list[list[int]]
    answers: list[list[int]]

    def batch(self, at: int) -> dict[str, Tensor]:
        """Return one edit, as tokens with labels."""
        return edit_batch(self.family, [self.prompts[at]], [self.answers[at]])

    def __len__(self) -> int:
        return len(self.prompts)


def stream(name: str, count: int, seed: int = 0) -> Stream:
    """Return a stream of edits."""
    draw = torch.Generator().manual_seed(seed)

    def number(least: int, beyond: int) -> int:
        return int(torch.randint(least, beyond, (1,), generator=draw))

    fresh, answers = prompts(count, seed), prompts(count, seed + 1, 2, 2)
    asked: list[list[int]] = []
    told: list[list[int]] = []
    for at in range(count):
        old = number(0, max(1, at))
        kind = number(0, 5) if at else 0
        prompt = list(fresh[at]) if kind < 2 else copy.copy(asked[old])
        if kind == 4:
            prompt[0] = number(3, 100)
        asked.append(prompt)
        told.append(told[old] if kind in (2, 4) else answers[at])
    return Stream(FAMILIES[name], asked, told)
