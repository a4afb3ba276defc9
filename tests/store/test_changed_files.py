"""Files of a codebook that are not what was saved: none is taken for one, none ends the process."""

from __future__ import annotations

import os
from hashlib import sha256

import pytest
import torch
from damages import change_config, change_mapped, drop_tensor, overwrite, replace_tensor
from disk import (
    ROWS,
    WIDTH,
    compiled,
    file_of,
    in_memory,
    some_keys,
)

import grace_fast as gf
from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.store import files

OPENING = {
    "a key file that was cut off": (
        lambda f: os.truncate(file_of(f, "keys"), HEADER_BYTES + 4000),
        r"keys-\w+\.safetensors is truncated or was changed: 8096 bytes, wanted 1444096",
    ),
    "a key file that grew": (
        lambda f: overwrite(file_of(f, "keys"), HEADER_BYTES + ROWS * WIDTH * 4, b"more"),
        "is truncated or was changed: 1444100 bytes",
    ),
    "values that are gone": (lambda f: file_of(f, "values").unlink(), "is missing"),
    "another header": (
        lambda f: overwrite(file_of(f, "keys"), 20, b"x"),
        "does not begin with the header of its keys",
    ),
    "a link": (
        lambda f: (
            (f / "k").symlink_to(file_of(f, "keys").rename(f / "elsewhere"))
            or change_mapped(f, file="k")
        ),
        "is a link: a codebook's files are regular files",
    ),
    "a path out of the directory": (
        lambda f: change_mapped(f, file="../keys"),
        "is not the name of a file in this directory",
    ),
    "no description": (
        lambda f: change_config(f, mapped={}),
        r"grace_config\.json does not describe its keys",
    ),
    "an unknown element type": (lambda f: change_mapped(f, dtype="torch.int8"), "not describe its"),
    "another number of rows": (
        lambda f: change_mapped(f, rows=ROWS - 1),
        "is truncated or was changed",
    ),
    "no rows at all": (lambda f: change_mapped(f, rows=-1), r"keys must be \[>= 0, >= 1\]"),
    "checksums that are missing": (
        lambda f: drop_tensor(f, "tensors", "keys.blocks"),
        "there are no checksums of the keys",
    ),
    "too many checksums": (
        lambda f: replace_tensor(f, "tensors", "keys.blocks", lambda t: torch.cat([t, t])),
        "has 1 blocks, and there are 2 checksums",
    ),
    "a flipped bit in the radii": (
        lambda f: overwrite(file_of(f, "codebook"), -3, b"\xee"),
        "is not what was saved",
    ),
    "fewer radii than keys": (
        lambda f: replace_tensor(f, "tensors", "rows.radius", lambda t: t[:100]),
        "state says that 9000 of 100 rows have codes",
    ),
    "more radii than keys": (
        lambda f: replace_tensor(f, "tensors", "rows.radius", lambda t: torch.cat([t, t])),
        r"rows\.key_slot points outside the 9000 slots",
    ),
    "no radii": (lambda f: drop_tensor(f, "tensors", "rows.radius"), r"rows\.radius is missing"),
    "codes that are gone": (lambda f: file_of(f, "codes").unlink(), "is missing"),
    "a flipped bit in the codes": (
        lambda f: overwrite(file_of(f, "codes"), -70_000, b"\x01\x02\x03"),
        "is not what was saved",
    ),
    "codes that were cut off": (
        lambda f: os.truncate(file_of(f, "codes"), 5000),
        "truncated or no safetensors file",
    ),
    "a row with two places": (
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t.clone().fill_(5)),
        r"run0\.rows must hold every row from 0 to 9000 once",
    ),
    "a row that is not there": (
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t + 1),
        r"run0\.rows must hold every row from 0 to 9000 once",
    ),
    "a run too short": (
        lambda f: replace_tensor(f, "codes", "run0.rows", lambda t: t.sort().values[:8000]),
        r"run0\.near must be uint8 \[500, 4, 16, 4\]",
    ),
    "a row without a place": (
        lambda f: drop_tensor(f, "codes", "run0.rows"),
        r"tail\.rows must hold every row from 0 to 9000",
    ),
    "codes that are missing": (
        lambda f: drop_tensor(f, "codes", "run0.far"),
        r"the tensor run0\.far is missing",
    ),
    "boxes of another shape": (
        lambda f: replace_tensor(f, "codes", "run0.leaf_boxes", lambda t: t[:2]),
        r"run0\.leaf_boxes must be int16",
    ),
    "a map of another width": (
        lambda f: replace_tensor(f, "codes", "map.centre", lambda t: t[:-1]),
        r"map\.centre must be float32 \[40\]",
    ),
    "a map without a step": (
        lambda f: replace_tensor(f, "codes", "map.numbers", lambda t: t * 0),
        r"map\.numbers are not those of a map",
    ),
    "a map that is not finite": (
        lambda f: replace_tensor(f, "codes", "map.numbers", lambda t: t / 0),
        r"map\.numbers must be finite",
    ),
    "a tail of rows that are not there": (
        lambda f: (
            replace_tensor(f, "codes", "tail.rows", lambda t: t.new_tensor([ROWS]))
            or replace_tensor(f, "codes", "tail.near", lambda t: t.new_zeros(1, 16))
            or replace_tensor(f, "codes", "tail.far", lambda t: t.new_zeros(1, 48))
        ),
        r"tail\.rows points outside the 9000 rows",
    ),
}


@compiled
@pytest.mark.parametrize("name", OPENING)
def test_a_directory_that_was_changed_does_not_open(name, folder):
    change, message = OPENING[name]
    change(folder)
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.Codebook.open(folder)


@compiled
@pytest.mark.parametrize("stem", ["keys", "values"])
def test_a_flipped_bit_is_seen_when_its_block_is_fetched(stem, parts, tmp_path):
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    values = keys.clone() if stem == "values" else values
    in_memory(keys, values, radii).save(tmp_path)
    overwrite(file_of(tmp_path, stem), HEADER_BYTES + BLOCK_BYTES + 99, b"\x77")
    message = rf"{stem}-\w+\.safetensors: block 1, from row 2050 on, is not what was saved \(check"
    opened = gf.Codebook.open(tmp_path)
    assert gf.find(keys[:1].float(), opened).hits == 1
    assert opened.snapshot().values_of(torch.tensor([0, 5])).shape[0] == 2
    snapshot, rows = opened.snapshot(), torch.tensor([3000])
    asks = {
        "keys": [
            lambda: gf.find(keys[3000:3001].float(), opened),
            lambda: gf.nearest(keys[:3].float(), opened),  # reads every key
            lambda: snapshot.row(3000).key,
            lambda: snapshot.keys_between(2999, 3001),
        ],
        "values": [lambda: snapshot.values_of(rows), lambda: snapshot.row(3000).value],
    }
    of_all = [
        lambda: gf.Codebook.open(tmp_path, verify=True),
        snapshot.test_files,
        lambda: opened.save(tmp_path),
        lambda: files.read_tensors(tmp_path, files.read_config(tmp_path)),
    ]
    for ask in asks[stem] + of_all:
        with pytest.raises(gf.CodebookCorrupt, match=message):
            ask()


def test_a_key_that_is_not_finite_is_seen_though_its_checksum_is_right(folder):
    path = file_of(folder, "keys")
    overwrite(path, HEADER_BYTES + 77 * WIDTH * 4, b"\x00\x00\xc0\x7f")
    check = list(sha256(path.read_bytes()[HEADER_BYTES:]).digest())
    replace_tensor(folder, "tensors", "keys.blocks", lambda t: t.new_tensor([check]))
    with pytest.raises(
        gf.CodebookCorrupt, match="keys must be finite, got NaN or infinity in row 77"
    ):
        gf.Codebook.open(folder, verify=True)


@compiled
def test_a_file_that_shrinks_under_its_mapping_is_an_error_and_no_crash(tmp_path):
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    in_memory(keys, values, radii).save(tmp_path)
    opened = gf.Codebook.open(tmp_path)
    os.truncate(file_of(tmp_path, "keys"), HEADER_BYTES + BLOCK_BYTES + 2046 * 200)
    message = "shrank while it was in use: 4607600 bytes, wanted 12280096"
    assert gf.find(keys[:1].float(), opened).hits == 1
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.find(keys[3000:3001].float(), opened)  # its block was never tested
    opened.snapshot().key_file.tested[:] = 1
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.find(keys[3000:3001].float(), opened)  # it was, and is gone
    with pytest.raises(gf.CodebookCorrupt, match=message):
        opened.snapshot().keys_at(torch.tensor([4000]))
    with pytest.raises(gf.CodebookCorrupt, match=message):
        opened.snapshot().test_files()


def test_an_index_is_not_built_of_changed_keys(folder):
    pytest.importorskip("faiss")
    overwrite(file_of(folder, "keys"), HEADER_BYTES + 100, b"\xff\x00\x01")
    book = gf.Codebook.open(folder)
    with pytest.raises(gf.CodebookCorrupt, match="block 0, from row 0 on, is not what was saved"):
        gf.find(torch.zeros(1, WIDTH), book, backend="faiss")
