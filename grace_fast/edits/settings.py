"""The settings of an editor and the schedule of its training, checked once and saved."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from grace_fast.codebook import scalars
from grace_fast.hook.positions import Query
from grace_fast.semantics import EXPAND_MARGIN, Expand, Replacement, Rules, Semantics

ValueInit = Literal["cold", "warm"]
Optimiser = Literal["adam", "lbfgs"]
_MAY_BE_NONE = ("expand_margin", "stop_loss", "max_radius", "margin")
STOP_LOSS = 0.1  # a target this likely (e^-0.1 = .9 a token) is learnt
MARGIN = 2.0  # log-odds ahead of the next best, 7 times as likely: see `Schedule.fast`
# Steps after which half of a margin is asked, and half of that again: what can hardly be learnt has
# no room for more. Without it one in six of the evaluation's fabrications takes every step.
HALVED_AFTER = 20
# Written only where they are not the default: versions before 1.0 do not know them.
_SINCE_FAST = ("optimiser", "margin")


@dataclass(frozen=True)
class Schedule:
    """How a value is trained: from where, by what, how long, and which one is kept."""

    iterations: int = 100
    learning_rate: float = 1.0
    stop_loss: float | None = 0.1  # stop below it once the prediction is right; None: by no loss
    keep_best: bool = True  # else the last, as the reference does
    optimiser: Optimiser = "adam"
    # Stop once each token of the target is so much ahead of the next best, in log-odds; beside a
    # stop_loss both have to be reached. None: by no margin.
    margin: float | None = None
    value_init: ValueInit = "cold"

    @classmethod
    def paper(cls) -> Schedule:
        """Return the paper's: at most 100 steps of Adam at a rate of 1, from a random value."""
        return cls()

    @classmethod
    def fast(cls) -> Schedule:
        """Return the one of the fewest steps: L-BFGS from the layer's own output.

        It ends once the target is generated with a margin of 2 log-odds at each token, so that
        the rounding of another batch or of bfloat16 (.1 at a logit of 20) does not change it. With
        less phrasings that share the value lose it; more costs steps and brings nothing on facts.
        `benchmarks/schedules.py` compares it with the paper's.
        """
        return cls(stop_loss=None, optimiser="lbfgs", margin=MARGIN, value_init="warm")

    @classmethod
    def named(cls, schedule: Schedule | str) -> Schedule:
        """Return a schedule, or the one of a name: "paper" or "fast".

        Raises: ValueError for another name, TypeError for what is no schedule.
        """
        if isinstance(schedule, Schedule):
            return schedule
        if not isinstance(schedule, str):
            kind = type(schedule).__name__
            raise TypeError(f'schedule must be "paper", "fast" or a Schedule, got {kind}')
        made = {"paper": cls.paper, "fast": cls.fast}.get(schedule)
        if made is None:
            raise ValueError(f'schedule must be "paper", "fast" or a Schedule, got {schedule!r}')
        return made()

    def margin_at(self, step: int) -> float | None:
        """Return the margin that is asked after so many steps."""
        if self.margin is None:
            return None
        return self.margin * float(0.5 ** (step / HALVED_AFTER))

    def settings(self) -> dict[str, Any]:
        """Return the fields of `Settings` that it stands for.

        Raises: ValueError where the last value is to be kept: that goes by the semantics.
        """
        if not self.keep_best:
            raise ValueError(
                'keep_best=False is what semantics="reference" does; attach with that instead'
            )
        return {name: getattr(self, name) for name in SCHEDULED}


# Fields of `Settings` that a schedule sets.
SCHEDULED = ("iterations", "learning_rate", "stop_loss", "optimiser", "margin", "value_init")


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
    optimiser: Optimiser = "adam"
    margin: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):  # numbers of numpy and torch could not be saved
            object.__setattr__(self, field.name, scalars.plain(getattr(self, field.name)))
        choices = {
            "replacement": Replacement,
            "value_init": ValueInit,
            "query": Query,
            "optimiser": Optimiser,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {given!r}")
        for name in (
            "epsilon",
            "learning_rate",
            "expand_margin",
            "stop_loss",
            "max_radius",
            "margin",
        ):
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
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin must be a number >= 0, or None, got {self.margin!r}")
        if self.semantics != "paper" and (self.optimiser != "adam" or self.margin is not None):
            raise ValueError(
                f"{self.semantics} semantics train by Adam, to the last step; take "
                'schedule="paper", or semantics="paper"'
            )

    def saved(self) -> dict[str, Any]:
        """Return the fields as a manifest holds them."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in vars(self).items()
            if not (name in _SINCE_FAST and value == defaults[name])
        }

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
        stop = self.stop_loss
        if stop is None and self.margin is None:
            stop = STOP_LOSS
        return Schedule(
            self.iterations,
            self.learning_rate,
            stop,
            optimiser=self.optimiser,
            margin=self.margin,
            value_init=self.value_init,
        )
