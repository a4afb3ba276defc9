"""The references' configurations of an adaptor, read once and checked."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from grace_fast.edits.settings import Schedule, ValueInit
from grace_fast.semantics import Expand, Replacement, Rules

Task = Literal["qa", "scotus", "hallucination"]
Read = Callable[[str], Any]  # a setting by its name in the references; raises where it is missing


@dataclass(frozen=True)
class Method:
    """How one adaptor edits. `dist_fn` and `num_pert` have no effect, as in the references."""

    epsilon: float = 1.0
    replacement: Replacement = "replace_prompt"
    val_init: ValueInit = "cold"
    eps_expand: Expand = "coverage"
    dist_fn: Any = "euc"
    num_pert: Any = None


def read_method(read: Read, read_idle: Read) -> Method:
    """Return what a configuration says; `read_idle` reads what has no effect and may be missing.

    Raises: ValueError for a mode that does not exist, naming those that do.
    """
    method = Method(
        epsilon=number("eps", read("eps")),
        replacement=cast(Replacement, one_of("replacement", read("replacement"), Replacement)),
        val_init=cast(ValueInit, one_of("val_init", read("val_init"), ValueInit)),
        eps_expand=cast(Expand, one_of("eps_expand", read("eps_expand"), Expand)),
        dist_fn=read_idle("dist_fn"),
        num_pert=read_idle("num_pert"),
    )
    Rules(method.epsilon)  # refuses an epsilon that no ball can have
    return method


def steps_of(n_iter: int, edit_lr: float) -> Schedule:
    """Return how the references train a value: exactly so many steps, the last value kept."""
    return Schedule(n_iter, edit_lr, stop_loss=None, keep_best=False)


def read_steps(read: Read) -> Schedule:
    """Return how a configuration has values trained.

    Raises: ValueError for fewer than one step or a learning rate that is not positive.
    """
    n_iter, edit_lr = number("n_iter", read("n_iter")), number("edit_lr", read("edit_lr"))
    if not 1 <= n_iter < math.inf:
        raise ValueError(f"n_iter must be at least 1, got {n_iter:g}")
    if not edit_lr > 0:
        raise ValueError(f"edit_lr must be a number > 0, got {edit_lr}")
    return steps_of(int(n_iter), edit_lr)


def one_of(name: str, given: Any, choices: Any) -> str:
    """Return a setting that is one of the choices.

    Raises: ValueError naming them.
    """
    if given not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {reprlib.repr(given)}")
    return str(given)


def number(name: str, given: Any) -> float:
    """Return a setting that is a number, or text of one.

    Raises: ValueError naming it.
    """
    try:
        return float(given)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {reprlib.repr(given)}") from None
