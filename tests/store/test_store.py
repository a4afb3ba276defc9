"""Codebooks on disk: whole again bit for bit, and no changed file is taken for ours."""

from __future__ import annotations

import json
import os

import pytest
import torch
from edit_streams import Stream, same, zero
from safetensors.torch import save_file

import grace_fast as gf
from grace_fast.semantics import Rules
from grace_fast.store import columns, files, history_columns, tensor_files


@pytest.fixture
def stream():
    """A codebook in which everything happened: moved, retrained, removed, by hand and by edits."""
    made = Stream(Rules(1.0, "moving_average"))
    labels = [None, torch.tensor([1, 2, 3])]
    made.book.append(torch.randn(2, 16) + 50, torch.randn(2, 4), torch.tensor([1.0, -1.0]), labels)
    for query, label in (
        (zero(), 1),
        (zero(1.5), 1),
        (zero(6.0), 2),
        (zero(6.4), 3),
        (zero(9.0), 4),
        (zero(9.0), 5),
    ):
        made.edit(query, label)
    made.undo(3)
    return made


def write(stream, path, **config):
    snapshot = stream.book.snapshot()
    tensors = columns.pack_codebook(snapshot) | history_columns.pack_history(
        stream.history, snapshot
    )
    files.write(path, {"settings": {}, **config}, tensors)
    return tensors


def read(path, next_id=99):
    tensors = files.read_tensors(path, files.read_config(path))
    book = columns.unpack_codebook(tensors, torch.device("cpu"))
    return tensors, book, history_columns.unpack_history(tensors, book.snapshot(), {}, next_id)


def test_a_codebook_comes_back_bit_for_bit_with_its_history(stream, tmp_path):
    written = write(stream, tmp_path)
    tensors, book, history = read(tmp_path)
    assert all(
        tensor_files.checksum(tensors[name]) == tensor_files.checksum(written[name])
        for name in written
    )
    again = Stream(stream.rules)
    again.book, again.history = book, history
    assert torch.equal(book.live, stream.book.live)
    assert torch.equal(book.radii, stream.book.radii)
    assert torch.equal(book.keys, stream.book.keys)
    assert torch.equal(book.values, stream.book.values)
    assert book.labels[0] is None
    assert torch.equal(book.labels[1], torch.tensor([1, 2, 3]))
    assert again.verify().fires == stream.verify().fires
    for edit_id in (5, 2, 1):
        again.undo(edit_id)
        stream.undo(edit_id)
        live, other = again.book.live, stream.book.live
        assert torch.equal(live, other)
        assert torch.equal(book.keys[live], stream.book.keys[live])
        assert torch.equal(book.radii[live], stream.book.radii[live])
    added = book.append(zero()[None], torch.zeros(1, 4), torch.ones(1))
    assert int(added[0]) == int(stream.book.ids[-1]) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_element_type_and_an_empty_codebook_come_back(dtype, tmp_path):
    for count in (0, 5000):  # more than a page
        book = gf.Codebook(3, 2, dtype)
        book.append(
            torch.randn(count, 3).to(dtype), torch.randn(count, 2).to(dtype), torch.rand(count)
        )
        files.write(tmp_path, {}, columns.pack_codebook(book.snapshot()))
        tensors = files.read_tensors(tmp_path, files.read_config(tmp_path))
        back = columns.unpack_codebook(tensors, torch.device("cpu"))
        assert back.dtype == dtype
        assert torch.equal(back.keys, book.keys)
        assert torch.equal(back.radii, book.radii)


def test_no_flipped_bit_is_silent(stream, tmp_path):
    write(stream, tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    good = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 * (8 + int.from_bytes(good[:8], "little"))
    anywhere = torch.randint(0, 8 * len(good), (300,), generator=generator).tolist()
    in_header = torch.randint(0, header, (300,), generator=generator).tolist()
    for bit in anywhere + in_header:
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(changed))
        try:
            tensors, _, _ = read(tmp_path)
        except gf.CodebookCorrupt:
            continue
        file.write_bytes(good)  # a change without effect: white space in the header, say
        original = files.read_tensors(tmp_path, files.read_config(tmp_path))
        assert all(torch.equal(tensors[name], original[name]) for name in original), bit


def test_a_truncated_file_is_refused_at_every_length(stream, tmp_path):
    write(stream, tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    good = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(gf.CodebookCorrupt, match="truncated or no safetensors file"):
            read(tmp_path)
    file.unlink()
    with pytest.raises(gf.CodebookCorrupt, match="is missing"):
        read(tmp_path)


def test_a_directory_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a codebook: it has no grace_config\.json"):
        read(tmp_path)
    config = tmp_path / files.CONFIG
    for content, message in {
        b"{": "is not JSON",
        b"\xff\xfe": "is not JSON",
        b"[" * 100_000: "is not JSON",
        b"[]": "no format number",
        b'{"format": "1"}': "no format number",
        b'{"format": 99}': "has format 99, this version of grace_fast reads up to 3",
        b'{"format": 1}': "does not describe its tensors",
        b'{"format": 1, "tensors": {"file": "../x", "sha256": {}}}': "not the name of a file in",
        b'{"format": 1, "tensors": {"file": 3, "sha256": {}}}': "not the name of a file in",
    }.items():
        config.write_bytes(content)
        with pytest.raises(gf.CodebookCorrupt, match=message):
            read(tmp_path)


def test_a_link_out_of_the_directory_is_not_followed(stream, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(stream, inside)
    file = next(inside.glob("*.safetensors"))
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(gf.CodebookCorrupt, match="is a link: a codebook's files are regular"):
        read(inside)


BROKEN = {
    "NaN in a key": (
        "keys",
        lambda keys: keys.index_fill(0, torch.tensor([1]), float("nan")),
        "finite",
    ),
    "an infinite radius": ("rows.radius", lambda radii: radii / 0, "rows.radius must be finite"),
    "a slot that is not there": ("rows.key_slot", lambda slots: slots + 99, "points outside"),
    "a negative slot": ("rows.value_slot", lambda slots: slots - 99, "points outside"),
    "a short column": ("rows.live", lambda live: live[1:], r"rows\.live must be torch\.bool \["),
    "ids out of order": ("rows.id", lambda ids: ids.flip(0), "rows.id must ascend"),
    "labels that do not add up": ("labels.length", lambda lengths: lengths + 2, "add up"),
    "another element type": ("values", lambda values: values.half(), "one element type"),
    "an edit on no row": ("edits.row", lambda rows: rows + 99, r"is on row .* of"),
    "a label slot that is not there": ("rows.label_slot", lambda s: s + 99, "points outside"),
    "ids below zero": ("rows.id", lambda ids: ids - 99, "rows.id must ascend from 0"),
    "double radii": ("rows.radius", lambda r: r.double(), r"must be torch\.float32 \[6\]"),
    "lengths as fractions": ("labels.length", lambda n: n.float(), r"must be torch\.int64 \["),
    "lengths that wrap around": (
        "labels.length",
        lambda n: torch.cat((torch.full((2,), 2**62), torch.full((2,), 2**62), n[4:])),
        "add up",
    ),
    "an edit's value that is not there": (
        "edits.value_after",
        lambda slots: slots + 10**6,
        r"edits\.value_after points outside",
    ),
    "an edit's value of before": (
        "edits.value_before",
        lambda slots: slots - 9,
        r"edits\.value_before points outside",
    ),
    "an edit's label": ("edits.label_slot", lambda s: -s - 1, r"label_slot points outside"),
    "an unknown outcome": ("edits.outcome", lambda o: o + 5, r"edits\.outcome points outside"),
    "edits out of order": ("edits.id", lambda ids: ids.flip(0), r"edits\.id must ascend"),
    "fewer losses than edits": ("edits.loss", lambda loss: loss[1:], r"must be torch\.float64 \["),
    "NaN in a query": ("edits.query", lambda q: q / 0, r"edits\.query must be finite"),
    "an event's key that is not there": (
        "events.key_slot",
        lambda slots: slots + 10**6,
        r"events\.key_slot points outside",
    ),
    "an event on no row": ("events.row", lambda rows: rows + 99, r"events\.row points outside"),
    "an event without end": (
        "events.lasts_with",
        lambda rows: rows - 9,
        r"events\.lasts_with points outside",
    ),
    "an infinite event": ("events.radius", lambda r: r / 0, r"events\.radius must be finite"),
    "an event of an unknown edit": ("events.edit", lambda e: e + 50, "unknown here"),
    "fewer events": ("events.edit", lambda e: e[1:], r"must be torch\.int64 \["),
    "bases of another form": ("bases", lambda b: torch.ones(1, 2).long(), r"bases must be"),
    "a base that is not there": (
        "bases",
        lambda b: torch.tensor([[0, 99, 0]]),
        "bases points outside",
    ),
    "queries of another width": ("edits.query", lambda queries: queries[:, 1:], "edits.query must"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_cannot_be_a_codebook_is_refused_by_its_name(case, stream, tmp_path):
    name, change, message = BROKEN[case]
    tensors = write(stream, tmp_path)
    files.write(tmp_path, {}, {**tensors, name: change(tensors[name])})
    with pytest.raises(gf.CodebookCorrupt, match=message):
        read(tmp_path)
    files.write(tmp_path, {}, {key: tensors[key] for key in tensors if key != name})
    with pytest.raises(gf.CodebookCorrupt, match=f"the tensor {name} is missing"):
        read(tmp_path)


def test_an_edit_without_the_event_that_made_its_row_is_refused(stream, tmp_path):
    tensors = write(stream, tmp_path)
    cut = {n: t[:-1] if n.startswith("events.") else t for n, t in tensors.items()}
    files.write(tmp_path, {}, cut)
    with pytest.raises(gf.CodebookCorrupt, match="no event says how it came to be"):
        read(tmp_path)


def test_an_id_that_was_given_is_not_given_again_after_loading(stream, tmp_path):
    write(stream, tmp_path)
    assert read(tmp_path, next_id=6)[2].next_id == 6
    with pytest.raises(gf.CodebookCorrupt, match="the next id is 5, and there is an edit 5"):
        read(tmp_path, next_id=5)


def test_tensors_of_another_file_are_refused(stream, tmp_path):
    write(stream, tmp_path)
    save_file({"keys": torch.zeros(2, 2)}, next(tmp_path.glob("*.safetensors")))
    with pytest.raises(gf.CodebookCorrupt, match="does not hold the tensors that were saved"):
        read(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_codebook_that_was_there(call, stream, tmp_path, monkeypatch):
    write(stream, tmp_path)
    before, good = stream.live_rows(), json.loads((tmp_path / files.CONFIG).read_text())
    stream.edit(zero(20.0), 9)
    failing = {"count": 0}

    def fail(*arguments, **named):
        failing["count"] += 1
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write(stream, tmp_path)
    monkeypatch.undo()
    assert failing["count"] == 1
    assert json.loads((tmp_path / files.CONFIG).read_text()) == good
    assert not list(tmp_path.glob("*.partial"))
    again = Stream(stream.rules)
    _, again.book, again.history = read(tmp_path)
    assert torch.equal(again.live_rows()[1], before[1])
    write(stream, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    _, again.book, again.history = read(tmp_path)
    assert again.live_rows()[4] == stream.live_rows()[4]
    assert same(again.live_rows(), stream.live_rows())
