"""The settings of an editor and the schedule of its training, checked once and saved."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from grace_fast.codebook import scalars
from grace_fast.hook.positions import Query
from grace_fast.semantics import EXPAND_MARGIN, Expand, Replacement, Rules, Semantics

ValueInit = Literal["cold", "warm"]
_MAY_BE_NONE = ("expand_margin", "stop_loss", "max_radius")
STOP_LOSS = 0.1  # a target this likely (e^-0.1 = .9 a token) is learnt


@dataclass(frozen=True)
class Schedule:
    """How long a value is trained and which one is kept."""

    iterations: int = 100
    learning_rate: float = 1.0
    stop_loss: float | None = 0.1  # stop below it once the prediction is right; None: never
    keep_best: bool = True  # else the last, as the reference does


@dataclass(frozen=True)
class Settings:
    """What `attach` was asked for; saved with the codebook."""

    layer: str
    epsilon: float
    semantics: Semantics = "paper"
    replacement: Replacement = "replace_prompt"
    iterations: int = 100
    learning_rate: float = 1.0
    expand: Expand = "coverage"
    expand_margin: float | None = None
    value_init: ValueInit = "cold"
    query: Query = "prompt_end"
    stop_loss: float | None = None
    store_text: bool = False
    max_radius: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # numbers of numpy and torch could not be saved
            object.__setattr__(self, field.name, scalars.plain(getattr(self, field.name)))
        choices = {"replacement": Replacement, "value_init": ValueInit, "query": Query}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {given!r}")
        for name in ("epsilon", "learning_rate", "expand_margin", "stop_loss", "max_radius"):
            given = getattr(self, name)
            if given is None and name in _MAY_BE_NONE:
                continue
            object.__setattr__(self, name, scalars.number(name, given))
        for name, kind in (("layer", str), ("store_text", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        is_whole = isinstance(self.iterations, int) and not isinstance(self.iterations, bool)
        if not is_whole or self.iterations < 0:
            raise ValueError(f"iterations must be a whole number >= 0, got {self.iterations!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a number > 0, got {self.learning_rate!r}")
        if self.stop_loss is not None and math.isnan(self.stop_loss):
            raise ValueError(f"stop_loss must be a number, got {self.stop_loss!r}")

    def rules(self, dtype: torch.dtype) -> Rules:
        """Return how edits are decided in a codebook of this element type."""
        margin = self.expand_margin
        if margin is None:
            margin = EXPAND_MARGIN[dtype]
        widest = math.inf if self.max_radius is None else float(self.max_radius)
        return Rules(float(self.epsilon), self.expand, margin, self.semantics, widest)

    def schedule(self) -> Schedule:
        """Return how a value is trained."""
        if self.semantics != "paper":
            return Schedule(self.iterations, self.learning_rate, self.stop_loss, keep_best=False)
        stop = STOP_LOSS if self.stop_loss is None else self.stop_loss
        return Schedule(self.iterations, self.learning_rate, stop)
