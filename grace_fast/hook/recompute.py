"""Recomputation cache: what a layer in training asked, for checkpoints that run it again.

There the model's own call is over, so nothing says where the prompts end; and an edit may have come
between. The layer is recognised by its input, and writes what it wrote before.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grace_fast.hook.answers import LookupAnswer

REMEMBERED = 64  # forward passes, of which a few come before their backward pass


def is_in_backward() -> bool:
    """Tell whether autograd runs this thread's calls."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class _Asked:
    queries: Tensor  # [Q, D]
    position: Tensor  # [Q], in this call; among all its tokens where the answer has an owner
    answer: LookupAnswer

    def difference(self, hidden: Tensor) -> float:
        """Return how far a layer's input [B, T, D] is from asking this, relative to the queries."""
        rows, width, each = hidden.flatten(0, 1), hidden.shape[1], self.position
        if self.answer.owner is None:
            if len(each) != len(hidden) or bool((each >= width).any()):
                return math.inf
            each = each + width * torch.arange(len(hidden), device=each.device)
        elif len(self.answer.owner) != len(rows):
            return math.inf
        apart = rows[each.to(rows.device)].float() - self.queries.float()
        return float(apart.norm() / self.queries.float().norm().clamp(min=1e-30))


@dataclass
class RecomputeCache:
    """The last look-ups of a layer in training."""

    asked: deque[_Asked] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def keep(self, queries: Tensor, position: Tensor, answer: LookupAnswer) -> None:
        """Remember queries [Q, D], where they were taken [Q], and what they found."""
        self.asked.append(_Asked(queries.clone(), position, answer))

    def recall(self, hidden: Tensor) -> LookupAnswer:
        """Return what was found when the layer ran forward on this input [B, T, D].

        Raises: RuntimeError where it did not, as far as is known.
        """
        known = [(asked.difference(hidden), asked.answer) for asked in list(self.asked)]
        difference, answer = min(known, key=lambda one: one[0], default=(math.inf, None))
        # What runs again may round otherwise, where attention has another kernel for gradients.
        if answer is not None and difference <= torch.finfo(hidden.dtype).eps ** 0.5:
            return answer
        raise RuntimeError(
            "a checkpoint runs the edited layer again on an input that it was not run on in the "
            "forward pass, so its prompts' ends are unknown; run forward and backward in turn"
        )
