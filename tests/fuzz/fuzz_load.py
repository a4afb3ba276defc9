"""Fuzz whatever reads a file that somebody else may have written, guided by coverage.

    PYTHONPATH=tests python tests/fuzz/fuzz_load.py -max_total_time=60 FOUND tests/fuzz/corpus

The first byte of an input chooses who gets the rest. An input may be refused, by the error that is
documented; whatever is taken has to work: be looked up by the law, be verified, be undone. New
inputs go to FOUND; `make fuzz-corpus` keeps those of them that reach something new.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["grace_fast"]):
    import grace_fast as gf
    from grace_fast import certificate, order
    from grace_fast.attachment import read_saved
    from grace_fast.store import coded, files, headers, layout, manifest, past, source

import golden_codebooks as golden
import torch
from safetensors.torch import load

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
HOST = torch.device("cpu")
EDITOR, BOOK = golden.editor(), golden.book()
EDITED, BARE = FOLDER / "edited", FOLDER / "bare"
EDITOR.save_pretrained(EDITED)
gf.save(BOOK, BARE)
CONFIGS = {folder: files.read_config(folder) for folder in (EDITED, BARE)}
CONTENTS = {path: path.read_bytes() for folder in CONFIGS for path in folder.iterdir()}
COLUMNS = files.read_tensors(EDITED, CONFIGS[EDITED])
ORDERED = golden.book(order.ORDER_ROWS + 64)
gf.save(ORDERED, FOLDER / "ordered")
CODES = files.read_file(FOLDER / "ordered", files.read_config(FOLDER / "ordered")["codes"])
CODES["state"][3] = 0.0  # they pay, whatever was predicted
RULES = EDITOR.settings.rules(torch.float32)
ODD = (0, 1, -1, 2**31, -(2**31), 2**62, -(2**63), float("nan"), float("inf"), -0.0, 1e-42, 3e38)
KINDS = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.bfloat16)


def header(content: bytes) -> None:
    """Take a safetensors file: what passes is what safetensors reads."""
    found = headers.check(content)
    read = load(content)
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read.items()
    }


def one_file(content: bytes) -> None:
    """Take a file of a directory in place of its own, whose checksums are as they were."""
    names = sorted(CONTENTS)
    path = names[content[0] % len(names)] if content else names[0]
    try:
        path.write_bytes(content[1:])
        folder = path.parent
        _use(gf.open(folder, verify=True))
        if folder == EDITED:
            read_saved(folder).codebook()
    finally:
        path.write_bytes(CONTENTS[path])


def sealed_manifest(content: bytes) -> None:
    """Take changes of a manifest, with a checksum that suits them."""
    try:
        changes = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(changes, dict):
        return
    for folder, config in CONFIGS.items():
        place = folder / files.CONFIG
        try:
            place.write_bytes(manifest.seal(config | changes))
            _use(gf.open(folder))
            if folder == EDITED:
                read_saved(folder).codebook()
        finally:
            place.write_bytes(CONTENTS[place])


def columns(content: bytes) -> None:
    """Take changed columns of a codebook and its edits."""
    tensors = _changed(COLUMNS, content)
    book = layout.unpack_codebook(tensors, HOST)
    _use(book)
    history = past.unpack_history(tensors, book.snapshot(), {}, 9)
    for edit in list(history.edits):
        history.verify(book, RULES)
        with book.writing() as draft:
            history.undo(draft, edit)
    _use(book)


def codes(content: bytes) -> None:
    """Take changed codes; what they say is believed, and must end no process."""
    with ORDERED.writing() as draft:
        draft.set_radius(0, 0.25)  # a version that nobody has asked
    snapshot = ORDERED.snapshot()
    certificate.restore(snapshot, coded.unpack_state(_changed(CODES, content), snapshot))
    gf.find(golden.questions(), ORDERED)


def rows(content: bytes) -> None:
    """Take a file of rows to build from."""
    place = FOLDER / "rows.safetensors"
    place.write_bytes(content)
    given = source.FilesOfRows([place])
    book = None
    for keys, values, radii in given.blocks(0):
        if book is None:
            book = gf.Codebook(keys.shape[1], values.shape[1])
        book.append(keys, values, radii)


def _use(book: gf.Codebook) -> None:
    if book.key_dim == golden.WIDTH:
        queries = golden.questions().to(book.dtype)
        found, told = gf.find(queries, book), gf.find(queries, book, backend="reference")
        assert torch.equal(found.hit, told.hit)
        assert torch.equal(found.row[found.hit], told.row[told.hit])


def _changed(tensors: dict[str, torch.Tensor], content: bytes) -> dict[str, torch.Tensor]:
    """Return tensors with changes that some bytes describe."""
    draw, changed = atheris.FuzzedDataProvider(content), dict(tensors)
    while draw.remaining_bytes() and changed:
        name = draw.PickValueInList(sorted(changed))
        tensor, how = changed.pop(name).clone(), draw.ConsumeIntInRange(0, 15)
        flat = tensor.reshape(-1)
        at = draw.ConsumeIntInRange(0, max(0, len(flat) - 1))
        if how == 0:
            continue
        if how == 1:
            tensor = tensor[draw.ConsumeIntInRange(0, 2) :]
        elif how == 2:
            tensor = torch.cat((tensor, tensor[: draw.ConsumeIntInRange(0, 2)]))
        elif how == 3:
            tensor = tensor.to(draw.PickValueInList(list(KINDS)))
        elif how < 8 and len(flat) and tensor.dtype != torch.bool:
            flat.view(torch.uint8)[at] ^= draw.ConsumeIntInRange(1, 255)
        elif len(flat):
            _put(flat, at, draw.PickValueInList(list(ODD)))
        changed[name] = tensor
    return changed


def _put(flat: torch.Tensor, at: int, number: float) -> None:
    if flat.dtype.is_floating_point or flat.dtype == torch.bool:
        flat[at] = number
    elif math.isfinite(number):
        limits = torch.iinfo(flat.dtype)
        flat[at] = int(min(max(number, limits.min), limits.max))


TARGETS: tuple[tuple[Callable[[bytes], None], tuple[type[Exception], ...]], ...] = (
    (header, (gf.CodebookCorrupt,)),
    (one_file, (gf.CodebookCorrupt,)),
    (sealed_manifest, (gf.CodebookCorrupt,)),
    (columns, (gf.CodebookCorrupt,)),
    (codes, (gf.CodebookCorrupt,)),
    (rows, (ValueError, TypeError)),
)


def test_one_input(content: bytes) -> None:
    """Give an input to whom its first byte names."""
    if content:
        target, refusals = TARGETS[content[0] % len(TARGETS)]
        with contextlib.suppress(*refusals):
            target(content[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
