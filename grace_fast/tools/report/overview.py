"""Head of the page: whose codebook it is, how it was made, and of which model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from grace_fast import __version__
from grace_fast.tools.report.reading import Reading

FIELDS = 60  # of a model's config that are shown
DEFAULTS = {
    "expand_margin": "by element type",
    "stop_loss": "by semantics",
    "max_radius": "none",
}


def overview_of(reading: Reading) -> SimpleNamespace:
    """Return the head of a page."""
    saved, snapshot = reading.saved, reading.snapshot
    told = saved.fingerprint
    config = told.get("config")
    fields = list(_flat(config)) if isinstance(config, Mapping) else []
    return SimpleNamespace(
        name=saved.path.resolve().name,
        layer=saved.settings.layer,
        keys=len(snapshot),
        removed=snapshot.rows - len(snapshot),
        key_dim=snapshot.key_dim,
        value_dim=snapshot.value_dim,
        dtype=str(snapshot.dtype).removeprefix("torch."),
        version=snapshot.version,
        base=saved.base,  # the version that the files hold; later ones are in the journal
        saved_by=str(saved.config.get("grace_fast", "")),
        format=int(saved.config["format"]),
        is_signed="hmac" in saved.config,
        is_journalled=saved.config.get("journal") is not None,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        written_by=__version__,
        settings=tuple(_settings(reading)),
        model=tuple(_flat({name: told[name] for name in told if name != "config"}))[:FIELDS],
        config=tuple(fields[:FIELDS]),
        config_left_out=max(0, len(fields) - FIELDS),
    )


def _settings(reading: Reading) -> Iterator[tuple[str, str]]:
    for name, value in asdict(reading.saved.settings).items():
        if name != "layer":
            yield name, DEFAULTS.get(name, "none") if value is None else _said(value)


def _flat(told: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values; of a mapping in it, those within."""
    for name, value in told.items():
        if isinstance(value, Mapping) and not above:
            yield from _flat(value, f"{name}, ")
        else:
            yield f"{above}{name}", _said(value)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " x ".join(map(str, value[:FIELDS]))
    return str(value)
