"""What is known of a model's shortcuts: ways to make a step that are not its own call."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Way = Literal["model", "cut", "replay"]  # which computed a step


class Shortcuts:
    """Which shortcuts are taken, as far as is known; what was not as the model, never again."""

    def __init__(self) -> None:
        self.cuts = True  # the head to the tokens that have a target
        self.cut_is_proved = False
        self.records = True  # steps, to run them again
        self.proved: set[int] = set()  # kinds of programs that were what the model computes
        self.taken: Counter[Way] = Counter()  # steps of each way

    def give_up(self) -> None:
        """Let the model compute every step from now on."""
        self.cuts = self.records = False
