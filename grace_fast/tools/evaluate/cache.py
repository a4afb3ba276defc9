"""Trained models on disk, by the recipe that made them; training again gives the same.

The folder is that of `--cache`, or $GRACE_FAST_CACHE, or $XDG_CACHE_HOME/grace_fast, or
~/.cache/grace_fast. Weights are safetensors; a folder is there in whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def folder(chosen: str | Path | None = None) -> Path:
    """Return where trained models are kept."""
    if chosen is not None:
        return Path(chosen)
    if own := os.environ.get("GRACE_FAST_CACHE"):
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "grace_fast"


def checksum(recipe: Any) -> str:
    """Return a short name for a recipe: numbers, texts, lists and objects of these."""
    written = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(written.encode(errors="surrogatepass")).hexdigest()[:16]


def trained(
    root: Path, name: str, recipe: Any, load: Callable[[Path], Any], train: Callable[[], Any]
) -> Any:
    """Return the model of a recipe, trained only where it is not in the cache.

    What is returned was always loaded: a first run and a later one use the same numbers.
    """
    place = root / f"{name}-{checksum(recipe)}"
    if not place.exists():
        root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            train().save_pretrained(draft)
            if not place.exists():  # another run may have been faster
                draft.rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return load(place)
