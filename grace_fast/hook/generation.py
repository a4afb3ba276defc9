"""Sequences over several forward calls: `generate`, and decoding loops of one's own.

The prompt's end is looked up once, in the call that computes it, and what was found is held until
the sequence ends. `generate` is wrapped on the model instance, so that it names the prompt's end
before the first call: chunks of a prompt and the drafts of assisted decoding are then told from it.

Not every call in between continues these sequences: guidance runs the model on a negative prompt,
a stopping criterion on whatever it likes, and both may do so before the prompt itself, while an
assistant drafts. A call continues the sequences whose cache it is given; without a cache, those
whose tokens it begins with. Any other is of sequences of its own, which are held likewise.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_fast.hook.answers import LookupAnswer
from grace_fast.hook.positions import CACHES, Call, last_unmasked

OTHERS = 8  # sequences beside those of one `generate` that are held at once


class Source(NamedTuple):
    """What tells which sequences a call is of."""

    cache: Any = None  # the object that was given, None without one
    is_whole: bool = False  # there is no cache of any kind: the call holds its sequences whole
    is_told: bool = True  # else a graph was entered, which knows tensors only

    @classmethod
    def of(cls, arguments: Mapping[str, Any], continues: bool) -> Source:
        """Return what a call says; continues: whether such calls can continue others at all."""
        for name in CACHES:
            cache = arguments.get(name)
            if cache is not None:
                return cls(cache)
        return cls(None, not continues or arguments.get("use_cache") is False)


UNTOLD = Source(is_told=False)


@dataclass(eq=False)
class Generation:
    """Sequences in progress: where their prompts end, and what was decided there."""

    positions: Tensor | None = None  # [B], counted from the first token of the row
    answer: LookupAnswer | None = None
    is_draft: bool = False  # an assistant's, whose calls continue those of an earlier `generate`
    prompt: Tensor | None = None  # [B, T] or [B, T, E], where it is known before the first call
    tokens: Tensor | None = None  # [B, T] or [B, T, E], of the first call
    has_begun: bool = False
    seen: int = 0  # tokens of a row that calls before this one were given
    caches: list[weakref.ref[Any]] = field(default_factory=list)
    others: list[Generation] = field(default_factory=list)  # that calls in between are of

    def positions_for(self, batch: int) -> Tensor | None:
        """Return the prompts' ends for a batch; its rows may be several for each prompt."""
        known = self.positions
        if known is None or not len(known) or batch % len(known):
            return None
        return known.repeat_interleave(batch // len(known))

    def before(self) -> int:
        """Return how many tokens precede those of a call that is given a state without a count."""
        # What was decided, was so in an earlier call.
        decided = 0 if self.answer is None else int(self.answer.position.max()) + 1
        return max(self.seen, decided, 1)

    def may_begin(self, call: Call) -> bool:
        """Tell whether a call may be the first of these sequences: of their prompt, or of a part.

        Nothing is told from one that goes on with tokens in a cache, or has other rows.
        """
        known, given = self.prompt, call.tokens
        if known is None or given is None or not _are_alike(known, given) or int(call.cached):
            return True
        length = min(known.shape[1], given.shape[1])
        if not len(known) or len(given) % len(known):
            return True
        known = known[:, :length].repeat_interleave(len(given) // len(known), dim=0)
        return torch.equal(known.to(given.device), given[:, :length])

    def begin(self, call: Call | None, source: Source) -> Generation:
        """Take a call as the first of these sequences."""
        self.has_begun = True
        self.tokens = None if call is None else call.tokens
        self.add(source.cache)
        return self

    def add(self, cache: Any) -> None:
        """Take a cache as one of these sequences."""
        if cache is not None and not self.owns(cache) and _is_known_again(cache):
            self.caches.append(weakref.ref(cache))

    def owns(self, cache: Any) -> bool:
        """Tell whether a cache is of these sequences."""
        return any(known() is cache for known in self.caches)

    def begins(self, call: Call) -> bool:
        """Tell whether a call that holds its sequences from their first token begins as these."""
        known, given = self.tokens, call.tokens
        if known is None or given is None or not _are_alike(known, given):
            return False
        length, each = known.shape[1], len(given) // max(len(known), 1)
        if given.shape[1] < length or len(known) * each != len(given):
            return False
        known = known if each == 1 else known.repeat_interleave(each, dim=0)
        return torch.equal(known.to(given.device), given[:, :length])

    def is_apart(self, call: Call, source: Source) -> bool:
        """Tell whether a call that does not begin as these sequences is surely of others."""
        if source.cache is not None or self.caches:
            return True
        known, given = self.tokens, call.tokens
        comparable = known is not None and given is not None and _are_alike(known, given)
        # A cache that nobody sees may be in use, unless the call says that there is none.
        return comparable and (source.is_whole or _length(given) >= _length(known))


def _length(tokens: Tensor | None) -> int:
    return 0 if tokens is None else tokens.shape[1]


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape[2:] == other.shape[2:]


def _is_known_again(cache: Any) -> bool:
    """Tell whether a cache is one object for all of its life, not a tuple made at every step."""
    return not isinstance(cache, tuple | list | Tensor) and hasattr(cache, "__weakref__")


def of_call(held: Sequence[Generation], call: Call | None, source: Source) -> Generation | None:
    """Return the sequences that a call is of, among those in progress, the newest last."""
    if not held:
        return None
    newest, cache = held[-1], source.cache
    unknown = cache is not None and not _is_known_again(cache)
    if call is None or not source.is_told or unknown:
        return newest
    for one in reversed(held):
        for known in (one, *one.others):
            if cache is not None and known.owns(cache):
                return known
    if not newest.has_begun and newest.may_begin(call):
        return newest.begin(call, source)
    if cache is None or not int(call.cached):
        alike = [one for each in held for one in (each, *each.others) if one.begins(call)]
        if alike:
            longest = max(alike, key=lambda one: _length(one.tokens))
            longest.add(cache)
            return longest
    if newest.has_begun and not newest.is_apart(call, source):
        return newest
    newest.others[:] = [*newest.others[1 - OTHERS :], Generation().begin(call, source)]
    return newest.others[-1]


def cache_of(result: Any) -> Any:
    """Return the cache that a call returned, None where there is none."""
    if isinstance(result, tuple):
        return next((part for part in result if hasattr(part, "get_seq_length")), None)
    found = (getattr(result, name, None) for name in CACHES)
    return next((cache for cache in found if cache is not None), None)


def prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return what the arguments of a `generate` say of its prompts."""
    given = args[0] if args else kwargs.get("inputs")
    tokens = next(
        (
            tokens
            for tokens in (given, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            if isinstance(tokens, Tensor) and tokens.ndim >= 2
        ),
        None,
    )
    mask = kwargs.get("attention_mask")
    return Call(tokens, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def prompt_end(call: Call) -> Tensor | None:
    """Return where the prompts given to `generate` end, [B], cached tokens counted."""
    tokens, mask = call.tokens, call.mask
    if tokens is None or not tokens.shape[1]:
        return None
    if mask is None or len(mask) != len(tokens) or mask.shape[1] < tokens.shape[1]:
        return last_unmasked(None, len(tokens), tokens.shape[1], tokens.device)
    # A mask that is longer than the tokens covers what is in the cache.
    return last_unmasked(mask, len(tokens), mask.shape[1], tokens.device)
