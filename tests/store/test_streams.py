"""Codebooks built from a stream: what appending makes, after any interruption and refusal."""

from __future__ import annotations

import itertools
import json
import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from disk import (
    ROWS,
    WIDTH,
    assert_same_answers,
    assert_same_book,
    blocks,
    compiled,
    file_of,
    in_memory,
    questions,
    run_python,
    some_keys,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast import _native
from grace_fast.index import quantizer
from grace_fast.store import columns, files
from grace_fast.store.large import build_state, encoded_file, resident, shard_files, stream
from grace_fast.tools.bench import large
from grace_fast.tools.cli import app


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [997, 20_000])
def test_what_a_stream_builds_is_what_appending_it_makes(dtype, size, tmp_path):
    parts = some_keys(dtype=dtype)
    built = gf.Codebook.build(tmp_path / "new", blocks(parts, size), rows=ROWS, progress=False)
    book = in_memory(*parts)
    assert_same_book(built, book)
    assert_same_answers(built, book, questions(parts[0]))
    assert not (tmp_path / "new" / resident.BUILDING).exists()
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "new").iterdir()) == sorted(
        ["codebook", "grace_config.json", "keys", "values"] + ["codes"] * (_native.cpu is not None)
    )


def test_arrays_of_numpy_build_too_and_few_keys_need_no_codes(tmp_path):
    keys, values, radii = some_keys(300)
    made = (
        (keys[at].numpy(), values[at].numpy(), radii[at].numpy())
        for at in (slice(150), slice(150, 300))
    )
    built = gf.Codebook.build(tmp_path, made, progress=False)
    assert_same_answers(built, in_memory(keys, values, radii), questions(keys))
    assert not list(tmp_path.glob("codes-*"))


class Broken(Exception):
    pass


def broken(parts, after, size=1000):
    for number, block in enumerate(blocks(parts, size)):
        if number == after:
            raise Broken
        yield block


def test_a_build_goes_on_where_its_stream_broke(parts, tmp_path):
    with pytest.raises(Broken):
        gf.Codebook.build(tmp_path, broken(parts, 5), progress=False)
    with pytest.raises(FileNotFoundError, match="is not a codebook"):
        gf.Codebook.open(tmp_path)
    with pytest.raises(Broken):
        gf.Codebook.build(tmp_path, broken(parts, 7, 700), progress=False)  # less than there was
    asked = []

    def rest(first):
        asked.append(first)
        return blocks([part[first:] for part in parts])

    built = gf.Codebook.build(tmp_path, rest, progress=False)
    assert asked == [5000]
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


def test_a_build_that_was_killed_goes_on_from_its_last_state(parts, tmp_path):
    save_file(dict(zip(("keys", "values", "radii"), parts, strict=True)), tmp_path / "parts")
    script = f"""
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from safetensors.torch import load_file
        from disk import blocks
        import grace_fast as gf
        from grace_fast.store.large import stream
        stream.CHECKPOINT_BYTES = 2000 * 42 * 4
        parts = list(load_file({str(tmp_path / "parts")!r}).values())
        def dying():
            for number, block in enumerate(blocks([parts[n] for n in (0, 2, 1)])):
                if number == 7:
                    os._exit(9)
                yield block
        gf.Codebook.build({str(tmp_path / "book")!r}, dying(), progress=False)
    """
    ran = run_python(script)
    assert ran.returncode == 9, ran.stderr
    state = json.loads((tmp_path / "book" / resident.BUILDING / build_state.STATE).read_text())
    assert 2000 <= state["keys"]["rows"] <= 7000
    built = gf.Codebook.build(tmp_path / "book", blocks(parts, 1234), progress=False)
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


@compiled
def test_keys_that_were_encoded_are_not_encoded_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_file, "CHECKPOINT_KEYS", 1024)
    encode, calls, number = quantizer.encode_keys, [], itertools.count(1)

    def counted(phi, keys):
        if threading.current_thread().name == "grace_fast-index":
            return encode(phi, keys)  # a codebook of an earlier test builds its own
        calls.append(len(keys))
        if next(number) == 12:  # whichever thread it is
            raise Broken
        return encode(phi, keys)

    monkeypatch.setattr(quantizer, "encode_keys", counted)
    with pytest.raises(Broken):
        gf.Codebook.build(tmp_path, blocks(parts), progress=False)
    before = len(calls)
    built = gf.Codebook.build(tmp_path, blocks(parts), progress=False)
    assert len(calls) - before < 18  # of 512 keys each
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


def test_a_codebook_stays_as_it_was_until_the_new_one_is_whole(parts, folder, monkeypatch):
    other = some_keys(seed=9)
    publish = files.publish

    def full(path, config, hmac_key):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "publish", full)
    with pytest.raises(OSError, match="No space left on device"):
        in_memory(*other).save(folder)
    assert len(list(folder.iterdir())) == 5 - (_native.cpu is None)
    with pytest.raises(OSError, match="What it held is as before; build again to go on from here"):
        gf.Codebook.build(folder, blocks(other), progress=False)
    assert_same_answers(
        gf.Codebook.open(folder, verify=True), in_memory(*parts), questions(parts[0])
    )
    monkeypatch.setattr(files, "publish", publish)
    with pytest.raises(FileExistsError, match="holds an unfinished build; finish it with"):
        in_memory(*other).save(folder)
    built = gf.Codebook.build(folder, blocks(other), progress=False)
    assert_same_answers(built, in_memory(*other), questions(other[0]))
    assert len(list(folder.iterdir())) == 5 - (_native.cpu is None)


@contextmanager
def files_no_larger_than(size):
    """What a full disk does to a write, without filling one."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("size", [20_000, 500_000, 1_300_000])
def test_a_disk_that_is_full_leaves_the_old_codebook_and_a_build_to_go_on_with(
    size, parts, folder, monkeypatch
):
    monkeypatch.setattr(stream, "CHECKPOINT_BYTES", 100_000)
    other = some_keys(seed=9)
    with files_no_larger_than(size), pytest.raises(OSError, match="File too large"):
        in_memory(*other).save(folder)
    with files_no_larger_than(size), pytest.raises(OSError, match=r"stopped: .*What it held is as"):
        gf.Codebook.build(folder, blocks(other), progress=False)
    assert_same_answers(
        gf.Codebook.open(folder, verify=True), in_memory(*parts), questions(parts[0])
    )
    built = gf.Codebook.build(folder, blocks(other), progress=False)
    assert_same_answers(built, in_memory(*other), questions(other[0]))


def one_block(**changes):
    parts = dict(zip(("keys", "values", "radii"), some_keys(100), strict=True)) | changes
    return tuple(parts.values())


STREAMS = {
    "nothing": ([], ValueError, r"must give at least one \(keys, values, radii\), got none"),
    "a pair": ([one_block()[:2]], ValueError, r"must be \(keys \[M, D\], values \[M, V\], radii"),
    "doubles": ([one_block(keys=torch.zeros(100, 4).double())], ValueError, "got torch.float64"),
    "a vector": ([one_block(keys=torch.zeros(100))], ValueError, r"must be \[M, D\] and \[M, V\]"),
    "another width": (
        [one_block(), one_block(keys=torch.zeros(100, 39))],
        ValueError,
        r"the block that begins with row 100: keys must be \[M, 40\], got \(100, 39\)",
    ),
    "another element type": (
        [one_block(), one_block(values=torch.zeros(100, 2, dtype=torch.float64))],
        ValueError,
        "row 100: values must be torch.float32 like the codebook, got torch.float64",
    ),
    "NaN": (
        [one_block(keys=some_keys(100)[0].index_fill(0, torch.tensor([7]), float("nan")))],
        ValueError,
        "row 0: keys must be finite, got NaN or infinity in row 7",
    ),
    "an infinite radius": (
        [one_block(radii=torch.full((100,), float("inf")))],
        ValueError,
        "row 0: radii must be finite in float32",
    ),
    "too few radii": (
        [one_block(radii=torch.ones(99))],
        ValueError,
        "row 0: keys, values and radii must have as many rows, got 100, 100 and 99",
    ),
    "lists": ([([[1.0]], [[1.0]], [1.0])], TypeError, "must be of tensors or arrays, got list"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_cannot_be_a_codebook_is_refused_in_words(name, tmp_path):
    given, error, message = STREAMS[name]
    with pytest.raises(error, match=message):
        gf.Codebook.build(tmp_path, given, progress=False)


def test_another_stream_than_was_begun_with_is_refused(parts, tmp_path):
    with pytest.raises(Broken):
        gf.Codebook.build(tmp_path, broken(parts, 5), progress=False)
    other = [parts[0].clone(), *parts[1:]]
    other[0][4321, 5] += 1
    with pytest.raises(ValueError, match="has other keys after row 4000 than were written before"):
        gf.Codebook.build(tmp_path, blocks(other), progress=False)
    few = [part[:3000] for part in parts]
    with pytest.raises(ValueError, match="the stream has 3000 rows, 5000 were written before"):
        gf.Codebook.build(tmp_path, blocks(few), progress=False)
    state = tmp_path / resident.BUILDING / build_state.STATE
    for content, message in {
        b"{": "is not the state of a build",
        b"[]": "is not the state of a build",
        b'{"format": 9}': "has format 9, wanted 2",
    }.items():
        state.write_bytes(content)
        with pytest.raises(gf.CodebookCorrupt, match=message):
            gf.Codebook.build(tmp_path, blocks(parts), progress=False)


def test_one_directory_takes_one_build_at_a_time(parts, tmp_path):
    def nested():
        with pytest.raises(BlockingIOError, match="another process builds in"):
            gf.Codebook.build(tmp_path, blocks(parts), progress=False)
        yield from blocks(parts)

    gf.Codebook.build(tmp_path, nested(), progress=False)


def test_a_directory_with_a_models_edits_is_not_replaced(parts, tmp_path):
    book = in_memory(*parts)
    files.write(tmp_path, {"settings": {}}, columns.pack_codebook(book.snapshot()))
    message = "holds the edits of a model"
    with pytest.raises(FileExistsError, match=message):
        book.save(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        gf.Codebook.build(tmp_path, blocks(parts), progress=False)
    with pytest.raises(TypeError, match="book must be a Codebook, got dict"):
        gf.Codebook.save({}, tmp_path / "new")
    assert_same_book(gf.Codebook.open(tmp_path), book)  # all of it in memory


# The command line.


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def shards(parts, tmp_path):
    """Two files of rows, the second without radii."""
    keys, values, radii = parts
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"keys": keys[:5000], "values": values[:5000], "radii": radii[:5000]}, paths[0])
    save_file({"keys": keys[5000:].clone(), "values": values[5000:].clone()}, paths[1])
    return paths


def test_files_of_rows_become_a_codebook_that_verifies(parts, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_BLOCK_BYTES", 700 * 4 * WIDTH)
    out = tmp_path / "book"
    refused = call("build", out, *shards)
    assert refused.exit_code == 1
    assert (
        "b.safetensors must hold ['keys', 'values', 'radii'], and has no ['radii']"
        in refused.output
    )
    made = call("build", out, *shards, "--radius", 0.25)
    assert made.exit_code == 0, made.output
    assert "9,000 keys [D = 40]" in made.output
    wanted = parts[2].clone()
    wanted[5000:] = 0.25
    assert_same_answers(gf.Codebook.open(out), in_memory(*parts[:2], wanted), questions(parts[0]))
    assert "9,000 keys and their values are as they were saved" in call("verify", out).output
    assert json.loads(call("verify", out, "--json").stdout) == {"ok": True, "keys": 9000}
    os.truncate(file_of(out, "values"), 5000)
    broken_file = call("verify", out)
    assert broken_file.exit_code == 1
    assert "is truncated or was changed" in broken_file.output


def test_files_that_hold_no_rows_are_refused_in_words(shards, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.write_bytes(b"nothing")
    flat = tmp_path / "flat"
    save_file({name: torch.zeros(3) for name in ("keys", "values", "radii")}, flat)
    for path, message in {
        nothing: "is not a safetensors file",
        tmp_path / "absent": "No such file",
        flat: "keys must be [M, D], got [3]",
    }.items():
        result = call("build", tmp_path / "book", shards[0], path)
        assert result.exit_code == 1
        assert message in result.output


@compiled
def test_the_benchmark_of_large_codebooks_checks_what_it_times(tmp_path, monkeypatch):
    result = call("bench", "--rows", "6k", "--folder", tmp_path, "--json")
    figures = json.loads(result.stdout)
    assert (figures["rows"], figures["wrong"], figures["passed"]) == (6000, 0, True)
    assert figures["us_p50"] > 0
    assert not list(tmp_path.iterdir())
    text = call("bench", "--rows", "5_000", "--folder", tmp_path).output
    assert "5,000 keys, 0.0 GB: built in" in text
    assert "0 wrong of 256 decisions" in text
    monkeypatch.setattr(large.Scan, "hits", lambda self, radius: self.row - 2)
    wrong = call("bench", "--rows", "5k", "--folder", tmp_path)
    assert wrong.exit_code == 1
    assert "p50" not in wrong.output
    monkeypatch.setattr(large, "DISK_BYTES", 10**15)
    full = call("bench", "--rows", "6M", "--folder", tmp_path)
    assert "6,000,000 keys need 6000000000000.0 GB, there are" in full.output
    for rows in ("many", "-1", "1kk", "0", "inf"):
        refused = call("bench", "--rows", rows)
        assert f"--rows must be a number such as 10M, 500k or 1e6, got '{rows}'" in refused.output
    assert "choose --quick or --rows" in call("bench").output
