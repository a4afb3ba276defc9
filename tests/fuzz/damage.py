"""Changes of a saved directory, of tensors and of JSON, as drawn bytes describe them.

Most bytes that are changed blindly end at a checksum, so what is changed within the manifest, a
tensor or a row of the journal gets the checksums that suit it: anybody can compute them.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from changes import put_rows, put_tensors
from safetensors.torch import load, save
from torch import Tensor

from fuzz.draw import Draw
from grace_fast.codebook.mapped import HEADER_BYTES, refuse_special
from grace_fast.store import files, journal, manifest, versions

NUMBERS = (0, 1, -1, 2**31, -(2**31), 2**62, -(2**63), math.nan, math.inf, -0.0, 1e-42, 3e38)
DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.bfloat16)
PLAIN: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1.5, -2.0, 1e308, math.inf, math.nan, 2**62, 2**64, 10**40),
    *("", "x", "0" * 64, "../victim", "/etc/passwd", "é\0", "\ud800", "torch.float16", "layer"),
    *([], {}, [0], [["x", "y"]], {"0": 1}, {"a": {"b": 1}}),
)
HOT = bytes.fromhex("d9d505f920a163d7")  # how the file begins that rolls SQLite back


def damage(draw: Draw, folder: Path, victim: Path) -> None:
    """Change a saved directory in one way; `victim` is a file outside that a link may lead to."""
    changes: tuple[Callable[[Draw, Path], None], ...] = (
        change_bytes,
        change_manifest,
        change_tensors,
        change_journal,
        lambda draw, folder: change_kind(draw, folder, victim),
    )
    # What is behind the checksums is much more than what is before them.
    draw.pick((*changes, change_manifest, change_tensors, change_journal))(draw, folder)


def file_in(draw: Draw, folder: Path) -> Path | None:
    """Return one file of a directory; its links and folders are none."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.is_symlink()]
    return draw.pick(found) if found else None


def change_bytes(draw: Draw, folder: Path) -> None:
    """Flip, overwrite, cut off, append or insert in one file; checksums are as they were."""
    path = file_in(draw, folder)
    if path is not None:
        path.write_bytes(changed_bytes(draw, path.read_bytes()))


def changed_bytes(draw: Draw, content: bytes) -> bytes:
    """Return bytes that were changed at one place."""
    how, at = draw.below(6), draw.below(len(content) + 1)
    head, tail = content[:at], content[at:]
    if how == 0:
        return head + bytes([tail[0] ^ 1 << draw.below(8)]) + tail[1:] if tail else content
    if how == 1:
        return head
    if how == 2:
        return head + draw.short() + tail
    if how == 3:
        return head + tail[draw.below(256) :]
    if how == 4:
        return draw.rest()
    fresh = draw.short()
    return head + fresh + tail[len(fresh) :]


def change_kind(draw: Draw, folder: Path, victim: Path) -> None:
    """Put something else in the place of a file, or something beside it."""
    path, how = file_in(draw, folder), draw.below(7)
    if path is None:
        return
    if how == 6:
        for database in folder.glob("*.sqlite"):
            database.with_name(f"{database.name}-journal").write_bytes(HOT + draw.rest())
        return
    path.unlink()
    if how == 1:
        path.symlink_to(victim)
    elif how == 2:
        path.mkdir()
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        path.touch()
    elif how == 5:
        path.symlink_to("/dev/zero")


def change_manifest(draw: Draw, folder: Path) -> None:
    """Change what a manifest says, with the checksum that suits it."""
    config = _config(folder)
    if config is not None:
        change_json(draw, config)
        (folder / files.CONFIG).write_bytes(manifest.seal(config))


def _config(folder: Path) -> dict[str, Any] | None:
    """Return what the manifest says where it can be read still."""
    try:
        return files.read_config(folder)
    except (ValueError, FileNotFoundError):
        return None


def change_json(draw: Draw, said: Any) -> None:
    """Change one value of an object in place: remove it, or put something odd there or beside."""
    places = list(_places(said))
    if not places:
        return
    container, name = draw.pick(places)
    how = draw.below(8)
    if how == 0:
        del container[name]
    elif how == 1:
        other, its_name = draw.pick(places)
        container[name] = json.loads(json.dumps(other[its_name]))
    elif how == 2 and isinstance(container, dict):
        container[draw.short().decode("latin-1")] = draw.pick(PLAIN)
    elif how == 3 and type(container[name]) is int:
        container[name] += draw.below(7) - 3
    elif how == 4:
        container[name] = draw.short().decode("latin-1")
    else:
        container[name] = draw.pick(PLAIN)


def _places(said: Any) -> list[tuple[Any, Any]]:
    """Return each value of a JSON as its container and its name there."""
    names: Any = ()
    if isinstance(said, dict):
        names = sorted(said)
    elif isinstance(said, list):
        names = range(len(said))
    found = []
    for name in names:
        found += [(said, name), *_places(said[name])]
    return found


def change_tensors(draw: Draw, folder: Path) -> None:
    """Change tensors of one file, or keys and values that are mapped, with suiting checksums."""
    config = _config(folder)
    if config is None:
        return
    which = draw.pick(("tensors", "tensors", "codes", *files.MAPPED))
    try:
        if which in files.MAPPED:
            _change_rows(draw, folder, config, which)
        elif config.get(which) is not None:
            tensors = load(_read(folder / config[which]["file"]))
            put_tensors(folder, which, changed_tensors(draw, tensors))
    except Exception:  # an earlier change has left nothing to change
        return


def _read(path: Path) -> bytes:
    if not path.is_file() or path.is_symlink():  # an earlier change has put a pipe there
        raise FileNotFoundError(path)
    return path.read_bytes()


def _change_rows(draw: Draw, folder: Path, config: dict[str, Any], name: str) -> None:
    rows = _read(folder / config["mapped"][name]["file"])[HEADER_BYTES:]
    at, number = draw.below(max(1, len(rows) // 4)), draw.pick(NUMBERS)
    _read(folder / config["tensors"]["file"])
    put_rows(folder, name, 4 * at, torch.tensor([float(number)]).numpy().tobytes())


def changed_tensors(draw: Draw, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which one or more were changed: numbers, rows, types, shapes, names."""
    changed = dict(tensors)
    for _ in range(1 + draw.below(3)):
        if not changed:
            break
        name = draw.pick(sorted(changed))
        tensor = _changed_tensor(draw, changed.pop(name))
        if tensor is not None:
            changed[name] = tensor
    return changed


def _changed_tensor(draw: Draw, tensor: Tensor) -> Tensor | None:
    how, tensor = draw.below(16), tensor.clone()
    flat = tensor.reshape(-1)
    at = draw.below(len(flat))
    if how == 0:
        return None
    if how == 1:
        return tensor[draw.below(3) :] if tensor.ndim else tensor
    if how == 2:
        return torch.cat((tensor, tensor[: 1 + draw.below(2)])) if tensor.ndim else tensor
    if how == 3:
        return tensor.to(draw.pick(DTYPES))
    if how == 4:
        return tensor[..., None] if draw.below(2) else flat
    if how == 5:
        return flat[:1].reshape(()) if len(flat) else tensor.new_zeros(())
    if how == 6 and len(flat) > 1:
        flat[at] = flat[draw.below(len(flat))]
    elif how < 10 and len(flat) and tensor.dtype != torch.bool:
        flat.view(torch.uint8)[at] ^= 1 + draw.below(255)
    elif len(flat):
        _put(flat, at, draw.pick(NUMBERS))
    return tensor


def _put(flat: Tensor, at: int, number: float) -> None:
    if flat.dtype.is_floating_point or flat.dtype == torch.bool:
        flat[at] = number
    elif math.isfinite(number):
        limits = torch.iinfo(flat.dtype)
        flat[at] = int(min(max(number, limits.min), limits.max))


def change_journal(draw: Draw, folder: Path) -> None:
    """Change rows of a journal, and make its chain of checksums anew."""
    config = _config(folder)
    try:
        path, name, base = versions.journal_place(folder, config or {})
        for each in (path, path.with_name(f"{path.name}-journal")):
            refuse_special(each)
        file = sqlite3.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None)
    except (KeyError, ValueError, AttributeError, sqlite3.Error):
        return  # there is none, or an earlier change has left none
    try:
        file.execute("PRAGMA synchronous=OFF")
        rows = file.execute(
            "SELECT version, time, kind, content FROM versions ORDER BY version"
        ).fetchall()
        _put_rows(draw, file, _changed_rows(draw, rows), journal._started(name, base, b""), base)
    except (sqlite3.Error, UnicodeDecodeError):
        return
    finally:
        file.close()


def _changed_rows(draw: Draw, rows: list[Any]) -> list[Any]:
    if not rows:
        return rows
    at, how = draw.below(len(rows)), draw.below(8)
    version, when, kind, content = rows[at]
    if how == 0:
        return rows[:at] + rows[at + 1 :]
    if how == 1:  # and those behind it follow
        kept = rows[:at] + rows[at + 1 :]
        return [(rows[0][0] + place, *row[1:]) for place, row in enumerate(kept)]
    if how == 2:
        content = rows[draw.below(len(rows))][3]
    elif how == 3:
        odd = draw.pick(("x", 7, None, 2**62, 1.5, b"\0"))
        row = [version, when, kind, content]
        row[draw.below(4)] = odd
        return [*rows[:at], tuple(row), *rows[at + 1 :]]
    elif isinstance(content, bytes):
        content = _changed_content(draw, content, how)
    return [*rows[:at], (version, when, kind, content), *rows[at + 1 :]]


def _changed_content(draw: Draw, content: bytes, how: int) -> bytes:
    if how == 4:
        return changed_bytes(draw, content)
    try:
        tensors = load(content)
    except Exception:  # an earlier change has left none
        return content
    if how == 5:
        texts: Any = {"0": ["a", "b"]}
        change_json(draw, texts)
        told = draw.short().decode("latin-1") if draw.below(2) else json.dumps(texts)
        return save(tensors, {"texts": told})
    return save({n: t.contiguous() for n, t in changed_tensors(draw, tensors).items()})


def _put_rows(
    draw: Draw, file: sqlite3.Connection, rows: list[Any], checksum: bytes, version: int
) -> None:
    file.execute("BEGIN")
    file.execute("DELETE FROM versions")
    for row in rows:
        if all(map(isinstance, row, (int, float, str, bytes))):
            checksum, version = journal._chained(b"", checksum, *row), row[0]
        file.execute("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)", (*row, checksum))
    head: Any = (version, checksum)
    if draw.below(16) == 15:
        head = draw.pick(((version + 1, checksum), ("x", checksum), (version, "x"), (0, checksum)))
    file.execute("UPDATE head SET version = ?, checksum = ?", head)
    file.execute("COMMIT")
