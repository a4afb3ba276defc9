"""Directories that are whole and were made to harm: manifests, signatures, numbers, drawn noise.

Checksums suit what was changed here, as anybody can compute them. The catalogue's F3 and F4.
"""

from __future__ import annotations

import hashlib
import json
import math

import golden_codebooks as golden
import pytest
import torch
from changes import replace_tensor, write_with_checksum
from damages import DAMAGES, each_damage
from fuzz.serving import assert_decides_by_the_law, assert_serves
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

import grace_fast as gf
from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.editor.attach import read_saved
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.store import (
    columns,
    files,
    headers,
    history_columns,
    manifest,
    records,
    tensor_files,
)
from grace_fast.store.versions import journal_of

KEY = bytes(range(32))
EDITOR = golden.editor()


def load_editor(folder, **options):
    return gf.from_pretrained(golden.Model().eval(), folder, **options)


# The manifest


@each_damage("manifest")
def test_a_manifest_is_read_strictly(damage, tmp_path):
    damage.do(tmp_path)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        gf.Codebook.open(tmp_path)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        load_editor(tmp_path)


def test_a_manifest_that_is_too_long_is_neither_read_nor_written(tmp_path, monkeypatch):
    (tmp_path / files.CONFIG).touch()
    with (tmp_path / files.CONFIG).open("r+b") as sparse:
        sparse.truncate(manifest.MAX_BYTES + 1)
    with pytest.raises(gf.CodebookCorrupt, match="has 268435457 bytes, wanted at most 268435456"):
        gf.Codebook.open(tmp_path)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 are read again; attach without store_text"):
        manifest.seal({"texts": {"1": ["a" * 100, "b"]}})


@each_damage("settings")
def test_the_settings_of_a_directory_are_held_against_their_types(damage, edited):
    damage.do(edited)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        load_editor(edited)


# The signature


def test_a_signed_directory_opens_with_its_key_alone(tmp_path):
    book, edited = tmp_path / "book", tmp_path / "edited"
    golden.book().save(book, hmac_key=KEY)
    golden.editor().save_pretrained(edited, hmac_key=KEY)
    for opens in (
        lambda **key: gf.Codebook.open(book, **key),
        lambda **key: gf.Codebook.open(edited, **key),
        lambda **key: load_editor(edited, **key),
    ):
        opens(hmac_key=KEY)
        opens()  # who has no key has the checksum
        with pytest.raises(gf.CodebookCorrupt, match="was not signed with this hmac_key, or chang"):
            opens(hmac_key=KEY[::-1])


def test_an_unsigned_directory_is_refused_where_a_key_is_given(edited, tmp_path):
    golden.book().save(tmp_path / "book")
    for folder in (edited, tmp_path / "book"):
        with pytest.raises(gf.CodebookCorrupt, match="is not signed, and an hmac_key was given"):
            gf.Codebook.open(folder, hmac_key=KEY)
    model = golden.Model()
    with pytest.raises(gf.CodebookCorrupt, match="is not signed"):
        gf.attach(model, golden.LAYER, path=edited, hmac_key=KEY)
    assert not model.layer._forward_pre_hooks
    assert not model.layer._forward_hooks


@each_damage("signature")
def test_what_is_no_signature_is_refused_in_words(damage, edited):
    damage.do(edited)
    gf.Codebook.open(edited)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        gf.Codebook.open(edited, hmac_key=KEY)


def test_an_honest_checksum_over_a_change_does_not_pass_for_a_signature(tmp_path):
    golden.editor().save_pretrained(tmp_path, hmac_key=KEY)
    signature = files.read_config(tmp_path)["hmac"]
    replace_tensor(tmp_path, "tensors", "values", lambda values: values + 1)
    assert "hmac" not in files.read_config(tmp_path)
    gf.Codebook.open(tmp_path)
    config = {**files.read_config(tmp_path), "hmac": signature}
    write_with_checksum(tmp_path, config)
    gf.Codebook.open(tmp_path)
    with pytest.raises(gf.CodebookCorrupt, match="was not signed with this hmac_key, or changed"):
        gf.Codebook.open(tmp_path, hmac_key=KEY)


def test_blocks_of_keys_are_told_by_what_cannot_be_forged(tmp_path):
    golden.book().save(tmp_path)
    tensors = tensor_files.read_file(tmp_path, files.read_config(tmp_path)["tensors"])
    for name in files.MAPPED:
        rows = next(tmp_path.glob(f"{name}-*")).read_bytes()[HEADER_BYTES:]
        assert len(rows) < BLOCK_BYTES
        assert bytes(tensors[f"{name}.blocks"][0].tolist()) == hashlib.sha256(rows).digest()


def test_every_edit_of_a_signed_directory_is_signed(tmp_path):
    options = {"epsilon": 0.5, "replacement": "replace_all", "iterations": 0}
    model = golden.Model().eval()
    grace = gf.attach(
        model, golden.LAYER, tokenizer=golden.tokens, path=tmp_path, hmac_key=KEY, **options
    )
    for token in (1, 4):
        grace.edit(str(token), 1)
        assert len(gf.Codebook.open(tmp_path, hmac_key=KEY)) == len(grace.codebook)
    grace.undo(0)
    assert len(gf.Codebook.open(tmp_path, hmac_key=KEY)) == 1
    grace.save_pretrained(tmp_path / "copy")  # signed with the key that it has
    assert len(gf.Codebook.open(tmp_path / "copy", hmac_key=KEY)) == 1
    grace.unload()
    with pytest.raises(ValueError, match="is signed, and further edits must be: give its hmac_key"):
        gf.attach(model, golden.LAYER, path=tmp_path)
    gf.attach(model, golden.LAYER, path=tmp_path, hmac_key=KEY).unload()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("secret", TypeError, "hmac_key must be bytes, got str"),
        (b"secret", ValueError, "hmac_key must be at least 16 random bytes, got 6"),
        (b"", ValueError, "hmac_key must be at least 16 random bytes, got 0"),
    ],
)
def test_what_is_no_key_is_refused_before_anything_is_done(key, error, message, edited, tmp_path):
    model = golden.Model()
    asks = (
        lambda: gf.Codebook.open(edited, hmac_key=key),
        lambda: golden.book().save(tmp_path / "new", hmac_key=key),
        lambda: gf.attach(model, golden.LAYER, hmac_key=key),
        lambda: load_editor(edited, hmac_key=key),
        lambda: golden.editor().save_pretrained(tmp_path / "new", hmac_key=key),
    )
    for ask in asks:
        with pytest.raises(error, match=message):
            ask()
    assert not model.layer._forward_hooks
    assert {path.name for path in (tmp_path / "new").glob("*")} <= {"lock"}


def test_a_signature_of_one_purpose_is_none_of_another():
    signature = manifest.sign(b"content", KEY, "journal")
    manifest.check(b"content", signature, KEY, "journal", files.Path("here"))
    with pytest.raises(gf.CodebookCorrupt, match="here was not signed with this hmac_key"):
        manifest.check(b"content", signature, KEY, "manifest", files.Path("here"))


# F3: contents


@each_damage("column", lambda damage: damage.message)
def test_contents_that_cannot_be_are_refused_with_their_field_and_row(damage, edited):
    damage.do(edited)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message) as refused:
        load_editor(edited, max_radius=damage.max_radius)
    if damage.row is not None:
        assert (refused.value.field, refused.value.row) == (damage.column, damage.row)


def test_a_truth_that_is_neither_0_nor_1_is_refused(edited):
    config = files.read_config(edited)
    place = edited / config["tensors"]["file"]
    at = headers.check(place)["rows.live"].begin
    content = bytearray(place.read_bytes())
    content[at] = 2
    place.write_bytes(content)
    with pytest.raises(gf.CodebookCorrupt, match="truths that are neither 0 nor 1") as refused:
        gf.Codebook.open(edited)
    assert refused.value.field == "rows.live"


def test_an_error_without_a_place_has_none():
    error = gf.CodebookCorrupt("something is wrong")
    assert (str(error), error.field, error.row) == ("something is wrong", None, None)


def test_keys_and_values_of_another_layer_are_refused_by_their_widths(edited):
    replace_tensor(edited, "tensors", "values", lambda values: values[:, 1:])
    model = golden.Model()
    with pytest.raises(gf.CodebookMismatch, match=r"of the widths \(8, 3\), layer wants \(8, 4\)"):
        gf.from_pretrained(model, edited)
    assert not model.layer._forward_hooks


@each_damage("column", lambda damage: damage.message is None)
def test_odd_numbers_that_may_be_are_decided_by_the_law(damage, edited):
    damage.do(edited)
    assert_decides_by_the_law(gf.Codebook.open(edited))


# The cap of epsilon


def test_an_edit_whose_ball_would_be_wider_than_allowed_changes_nothing():
    grace = gf.attach(
        golden.Model().eval(),
        golden.LAYER,
        0.5,
        tokenizer=golden.tokens,
        replacement="replace_all",
        iterations=0,
        max_radius=0.52,
    )
    grace.edit("4", 1)
    before = columns.pack_codebook(grace.codebook.snapshot())
    with pytest.raises(
        ValueError,
        match=r"ball must be at most max_radius = 0\.52, and it would be 0\.53\d* \(expanded\)",
    ):
        grace.edit("7", 1)
    after = columns.pack_codebook(grace.codebook.snapshot())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [edit.id for edit in grace.edits()] == [0]
    assert grace.edit("1", 1).id == 1
    grace._context.settings = Settings(**{**vars(grace.settings), "max_radius": 0.4})
    with pytest.raises(ValueError, match=r"it would be 0\.5 \(added\); edit a nearer prompt, or"):
        grace.edit("14", 1)
    assert len(grace.codebook) == 2


@pytest.mark.parametrize("name", ["a radius that is too wide", "an event that is too wide"])
def test_a_stored_ball_wider_than_allowed_is_refused(name, edited, tmp_path):
    damage = DAMAGES[name]
    damage.do(edited)
    opens = [
        lambda: load_editor(edited, max_radius=5.0),
        lambda: gf.attach(golden.Model(), golden.LAYER, path=edited, max_radius=5.0),
        lambda: gf.Codebook.open(edited, max_radius=5.0),
    ]
    for ask in opens:
        with pytest.raises(gf.CodebookCorrupt, match=damage.message) as refused:
            ask()
        assert (refused.value.field, refused.value.row) == (damage.column, damage.row)
    assert load_editor(edited, max_radius=7.0).settings.max_radius == 7.0
    gf.Codebook.open(edited, max_radius=7.0).save(tmp_path / "book")
    if damage.column == "rows.radius":
        with pytest.raises(gf.CodebookCorrupt, match=r"at most 5\.0, got 7\.0 in row 1"):
            gf.Codebook.open(tmp_path / "book", max_radius=5.0)


def test_the_cap_is_kept_with_the_codebook_and_a_radius_as_wide_as_it_is_allowed(tmp_path):
    for number, cap in enumerate((0.1, 0.3, 0.7, 1 / 3)):
        folder = tmp_path / str(number)
        grace = gf.attach(
            golden.Model().eval(),
            golden.LAYER,
            cap,
            tokenizer=golden.tokens,
            replacement="replace_all",
            iterations=0,
            max_radius=cap,
        )
        grace.edit("4", 1)
        grace.save_pretrained(folder)
        assert load_editor(folder).settings.max_radius == cap
    replace_tensor(folder, "tensors", "rows.radius", lambda radii: radii * 1.001)
    with pytest.raises(gf.CodebookCorrupt, match=r"rows\.radius must be at most"):
        load_editor(folder)


# F4: drawn


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_be_refused_as_a_header(content):
    with pytest.raises(gf.CodebookCorrupt):
        headers.check(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)
SMALL = st.integers(-1, 5)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "BOOL", "U8", "F4", ""]),
        "shape": st.lists(SMALL, max_size=3),
        "data_offsets": st.lists(st.integers(0, 48), min_size=1, max_size=3),
    }
)


@given(st.dictionaries(st.text(max_size=3), TENSOR | JSON, max_size=3), st.binary(max_size=48))
def test_what_is_taken_for_a_header_is_read_by_safetensors_as_well(header, data):
    length = json.dumps(header).encode()
    content = len(length).to_bytes(8, "little") + length + data
    try:
        found = headers.check(content)
    except gf.CodebookCorrupt:
        return
    tensors = load(content)
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


@given(st.data())
def test_every_header_that_safetensors_writes_is_taken_and_no_cut_of_it(data):
    kinds = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.uint8, torch.float64]
    tensors = {
        name: torch.zeros(data.draw(st.lists(st.integers(0, 4), max_size=3)), dtype=kind)
        for name, kind in zip("abcdef", data.draw(st.permutations(kinds)), strict=True)
    }
    content = save(tensors)
    found = headers.check(content, tensors.keys())
    for name, each in found.items():
        assert (each.dtype, each.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
    with pytest.raises(gf.CodebookCorrupt):
        headers.check(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(gf.CodebookCorrupt):
        headers.check(content + b"x")


@given(st.dictionaries(st.sampled_from(sorted(manifest._FIELDS)) | st.text(max_size=3), JSON))
def test_no_manifest_does_anything_but_be_refused(tmp_path_factory, said):
    folder = tmp_path_factory.mktemp("drawn")
    (folder / files.CONFIG).write_text(json.dumps({**said, "format": 1}))
    for ask in (lambda: gf.Codebook.open(folder), lambda: read_saved(folder)):
        with pytest.raises(gf.CodebookCorrupt):
            ask()


KINDS = (torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, -(2**40), 2**62, math.nan, math.inf, -0.0, 1e-40])


def changed(data, tensors):
    """Return tensors of which a few were changed: numbers, rows, element types."""
    tensors = dict(tensors)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        tensor = tensors[name].clone()
        flat = tensor.view(-1)
        for _ in range(data.draw(st.integers(0, 3)) if len(flat) else 0):
            number = data.draw(NUMBERS)
            if tensor.dtype == torch.uint8:
                number = abs(number) % 7 if math.isfinite(number) else 0
            if tensor.dtype.is_floating_point or math.isfinite(number):
                flat[data.draw(st.integers(0, len(flat) - 1))] = number
        if data.draw(st.booleans()):
            last = len(tensor) - data.draw(st.integers(0, 1))
            tensor = tensor[data.draw(st.integers(0, 1)) : last]
        if not data.draw(st.integers(0, 4)):
            tensor = tensor.to(data.draw(st.sampled_from(KINDS)))
        tensors[name] = tensor.contiguous()
    return tensors


def assert_serves_in_any_order(data, book, history):
    order = data.draw(st.permutations(list(history.edits)))
    assert_serves(book, history, EDITOR.settings.rules(book.dtype), order)


@given(st.data())
def test_drawn_columns_are_refused_or_make_a_codebook_that_serves(data):
    snapshot = EDITOR.codebook.snapshot()
    tensors = columns.pack_codebook(snapshot) | history_columns.pack_history(
        EDITOR._context.history, snapshot
    )
    tensors = changed(data, tensors)
    try:
        book = columns.unpack_codebook(tensors, torch.device("cpu"))
        history = history_columns.unpack_history(tensors, book.snapshot(), {}, 9)
    except gf.CodebookCorrupt:
        return
    assert_serves_in_any_order(data, book, history)


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """The contents of a journal, one for each version."""
    folder = tmp_path_factory.mktemp("versions")
    golden.editor(path=folder).unload()
    journal = journal_of(folder, files.read_config(folder))
    return [entry.content for entry in journal.entries()]


@given(st.data())
def test_drawn_versions_of_a_journal_are_refused_or_make_a_codebook_that_serves(versions, data):
    book, history = gf.Codebook(golden.WIDTH, 4), History()
    which = data.draw(st.sets(st.integers(0, len(versions) - 1), min_size=1, max_size=2))
    try:
        for number, content in enumerate(versions):
            if number in which:
                content = save(changed(data, load(content)))
            with book.writing() as draft:
                records.redo(content, draft, history)
        history_columns.check_replayed(book.snapshot(), history, None)
    except gf.CodebookCorrupt:
        return
    assert_serves_in_any_order(data, book, history)


@pytest.mark.parametrize(
    "texts", ["[", "[]", '{"0": 1}', '{"0": ["a"]}', '{"x": ["a", "b"]}', '{"0": [["a"], "b"]}']
)
def test_texts_of_a_version_that_are_none_are_refused(texts, versions):
    content = save(load(versions[0]), {"texts": texts})
    with pytest.raises(gf.CodebookCorrupt, match=r"must hold its texts|is no safetensors content"):
        records.redo(content, gf.Codebook(golden.WIDTH, 4).writing().__enter__(), History())


def test_a_ball_that_a_journal_makes_wider_than_allowed_is_refused(tmp_path):
    golden.editor(path=tmp_path).unload()
    assert max(load_editor(tmp_path, max_radius=0.6).codebook.radii) > 0.52
    for ask in (
        lambda: load_editor(tmp_path, max_radius=0.52),
        lambda: gf.Codebook.open(tmp_path, max_radius=0.52),
    ):
        with pytest.raises(gf.CodebookCorrupt, match=r"radius must be at most 0\.52, got 0\.53"):
            ask()


@each_damage("described journal")
def test_a_manifest_that_does_not_describe_its_journal_is_refused(damage, journalled):
    damage.do(journalled)
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        gf.Codebook.open(journalled)
