"""What the fuzzer has found: files that were refused by whatever they broke, now in words."""

from __future__ import annotations

import sqlite3
import zipfile

import golden_codebooks as golden
import pytest
import torch
from changes import change_state, replace_tensor
from damages import each_damage
from fuzz import readers
from torch import nn

import grace_fast as gf
from grace_fast.compat import easyedit
from grace_fast.editor.attach import read_saved
from grace_fast.store import archive, files, versions
from grace_fast.store.large import resident
from grace_fast.store.large.shard_files import FilesOfRows
from grace_fast.store.repair import repair
from grace_fast.tools.evaluate import records

# Unfinished builds


@pytest.fixture
def unfinished(tmp_path):
    """A build that stopped after a first block of rows."""
    readers._leave_a_build(tmp_path)
    return tmp_path


def resumed(folder):
    return gf.Codebook.build(folder, [readers.ROWS], threads=1, progress=False)


@each_damage("build")
def test_a_state_that_does_not_tell_what_was_written_is_refused(damage, unfinished):
    damage.do(unfinished)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        resumed(unfinished)


def test_rows_that_were_never_written_take_no_room(unfinished):
    place = unfinished / resident.BUILDING / "state.json"
    change_state(place, lambda state: state["keys"].update(rows=100_000))
    with pytest.raises(gf.CodebookCorrupt, match=r"has fewer rows than were written; remove"):
        resumed(unfinished)
    assert sum(each.stat().st_size for each in unfinished.rglob("*")) < 100_000


def test_a_build_whose_state_is_whole_goes_on(unfinished):
    assert len(resumed(unfinished)) == len(readers.ROWS[0])


@each_damage("rows")
def test_rows_of_another_shape_are_refused_before_they_are_read(damage, tmp_path):
    place = damage.do(tmp_path)
    with pytest.raises(ValueError, match=damage.message):
        FilesOfRows([place])


# Directories


def test_a_version_behind_the_last_one_is_seen(tmp_path):
    golden.editor(path=tmp_path).unload()
    path, *_ = versions.journal_place(tmp_path, files.read_config(tmp_path))
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO versions VALUES (11, 0.0, 'edit', x'', x'')")
    file.close()
    for ask in (
        lambda: gf.Codebook.open(tmp_path),
        lambda: read_saved(tmp_path).codebook(),
        lambda: gf.attach(golden.Model(), golden.LAYER, path=tmp_path),
    ):
        with pytest.raises(gf.CodebookCorrupt, match="version 10 is the last, found 11"):
            ask()


def test_a_column_without_a_dimension_is_dropped_or_refused(tmp_path):
    golden.editor().save_pretrained(tmp_path / "edited")
    replace_tensor(tmp_path / "edited", "tensors", "edits.id", lambda ids: ids[0].clone())
    report = repair(tmp_path / "edited")
    assert [each.what for each in report.dropped].count("edit") == 1  # all of them
    replace_tensor(tmp_path / "edited", "tensors", "rows.id", lambda ids: ids.new_tensor(3))
    with pytest.raises(gf.CodebookCorrupt, match=r"rows\.id must be torch\.int64, one for each"):
        repair(tmp_path / "edited")


def test_a_folder_with_the_name_of_a_file_is_left_alone(tmp_path):
    folders = [tmp_path / "codes-0.safetensors", tmp_path / "journal-0.sqlite"]
    for folder in folders:
        folder.mkdir(parents=True)
    golden.editor().save_pretrained(tmp_path)
    assert all(folder.is_dir() for folder in folders)
    assert len(gf.Codebook.open(tmp_path)) > 0


def test_a_packed_codebook_without_a_manifest_is_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed", "w") as packed:
        packed.writestr("lock", "")
    with pytest.raises(gf.CodebookCorrupt, match=r"is not a packed codebook: .* is not a codebook"):
        archive.unpack(tmp_path / "packed", tmp_path / "made")
    assert [each.name for each in tmp_path.iterdir()] == ["packed"]


def test_a_member_before_the_beginning_of_a_packed_file_is_refused(tmp_path):
    golden.editor().save_pretrained(tmp_path / "edited")
    archive.pack(tmp_path / "edited", tmp_path / "packed")
    content = bytearray((tmp_path / "packed").read_bytes())
    place = content.rfind(b"PK\5\6") + 16  # where its end says that the members are listed
    listed = int.from_bytes(content[place : place + 4], "little")
    content[place : place + 4] = (listed + 3000).to_bytes(4, "little")
    (tmp_path / "packed").write_bytes(content)
    with pytest.raises(gf.CodebookCorrupt, match="is not a packed codebook"):
        archive.unpack(tmp_path / "packed", tmp_path / "made")
    assert not (tmp_path / "made").exists()


# The references'


SIZES = {
    "too few": torch.tensor([2, 0, 0, 0]),
    "too many": torch.tensor([2, 0, 1, 1]),
    "below none": torch.tensor([4, 0, -1, 0]),
    "that wrap around": torch.tensor([2**62, 2**62, 2**63 - 1, 4]),
    "fractions": torch.tensor([2.0, 0.0, 1.0, 0.0]),
    "one number": torch.tensor(3),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_labels_that_are_not_theirs_are_told_with_the_module(name):
    adaptor = readers._adaptor(False)
    adaptor.load(*readers._codebook(), [None] * 4)
    with pytest.raises(RuntimeError, match=r"loading state_dict[^k]*key_label_sizes must"):
        adaptor.load_state_dict(readers.STATE | {"key_label_sizes": SIZES[name]})
    assert adaptor.key_labels == [None] * 4


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("keys", None, "keys of the adaptor at one must be a tensor, got NoneType"),
        ("values", "x", "values of the adaptor at one must be a tensor, got str"),
        ("epsilons", {}, "epsilons and key_labels of the adaptor at one must be numbers and a"),
        ("key_labels", 3, "epsilons and key_labels of the adaptor at one must be numbers and a"),
    ],
)
def test_parts_of_an_adaptor_that_are_none_are_refused_and_it_stays(part, given, message):
    parts = dict(zip(("keys", "values", "epsilons"), readers._codebook(), strict=True))
    foreign = readers.Foreign(**(parts | {"key_labels": [None] * 4, part: given}))
    model = nn.ModuleDict({"one": foreign})
    with pytest.raises(TypeError, match=message):
        gf.accelerate(model)
    assert model["one"] is foreign


def test_keys_without_a_dimension_are_refused_whoever_kept_them():
    keys, values, epsilons = readers._codebook()
    config = easyedit.GraceHyperParams(["layer"])
    foreign = readers.Foreign(
        keys=keys[0, 0].clone(), values=values, epsilons=epsilons, key_labels=[None] * 4
    )
    foreign.config, foreign.delete_key = config, None
    with pytest.raises(ValueError, match=r"keys must be \[N, 8\], got \(\)"):
        gf.accelerate(nn.ModuleDict({"one": foreign}))


@each_damage("hparams")
def test_yaml_that_holds_no_hparams_is_refused_in_words(damage, tmp_path):
    place = damage.do(tmp_path)
    with pytest.raises(ValueError, match=damage.message) as refused:
        easyedit.GraceHyperParams.from_hparams(place)
    assert len(str(refused.value)) < 1000


# Data files


@each_damage("records")
def test_records_that_cannot_be_read_are_refused_with_their_file(damage, tmp_path):
    place = damage.do(tmp_path)
    with pytest.raises(ValueError, match=damage.message):
        records.read(place, {"prompt": records.text})


def test_edits_of_a_hundred_thousand_brackets_are_refused_with_their_line(tmp_path):
    content = bytes([readers.READERS.index(readers.edits)]) + b"[" * 100_000
    assert readers.take(content)
