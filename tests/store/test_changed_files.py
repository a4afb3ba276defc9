"""Files of a codebook that are not what was saved: none is taken for one, none ends the process."""

from __future__ import annotations

import os

import pytest
import torch
from changes import flip_in_second_block, overwrite, put_rows
from damages import each_damage
from disk import (
    WIDTH,
    compiled,
    file_of,
    in_memory,
    some_keys,
)

import grace_fast as gf
from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.store import files


@compiled
@each_damage("mapped")
def test_a_directory_that_was_changed_does_not_open(damage, folder):
    damage.do(folder)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        gf.Codebook.open(folder)


@compiled
@pytest.mark.parametrize("stem", ["keys", "values"])
def test_a_flipped_bit_is_seen_when_its_block_is_fetched(stem, parts, tmp_path):
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    values = keys.clone() if stem == "values" else values
    in_memory(keys, values, radii).save(tmp_path)
    flip_in_second_block(file_of(tmp_path, stem))
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
    put_rows(folder, "keys", 77 * WIDTH * 4, b"\x00\x00\xc0\x7f")
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
