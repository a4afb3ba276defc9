"""Warnings: an edit was made, but the set-up makes it unlikely to serve."""

from __future__ import annotations

import warnings

from grace_fast.codebook import printable
from grace_fast.editor.training import Stuck
from grace_fast.edits.edit import Edit
from grace_fast.errors import GraceWarning as GraceWarning
from grace_fast.hook.adapter import Observation
from grace_fast.semantics import Replacement


def warn_of_scale(layer: str, epsilon: float, seen: Observation) -> None:
    """Compare epsilon with how far apart the tokens of the first prompt are at a layer."""
    others = seen.hidden[0, : int(seen.positions[0])].float()
    if not len(others):
        return
    scale = float((others - seen.queries[0].float()).norm(dim=1).median())
    if epsilon > scale or epsilon < 1e-3 * scale:
        effect = "unrelated prompts" if epsilon > scale else "nothing but exact repeats"
        _warn(
            f"epsilon {epsilon:g} is far off the scale of {layer}: tokens of one prompt are about "
            f"{scale:.3g} apart there, so an edit would catch {effect}; measure it with "
            'epsilon="auto"'
        )


def warn_of_shared_query(layer: str, stored: Edit, distance: float) -> None:
    """Say that another prompt asks with the query of a stored edit, as at the end of a template."""
    _warn(
        f"this prompt asks {layer} with the same query as the other prompt of edit {stored.id} "
        f"(distance {distance:.3g}): the layer cannot tell them apart, as at the tail of a "
        "template; attach to a later layer"
    )


def warn_of_nothing_learnt(
    layer: str, row: int, replacement: Replacement, why: Stuck, loss: float, steps: int
) -> None:
    """Say why the training of a row's edit was given up, and what to do."""
    said = f"the edit of row {row} of the batch cannot be learnt at {layer}"
    if why == "not finite":
        now = "from the start" if not steps else f"after {steps} steps"
        _warn(
            f"{said}: the loss is not finite {now} (kept: {loss:g}); look at the labels, the mask "
            "and the model's element type, or attach with a lower learning_rate"
        )
        return
    if replacement == "replace_prompt":
        reason = "replace_prompt writes it before the query token, and nothing later reads it there"
        advice = "replacement='replace_last', or to an earlier layer"
    else:
        reason = "what the layer gives there reaches no token of the target"
        advice = "another layer, an earlier one as a rule"
    _warn(f"{said}: its value has no effect on the loss ({reason}); attach with {advice}")


def _warn(message: str) -> None:
    # The line of the caller's `edit`, past warn_of_*, and the steps of the edit.
    warnings.warn(printable.spelt(message), GraceWarning, stacklevel=7)
