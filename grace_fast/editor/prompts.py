"""What a prompt and a target are taken for: one text, one chat, one number; and their tokens.

Lists, columns of tables and what is missing from them are told apart from a chat, and are refused
by what they are: what would be edited otherwise is something that nobody asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np

from grace_fast.codebook import scalars
from grace_fast.editor import joining

_P = ParamSpec("_P")
_R = TypeVar("_R")
Prompt = str | Sequence[Mapping[str, str]]
Target = str | int | float
_SURROGATE = re.compile("[\ud800-\udfff]")


def one_prompt(prompt: Any) -> Prompt:
    """Return the one text, or the messages of one chat, that a prompt is.

    Raises: ValueError for several texts or none; TypeError for anything else.
    """
    prompt = scalars.plain(prompt)
    if isinstance(prompt, str):
        return prompt
    kind = type(prompt).__name__
    if isinstance(prompt, bytes | bytearray):
        raise TypeError(f"the prompt must be a text, got {kind}: decode it first")
    if isinstance(prompt, Sequence | np.ndarray | Set):
        parts = list(prompt)
    elif hasattr(prompt, "tolist") and hasattr(prompt, "__len__"):  # a series of pandas
        parts = list(prompt.tolist())
    else:
        raise TypeError(f"the prompt must be one text, or chat messages, got {kind}")
    if parts and all(isinstance(part, Mapping) for part in parts):
        for at, part in enumerate(parts):
            if "role" not in part:
                raise ValueError(f"chat message {at} must have a role, got {sorted(part)}")
            if part.get("content") is None and part.keys() <= {"role", "content"}:
                raise ValueError(f"chat message {at} must have a content, got {dict(part)}")
        return parts
    are_texts = all(isinstance(part, str) for part in parts)
    named = ("text" if are_texts else "thing") + ("" if len(parts) == 1 else "s")
    raise ValueError(
        f"the prompt must be one text, or chat messages, got a {kind} of {len(parts)} {named}; "
        "make one call for each, or give edit_batch their tokens and labels as a batch of tensors"
    )


def as_text(prompt: Any, target: Any) -> tuple[str, str]:
    """Return a prompt and a target as texts to keep: of a chat its last message."""
    asked = one_prompt(prompt)
    said = asked if isinstance(asked, str) else str(asked[-1].get("content", ""))
    return said, str(one_target(target))


def one_target(target: Any) -> str | float | None:
    """Return the one text or number that a target is, of numpy and torch as Python's.

    Raises: ValueError for a number that is not finite; TypeError for anything else.
    """
    target = scalars.plain(target)
    if target is None:
        return None
    if isinstance(target, str):
        return target
    if isinstance(target, Decimal) and target.is_finite():
        return str(target)  # trailing zeros and all
    if isinstance(target, Decimal | Real) and not isinstance(target, int | float):
        target = scalars.number("the target", target)
    if isinstance(target, bool) or not isinstance(target, int | float):
        written = repr(target)
        written = written if len(written) <= 60 else f"a {type(target).__name__}"
        raise TypeError(f"the target must be one text or number, got {written}")
    if not math.isfinite(target):
        raise ValueError(f"the target must be a text or a number, got {target!r}")
    return target


def _of_unicode(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a call say what it is in a text that no tokenizer takes: half a pair of surrogates."""

    @wraps(call)
    def checked(*given: _P.args, **named: _P.kwargs) -> _R:
        try:
            return call(*given, **named)
        except (TypeError, ValueError) as error:
            texts = (one for part in (*given, *named.values()) for one in _texts(part))
            written = next(filter(_SURROGATE.search, texts), "")
            found = _SURROGATE.search(written)
            if found is None:
                raise
            raise ValueError(
                "prompt and target must be Unicode, got half of a pair of surrogates, "
                f"{found[0]!a}, in {written!a}"
            ) from error

    return checked


def _texts(part: Any) -> Iterator[str]:
    """Yield the texts that a text, a chat or a message holds."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for one in part.values() if isinstance(part, Mapping) else part:
            yield from _texts(one)


@_of_unicode
def prompt_ids(prompt: Prompt, tokenizer: Any) -> tuple[list[int], str]:
    """Return a prompt's tokens and its text, a chat's by the tokenizer's template.

    Raises: ValueError for a chat where there is no template, or that the template refuses.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"]), prompt
    template = getattr(tokenizer, "apply_chat_template", None)
    if template is None or getattr(tokenizer, "chat_template", "") is None:
        raise ValueError(
            "chat messages need a tokenizer with a chat template, and this one has none; "
            "set tokenizer.chat_template, or give the prompt as one text"
        )
    try:
        text = template(list(prompt), tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise
    except Exception as error:  # a template raises what its author likes: roles out of turn, say
        raise ValueError(
            f"the tokenizer's chat template refuses these messages: {type(error).__name__}: {error}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), text


@_of_unicode
def answer_ids(target: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a target that is a sequence of its own; none of an empty one."""
    return list(tokenizer(text_target=target)["input_ids"]) if target.strip() else []


@_of_unicode
def target_ids(
    target: str,
    text: str,
    ids: list[int],
    tokenizer: Any,
    chat: Sequence[Mapping[str, str]] | None,
    joint: str | None,
) -> list[int]:
    """Return a target's tokens as they follow a prompt's in one text; none of an empty one.

    text, ids: of the prompt, a chat's as its template writes it; joint: what stands between the
    two, by default as people, or the template, write them.
    """
    if not target.strip():
        return []
    if not isinstance(joint, str | None):
        raise TypeError(f"joint must be a text or None, got {joint!r}")
    if joint is None and chat is None:
        joint = joining.joint_of(text, target)
    elif joint is None:
        joint = joining.chat_joint(list(chat or ()), text, target, tokenizer)
    return joining.target_ids(text, ids, joint, target, tokenizer, special=chat is None)
