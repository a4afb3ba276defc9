"""Codebooks larger than memory: codes and radii are resident, keys and values stay in their files.

`open` reads what is resident, checks all of it, and maps the rest; a key or a value is read when a
look-up needs it. What is edited afterwards is in memory beside the files, which are never written:
`save` makes a codebook of both. So any number of processes may open a directory, and one that saves
takes nothing from those that have it open.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.mapped import MappedFile
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained
from grace_fast.store import atomic, columns, files, tensor_files
from grace_fast.store.checks import check_radii
from grace_fast.store.large.index_file import pack_state, unpack_state
from grace_fast.store.locks import Lock
from grace_fast.store.row_file import RowWriter, Written
from grace_fast.store.saved import read_saved

BUILDING = "building"  # the folder of a build that is not finished (stream.py)
_CHUNK_BYTES = 1 << 24


def save(book: Codebook, path: str | Path, *, hmac_key: bytes | None = None) -> None:
    """Save a codebook to a directory; see `Codebook.save`."""
    if not isinstance(book, Codebook):
        raise TypeError(f"book must be a Codebook, got {type(book).__name__}")
    folder = atomic.absolute(path)
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        refuse_taken(folder)
        if (folder / BUILDING).exists():
            raise FileExistsError(
                f"{folder} holds an unfinished build; finish it with build(), "
                f"or remove {folder / BUILDING}"
            )
        _save(book, folder, hmac_key)
    finally:
        lock.remove()


def _save(book: Codebook, folder: Path, hmac_key: bytes | None) -> None:
    snapshot, coded = with_codes(book)
    token = secrets.token_hex(8)
    places = {name: folder / f"{name}-{token}.safetensors" for name in files.MAPPED}
    slots = {
        "keys": (snapshot.key_slots, snapshot.counts.keys, snapshot.key_file),
        "values": (snapshot.value_slots, snapshot.counts.values, snapshot.value_file),
    }
    with atomic.removed_on_failure(*places.values()):
        written = {name: _write(places[name], name, *each) for name, each in slots.items()}
        publish(folder, token, written, snapshot, coded, hmac_key)


def refuse_taken(folder: Path) -> None:
    """Raise where a directory holds the edits of a model, which a bare codebook would replace."""
    if files.holds_codebook(folder) and "settings" in files.read_config(folder):
        raise FileExistsError(
            f"{folder} holds the edits of a model (save_pretrained); "
            "choose another directory for the codebook alone"
        )


def with_codes(book: Codebook) -> tuple[Snapshot, dict[str, Tensor] | None]:
    """Return a version and its codes; none where there are few keys or nothing to code them."""
    while True:
        snapshot = book.snapshot()
        known = maintained.of(snapshot)
        if known is None:
            return snapshot, None
        known.build(snapshot)
        with known.held(snapshot) as state:
            if state is not None:
                return snapshot, pack_state(state, snapshot.rows)
        if book.snapshot() is snapshot:
            return snapshot, None


def _write(path: Path, name: str, slots: Tensor, count: int, file: MappedFile | None) -> Written:
    step = max(1, _CHUNK_BYTES // (slots.shape[1] * slots.dtype.itemsize))
    with closing(RowWriter(path, name, slots.shape[1], slots.dtype)) as writer:
        for first in range(0, count, step):
            last = min(first + step, count)
            if file is not None:
                file.test_rows(first, last)
            writer.append(slots[first:last].cpu())
        return writer.finish()


def publish(
    folder: Path,
    token: str,
    written: Mapping[str, Written],
    snapshot: Snapshot,
    coded: Mapping[str, Tensor] | None,
    hmac_key: bytes | None = None,
) -> None:
    """Let a directory hold a codebook whose keys and values were written.

    Raises: OSError where it cannot be written; what was there before stays valid then.
    """
    rows = columns.omit_defaults(columns.pack_rows(snapshot))
    checks = {f"{name}.blocks": each.checks for name, each in written.items()}
    mapped = {
        name: {
            "file": each.path.name,
            "rows": each.shape.rows,
            "width": each.shape.width,
            "dtype": str(each.shape.dtype),
        }
        for name, each in written.items()
    }
    names = [f"codebook-{token}", f"codes-{token}"]
    with atomic.removed_on_failure(*(folder / f"{name}.safetensors" for name in names)):
        tensors = tensor_files.write_new(folder, names[0], rows | checks)
        codes = tensor_files.write_new(folder, names[1], coded) if coded else None
        described = {"tensors": tensors, "codes": codes, "mapped": mapped}
        files.publish(folder, described, hmac_key)


def open(
    path: str | Path,
    *,
    verify: bool = False,
    hmac_key: bytes | None = None,
    max_radius: float | None = None,
) -> Codebook:
    """Open a codebook where it lies; see `Codebook.open`."""
    folder = atomic.absolute(path)
    return files.steadily(folder, lambda: _open(folder, verify, hmac_key, max_radius))


def _open(path: Path, verify: bool, hmac_key: bytes | None, max_radius: float | None) -> Codebook:
    config = files.read_config(path, hmac_key)
    host = torch.device("cpu")
    if not files.is_mapped(config):
        if config.get("journal") is not None:
            return read_saved(path, hmac_key, max_radius).codebook()[0]
        tensors = files.read_tensors(path, config)
        check_radii(tensors, max_radius)
        return columns.unpack_codebook(tensors, host)
    tensors = tensor_files.read_file(path, config.get("tensors"))
    check_radii(tensors, max_radius)
    keys, values = (tensor_files.map_file(path, config, name, tensors) for name in files.MAPPED)
    if keys.shape.dtype != values.shape.dtype:
        raise files.CodebookCorrupt(f"{path}: keys and values must be of one element type")
    if verify:
        for file in (keys, values):
            file.test_all()
    book = columns.unpack_rows(columns.fill_defaults(tensors), keys, values, host)
    if config.get("codes") is not None:
        snapshot = book.snapshot()
        state = unpack_state(tensor_files.read_file(path, config["codes"]), snapshot)
        maintained.restore(snapshot, state)
    return book
