"""Files that someone changed: a bit that flipped, a header made to harm, contents that cannot be.

The catalogue's F1 to F4: nothing is silent, nothing is allocated on a header's word, and what is
refused is named.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
import time

import golden_codebooks as golden
import pytest
import torch
from damages import change_config
from disk import file_of, run_python
from safetensors.torch import load, save

import grace_fast as gf
from grace_fast.codebook.mapped import open_regular, refuse_special
from grace_fast.editor.attach import read_saved
from grace_fast.store import columns, files, headers, tensor_files
from grace_fast.store.large import resident


@pytest.fixture
def edited(tmp_path):
    """A directory of a model's edits: one file of tensors."""
    folder = tmp_path / "edited"
    golden.editor().save_pretrained(folder)
    return folder


@pytest.fixture
def bare(tmp_path):
    """A directory of a codebook alone: keys, values and codes have files of their own."""
    folder = tmp_path / "bare"
    golden.book().save(folder)
    return folder


def content_of(folder):
    """Open a directory to the last byte and return all that it says."""
    config = files.read_config(folder)
    tensors = files.read_tensors(folder, config)
    said = {name: config[name] for name in config.keys() - {"checksum"}}
    if "settings" in config:
        saved = read_saved(folder)
        book, history = saved.codebook()
        # As text: a loss that is not a number is equal to itself then.
        edits = [
            dataclasses.replace(edit, query=None, label=None) for edit in history.edits.values()
        ]
        said["edits"] = repr((edits, dict(history.rows), history.next_id))
    else:
        book = gf.Codebook.open(folder, verify=True)
        if config["codes"] is not None:
            tensors |= tensor_files.read_file(folder, config["codes"])
    said["book"] = columns.pack_rows(book.snapshot())
    for part in (tensors, said["book"]):
        for name, tensor in part.items():
            part[name] = (tensor.dtype, tuple(tensor.shape), tensor_files.checksum(tensor))
    return said, tensors


@pytest.fixture
def journalled(tmp_path):
    """A directory with a journal of further edits."""
    folder = tmp_path / "journalled"
    golden.editor(path=folder).unload()
    return folder


# F1: flipped bits


def header_bytes(path):
    """Return how many bytes of a file say what the rest of it is."""
    if path.suffix == ".sqlite":
        return 100
    if path.name == files.CONFIG:
        return path.stat().st_size
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip_each(folder, path, bits):
    """Flip some bits of a file, one at a time; return how many were refused and how many silent."""
    good, refused, silent = content_of(folder), 0, []
    descriptor = os.open(path, os.O_RDWR)
    try:
        for bit in bits:
            byte = os.pread(descriptor, 1, bit // 8)
            os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
            try:
                if content_of(folder) != good:
                    silent.append((path.name, bit))
            except gf.CodebookCorrupt:
                refused += 1
            os.pwrite(descriptor, byte, bit // 8)
    finally:
        os.close(descriptor)
    return refused, silent


def flip_everywhere(folder, step, others):
    """Flip every step-th bit of the manifest and of each header, and drawn ones elsewhere."""
    tried, refused, silent, drawn = 0, 0, [], random.Random(0)
    paths = sorted(path for path in folder.iterdir() if path.name != "lock")
    for path in paths:
        whole, first = 8 * path.stat().st_size, 8 * header_bytes(path)
        share = min(whole - first, others // (len(paths) - 1))
        bits = [*range(0, first, step), *drawn.sample(range(first, whole), share)]
        each = flip_each(folder, path, bits)
        tried, refused, silent = tried + len(bits), refused + each[0], silent + each[1]
    print(f"{tried} bits flipped, {refused} refused, {len(silent)} silent")
    return tried, refused, silent


@pytest.mark.parametrize("which", ["edited", "bare"])
def test_no_flipped_bit_is_silent(which, request):
    tried, refused, silent = flip_everywhere(request.getfixturevalue(which), 13, 1000)
    assert not silent
    assert tried == refused > 4000


@pytest.mark.slow
@pytest.mark.parametrize(("which", "least"), [("edited", 50_000), ("bare", 90_000)])
def test_none_of_all_bits_of_the_headers_and_10_000_others_is_silent(which, least, request):
    tried, refused, silent = flip_everywhere(request.getfixturevalue(which), 1, 10_000)
    assert not silent
    assert tried == refused > least


def flip_journal(folder, step, others):
    """Flip bits of a journal; many are in room that is not used, where nothing changes."""
    path, drawn = next(folder.glob("*.sqlite")), random.Random(0)
    whole, first = 8 * path.stat().st_size, 8 * header_bytes(path)
    bits = [*range(0, first, step), *drawn.sample(range(first, whole), others)]
    refused, silent = flip_each(folder, path, bits)
    print(f"{len(bits)} bits flipped, {refused} refused, {len(silent)} silent")
    return refused, silent


def test_no_flipped_bit_of_a_journal_is_silent(journalled):
    refused, silent = flip_journal(journalled, 7, 150)
    assert not silent
    assert refused > 50


@pytest.mark.slow
def test_none_of_all_bits_of_a_journals_header_and_10_000_others_is_silent(journalled):
    refused, silent = flip_journal(journalled, 1, 10_000)
    assert not silent
    assert refused > 4000


# F2: headers


def described(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_with(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = described(0, 8, [2])
HEADERS = {
    "an empty file": (b"", "has 0 bytes, and the length of a header takes 8"),
    "seven bytes": (b"\x02" + b"\0" * 6, "has 7 bytes, and the length"),
    "a header of 2^63 bytes": (file_with({}, length=2**63), "header has 9223372036854775808 bytes"),
    "a header longer than 100 MB": (file_with({}, length=100_000_001), "wanted at most 100000000"),
    "a header longer than the file": (
        file_with({}, length=9),
        "has 9 bytes, and there are 2 after",
    ),
    "a header of no bytes": (file_with(b""), "does not begin with {"),
    "a list": (file_with(b"[]"), "does not begin with {"),
    "white space first": (file_with(b" {}"), "does not begin with {"),
    "no JSON": (file_with(b"{]"), "its brackets do not close"),
    "half a JSON": (file_with(b'{"a":'), "its brackets do not close"),
    "two of them": (file_with(b"{}{}"), "not JSON as it should be: Extra data"),
    "no UTF-8": (file_with(b'{"\xff\xfe": 1}'), "'utf-8' codec can't decode"),
    "a million brackets": (file_with(b'{"a":' + b"[" * 10**6), "more than 3 are open at once"),
    "brackets that close": (file_with(b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"), "more than 3 are"),
    "brackets in a string": (file_with({"[[[[{{{{\\": ONE}, b"x" * 8), None),
    "a string without end": (file_with(b'{"' + b'\\"' * 10**6), "brackets do not close"),
    "a name twice": (
        file_with(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2), b"x" * 8),
        "names 'a' more than once",
    ),
    "a field twice": (
        file_with(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "names 'dtype' more than once",
    ),
    "NaN for a number": (file_with(b'{"a": {"shape": [NaN]}}'), "NaN is not a number"),
    "a number of 5 000 digits": (
        file_with(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"),
        "Exceeds the limit",
    ),
    "a number for a tensor": (file_with({"a": 1}), "must have dtype, shape and data_offsets"),
    "a field too many": (file_with({"a": {**ONE, "b": 1}}), "and nothing else"),
    "a field too few": (file_with({"a": {"dtype": "F32", "shape": []}}), "must have dtype, shape"),
    "an unknown element type": (file_with({"a": described(0, 8, [2], "F31")}), "element types"),
    "a list for an element type": (file_with({"a": described(0, 8, [2], [])}), "element types"),
    "a negative length": (file_with({"a": described(0, 8, [-2])}), "at most 8 whole numbers >= 0"),
    "a fraction of a length": (file_with({"a": described(0, 8, [2.0])}), "whole numbers >= 0"),
    "a truth for a length": (file_with({"a": described(0, 4, [True])}), "whole numbers >= 0"),
    "nine dimensions": (file_with({"a": described(0, 4, [1] * 9)}, b"x" * 4), "at most 8"),
    "an overflowing shape": (file_with({"a": described(0, 0, [2**31, 2**31, 4])}), "overflows"),
    "2^62 times nothing": (file_with({"a": described(0, 0, [2**62, 0])}), "size overflows"),
    "a length of 2^64": (file_with({"a": described(0, 0, [2**64])}), "whole numbers >= 0"),
    "bytes that wrap around": (file_with({"a": described(0, 0, [2**62])}), "size overflows"),
    "one offset": (file_with({"a": {**ONE, "data_offsets": [0]}}), "must have two data_offsets"),
    "a negative offset": (file_with({"a": described(-8, 0, [2])}), "must have two data_offsets"),
    "offsets that cross": (file_with({"a": described(8, 0, [2])}), "has -8 bytes, and its shape"),
    "fewer bytes than the shape": (file_with({"a": described(0, 4, [2])}), "another number of"),
    "an overlap": (
        file_with({"a": described(0, 8, [2]), "b": described(4, 12, [2])}, b"x" * 12),
        "tensor 'b' overlaps the one before it",
    ),
    "the same bytes twice": (
        file_with({"a": ONE, "b": ONE}, b"x" * 8),
        "tensor 'b' overlaps the one before it",
    ),
    "a hole": (
        file_with({"a": described(0, 8, [2]), "b": described(12, 20, [2])}, b"x" * 20),
        "tensor 'b' leaves a hole before it",
    ),
    "a hole at the start": (file_with({"a": described(8, 16, [2])}, b"x" * 16), "a hole before it"),
    "bytes of no tensor": (file_with({"a": ONE}, b"x" * 9), "tensors end at byte .* and it has"),
    "tensors past the end": (file_with({"a": ONE}, b"x" * 7), "tensors end at byte .* and it has"),
    "terabytes in a small file": (
        file_with({"a": described(0, 2**42, [2**40])}, b"x" * 8),
        "tensors end at byte",
    ),
    "metadata that is none": (file_with({"__metadata__": {"a": {}}}), "an object of strings"),
    "metadata": (file_with({"__metadata__": {"format": "pt"}, "a": ONE}, b"x" * 8), None),
    "no tensor": (file_with({}), None),
    "an empty tensor between two": (
        file_with(
            {"c": described(8, 16, [2]), "b": described(8, 8, [0, 5]), "a": described(0, 8, [2])},
            b"x" * 16,
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_held_against_its_file(name, tmp_path):
    content, message = HEADERS[name]
    place = tmp_path / "one.safetensors"
    place.write_bytes(content)
    for given_as in (content, memoryview(content), place):
        if message is None:
            found = headers.check(given_as)
            assert found.keys() == load(content).keys()
            continue
        began = time.perf_counter()
        with pytest.raises(gf.CodebookCorrupt, match=message):
            headers.check(given_as)
        assert time.perf_counter() - began < 1  # whatever it says


@pytest.mark.parametrize("name", [name for name, (_, message) in HEADERS.items() if message])
def test_a_directory_with_such_a_file_is_refused(name, edited):
    place = file_of(edited, "codebook")
    place.write_bytes(HEADERS[name][0])
    with pytest.raises(
        gf.CodebookCorrupt, match=r"codebook-\w+.safetensors is truncated or no safe"
    ):
        content_of(edited)


def test_a_header_far_longer_than_its_tensors_take_is_not_read(edited):
    place = file_of(edited, "codebook")
    place.write_bytes(file_with(b"{" + b" " * 99_999 + b"}"))
    with pytest.raises(gf.CodebookCorrupt, match="header has 100001 bytes, wanted at most"):
        content_of(edited)


def test_no_header_makes_anyone_allocate(tmp_path):
    for number, (content, message) in enumerate(HEADERS.values()):
        if message is not None and len(content) < 10_000:
            (tmp_path / str(number)).write_bytes(content)
    script = f"""
        import pathlib, re, resource
        from grace_fast.store import headers
        taken = re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())
        limit = (int(taken[1]) << 10) + (4 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        refused = 0
        for place in pathlib.Path({str(tmp_path)!r}).iterdir():
            for given in (place, place.read_bytes()):
                try:
                    headers.check(given)
                except headers.CodebookCorrupt:
                    refused += 1
        print(refused)
    """
    ran = run_python(script)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == 2 * len(list(tmp_path.iterdir())) > 60


def test_a_small_header_is_checked_in_microseconds():
    content = save({f"rows.{name}": torch.zeros(3) for name in range(8)})
    elapsed_us = []
    for _ in range(200):
        began = time.perf_counter_ns()
        headers.check(content)
        elapsed_us.append((time.perf_counter_ns() - began) / 1000)
    assert min(elapsed_us) < 1000  # some tens where the machine is not shared
    print(f"{min(elapsed_us):.0f} us")


# What has the name of a file and is none


def of_another_kind(place, kind):
    """Put something in the place of a file that has its name, and its content behind a link."""
    elsewhere = place.with_name("elsewhere")
    if kind == "link":
        place.rename(elsewhere)
        place.symlink_to(elsewhere)
        return
    place.unlink()
    if kind == "dangling link":
        place.symlink_to(elsewhere)
    elif kind == "folder":
        place.mkdir()
    elif kind == "link to a device":
        place.symlink_to("/dev/zero")
    else:
        os.mkfifo(place)


KINDS = ("link", "dangling link", "link to a device", "folder", "pipe")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem", ["grace_config", "codebook", "keys", "values", "codes"])
def test_only_regular_files_are_read(kind, stem, bare):
    of_another_kind(next(bare.glob(f"{stem}*")), kind)
    message = rf"{stem}.* is (a link|no regular file): a codebook's files are regular files"
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.Codebook.open(bare)
    if stem == "grace_config":  # neither is it taken for an empty directory
        with pytest.raises(gf.CodebookCorrupt, match=message):
            golden.book().save(bare)
        with pytest.raises(gf.CodebookCorrupt, match=message):
            gf.attach(golden.Model(), golden.LAYER, path=bare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["sqlite", "sqlite-journal", "lock"])
def test_a_journal_and_a_lock_are_regular_files(kind, suffix, journalled):
    pattern = "lock" if suffix == "lock" else f"journal-*.{suffix}"
    place = next(journalled.glob(pattern))
    of_another_kind(place, kind)
    with pytest.raises(gf.CodebookCorrupt, match=rf"{place.name} is (a link|no regular file)"):
        gf.attach(golden.Model(), golden.LAYER, path=journalled)
    if suffix != "lock":
        with pytest.raises(gf.CodebookCorrupt, match=rf"{place.name} is (a link|no regular file)"):
            gf.Codebook.open(journalled)


def test_a_device_is_refused_before_it_is_opened(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    opened = []
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments))
    with pytest.raises(gf.CodebookCorrupt, match="is no regular file"):
        open_regular(tmp_path / "pipe")
    assert not opened


def test_what_takes_the_place_of_a_file_while_it_is_opened_is_refused(monkeypatch, tmp_path):
    place = tmp_path / "file"
    monkeypatch.setattr("grace_fast.codebook.mapped.refuse_special", lambda path: os.mkfifo(path))
    with pytest.raises(gf.CodebookCorrupt, match="is no regular file"):
        open_regular(place)


def test_a_file_that_is_to_be_created_need_not_be_there(tmp_path):
    refuse_special(tmp_path / "lock")
    os.close(open_regular(tmp_path / "lock", os.O_RDWR | os.O_CREAT))
    assert (tmp_path / "lock").is_file()


def test_nothing_is_written_through_a_link(edited, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (edited / f"{files.CONFIG}.partial").symlink_to(victim)
    golden.editor().save_pretrained(edited)
    assert victim.read_text() == "as it was"
    content_of(edited)


@pytest.mark.parametrize("name", ["lock", "state.json", "building"])
def test_a_build_does_not_follow_a_link_of_its_folder(name, tmp_path):
    folder, victim = tmp_path / "book", tmp_path / "victim"
    folder.mkdir()
    place = folder / resident.BUILDING
    if name == "building":
        victim.mkdir()
    else:
        victim.write_text("{}")
        place.mkdir()
        place = place / name
    place.symlink_to(victim)
    rows = (torch.zeros(1, 4), torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(gf.CodebookCorrupt, match=f"{name} is a link"):
        gf.Codebook.build(folder, [rows], progress=False)
    assert not (list(victim.iterdir()) if name == "building" else victim.read_text() != "{}")


def test_the_state_of_a_build_names_no_file_elsewhere(tmp_path):
    work = tmp_path / resident.BUILDING
    work.mkdir()
    (work / "state.json").write_text('{"format": 2, "token": "../../elsewhere"}')
    with pytest.raises(gf.CodebookCorrupt, match="does not name the files of a build; remove"):
        gf.Codebook.build(tmp_path, [], progress=False)


NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800", "x" * 300, 3, None, ["x"]]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:12] for name in NAMES])
@pytest.mark.parametrize("which", ["tensors", "codes", "keys"])
def test_a_name_that_leads_elsewhere_is_no_name(name, which, bare):
    config = files.read_config(bare)
    told = config["mapped"]["keys"] if which == "keys" else config[which]
    told["file"] = name
    change_config(bare, **{field: config[field] for field in ("tensors", "codes", "mapped")})
    with pytest.raises(gf.CodebookCorrupt, match="is not the name of a file in this directory"):
        gf.Codebook.open(bare)
