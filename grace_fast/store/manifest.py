"""Manifest of a directory, `grace_config.json`: read strictly, sealed by a checksum, signed.

It carries the checksum of every tensor and block in the directory, and from format 3 on one of
itself. A checksum tells damage; who means harm computes it anew. Where there is a key, an HMAC over
the manifest tells that too, of every file that it names.

    format 1: one tensor file (`save_pretrained`)
    format 2: keys and values have files of their own, to be mapped, and so have the codes
              (`gf.Codebook.save`, `gf.Codebook.build`); blocks are told by CRC-32
    format 3: either of the two; the manifest has a checksum, blocks are told by SHA-256
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grace_fast.codebook.checks import MAX_COUNTER as MAX_COUNTER
from grace_fast.codebook.checks import MAX_NUMBER as MAX_NUMBER
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import strict_json

FORMAT = 3
CONFIG = "grace_config.json"
MAX_BYTES = 1 << 28  # texts and hits of a million edits fit
_DEPTH = 8
_LONGER = "it has {size} bytes, wanted at most {most}"
_LEAST_KEY_BYTES = 16


def seal(config: Mapping[str, Any], hmac_key: bytes | None = None) -> bytes:
    """Return the JSON of a manifest in the format of today, with its checksum and its HMAC.

    Raises: ValueError where it would be longer than any that is read.
    """
    whole = {"format": FORMAT, **_without(config, "checksum", "hmac")}
    if hmac_key is not None:
        whole["hmac"] = sign(_canonical(whole), hmac_key, CONFIG)
    whole["checksum"] = hashlib.sha256(_canonical(whole)).hexdigest()
    content = (json.dumps(whole, indent=1) + "\n").encode()
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{CONFIG} would have {len(content)} bytes, at most {MAX_BYTES} are read again; "
            "attach without store_text"
        )
    try:
        strict_json.outline(content)
    except ValueError as error:
        raise ValueError(
            f"{CONFIG} would not be read again: {error}; attach without store_text"
        ) from error
    return content


def read(path: str | Path, hmac_key: bytes | None = None) -> dict[str, Any]:
    """Return what the manifest of a directory says, each field of its type.

    hmac_key: the key that it must have been signed with.

    Raises: FileNotFoundError where there is none, CodebookCorrupt where it is not ours, not what
    was saved, or not signed with the key; TypeError and ValueError for what is no key.
    """
    file = Path(path) / CONFIG
    if not os.path.lexists(file):
        raise FileNotFoundError(f"{path} is not a codebook: it has no {CONFIG}")
    try:
        # A model's settings may hold an infinite number; older manifests do.
        config = strict_json.read(file, MAX_BYTES, _DEPTH, True, _LONGER)
    except CodebookCorrupt:
        raise
    except (ValueError, RecursionError) as error:
        raise CodebookCorrupt(f"{file} is not JSON as it should be: {error}") from error
    if not isinstance(config, dict) or not _is_count(config.get("format")) or not config["format"]:
        raise CodebookCorrupt(f"{file} is not a codebook's: it has no format number")
    if config["format"] > FORMAT:
        raise CodebookCorrupt(
            f"{file} has format {config['format']}, this version of grace_fast reads up to {FORMAT}"
        )
    if config["format"] >= 3 or "checksum" in config:
        sealed = _canonical(_without(config, "checksum"))
        if config.get("checksum") != hashlib.sha256(sealed).hexdigest():
            raise CodebookCorrupt(f"{file} is not what was saved (checksum)")
    if hmac_key is not None:
        signed = _canonical(_without(config, "checksum", "hmac"))
        check(signed, config.get("hmac"), hmac_key, CONFIG, file)
    for name, (is_right, wanted) in _FIELDS.items():
        if name in config and not is_right(config[name]):
            raise CodebookCorrupt(f"{file}: {name} must be {wanted}", field=name)
    return config


def counted(hits: Mapping[int, int]) -> dict[str, int]:
    """Return hits by row as a manifest holds them: who counts on stops at the last number."""
    return {str(row): min(count, MAX_NUMBER - 1) for row, count in hits.items()}


def sign(content: bytes, hmac_key: bytes, purpose: str) -> str:
    """Return the HMAC-SHA256 of a content; that of one purpose never passes for another.

    Raises: TypeError and ValueError for what is no key.
    """
    require_key(hmac_key)
    return hmac.new(hmac_key, purpose.encode() + b"\0" + content, hashlib.sha256).hexdigest()


def require_key(hmac_key: bytes) -> None:
    """Raise TypeError or ValueError for what is no key to sign with."""
    if not isinstance(hmac_key, bytes):
        raise TypeError(f"hmac_key must be bytes, got {type(hmac_key).__name__}")
    if len(hmac_key) < _LEAST_KEY_BYTES:
        raise ValueError(
            f"hmac_key must be at least {_LEAST_KEY_BYTES} random bytes, got {len(hmac_key)}"
        )


def check(content: bytes, signature: Any, hmac_key: bytes, purpose: str, where: Path) -> None:
    """Raise CodebookCorrupt, naming `where`, unless a signature is that of `sign`."""
    wanted = sign(content, hmac_key, purpose)
    if signature is None:
        raise CodebookCorrupt(
            f"{where} is not signed, and an hmac_key was given to hold it against"
        )
    given = signature.encode("utf-8", "replace") if isinstance(signature, str) else b""
    if not hmac.compare_digest(given, wanted.encode()):
        raise CodebookCorrupt(f"{where} was not signed with this hmac_key, or changed afterwards")


def _canonical(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()


def _without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_count(value: Any, limit: int = MAX_NUMBER) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_settings(value: Any) -> bool:
    plain = _is(bool, int, float, str, type(None))
    return isinstance(value, dict) and all(map(plain, value.values()))


def _by_number(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and all(
            name.isascii() and name.isdigit() and len(name) < 20 and is_right(each)
            for name, each in value.items()
        )
    )


are_texts = _by_number(
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is(str), value))
)
_COUNTER = (lambda n: _is_count(n, MAX_COUNTER), f"a whole number >= 0, below {MAX_COUNTER}")
_OBJECT, _OR_NULL = (_is(dict), "an object"), (_is(dict, type(None)), "an object, or null")
# What each field must be, where it is there; who needs a field says so.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "grace_fast": (_is(str), "a text"),
    "settings": (_is_settings, "an object of plain values"),
    "fingerprint": _OBJECT,
    "next_id": _COUNTER,
    "version": _COUNTER,
    "hits": (_by_number(_is_count), "an object of counts by row"),
    "texts": (are_texts, "an object of prompt and target by edit"),
    "tensors": _OBJECT,
    "codes": _OR_NULL,
    "journal": _OR_NULL,
}
