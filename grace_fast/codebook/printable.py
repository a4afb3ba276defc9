"""Text from files, models and callers, made fit to be shown: as it is, and inert.

What cannot be seen, moves a terminal's cursor or reorders what stands around it is spelt out:
controls (C0, C1, DEL), line and paragraph separators, marks of direction, zero-width characters,
tags, fillers, surrogates. Every other character stays. Nothing is markup: whoever hands a text to
Rich, Jinja or Matplotlib hands it over as plain text.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Iterable
from typing import IO, Any

# Controls, formats (what changes direction is among them), surrogates, line and paragraph ends.
_HIDDEN_KINDS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# Characters of other kinds that are drawn as nothing: fillers, joiners of graphemes, shorthand.
_HIDDEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_NON_JOINER, _JOINER = "\u200c", "\u200d"
_VIRAMA = 9  # the combining class after which Indic scripts use both joiners
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

Spell = Callable[[str], str]


def escape(character: str) -> str:
    r"""Return a character as Python writes it: \n, \x1b, \u202e, \U000e0041."""
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def spelt(text: Any, keep: str = "", spell: Spell = escape) -> str:
    """Return a text with everything that would hide, move or reorder something spelt out.

    keep: characters that stay all the same, the line ends of a traceback, say; spell: how one
    character is written.
    """
    given = text if isinstance(text, str) else str(text)
    if given.isascii() and given.isprintable():
        return str(given)
    shown = [
        character if character in keep or not _is_hidden(given, at) else spell(character)
        for at, character in enumerate(given)
    ]
    return "".join(shown)


def fit(text: Any, stream: IO[str] | None, keep: str = "") -> str:
    """Return `spelt` text that a stream can write: what its encoding lacks is spelt out as well."""
    line = spelt(text, keep)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return "".join(map(_fitting(encoding), line))
    except LookupError:  # an encoding that Python does not know
        return line.encode("ascii", "backslashreplace").decode("ascii")
    return line


def for_plot(text: Any) -> str:
    """Return `spelt` text for Matplotlib: no dollar begins a formula, and no legend leaves it out.

    Matplotlib takes a label that begins with an underscore for one that is not to be shown.
    """
    line = spelt(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Return names in one line; of many the first ones, and how many there are."""
    every = [spelt(name) for name in names]
    if len(every) <= most:
        return ", ".join(every)
    return f"{', '.join(every[:most])} and {len(every) - most:,} more"


def _fitting(encoding: str) -> Spell:
    encode = codecs.getencoder(encoding)

    def fitting(character: str) -> str:
        try:
            encode(character)
        except UnicodeEncodeError:
            return escape(character)
        return character

    return fitting


def _is_hidden(text: str, at: int) -> bool:
    character = text[at]
    code = ord(character)
    if code < 0x7F:
        return code < 0x20
    if character in (_NON_JOINER, _JOINER):
        return not _joins(text, at)
    if _is_selector(code):  # one chooses how the character before it is drawn; more carry a message
        return at == 0 or _is_selector(ord(text[at - 1])) or text[at - 1].isspace()
    kind = unicodedata.category(character)
    # Unassigned ones in the plane of the tags are ignored by whoever draws them.
    return kind in _HIDDEN_KINDS or character in _HIDDEN or (kind == "Cn" and code >> 12 == 0xE0)


def _is_selector(code: int) -> bool:
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F


def _joins(text: str, at: int) -> bool:
    """Tell whether a joiner is part of a word or an emoji: elsewhere it only hides (RFC 5892)."""
    if not 0 < at < len(text) - 1:
        return False
    before, after = text[at - 1], text[at + 1]
    if unicodedata.combining(before) == _VIRAMA:
        return True
    if text[at] == _JOINER and _is_emoji(before):
        return _is_emoji(after)
    return all(unicodedata.bidirectional(one) in ("AL", "NSM") for one in (before, after))


def _is_emoji(character: str) -> bool:
    """Tell whether an emoji's part may stand here: a symbol, its colour of skin, its selector."""
    return unicodedata.category(character) in ("So", "Sk") or _is_selector(ord(character))
