"""The table of damages: what is done to a file or a directory of a codebook, and what is said then.

Each test takes those of a kind. Nothing here is silent, and nothing may end the process.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from changes import (
    change_config,
    change_mapped,
    change_state,
    described,
    drop_tensor,
    file_with,
    overwrite,
    put,
    replace_tensor,
    write_with_checksum,
)
from disk import ROWS, WIDTH, file_of
from safetensors.torch import save_file

from grace_fast.codebook.checks import MAX_COUNTER, MAX_NUMBER
from grace_fast.codebook.mapped import HEADER_BYTES
from grace_fast.store import files
from grace_fast.store.large import resident
from grace_fast.tools.evaluate import stream


@dataclass(frozen=True)
class Damage:
    """One way in which something on the disk is not what was saved."""

    kind: str  # what is damaged
    do: Callable[[Any], object]  # to a directory, a file or a part of a manifest, by the kind
    message: str | None = None  # how it is refused; None where it may be
    content: bytes = b""  # of a file that is another as a whole
    column: str = ""  # the tensor that is damaged
    row: int | None = None  # the row that the error names
    max_radius: float | None = None  # beyond which a ball is a damage
    repaired: bool = False  # by dropping rows
    last_version: int | None = None  # of a journal: what is left of it once it is repaired


def each_damage(kind, wanted=lambda damage: True):
    """Let a test run with every damage of a kind."""
    found = [
        pytest.param(damage, id=name)
        for name, damage in DAMAGES.items()
        if damage.kind == kind and wanted(damage)
    ]
    return pytest.mark.parametrize("damage", found)


mapped = partial(Damage, "mapped")  # keys, values and codes that have files of their own
special = partial(Damage, "special")  # what has the name of a file and is none


def written(kind, file, content, message):
    """A file that holds something else; its place is returned."""

    def write(folder):
        (folder / file).write_bytes(content)
        return folder / file

    return Damage(kind, write, message, content)


def said(content, message):
    """A manifest, as text."""
    return written("manifest", files.CONFIG, content.encode(), message)


def header(content, message):
    return written("header", "one.safetensors", content, message)


def hparams(content, message):
    return written("hparams", "hparams.yaml", content, message)


def records(file, content, message):
    return written("records", file, content, message)


def text(**changes):
    return json.dumps({"format": 1, **changes})


def sealed(kind, change, message):
    """What a manifest says, with the checksum that suits it."""

    def do(folder):
        config = files.read_config(folder)
        change(config)
        write_with_checksum(folder, config)

    return Damage(kind, do, message)


def settings(changes, message):
    return sealed("settings", lambda config: config["settings"].update(changes), message)


def counter(field, number):
    message = f"{field} must be a whole number >= 0, below"
    return sealed("counter", lambda config: config.update({field: number}), message)


def signature(value):
    return sealed("signature", lambda config: config.update(hmac=value), r"(is|was) not signed")


def described_journal(change):
    return sealed("described journal", change, "does not describe its journal")


def column(name, change, row=None, message=None, max_radius=None, repaired=False):
    """A column of a model's edits, with the checksum that suits it."""

    def do(folder):
        replace_tensor(folder, "tensors", name, change)

    return Damage(
        "column", do, message, column=name, row=row, max_radius=max_radius, repaired=repaired
    )


def journal(statement, last_version):
    """A row of a journal, or a table of it."""

    def do(folder):
        file = sqlite3.connect(next(folder.glob("journal-*.sqlite")), isolation_level=None)
        file.execute(statement)
        file.close()

    return Damage("journal", do, last_version=last_version)


def file_name(value):
    """The name of a file in a manifest, as one part of it that has a file."""
    message = "is not the name of a file in this directory"
    return Damage("name", lambda part: part.update(file=value), message)


def emptied(path):
    path.unlink()
    return path


def build(change):
    place, message = f"{resident.BUILDING}/state.json", "does not tell what was written; remove"
    return Damage("build", lambda folder: change_state(folder / place, change), message)


def checkpoint(message="is not the checkpoint of an evaluation", **changes):
    def do(folder):
        change_state(folder / stream.STATE, lambda state: state.update(changes))

    return Damage("checkpoint", do, message)


def rows_of(name, tensor, message):
    """A file of rows that a codebook is built of."""

    def do(folder):
        parts = {"keys": torch.ones(4, 2), "values": torch.ones(4, 2), "radii": torch.ones(4)}
        save_file(parts | {name: tensor}, folder / "rows.safetensors")
        return folder / "rows.safetensors"

    return Damage("rows", do, message)


MANY_BYTES = 12_000_000


def dense(unit, size=MANY_BYTES):
    """Return a manifest with very many values."""
    return b'{"format": 3, "hits": [' + unit * (size // len(unit)) + b"1]}"


def many(unit):
    def do(folder):
        (folder / files.CONFIG).write_bytes(dense(unit))

    return Damage("many values", do, "holds more than 65536")


# YAML: aliases of aliases, 2^24 words once they are written out.
BOMB = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [*{before}, *{before}]\n"
    for before, after in zip(
        "abcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwxyz"[:24], strict=True
    )
)
ONE = described(0, 8, [2])
NO_NUMBERS = (MAX_COUNTER, MAX_NUMBER - 1, 2**62, 2**63 - 1, 2**63, 2**64, -1)
NO_NAMES = (
    *("../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800", "x" * 300, 3, None),
    ["x"],
)
NO_FOLDERS = ("../mine", "/", ".", "codebook-000050/..", "codebook-1\n", "mine")
NO_SIGNATURES = (3, "é" * 64, "", None, ["x"])

DAMAGES = {
    # A directory whose keys, values and codes have files of their own
    "a key file that was cut off": mapped(
        lambda f: os.truncate(file_of(f, "keys"), HEADER_BYTES + 4000),
        r"keys-\w+\.safetensors is truncated or was changed: 8096 bytes, wanted 1444096",
    ),
    "a key file that grew": mapped(
        lambda f: overwrite(file_of(f, "keys"), HEADER_BYTES + ROWS * WIDTH * 4, b"more"),
        "is truncated or was changed: 1444100 bytes",
    ),
    "values that are gone": mapped(lambda f: file_of(f, "values").unlink(), "is missing"),
    "another header of the keys": mapped(
        lambda f: overwrite(file_of(f, "keys"), 20, b"x"),
        "does not begin with the header of its keys",
    ),
    "a link to the keys": mapped(
        lambda f: (
            (f / "k").symlink_to(file_of(f, "keys").rename(f / "elsewhere"))
            or change_mapped(f, file="k")
        ),
        "is a link: a codebook's files are regular files",
    ),
    "a path out of the directory": mapped(
        lambda f: change_mapped(f, file="../keys"), "is not the name of a file in this directory"
    ),
    "no description": mapped(
        lambda f: change_config(f, mapped={}), r"grace_config\.json does not describe its keys"
    ),
    "an unknown element type": mapped(
        lambda f: change_mapped(f, dtype="torch.int8"), "not describe its"
    ),
    "another number of rows": mapped(
        lambda f: change_mapped(f, rows=ROWS - 1), "is truncated or was changed"
    ),
    "no rows at all": mapped(lambda f: change_mapped(f, rows=-1), r"keys must be \[>= 0, >= 1\]"),
    "checksums that are missing": mapped(
        lambda f: drop_tensor(f, "tensors", "keys.blocks"), "there are no checksums of the keys"
    ),
    "too many checksums": mapped(
        lambda f: replace_tensor(f, "tensors", "keys.blocks", lambda t: torch.cat([t, t])),
        "has 1 blocks, and there are 2 checksums",
    ),
    "a flipped bit in the radii": mapped(
        lambda f: overwrite(file_of(f, "codebook"), -3, b"\xee"), "is not what was saved"
    ),
    "fewer radii than keys": mapped(
        lambda f: replace_tensor(f, "tensors", "rows.radius", lambda t: t[:100]),
        "state says that 9000 of 100 rows have codes",
    ),
    "more radii than keys": mapped(
        lambda f: replace_tensor(f, "tensors", "rows.radius", lambda t: torch.cat([t, t])),
        r"rows\.key_slot points outside the 9000 slots",
    ),
    "no radii": mapped(
        lambda f: drop_tensor(f, "tensors", "rows.radius"), r"rows\.radius is missing"
    ),
    "codes that are gone": mapped(lambda f: file_of(f, "codes").unlink(), "is missing"),
    "a flipped bit in the codes": mapped(
        lambda f: overwrite(file_of(f, "codes"), -70_000, b"\x01\x02\x03"), "is not what was saved"
    ),
    "codes that were cut off": mapped(
        lambda f: os.truncate(file_of(f, "codes"), 5000), "truncated or no safetensors file"
    ),
    "a row with two places": mapped(
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t.clone().fill_(5)),
        r"run0\.rows must hold every row from 0 to 9000 once",
    ),
    "a row that is not there": mapped(
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t + 1),
        r"run0\.rows must hold every row from 0 to 9000 once",
    ),
    "a run too short": mapped(
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t.sort().values[:8000]),
        r"run0\.near must be uint8 \[500, 4, 16, 4\]",
    ),
    "a row without a place": mapped(
        lambda f: drop_tensor(f, "codes", "run0.rows"),
        r"tail\.rows must hold every row from 0 to 9000",
    ),
    "codes that are missing": mapped(
        lambda f: drop_tensor(f, "codes", "run0.far"), r"the tensor run0\.far is missing"
    ),
    "boxes of another shape": mapped(
        lambda f: replace_tensor(f, "codes", "run0.leaf_boxes", lambda t: t[:2]),
        r"run0\.leaf_boxes must be int16",
    ),
    "a map of another width": mapped(
        lambda f: replace_tensor(f, "codes", "map.centre", lambda t: t[:-1]),
        r"map\.centre must be float32 \[40\]",
    ),
    "a map without a step": mapped(
        lambda f: replace_tensor(f, "codes", "map.numbers", lambda t: t * 0),
        r"map\.numbers are not those of a map",
    ),
    "a map that is not finite": mapped(
        lambda f: replace_tensor(f, "codes", "map.numbers", lambda t: t / 0),
        r"map\.numbers must be finite",
    ),
    "a tail of rows that are not there": mapped(
        lambda f: (
            replace_tensor(f, "codes", "tail.rows", lambda t: t.new_tensor([ROWS]))
            or replace_tensor(f, "codes", "tail.near", lambda t: t.new_zeros(1, 16))
            or replace_tensor(f, "codes", "tail.far", lambda t: t.new_zeros(1, 48))
        ),
        r"tail\.rows points outside the 9000 rows",
    ),
    # Manifests
    "empty": said("", "is not JSON as it should be"),
    "cut off": said('{"format": 1', "is not JSON as it should be: its brackets do not close"),
    "a million brackets": said("[" * 10**6, "or more than 8 are open at once"),
    "nine levels": said('{"a":' * 9 + "1" + "}" * 9, "or more than 8 are open at once"),
    "a name twice": said('{"format": 1, "format": 2}', "names 'format' more than once"),
    "a name twice, deep": said(
        '{"format": 1, "hits": {"1": 1, "1": 2}}', "names '1' more than once"
    ),
    "another name in other letters": said(
        '{"format": 1, "f\\u006frmat": 1}', "'format' more than once"
    ),
    "a manifest that is no object": said("3", "it has no format number"),
    "a truth for a format": said(text(format=True), "it has no format number"),
    "format 0": said(text(format=0), "it has no format number"),
    "a negative format": said(text(format=-1), "it has no format number"),
    "a fraction of a format": said(text(format=1.0), "it has no format number"),
    "a newer format": said(
        text(format=4), "has format 4, this version of grace_fast reads up to 3"
    ),
    "format 3 without a checksum": said(text(format=3), r"is not what was saved \(checksum\)"),
    "a checksum that is wrong": said(
        text(checksum="0" * 64), r"is not what was saved \(checksum\)"
    ),
    "a list of settings": said(text(settings=[]), "settings must be an object of plain values"),
    "settings within settings": said(
        text(settings={"a": {}}), "settings must be an object of plain"
    ),
    "a fingerprint in words": said(text(fingerprint="x"), "fingerprint must be an object"),
    "a negative id": said(text(next_id=-1), "next_id must be a whole number >= 0"),
    "an id past int64": said(text(next_id=2**63), "next_id must be a whole number >= 0"),
    "an id of 5 000 digits": said(
        '{"format": 1, "next_id": %s}' % ("9" * 5000), "Exceeds the limit"
    ),
    "hits of no row": said(text(hits={"-1": 1}), "hits must be an object of counts by row"),
    "hits by a fraction": said(text(hits={"1": 1.5}), "hits must be an object of counts by row"),
    "a text of one part": said(
        text(texts={"1": ["a"]}), "texts must be an object of prompt and target"
    ),
    "a text of numbers": said(
        text(texts={"1": [1, 2]}), "texts must be an object of prompt and target"
    ),
    "tensors in words": said(text(tensors="x"), "tensors must be an object"),
    "a journal in words": said(text(journal="x"), "journal must be an object, or null"),
    "a version in words": said(text(version="x"), "version must be a whole number >= 0"),
    # Manifests of very many values
    "empty lists": many(b"[[]],"),
    "short texts": many(b'"ab",'),
    "objects": many(b'{"a":1},'),
    "numbers": many(b"1.5,"),
    "names": many(b'{"abc":"abc"},'),
    # Settings
    "an unknown one": settings({"depth": 3}, "unexpected keyword argument 'depth'"),
    "epsilon in words": settings({"epsilon": "1"}, "epsilon must be a number, got '1'"),
    "no epsilon": settings({"epsilon": None}, "epsilon must be a number, got None"),
    "epsilon below zero": settings({"epsilon": -1}, "epsilon must be a positive number"),
    "infinite epsilon": settings({"epsilon": math.inf}, "epsilon must be a positive number"),
    "a truth for a rate": settings({"learning_rate": True}, "learning_rate must be a number"),
    "a margin in words": settings({"expand_margin": "1"}, "expand_margin must be a number"),
    "a layer that is a number": settings({"layer": 3}, "layer must be a str, got 3"),
    "whether to store text": settings(
        {"store_text": "yes"}, "store_text must be a bool, got 'yes'"
    ),
    "semantics": settings({"semantics": "mine"}, "semantics must be one of"),
    "NaN for a cap": settings({"max_radius": math.nan}, "max_radius must be a number > 0"),
    "a cap below zero": settings({"max_radius": -1}, "max_radius must be a number > 0"),
    # What a manifest says of a file, a counter or a journal
    **{f"a file by the name {ascii(value)[:12]}": file_name(value) for value in NO_NAMES},
    **{
        f"{number} for the {field}": counter(field, number)
        for field in ("next_id", "version")
        for number in NO_NUMBERS
    },
    "a journal that is not described": described_journal(lambda said: said.update(journal={})),
    "a journal whose name is a number": described_journal(
        lambda said: said["journal"].update(name=3)
    ),
    "a journal elsewhere": described_journal(
        lambda said: said["journal"].update(file="../journal-x.sqlite")
    ),
    "a journal without a version": described_journal(lambda said: said.pop("version")),
    **{f"a signature {value!a:.12}": signature(value) for value in NO_SIGNATURES},
    # What has the name of a file and is none
    "a link": special(lambda p: p.symlink_to(p.rename(p.with_name("elsewhere"))), "is a link"),
    "a dangling link": special(
        lambda p: emptied(p).symlink_to(p.with_name("elsewhere")), "is a link"
    ),
    "a link to a device": special(lambda p: emptied(p).symlink_to("/dev/zero"), "is a link"),
    "a folder": special(lambda p: emptied(p).mkdir(), "is no regular file"),
    "a pipe": special(lambda p: os.mkfifo(emptied(p)), "is no regular file"),
    # Columns of a model's edits
    "NaN in a key": column(
        "keys", put(3, math.nan), 3, "keys must be finite, got NaN or infinity in"
    ),
    "infinity in a key": column("keys", put(0, -math.inf), 0, "keys must be finite"),
    "infinity in a value": column("values", put(2, math.inf), 2, "values must be finite"),
    "NaN for a radius": column(
        "rows.radius", put(1, math.nan), 1, r"rows\.radius must be finite", repaired=True
    ),
    "an infinite radius": column(
        "rows.radius", put(4, math.inf), 4, r"rows\.radius must be finite"
    ),
    "NaN in a query": column("edits.query", put(5, math.nan), 5, r"edits\.query must be finite"),
    "NaN for the radius of an edit": column("edits.radius", put(1, math.nan), 1, "must be finite"),
    "NaN for a distance": column(
        "edits.distance", put(1, math.nan), 1, "must be a number >= 0 in row 1"
    ),
    "a distance below zero": column(
        "edits.distance", put(1, -1.0), 1, "must be a number >= 0 in row 1"
    ),
    "steps below zero": column("edits.steps", put(2, -1), 2, "must be at least 0 in row 2"),
    "the radius of an event": column(
        "events.radius", put(2, math.inf), 2, r"events\.radius must be fin"
    ),
    "the largest id": column("rows.id", put(4, 2**63 - 1), 4, "must be below 4611686018427387904"),
    "an id twice": column(
        "edits.id", put(4, 3), 4, "must ascend from 0 or more in row 4", repaired=True
    ),
    "a first id below zero": column(
        "rows.id", put(0, -1), 0, "must ascend from 0 or more in row 0"
    ),
    "a slot that is not there": column(
        "rows.key_slot", put(2, 99), 2, "points outside the . slots"
    ),
    "the row of an edit": column(
        "edits.row", put(6, 99), 6, "edit 7 is on row 99 of 5", repaired=True
    ),
    "keys of another width": column("keys", lambda keys: keys[:, 1:], None, "edits.query must be"),
    "a radius too few": column(
        "rows.radius", lambda radii: radii[1:], None, r"must be .* \[5\], got"
    ),
    "a value too few": column("values", lambda values: values[:-1], None, "points outside the"),
    "radii in halves": column(
        "rows.radius", lambda radii: radii.half(), None, r"must be torch\.float32"
    ),
    "truths of another kind": column("rows.live", lambda live: live.byte() + 1, None, "torch.bool"),
    "no keys": column("keys", lambda keys: keys[:, :0], None, r"must be numbers \[\*, >= 1\]"),
    # More of which repair drops the rows
    "a key that is NaN": column("keys", put(2, math.nan), 2, "keys must be finite", repaired=True),
    "a value that is infinite": column(
        "values", put(1, math.inf), 1, "values must be finite", repaired=True
    ),
    "a radius that is too wide": column(
        "rows.radius",
        put(1, 7.0),
        1,
        r"rows\.radius must be at most 5\.0, got 7\.0 in row 1",
        5.0,
        repaired=True,
    ),
    "a value's slot that is not there": column(
        "rows.value_slot", put(1, 99), 1, "points outside the 9 slots", repaired=True
    ),
    "a query that is NaN": column(
        "edits.query", put(3, math.nan), 3, r"edits\.query must be finite", repaired=True
    ),
    "an edit without a value": column(
        "edits.value_after", put(1, 99), 1, "points outside the 9 slots", repaired=True
    ),
    "an event that is too wide": column(
        "events.radius",
        put(1, 7.0),
        1,
        r"events\.radius must be at most 5\.0, got 7\.0 in row 1",
        5.0,
    ),
    "an undo that would be too wide": column(
        "events.radius",
        put(0, 9.0),
        0,
        r"events\.radius must be at most 5\.0, got 9\.0",
        5.0,
        repaired=True,
    ),
    "an event of another row": column(
        "events.lasts_with", put(0, 1), None, "no event says how it came to be", repaired=True
    ),
    # Odd numbers that may be
    "a denormal in a key": column("keys", put(0, 1e-42)),
    "a denormal radius": column("rows.radius", put(0, 1e-42)),
    "a radius of zero": column("rows.radius", put(0, 0.0)),
    "a dead key": column("rows.radius", put(0, -1e-5)),
    "a key as dead as can be": column("rows.radius", put(0, -3e38)),
    "a large key": column("keys", put(0, 1e38)),
    "a ball around everything": column("rows.radius", put(0, 3e38)),
    # Journals
    "a row that was changed": journal("UPDATE versions SET kind = 'undo' WHERE version = 6", 5),
    "a row that is lost": journal("DELETE FROM versions WHERE version = 6", 5),
    "the last rows lost": journal("DELETE FROM versions WHERE version > 8", 8),
    "no last version": journal("DELETE FROM head", 10),
    "a foreign table": journal("CREATE TABLE other (a)", 0),
    # Headers of safetensors files
    "an empty file": header(b"", "has 0 bytes, and the length of a header takes 8"),
    "seven bytes": header(b"\x02" + b"\0" * 6, "has 7 bytes, and the length"),
    "a header of 2^63 bytes": header(
        file_with({}, length=2**63), "header has 9223372036854775808 bytes"
    ),
    "a header longer than 100 MB": header(
        file_with({}, length=100_000_001), "wanted at most 100000000"
    ),
    "a header longer than the file": header(
        file_with({}, length=9), "has 9 bytes, and there are 2 after"
    ),
    "a header of no bytes": header(file_with(b""), "does not begin with {"),
    "a list": header(file_with(b"[]"), "does not begin with {"),
    "white space first": header(file_with(b" {}"), "does not begin with {"),
    "no JSON": header(file_with(b"{]"), "its brackets do not close"),
    "half a JSON": header(file_with(b'{"a":'), "its brackets do not close"),
    "two of them": header(file_with(b"{}{}"), "not JSON as it should be: Extra data"),
    "a header that is no UTF-8": header(
        file_with(b'{"\xff\xfe": 1}'), "'utf-8' codec can't decode"
    ),
    "a header of a million brackets": header(
        file_with(b'{"a":' + b"[" * 10**6), "more than 3 are open at once"
    ),
    "brackets that close": header(
        file_with(b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"), "more than 3 are"
    ),
    "brackets in a string": header(file_with({"[[[[{{{{\\": ONE}, b"x" * 8), None),
    "a string without end": header(file_with(b'{"' + b'\\"' * 10**6), "brackets do not close"),
    "a tensor twice": header(
        file_with(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2), b"x" * 8),
        "names 'a' more than once",
    ),
    "a field twice": header(
        file_with(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "names 'dtype' more than once",
    ),
    "NaN for a number": header(file_with(b'{"a": {"shape": [NaN]}}'), "NaN is not a number"),
    "a number of 5 000 digits": header(
        file_with(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "Exceeds the limit"
    ),
    "a number for a tensor": header(file_with({"a": 1}), "must have dtype, shape and data_offsets"),
    "a field too many": header(file_with({"a": {**ONE, "b": 1}}), "and nothing else"),
    "a field too few": header(
        file_with({"a": {"dtype": "F32", "shape": []}}), "must have dtype, shape"
    ),
    "a tensor of an unknown element type": header(
        file_with({"a": described(0, 8, [2], "F31")}), "element types"
    ),
    "a list for the element type of a tensor": header(
        file_with({"a": described(0, 8, [2], [])}), "element types"
    ),
    "a negative length": header(
        file_with({"a": described(0, 8, [-2])}), "at most 8 whole numbers >= 0"
    ),
    "a fraction of a length": header(
        file_with({"a": described(0, 8, [2.0])}), "whole numbers >= 0"
    ),
    "a truth for a length": header(file_with({"a": described(0, 4, [True])}), "whole numbers >= 0"),
    "nine dimensions": header(file_with({"a": described(0, 4, [1] * 9)}, b"x" * 4), "at most 8"),
    "an overflowing shape": header(
        file_with({"a": described(0, 0, [2**31, 2**31, 4])}), "overflows"
    ),
    "2^62 times nothing": header(file_with({"a": described(0, 0, [2**62, 0])}), "size overflows"),
    "a length of 2^64": header(file_with({"a": described(0, 0, [2**64])}), "whole numbers >= 0"),
    "bytes that wrap around": header(file_with({"a": described(0, 0, [2**62])}), "size overflows"),
    "one offset": header(
        file_with({"a": {**ONE, "data_offsets": [0]}}), "must have two data_offsets"
    ),
    "a negative offset": header(
        file_with({"a": described(-8, 0, [2])}), "must have two data_offsets"
    ),
    "offsets that cross": header(
        file_with({"a": described(8, 0, [2])}), "has -8 bytes, and its shape"
    ),
    "fewer bytes than the shape": header(
        file_with({"a": described(0, 4, [2])}), "another number of"
    ),
    "an overlap": header(
        file_with({"a": described(0, 8, [2]), "b": described(4, 12, [2])}, b"x" * 12),
        "tensor 'b' overlaps the one before it",
    ),
    "the same bytes twice": header(
        file_with({"a": ONE, "b": ONE}, b"x" * 8), "tensor 'b' overlaps the one before it"
    ),
    "a hole": header(
        file_with({"a": described(0, 8, [2]), "b": described(12, 20, [2])}, b"x" * 20),
        "tensor 'b' leaves a hole before it",
    ),
    "a hole at the start": header(
        file_with({"a": described(8, 16, [2])}, b"x" * 16), "a hole before it"
    ),
    "bytes of no tensor": header(
        file_with({"a": ONE}, b"x" * 9), "tensors end at byte .* and it has"
    ),
    "tensors past the end": header(
        file_with({"a": ONE}, b"x" * 7), "tensors end at byte .* and it has"
    ),
    "terabytes in a small file": header(
        file_with({"a": described(0, 2**42, [2**40])}, b"x" * 8), "tensors end at byte"
    ),
    "metadata that is none": header(file_with({"__metadata__": {"a": {}}}), "an object of strings"),
    "metadata": header(file_with({"__metadata__": {"format": "pt"}, "a": ONE}, b"x" * 8), None),
    "no tensor": header(file_with({}), None),
    "an empty tensor between two": header(
        file_with(
            {"c": described(8, 16, [2]), "b": described(8, 8, [0, 5]), "a": described(0, 8, [2])},
            b"x" * 16,
        ),
        None,
    ),
    # The state of an unfinished build
    "no element type": build(lambda s: s.pop("dtype")),
    "an element type there is not": build(lambda s: s.update(dtype="torch.int8")),
    "a list for the element type of a build": build(lambda s: s.update(dtype=[])),
    "no widths": build(lambda s: s.pop("widths")),
    "the width of one alone": build(lambda s: s["widths"].pop("keys")),
    "a width of nothing": build(lambda s: s["widths"].update(keys=0)),
    "a width in words": build(lambda s: s["widths"].update(keys="8")),
    "a state without keys": build(lambda s: s.pop("keys")),
    "a number for what was written": build(lambda s: s.update(values=3)),
    "rows below none": build(lambda s: s["keys"].update(rows=-1)),
    "half a row": build(lambda s: s["keys"].update(rows=1.5)),
    "no checksum": build(lambda s: s["keys"].update(last_check=None)),
    "a checksum in other letters": build(lambda s: s["keys"].update(last_check="x" * 64)),
    "a block too many": build(lambda s: s["keys"].update(checks=["0" * 64])),
    "more rows than blocks": build(lambda s: s["keys"].update(rows=2**61)),
    "other rows of keys once all are written": build(
        lambda s: (
            s["keys"].update(rows=1),
            s.update(written=True),
        )
    ),
    "a map in words": build(lambda s: s.update(map="x")),
    "codes of more rows": build(
        lambda s: s.update(encoded={"rows": 2**40, "near_error": 0.0, "far_error": 0.0})
    ),
    "an error in words": build(
        lambda s: s.update(encoded={"rows": 0, "near_error": "x", "far_error": 0.0})
    ),
    # The state of an evaluation
    **{
        f"a checkpoint of the folder {folder!a}": checkpoint(
            "no codebook beside it is named", codebook=folder
        )
        for folder in NO_FOLDERS
    },
    "a checkpoint with a point of nothing": checkpoint(points=[{}]),
    "a checkpoint with a number of points": checkpoint(points=3),
    "a checkpoint with a field too many": checkpoint(more=1),
    "a checkpoint of a folder that is a number": checkpoint(codebook=3),
    # Rows that a codebook is built of
    "one radius without a dimension": rows_of(
        "radii", torch.tensor(1.0), r"radii must be \[M\], got \[\]"
    ),
    "radii of two dimensions": rows_of(
        "radii", torch.ones(4, 1), r"radii must be \[M\], got \[4, 1\]"
    ),
    "values of one dimension": rows_of(
        "values", torch.ones(4), r"values must be \[M, V\], got \[4\]"
    ),
    "keys of no width": rows_of("keys", torch.ones(4, 0), r"keys must be \[M, D\], got \[4, 0\]"),
    # EasyEdit's hparams
    "no UTF-8": hparams(b"\xff", "is not YAML"),
    "no YAML": hparams(b"a: ]", "is not YAML"),
    "a date that is none": hparams(b"a: !!timestamp x", "is not YAML"),
    "an empty number": hparams(b"a: !!int ''", "is not YAML"),
    "a thousand brackets": hparams(b"[" * 2000, "is not YAML"),
    "layers that are a number": hparams(
        b"alg_name: GRACE\ninner_params: 3", "a list of the layers"
    ),
    "a list for a rate": hparams(
        b"alg_name: GRACE\ninner_params: [a]\nedit_lr: []", r"edit_lr must be a number, got \[\]"
    ),
    "aliases of aliases": hparams(
        f"{BOMB}alg_name: *x".encode(), r"must have alg_name: GRACE, got \[\["
    ),
    # Data files of an evaluation
    "records that are no UTF-8": records("a.jsonl", b"\xff", r"a\.jsonl is not \.jsonl in UTF-8"),
    "a table that is no UTF-8": records("a.csv", b"prompt\n\xff", r"a\.csv is not \.csv in UTF-8"),
    "a record of a hundred thousand brackets": records(
        "a.jsonl", b"\n" + b"[" * 100_000, r"a\.jsonl, line 2 is not JSON: maximum recursion"
    ),
}
