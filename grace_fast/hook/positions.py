"""Which token of each sequence is the query: rules on the arguments of one forward call.

A prompt's end is found from, in this order,
  1. the positions the caller gives,
  2. for a decoder-only model, the token before the first label that counts, where `labels` is
     shaped like `input_ids`: the end of the prompt, with the target after it,
  3. the ends of packed sequences: `cu_seq_lens_q`, or position ids that start anew without a mask,
  4. the last token under the 2-D attention mask, on whichever side the padding is; without a mask
     the last that is not padding, for a classifier whose head looks for that one itself,
  5. the token with the highest position id,
  6. the last token.
A prompt alone, the same prompt with labels, and `generate` therefore ask with the same query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grace_fast.semantics import IGNORED_LABEL

# When a sequence is looked up: once, at the end of its prompt; at the newest token of every forward
# call; or at every token, each for itself.
Query = Literal["prompt_end", "every_step", "every_token"]


# The arguments that a cache is given by. Models without attention have a state, without a count.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
UNCOUNTED = -1
# What else than ids and a mask says where a prompt ends.
TELLING = (*CACHES, "inputs_embeds", "labels", "position_ids", "cu_seq_lens_q")


class Call(NamedTuple):
    """What one forward call says of its tokens: only tensors, so that a graph can carry it."""

    tokens: Tensor | None = None  # input_ids [B, T] or inputs_embeds [B, T, E]
    mask: Tensor | None = None  # [B, M], of M >= T tokens of which the last T are of this call
    labels: Tensor | None = None  # [B, T], of a decoder-only model
    position_ids: Tensor | None = None  # [1 or B, T]; None beside a 2-D mask, which says more
    bounds: Tensor | None = None  # [S + 1], where packed sequences begin, and the end of the last
    cached: int | Tensor = 0  # tokens of the sequence that are in a cache already, or UNCOUNTED
    is_packable: bool = False  # no mask of any kind keeps the tokens of a row together


def read(
    arguments: Mapping[str, Any], decoder_only: bool, in_cache: int | Tensor | None = None
) -> Call:
    """Return what the arguments of a forward call say of its tokens.

    in_cache: what `cached` said as the call began, where layers may have run since.
    """
    if in_cache is None:
        in_cache = cached(arguments)
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return Call(cached=in_cache)
    mask, ids = arguments.get("attention_mask"), arguments.get("position_ids")
    labels, bounds = arguments.get("labels"), arguments.get("cu_seq_lens_q")
    length = tokens.shape[1]
    covers = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length
    if not (decoder_only and isinstance(labels, Tensor) and labels.shape == tokens.shape[:2]):
        labels = None
    if covers or not (isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == length):
        ids = None
    return Call(
        tokens,
        mask if covers else None,
        labels,
        ids,
        bounds if isinstance(bounds, Tensor) else None,
        in_cache,
        mask is None or isinstance(bounds, Tensor),
    )


def within(outer: Call, inner: Call) -> Call:
    """Return what a call and one within it say together of the tokens that the inner one computes.

    The inner one has the last word. Labels are the outer one's, which are shaped like its tokens:
    what was put before those has none.
    """
    if inner.tokens is None:
        return outer
    if outer.tokens is None:
        return inner
    labels, (batch, length) = outer.labels, inner.tokens.shape[:2]
    if (batch, length) == tuple(outer.tokens.shape[:2]):
        is_cached = isinstance(outer.cached, Tensor) or outer.cached != 0
        return Call(
            outer.tokens,  # ids, where the inner one is given embeddings
            outer.mask if inner.mask is None else inner.mask,
            labels,
            outer.position_ids if inner.position_ids is None else inner.position_ids,
            outer.bounds if inner.bounds is None else inner.bounds,
            outer.cached if is_cached else inner.cached,
            outer.is_packable,
        )
    if labels is None or len(labels) != batch or labels.shape[1] > length:
        return inner
    before = labels.new_full((batch, length - labels.shape[1]), IGNORED_LABEL)
    return inner._replace(labels=torch.cat([before, labels], dim=1))


def cached(arguments: Mapping[str, Any]) -> int | Tensor:
    """Return how many tokens are in the cache that a call is given, or UNCOUNTED."""
    for name in CACHES:
        cache: Any = arguments.get(name)
        if cache is not None:
            return _length(cache)
    return 0


def _length(cache: Any) -> int | Tensor:
    """Return how many tokens a cache holds, UNCOUNTED where it has some and does not say."""
    count = getattr(cache, "get_seq_length", None)
    try:
        length: int | Tensor | None = None if count is None else count()
    except ValueError:  # of a state alone
        return UNCOUNTED if cache.has_previous_state() else 0
    if length is None:  # of a model's own kind
        return 0 if _is_fresh(cache) else UNCOUNTED
    # A static cache counts in place, while the layers before the edited one run.
    return length.clone() if isinstance(length, Tensor) else length


def _is_fresh(cache: Any) -> bool:
    """Tell whether no token has gone into a cache yet, as far as it says anything."""
    if hasattr(cache, "seqlen_offset"):
        return not int(cache.seqlen_offset)
    return hasattr(cache, "__len__") and not len(cache)


def prompt_end(call: Call) -> Tensor | None:
    """Return the position of each row's query in this call, [B] int64; None where none is named."""
    if call.tokens is None:
        return None
    last = newest(call)
    if call.labels is None:
        return last
    end = prompt_lengths(call.labels) - 1
    return torch.where(end >= 0, end, last)


def newest(call: Call) -> Tensor:
    """Return each row's last token in this call that is no padding, [B] int64; see 4 to 6 above."""
    assert call.tokens is not None
    batch, length = call.tokens.shape[:2]
    if call.position_ids is not None:
        # The first of equals: padding on the right repeats a position or starts anew.
        return call.position_ids.argmax(dim=1).expand(batch)
    return last_unmasked(call.mask, batch, length, call.tokens.device)


def prompt_lengths(labels: Tensor) -> Tensor:
    """Return how many tokens precede the first label that counts, [B]; 0 where there is none."""
    return (labels != IGNORED_LABEL).int().argmax(dim=1)


def last_unmasked(mask: Any, batch_size: int, length: int, device: torch.device) -> Tensor:
    """Return the last position of each row that a 2-D mask lets through, [B] int64.

    A mask that reaches further back than the tokens (a cache) counts from its end; one of another
    rank, or a row without any token, leaves the last position.
    """
    last = torch.full((batch_size,), length - 1, dtype=torch.int64, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
        return last
    # In the midst of a model each operation costs some 10 us: its code is out of the caches.
    if mask.device.type == "cpu" and all(mask[:, -1].tolist()):
        return last
    reversed_mask = mask[:, mask.shape[1] - length :].bool().flip(1)
    return last - reversed_mask.int().argmax(dim=1).to(last)


class Packed(NamedTuple):
    """Several sequences in one row: which of S sequences each of the call's B*T tokens is of."""

    owner: Tensor  # [B*T] int64, ascending
    position: Tensor  # [S] int64, the query token of each sequence, among all B*T


def packed(call: Call) -> Packed | None:
    """Return the sequences of rows that hold several, or None where every row is one.

    Raises: ValueError for a sequence that goes on from an earlier call: its prompt's end is not
    told apart from a step of decoding.
    """
    starts = _starts(call)
    if starts is None:
        return None
    assert call.tokens is not None
    flat = starts.flatten()
    first = flat.nonzero()[:, 0]
    ids = call.position_ids
    if ids is not None and bool((ids.expand_as(starts).flatten()[first] != 0).any()):
        raise ValueError(
            "packed rows hold a sequence that goes on from an earlier call, as in continuous "
            "batching, and a decoding step is not told from a prompt there; attach with "
            "query='every_token'"
        )
    owner = flat.cumsum(0) - 1
    position = torch.cat([first[1:], first.new_full((1,), flat.numel())]) - 1
    if call.labels is not None:
        counted = (call.labels != IGNORED_LABEL).flatten()
        token = torch.arange(flat.numel(), device=flat.device)
        beyond = torch.where(counted, token, flat.numel())
        labelled = torch.full_like(first, flat.numel()).scatter_reduce(0, owner, beyond, "amin")
        has_prompt = (labelled > first) & (labelled < flat.numel())
        position = torch.where(has_prompt, labelled - 1, position)
    return Packed(owner, position)


def _starts(call: Call) -> Tensor | None:
    """Tell which tokens begin a sequence, [B, T] bool; None where only the first of a row does."""
    if call.tokens is None or not call.is_packable:
        return None
    shape = call.tokens.shape[:2]
    starts = torch.zeros(shape, dtype=torch.bool, device=call.tokens.device)
    starts[:, 0] = True
    if call.bounds is not None:
        bounds = call.bounds.to(starts.device)
        starts.view(-1)[bounds[bounds < starts.numel()].long()] = True
    elif call.position_ids is not None and isinstance(call.cached, int) and not call.cached:
        ids = call.position_ids
        starts[:, 1:] |= ids[:, 1:] != ids[:, :-1] + 1
    else:
        return None
    return starts if bool(starts[:, 1:].any()) else None


class Padding(NamedTuple):
    """The token that rows are padded with, as far as a model's config says."""

    token: int | None
    is_text_too: bool  # it also ends sequences, so that one of them says nothing

    @classmethod
    def of(cls, config: Any) -> Padding:
        """Return a config's padding; where there is none, rows are padded with an end token."""
        ends = getattr(config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, list | tuple) else [ends]
        token = getattr(config, "pad_token_id", None)
        token = ends[0] if token is None else token
        return cls(token if isinstance(token, int) else None, token in ends)

    def shown(self, call: Call) -> Call:
        """Return a call with the mask of its padding, where it was given none."""
        ids = call.tokens
        if not call.is_packable or call.bounds is not None or self.token is None:
            return call
        if ids is None or ids.is_floating_point():
            return call
        return call._replace(mask=ids != self.token, is_packable=False)


def lengthens(config: Any) -> bool:
    """Tell whether a model computes more tokens than it is given.

    Attention over whole windows or chunks adds padding behind them, CPM-Ant has prompts before.
    """
    if getattr(config, "attention_type", None) == "block_sparse":
        return True
    names = ("attention_window", "lsh_attn_chunk_length", "prompt_length")
    return any(getattr(config, name, None) is not None for name in names)


def refuse_hidden_padding(call: Call, padding: Padding) -> None:
    """Refuse rows of a decoder that end in padding which no mask shows.

    Raises: ValueError naming the first such row.
    """
    ids = call.tokens
    shown = call.mask is not None or call.labels is not None
    if shown or ids is None or ids.is_floating_point() or padding.token is None:
        return
    if ids.shape[1] < 2:
        return
    padded = (ids[:, -1] == padding.token) & (newest(call) == ids.shape[1] - 1)
    if padding.is_text_too:
        padded &= ids[:, -2] == padding.token
    if bool(padded.any()):
        raise ValueError(
            f"row {int(padded.nonzero()[0])} ends in padding (token {padding.token}) and there is "
            "no attention_mask, so the end of its prompt is unknown; give the attention_mask, or "
            "pad on the left"
        )


def vectors_at(tensor: Tensor, where: Tensor) -> Tensor:
    """Return the tokens of a tensor [B, T, width] at one position a row, [B, width]."""
    return tensor[torch.arange(len(tensor), device=tensor.device), where.to(tensor.device)]
