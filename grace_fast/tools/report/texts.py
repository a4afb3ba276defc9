"""Stored text made fit to be shown: it may come from a stranger's file.

Markup in it is escaped by the templates. Here it gets an end, and what cannot be seen, or reorders
what stands around it, is spelt out (`grace_fast.codebook.printable`).
"""

from __future__ import annotations

from grace_fast.codebook import printable

LIMIT = 200  # characters
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
NOTHING = "\N{EN DASH}"


def inert(text: str, limit: int = LIMIT) -> str:
    """Return a text in one line, of at most `limit` characters, saying how many it had."""
    line = " ".join(text[:limit].split())
    seen = printable.spelt(line, spell=lambda character: f"[U+{ord(character):04X}]")
    return seen if len(text) <= limit else f"{seen}… ({len(text):,} characters)"


def number(value: float, digits: int = 5) -> str:
    """Return a number to so many digits; a dash for what was not measured."""
    if value != value:
        return NOTHING
    return f"{value:.{digits}g}".replace("inf", "∞")


def compact(count: float) -> str:
    """Return a count of at least 1 to three digits, as in 16.4k."""
    unit, size = next((unit, size) for unit, size in UNITS if count >= size)
    return f"{count / size:.3g}{unit}"


def share(part: float, whole: float) -> str:
    """Return a share in per cent, a dash of nothing."""
    return f"{part / whole:.1%}" if whole else NOTHING
