"""Files that someone changed: a bit that flipped, a header made to harm, contents that cannot be.

The catalogue's F1 to F4: nothing is silent, nothing is allocated on a header's word, and what is
refused is named.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time

import golden_codebooks as golden
import pytest
import torch
from changes import change_config, file_with, leave_state
from damages import DAMAGES, each_damage
from disk import file_of, run_python
from safetensors.torch import load, save

import grace_fast as gf
from grace_fast.codebook.mapped import open_regular, refuse_special
from grace_fast.editor.attach import read_saved
from grace_fast.store import columns, files, headers, tensor_files
from grace_fast.store.large import resident


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


@each_damage("header")
def test_a_header_is_held_against_its_file(damage, tmp_path):
    place, content = damage.do(tmp_path), damage.content
    for given_as in (content, memoryview(content), place):
        if damage.message is None:
            found = headers.check(given_as)
            assert found.keys() == load(content).keys()
            continue
        began = time.perf_counter()
        with pytest.raises(gf.CodebookCorrupt, match=damage.message):
            headers.check(given_as)
        assert time.perf_counter() - began < 1  # whatever it says


@each_damage("header", lambda damage: damage.message)
def test_a_directory_with_such_a_file_is_refused(damage, edited):
    file_of(edited, "codebook").write_bytes(damage.content)
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
    for number, damage in enumerate(DAMAGES.values()):
        if damage.kind == "header" and damage.message and len(damage.content) < 10_000:
            (tmp_path / str(number)).write_bytes(damage.content)
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


@each_damage("special")
@pytest.mark.parametrize("stem", ["grace_config", "codebook", "keys", "values", "codes"])
def test_only_regular_files_are_read(damage, stem, bare):
    damage.do(next(bare.glob(f"{stem}*")))
    message = rf"{stem}.* {damage.message}: a codebook's files are regular files"
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.Codebook.open(bare)
    if stem == "grace_config":  # neither is it taken for an empty directory
        with pytest.raises(gf.CodebookCorrupt, match=message):
            golden.book().save(bare)
        with pytest.raises(gf.CodebookCorrupt, match=message):
            gf.attach(golden.Model(), golden.LAYER, path=bare)


@each_damage("special")
@pytest.mark.parametrize("suffix", ["sqlite", "sqlite-journal", "lock"])
def test_a_journal_and_a_lock_are_regular_files(damage, suffix, journalled):
    pattern = "lock" if suffix == "lock" else f"journal-*.{suffix}"
    place = next(journalled.glob(pattern))
    damage.do(place)
    with pytest.raises(gf.CodebookCorrupt, match=rf"{place.name} {damage.message}"):
        gf.attach(golden.Model(), golden.LAYER, path=journalled)
    if suffix != "lock":
        with pytest.raises(gf.CodebookCorrupt, match=rf"{place.name} {damage.message}"):
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
    leave_state(tmp_path, b'{"format": 2, "token": "../../elsewhere"}')
    with pytest.raises(gf.CodebookCorrupt, match="does not name the files of a build; remove"):
        gf.Codebook.build(tmp_path, [], progress=False)


@each_damage("name")
@pytest.mark.parametrize("which", ["tensors", "codes", "keys"])
def test_a_name_that_leads_elsewhere_is_no_name(damage, which, bare):
    config = files.read_config(bare)
    damage.do(config["mapped"]["keys"] if which == "keys" else config[which])
    change_config(bare, **{field: config[field] for field in ("tensors", "codes", "mapped")})
    with pytest.raises(gf.CodebookCorrupt, match=damage.message):
        gf.Codebook.open(bare)
