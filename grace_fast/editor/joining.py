"""A prompt and its target written as one text, and the target's tokens in it.

    The capital of France is + Paris    The capital of France is Paris
    法国的首都是 + 巴黎                  法国的首都是巴黎
    It costs $ + 100                    It costs $100

A word of its own follows after a space, unless the prompt or the target says otherwise: by a space
that is there, a script that writes none, an opening bracket or quote, a sign that a number or a
word is tied to, a target that closes what is open or goes on with a word. Who knows better says so
with `joint=`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from typing import Any

# Scripts that write no spaces between words, as ranges of code points. Hangul writes them.
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai scripts of China
    (0x1A20, 0x1AAF),  # of Laos and Lanna
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # radicals, punctuation of East Asia, Hiragana, Katakana, Bopomofo
    (0x3190, 0x9FFF),  # Kanbun to the Han unification
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, more of Myanmar
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),  # Han for compatibility
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF9F),  # full-width forms, half-width Katakana
    (0xFFE0, 0xFFE6),
    (0x1AFF0, 0x1B16F),  # more of the Kana
    (0x20000, 0x3FFFF),  # more of Han
)
_STARTS = [first for first, _ in _WITHOUT_SPACES]
_FAR_EAST = 0x2E80  # from here on, foreign words and numbers stand without spaces, too
_TIED = frozenset("/\\_@=~^")  # to what follows, where something stands before them: and/or, x=5
_PREFIXES = frozenset("@#~^/\\\u00bf\u00a1")  # where nothing does: @user, #tag, ~5
# A target that begins so goes on with what is there; the last are those of East Asia.
_CLOSERS = frozenset(",.;:!?%‰°…\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f")
_NUMBER_SIGNS = frozenset("-\u2212+")
_IN_NUMBERS = frozenset(".,:")
_CONTRACTION = re.compile(r"(?:['\u2019](?:s|re|ve|ll|d|m|t)|n['\u2019]t)(?!\w)", re.IGNORECASE)
_TAG = re.compile(r"<[^<>\s][^<>]*>$")
_WORDS = re.compile(r"[^\W_]+")
_TAIL = 400  # characters of a prompt that its tag is looked for in

# Texts that leave what comes after them alone: see `_after`.
_ANCHORS = ("\n", "a", "=", ".")


def joint_of(prompt: str, target: str) -> str:
    """Return what is written between a prompt and its target: one space, or nothing."""
    return "" if _touch(prompt, target) else " "


def _touch(prompt: str, target: str) -> bool:
    last, first = prompt[-1], target[0]
    if last.isspace() or first.isspace():
        return True
    before = prompt[-2] if len(prompt) > 1 else " "
    return (
        _is_spaceless(prompt, first)
        or _opens(prompt, before)
        or _ties(prompt, target)
        or bool(_TAG.search(prompt[-_TAIL:]))
        or _goes_on(prompt, target)
    )


def writes_no_spaces(character: str) -> bool:
    """Tell whether a character is of a script that writes no spaces between words."""
    code = ord(character)
    at = bisect_right(_STARTS, code) - 1
    return at >= 0 and code <= _WITHOUT_SPACES[at][1]


def _is_spaceless(prompt: str, first: str) -> bool:
    last = prompt[-1]
    if writes_no_spaces(last):
        return ord(last) >= _FAR_EAST or writes_no_spaces(first) or not first.isalnum()
    if not writes_no_spaces(first):
        return False
    # Foreign words and ASCII punctuation stand within a text: the rest of it decides.
    if not prompt[-1].isalnum():
        letters = [one for one in prompt[-_TAIL:] if one.isalnum()]
        return bool(letters) and writes_no_spaces(letters[-1])
    words = [word for word in _WORDS.findall(prompt[-_TAIL:]) if not word.isdecimal()]
    spaceless = sum(writes_no_spaces(one) for word in words for one in word)
    others = sum(not any(map(writes_no_spaces, word)) for word in words)
    return others == 0 or spaceless > others


def _opens(prompt: str, before: str) -> bool:
    """Tell whether a prompt ends in an opening bracket or quote."""
    last = prompt[-1]
    if unicodedata.category(last) in ("Ps", "Pi"):
        return True
    if last not in "\"'`" or before.isalnum():
        return False
    if before.isspace() or unicodedata.category(before) in ("Ps", "Pi", "Sm", "Pd"):
        return True
    return prompt.count(last) % 2 == 1


def _ties(prompt: str, target: str) -> bool:
    """Tell whether a prompt ends in a sign that belongs to what follows."""
    last, stem = prompt[-1], prompt.rstrip(prompt[-1])
    run, before = len(prompt) - len(stem), stem[-1:] or "\n"
    begins_number = target[0].isdecimal() or (target[0] == "." and target[1:2].isdecimal())
    if unicodedata.category(last) == "Sc":  # $100, but not 100€50
        return begins_number and not before.isdecimal()
    if last == "#":
        # A heading and C# have a space after it.
        return run == 1 and not before.isalnum() and (begins_number or before != "\n")
    if before.isspace():
        if last in _NUMBER_SIGNS:
            return begins_number and before != "\n"  # an item of a list has a space
        return last in _PREFIXES or last * run == "**"
    if last in _IN_NUMBERS and run == 1 and before.isdecimal():  # 3.14, 12:30
        return target[0].isdecimal()
    if unicodedata.category(last) == "Pd":  # well-known
        return before.isalnum()
    return last in _TIED or last * run == "::"


def _goes_on(prompt: str, target: str) -> bool:
    """Tell whether a target closes what is open, or goes on with the prompt's last word."""
    first, second = target[0], target[1:2]
    kind = unicodedata.category(first)
    if kind in ("Mn", "Mc", "Me") or _CONTRACTION.match(target):
        return True
    if kind in ("Pe", "Pf"):
        return True
    if first in "\"'`":
        return prompt.count(first) % 2 == 1 and not second.isalnum()
    if first in ".:" and (second.isalnum() or (first == ":" and second in ("(", ")", "D", "-"))):
        return False  # .5, .NET and :) are words of their own
    return first in _CLOSERS


def target_ids(
    text: str, ids: list[int], joint: str, target: str, tokenizer: Any, special: bool
) -> list[int]:
    """Return the tokens of a target that follow a prompt's own ones, as a model has to say them.

    ids: the prompt's tokens, which are what the model will be asked with; special: the tokenizer
    puts its special tokens around a text.

    The target's tokens in the joint text where the prompt's are kept in it. Where they are not (a
    token goes over the seam, or a prompt ends in a special token), tokens that are read after
    `ids` as joint and target: a tokenizer of words puts a space before whatever begins a text.
    """
    wanted = joint + target
    together = list(tokenizer(text + wanted, add_special_tokens=special)["input_ids"])
    if together[: len(ids)] == ids and len(together) > len(ids):
        return together[len(ids) :]
    alone = list(tokenizer(wanted, add_special_tokens=False)["input_ids"])
    if not hasattr(tokenizer, "decode"):
        return alone
    said = _read(tokenizer, ids)
    for tokens in (alone, *(_after(anchor, wanted, tokenizer) for anchor in _ANCHORS)):
        if tokens and _read(tokenizer, ids + tokens) == said + wanted:
            return tokens
    return alone


def _after(anchor: str, wanted: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text after another, where the other's are kept; else none."""
    first = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
    both = list(tokenizer(anchor + wanted, add_special_tokens=False)["input_ids"])
    return both[len(first) :] if both[: len(first)] == first else []


def _read(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def chat_joint(messages: list[Any], text: str, target: str, tokenizer: Any) -> str:
    """Return what a chat's template writes between its prompt and an answer.

    text: the prompt that the template makes, up to where the answer begins.
    """
    answered = [*messages, {"role": "assistant", "content": target}]
    try:
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except Exception:  # a template raises what its author likes; it has made the prompt, though
        return ""
    if not isinstance(whole, str) or not whole.startswith(text):
        return ""
    between = whole[len(text) :].partition(target)
    return between[0] if between[1] and between[0].strip(" \n") == "" else ""
