"""Text fit for where it is shown: a stream's encoding, a plot, a list in one line.

What hides, moves or reorders something is spelt out first (`errors.spelt`). Nothing is markup:
whoever hands a text to Rich, Jinja or Matplotlib hands it over as plain text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from grace_fast.errors import escape, spelt

__all__ = ["escape", "fit", "for_plot", "listed", "spelt"]


def fit(text: Any, stream: IO[str] | None, keep: str = "") -> str:
    """Return `spelt` text that a stream can write: what its encoding lacks is spelt out as well."""
    line = spelt(text, keep)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_fitting(character, encoding) for character in line)
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


def _fitting(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return escape(character)
    return character
