"""One HTML page of a codebook: its edits, hits, radii, conflicts, a map of its keys, its epsilon.

The page needs no model, no network and no script, and reads a directory beside whoever edits it.
Where a codebook is large it says what it lists or looks at: it is made in seconds and stays small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_fast.store.atomic import replace
from grace_fast.tools.report.balls import hits_of, radii_of
from grace_fast.tools.report.keymap import keymap_of
from grace_fast.tools.report.listing import listing_of
from grace_fast.tools.report.neighbours import neighbours_of
from grace_fast.tools.report.overview import overview_of
from grace_fast.tools.report.page import render
from grace_fast.tools.report.reading import Reading, read
from grace_fast.tools.report.tradeoff import trade_off_of
from grace_fast.tools.timing import one_thread

ENDINGS = (".html", ".htm")


def write(directory: Path, out: Path, hmac_key: bytes | None = None) -> dict[str, Any]:
    """Write the page of a directory, in one step; return what it says in figures.

    out: a name that ends in .html, so that no file of a codebook is written over; hmac_key: as in
    `attach`.

    Raises: ValueError for another name; FileNotFoundError, CodebookCorrupt, OSError.
    """
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"a page must be named .html, got {str(out)!r}")
    reading = read(directory, hmac_key)
    with one_thread():
        page = render(facts(reading)).encode()
    try:
        replace(out, page)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror}") from error
    edits, keys = len(reading.history.edits), len(reading.snapshot)
    return {"out": str(out), "edits": edits, "keys": keys, "bytes": len(page)}


def facts(reading: Reading) -> dict[str, Any]:
    """Return what the page is made of."""
    return {
        "head": overview_of(reading),
        "edits": listing_of(reading),
        "hits": hits_of(reading),
        "radii": radii_of(reading),
        "epsilon": reading.rules.epsilon,
        "near": neighbours_of(reading),
        "map": keymap_of(reading),
        "trade": trade_off_of(reading),
    }
