"""Query location: which vectors of the layer's input one call looks up, and of which tokens.

What is usual (prompts that all end with the call's last token, no cache, no mode) is told from the
arguments of the call as they are. Everything else is read into `Call`s first: padding, packed rows,
labels, caches, sequences in progress, positions that the caller names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grace_fast.hook import calls, positions, recompute, tensor_parallel
from grace_fast.hook.answers import LookupAnswer
from grace_fast.hook.generation import Generation
from grace_fast.hook.modes import Asked
from grace_fast.hook.positions import TELLING, Call
from grace_fast.hook.reading import Reader
from grace_fast.hook.recompute import RecomputeCache

_TELLING = frozenset(TELLING)


class Queries(NamedTuple):
    """What a call asks: Q vectors, of tokens of its rows or, with an owner, of all its tokens."""

    rows: Tensor  # [Q, D]
    where: Tensor | None = None  # [Q], cached tokens counted; None for the last token of each row
    length: int = 0  # of the rows, where that is so
    here: Tensor | None = None  # [Q], in this call, where that is not all of the sequence
    counts: Tensor | None = None  # [Q] bool, whose tokens are in this call; None for all of them
    owner: Tensor | None = None  # [B*T] int64, the query that decides for each token
    batch: int | None = None  # B, where that is not Q
    cached: int | Tensor = 0  # tokens of the sequences before these
    holder: Generation | None = None  # that holds what is found
    known: LookupAnswer | None = None  # what was found already: nothing is asked

    @property
    def position(self) -> Tensor:
        """[Q], the query's token, cached ones counted."""
        return _last(self.rows, self.length) if self.where is None else self.where


class Locator:
    """Where the queries of one adaptor are in the calls of a thread."""

    def __init__(self, reader: Reader, recomputed: RecomputeCache) -> None:
        self._reader, self._recomputed = reader, recomputed
        self._adaptor, self._modes = reader.adaptor, reader.modes
        self._site = site = reader.site
        self._lengthens = positions.lengthens(getattr(site.model, "config", None))
        self._rows_second = False  # the layer's tensors are [T, B, width]
        self._asks_last = site.query != "every_token" and not site.first_token
        self._needs_mask = site.decoder_only or site.finds_padding  # to tell padding by

    def locate(self, hidden: Tensor, output: Tensor) -> Queries | None:
        """Return what a call asks by a layer's input; None where the prompts' ends are not in it.

        hidden: [B, T, D] or, from a model that flattens them, [B*T, D]; output: the same with V.

        Raises: ValueError where the prompts' ends are not told, or were computed already.
        """
        stack, at = calls.in_progress.stack, 0
        while at < len(stack) and self._adaptor not in stack[at].depths:
            at += 1  # a call of another model, around those of this one
        is_usual = self._asks_last and not self._rows_second and not self._modes.thread.stack
        if is_usual and at < len(stack):
            given = stack[at].arguments
            tokens, mask, shape = given.get("input_ids"), given.get("attention_mask"), hidden.shape
            if (
                _TELLING.isdisjoint(given)
                and isinstance(tokens, Tensor)
                and len(shape) == 3
                and tokens.shape == shape[:2]
                and (
                    not self._needs_mask
                    if mask is None
                    else isinstance(mask, Tensor)
                    and mask.shape == tokens.shape
                    and mask.is_cpu
                    and 0 not in mask[:, -1].tolist()
                )
            ):
                for entered in stack[at + 1 :]:
                    said, depth = entered.arguments, entered.depths.get(self._adaptor)
                    if depth is not None and (
                        depth == 0
                        or said.get("input_ids") is not tokens
                        or said.get("attention_mask") is not mask
                        or said.get("past_key_values") is not None
                    ):
                        break
                else:
                    rows = hidden.detach() if hidden.requires_grad else hidden
                    return Queries(rows[:, -1], length=shape[1])
        return self._of_calls(hidden.detach(), output)

    def _of_calls(self, hidden: Tensor, output: Tensor) -> Queries | None:
        """Do what `locate` does where it cannot be told from the arguments as they are."""
        site, call = self._site, self._reader.call()
        hidden, _ = self.shaped(hidden), self.shaped(output)
        if site.query == "every_token":
            rows = hidden.reshape(-1, hidden.shape[-1])
            token = torch.arange(len(rows), device=rows.device)
            return Queries(rows, token, owner=token, batch=len(hidden))
        self.refuse_other_tokens(hidden)
        if call is None and recompute.is_in_backward():
            return Queries(hidden, known=self._recomputed.recall(hidden))
        held = self._reader.sequences()
        if call is None and self._adaptor.attachment.knows_tokens:
            self._refuse_untold(hidden, held)
        if site.query == "prompt_end":
            return self._of_prompts(hidden, call, held)
        if call is not None and hidden.shape[1] > 1:
            self._reader.refuse_hidden_padding(call)
        is_named = call is not None and not site.first_token
        where = _within(positions.prompt_end(call) if is_named and call else None, hidden)
        return Queries(positions.vectors_at(hidden, where), where)

    def _of_prompts(
        self, hidden: Tensor, call: Call | None, held: Generation | None
    ) -> Queries | None:
        """Ask at the prompts' ends, once a sequence; None where they are not in this call."""
        batch, length, before = len(hidden), hidden.shape[1], _before(call, held)
        if held is not None and held.answer is not None:
            known = held.answer.for_batch(batch)
            if known is not None:
                return Queries(hidden, cached=before, known=known)
        cached, is_draft = int(before), held is not None and held.is_draft
        ends = None if held is None else held.positions_for(batch)
        if ends is None and cached and (length == 1 or self._site.first_token or is_draft):
            return None  # a decoding step: the prompt's end was in an earlier call
        if (
            ends is None
            and call is not None
            and not self._site.first_token
            and self._given() is None
        ):
            if not cached:
                self._reader.refuse_hidden_padding(call)
            if (packed := positions.packed(call)) is not None:
                flat = hidden.reshape(-1, hidden.shape[-1])[packed.position]
                owner = packed.owner
                return Queries(flat, packed.position, owner=owner, batch=batch, cached=before)
        if ends is None and not cached:
            ends = self.prompt_ends(hidden)
            return Queries(positions.vectors_at(hidden, ends), ends, cached=before, holder=held)
        ends = self.prompt_ends(hidden) + cached if ends is None else ends.to(hidden.device)
        inside = self._inside(ends - cached, cached, length, is_draft)
        if inside is not None and not inside.any():
            return None
        here, holder = (ends - cached).clamp(0, length - 1), held if inside is None else None
        rows = positions.vectors_at(hidden, here)
        return Queries(rows, ends, here=here, counts=inside, cached=before, holder=holder)

    def _inside(self, where: Tensor, cached: int, length: int, is_draft: bool) -> Tensor | None:
        """Tell which prompts end in this call, [B] bool; None for all of them.

        Raises: ValueError where a prompt goes on, or went before, and that matters to the mode.
        """
        before, beyond = where < 0, where >= length
        inside = ~(before | beyond)
        in_parts = bool(beyond.any()) or (bool(cached) and bool(inside.any()))
        mode = self._site.replacement
        if in_parts and mode != "replace_last" and not is_draft:
            raise ValueError(
                f"{mode} writes tokens before the prompt's end, and here they are "
                "computed in an earlier call (chunked prefill or a cached prefix); attach with "
                "replacement='replace_last' or query='every_token'"
            )
        return None if bool(inside.all()) else inside

    def prompt_ends(self, hidden: Tensor) -> Tensor:
        """Return the position of each row's query in this call, [B]; hidden: [B, T, D]."""
        call, given = self._reader.call(), self._given()
        if given is not None:
            where, asked = _within(given, hidden), self._modes.newest(Asked)
            if asked and asked.length is not None and call and call.tokens is not None:
                where = where + max(call.tokens.shape[1] - asked.length, 0)  # what stands before
            return where.clamp(max=hidden.shape[1] - 1)
        if self._site.first_token:
            return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return _within(None if call is None else positions.prompt_end(call), hidden)

    def _given(self) -> Tensor | None:
        """Return where the caller says that prompts end, [B]."""
        asked = self._modes.newest(Asked)
        return None if asked is None else asked.where

    # The shape of a layer's tensors

    def shaped(self, tensor: Tensor) -> Tensor:
        """Return a layer's tensor as [B, T, width]; a model may have it as [B*T] or [T, B], too."""
        call = self._reader.call()
        tokens = None if call is None else call.tokens
        if tensor.ndim == 3:
            # A call in which T is not B tells them apart. An edit is such a call: it has one row.
            if tokens is not None:
                rows, (first, second) = len(tokens), tensor.shape[:2]
                if first != second and rows in (first, second):
                    self._rows_second = rows == second
                    if self._adaptor.plain is not None:
                        self._adaptor.plain.is_off = self._rows_second
            return tensor.transpose(0, 1) if self._rows_second else tensor
        known = self._given() if tokens is None else tokens
        batch = len(tensor) if known is None or len(tensor) % len(known) else len(known)
        return tensor.reshape(batch, -1, tensor.shape[-1])

    def unshaped(self, written: tuple[Tensor, Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is [B, T, V] and [B, T] in the shape of a layer's output."""
        if output.ndim == 3 and self._rows_second:
            return written[0].transpose(0, 1), written[1].transpose(0, 1)
        return written[0].view(output.shape), written[1].view(output.shape[:-1])

    # What is refused

    def refuse_other_tokens(self, hidden: Tensor) -> None:
        """Refuse a layer's input [B, T, D] that is not one vector for each token of the call.

        Raises: ValueError.
        """
        call = self._reader.call()
        if call is None or call.tokens is None or not isinstance(call.cached, int) or call.cached:
            return  # what goes on from a cache may be given all tokens, and compute the newest
        given, wanted = hidden.shape[:2], call.tokens.shape[:2]
        # How many tokens a second decoder has is not among what the call says.
        fits = given[0] == wanted[0] and (self._site.first_token or given[1] == wanted[1])
        if fits or (self._lengthens and given[0] == wanted[0] and given[1] > wanted[1]):
            return
        raise ValueError(
            f"{self._site.layer_name} must see one vector for each of the call's {list(wanted)} "
            f"tokens to be edited, it was given {list(given)}; attach to a linear layer in a block "
            "of the language model, as the last of its MLP"
        )

    def _refuse_untold(self, hidden: Tensor, held: Generation | None) -> None:
        """Refuse a call of the layer [B, T, D] alone, where nobody has named the prompts' ends.

        Raises: ValueError.
        """
        site = self._site
        known = self._given() if held is None else held.positions_for(len(hidden))
        if site.first_token or (known is not None and int(known.max()) < hidden.shape[1]):
            return
        # What is wrong first, if so.
        tensor_parallel.whole(hidden, site.layer, self._adaptor.book.key_dim)
        raise ValueError(
            f"{site.layer_name} ran outside a call that is given input_ids or inputs_embeds, so "
            f"where the prompts end is unknown: call {type(site.model).__name__}, or the module "
            "within it that takes them; or name the ends, within grace.prompt(positions); or "
            "attach with query='every_token'"
        )


def _before(call: Call | None, held: Generation | None) -> int | Tensor:
    """Return how many tokens of the sequences come before those of a call."""
    if call is None:
        return 0
    if isinstance(call.cached, Tensor) or call.cached != positions.UNCOUNTED:
        return call.cached
    return 1 if held is None else held.before()  # any number tells a step from a prompt


def _within(known: Tensor | None, hidden: Tensor) -> Tensor:
    """Return positions [B] where the input is; the last ones where none are known."""
    if known is None or len(known) != len(hidden):
        return _last(hidden, hidden.shape[1])
    return known.to(hidden.device, torch.int64)


def _last(rows: Tensor, length: int) -> Tensor:
    """Return the position of each row's last token, [B]."""
    return torch.full((len(rows),), length - 1, dtype=torch.int64, device=rows.device)
