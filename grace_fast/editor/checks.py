"""Checks of one edit: what cannot be edited is refused, what is unlikely to serve warned of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from torch import Tensor

from grace_fast.codebook import printable
from grace_fast.editor import batches, unfit
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.heads import Head
from grace_fast.editor.training import Trained
from grace_fast.edits.plans import Plan, RowsRefused
from grace_fast.edits.settings import Settings
from grace_fast.errors import GraceWarning
from grace_fast.hook.modes import Observation
from grace_fast.hook.wrappers import Host
from grace_fast.semantics import Rules


def refuse_unknown_labels(host: Host, batch: Batch, head: Head) -> None:
    """Refuse a label a token where a wrapper reads them, which may be one token ahead or not.

    Raises: ValueError.
    """
    if not host.is_wrapper or head != "classes" or batch["labels"].ndim < 2:
        return
    raise ValueError(
        f"{type(host.called).__name__} makes a loss of its own around another model, and "
        "nothing says whether it predicts the label of each token in place or one token "
        "ahead; attach to a model that makes its own loss"
    )


def check_tokens(context: EditContext, batch: Batch, seen: Observation) -> None:
    """Refuse a layer that does not see the tokens, or as many vectors by chance alone.

    One for each prompt are as many as there are tokens where a prompt has one; the encoder's
    states may be as many as the decoder's tokens. A first edit looks again with other lengths.

    Raises: ValueError.
    """
    if context.tokens_are_checked:
        return
    length, decoded = batches.token_count(batch), batches.decoder_length(batch)
    if not context.adapter.first_token:
        if length == 1:
            context.observe(batches.with_more_tokens(batch))
    elif decoded is not None:
        given = seen.hidden.shape[1]
        if given == decoded and length in (None, decoded):
            decoded += 1 if decoded == 1 else -1  # a model may take no more
            start = batches.start_of(context.host.model)
            other = batches.with_decoder_of(batch, decoded, start)
            given = context.observe(other).hidden.shape[1]
        if given != decoded:
            raise ValueError(
                f"{context.settings.layer} must see one vector for each of the decoder's "
                f"{decoded} tokens, it was given {given}{unfit.ELSEWHERE}"
            )
    context.tokens_are_checked = True


def check_query(context: EditContext, queries: Tensor, seen: Observation) -> None:
    """Refuse queries [B, D] that no codebook may hold, or that the mode writes nothing for.

    Raises: ValueError naming the row.
    """
    settings = context.settings
    if not queries.isfinite().all():
        row = int((~queries.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(
            f"the query of row {row} must be finite, got NaN or infinity at {settings.layer}"
        )
    if settings.replacement == "replace_prompt" and bool((seen.positions == 0).any()):
        raise ValueError(
            "replace_prompt replaces the tokens before the query, and there are none in a "
            "prompt of one token; attach with replacement='replace_last' or 'replace_all'"
        )
    if not context.scale_is_checked:
        context.scale_is_checked = True
        _warn_of_scale(settings.layer, settings.epsilon, seen)


def _warn_of_scale(layer: str, epsilon: float, seen: Observation) -> None:
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


def warn_of_shared_queries(context: EditContext, batch: Batch, plan: Plan, rules: Rules) -> None:
    """Warn where the edits of the nearest key all came from other prompts."""
    history = context.history
    for at, done in enumerate(plan.applied):
        if done.distance > rules.repeat_distance:
            continue
        near = history.rows[done.row]
        if not near.edits and near.neighbour >= 0:
            near = history.rows[near.neighbour]
        stored = [history.edits[edit] for edit in near.edits]
        prompt = batches.prompt_checksum(batch, at, context.kind)
        if stored and all(edit.prompt != prompt for edit in stored):
            _warn(
                f"this prompt asks {context.settings.layer} with the same query as the other "
                f"prompt of edit {stored[0].id} (distance {done.distance:.3g}): the layer cannot "
                "tell them apart, as at the tail of a template; attach to a later layer"
            )


def warn_of_nothing_learnt(settings: Settings, plan: Plan, results: Sequence[Trained]) -> None:
    """Warn of values whose training was given up: say why, and what to do.

    Raises: RowsRefused for a value that is not finite, which no codebook may hold.
    """
    for one, result in zip(plan.trainings, results, strict=True):
        at, layer = one.picked[0], settings.layer
        if not result.value.isfinite().all():
            raise RowsRefused(
                one.picked,
                f"the value of row {at} of the batch must be finite, and its training at "
                f"{layer} ended in NaN or infinity; attach with a lower learning_rate",
            )
        said = f"the edit of row {at} of the batch cannot be learnt at {layer}"
        if result.stuck == "not finite":
            now = "from the start" if not result.steps else f"after {result.steps} steps"
            _warn(
                f"{said}: the loss is not finite {now} (kept: {result.loss:g}); look at the "
                "labels, the mask and the model's element type, or attach with a lower "
                "learning_rate"
            )
        elif result.stuck is not None:
            reason = "what the layer gives there reaches no token of the target"
            advice = "another layer, an earlier one as a rule"
            if settings.replacement == "replace_prompt":
                reason = (
                    "replace_prompt writes it before the query token, and nothing later reads it "
                    "there"
                )
                advice = "replacement='replace_last', or to an earlier layer"
            _warn(f"{said}: its value has no effect on the loss ({reason}); attach with {advice}")


def _warn(message: str) -> None:
    frame, level = sys._getframe(), 1  # the line of the caller's `edit`, past the steps of the edit
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(__package__ + "."):
        frame, level = frame.f_back, level + 1
    warnings.warn(printable.spelt(message), GraceWarning, stacklevel=level)
