"""Codebooks whose keys stay on the disk decide as those in memory, and refuse changed files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file, save_file

import grace_fast as gf
from grace_fast import certificate, codes, native, order
from grace_fast.backends import cpu
from grace_fast.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.store import files, layout, resident, stream

compiled = pytest.mark.skipif(native.cpu is None, reason="grace_fast._cpu was not built")
ROWS, WIDTH = 9000, 40  # two pages and a part of one, enough keys for an order


def some_keys(rows=ROWS, width=WIDTH, dtype=torch.float32, seed=0):
    """Clustered keys, values that tell their row, and radii of which one is large, one dead."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(rows // 12 + 1, width, generator=generator)
    at = torch.randint(len(centres), (rows,), generator=generator)
    keys = centres[at] + 0.05 * torch.randn(rows, width, generator=generator)
    number = torch.arange(rows, dtype=torch.float32)
    radii = 0.1 + 0.2 * torch.rand(rows, generator=generator)
    if rows > 70:
        radii[50], radii[60] = 3.0, -1.0
    return keys.to(dtype), torch.stack((number % 512, -(number // 512)), dim=1).to(dtype), radii


def questions(keys, count=120, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(keys), (count,), generator=generator)
    asked = keys[rows].float()
    return asked + 0.04 * torch.randn(count, keys.shape[1], generator=generator)


def in_memory(keys, values, radii):
    book = gf.Codebook(
        keys.shape[1], values.shape[1], keys.dtype, reserve_rows=4 * len(keys) + 9000
    )
    book.append(keys, values, radii)
    return book


def blocks(parts, size=1000):
    for first in range(0, len(parts[0]), size):
        yield tuple(part[first : first + size] for part in parts)


def assert_same_book(book, wanted):
    for name in ("keys", "values", "radii", "ids", "live"):
        assert torch.equal(getattr(book, name), getattr(wanted, name)), name
    for label, other in zip(book.labels, wanted.labels, strict=True):
        assert (label is None and other is None) or torch.equal(label, other)


def assert_same_answers(book, wanted, queries):
    found, expected = gf.find(queries, book), gf.find(queries, wanted)
    for name in ("hit", "row", "squared_distance"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    near, expected_near = gf.nearest(queries, book), gf.nearest(queries, wanted)
    assert torch.equal(near.row, expected_near.row)
    assert torch.equal(near.squared_distance, expected_near.squared_distance)
    rows = found.row[found.hit]
    assert torch.equal(book.snapshot().values_of(rows), wanted.snapshot().values_of(rows))
    assert book.snapshot().key_file is not None


@pytest.fixture(scope="module")
def parts():
    return some_keys()


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """A directory that no test may change."""
    folder = tmp_path_factory.mktemp("saved")
    gf.save(in_memory(*parts), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may break."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def file_of(folder, stem):
    return next(folder.glob(f"{stem}-*.safetensors"))


# What comes back is what was saved.


@pytest.mark.parametrize("name", CASES)
def test_an_opened_codebook_decides_as_the_one_that_was_saved(name, tmp_path):
    case = CASES[name]
    book = case.book()
    gf.save(book, tmp_path)
    opened = gf.open(tmp_path)
    assert_same_book(opened, book)
    assert_same_answers(opened, book, case.queries)


@compiled
def test_the_codes_are_those_that_were_saved_and_nothing_is_computed(parts, saved, monkeypatch):
    monkeypatch.setattr(codes, "encode_keys", None)
    book = in_memory(*parts)
    monkeypatch.undo()
    wanted = certificate.of(book.snapshot())
    wanted.build(book.snapshot())
    monkeypatch.setattr(codes, "fit", None)
    monkeypatch.setattr(codes, "encode_keys", None)
    opened = gf.open(saved)
    state, expected = certificate.of(opened.snapshot()).current, wanted.current
    assert state.covered == ROWS
    assert (state.floor, state.predicted_bytes) == (expected.floor, expected.predicted_bytes)
    assert torch.equal(state.phi.wide_rows, expected.phi.wide_rows)
    (run,), (other,) = state.runs, expected.runs
    for name in ("rows", "near", "far", "reach", "places", "leaf_boxes", "super_boxes", "isolated"):
        assert (getattr(run, name) == getattr(other, name)).all(), name
    assert (run.super_reach == other.super_reach).all()
    asked = questions(parts[0])
    assert cpu.view_of(opened.snapshot()).effort(asked) == cpu.view_of(book.snapshot()).effort(
        asked
    )
    assert_same_answers(opened, book, asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [997, 20_000])
def test_what_a_stream_builds_is_what_appending_it_makes(dtype, size, tmp_path):
    parts = some_keys(dtype=dtype)
    built = gf.build(tmp_path / "new", blocks(parts, size), rows=ROWS, progress=False)
    book = in_memory(*parts)
    assert_same_book(built, book)
    assert_same_answers(built, book, questions(parts[0]))
    assert not (tmp_path / "new" / resident.BUILDING).exists()
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "new").iterdir()) == sorted(
        ["codebook", "grace_config.json", "keys", "values"] + ["codes"] * (native.cpu is not None)
    )


def test_arrays_of_numpy_build_too_and_few_keys_need_no_codes(tmp_path):
    keys, values, radii = some_keys(300)
    made = (
        (keys[at].numpy(), values[at].numpy(), radii[at].numpy())
        for at in (slice(150), slice(150, 300))
    )
    built = gf.build(tmp_path, made, progress=False)
    assert_same_answers(built, in_memory(keys, values, radii), questions(keys))
    assert not list(tmp_path.glob("codes-*"))


@compiled
def test_rows_of_odd_widths_lie_across_blocks(tmp_path):
    # 2 046 bytes a row: almost every block of 4 MiB ends within a row.
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    built = gf.build(tmp_path, blocks((keys, values, radii), 1700), progress=False)
    assert len(built.snapshot().key_file.tested) == 6000 * 2046 // BLOCK_BYTES + 2
    rows = torch.arange(2040, 2060)  # around the first block's end
    assert torch.equal(built.snapshot().keys_at(rows), keys[rows])
    assert_same_answers(built, in_memory(keys, values, radii), questions(keys, 40))


def test_only_the_blocks_that_are_fetched_are_tested(tmp_path):
    keys, values, radii = some_keys(5000, 1023)
    gf.save(in_memory(keys, values, radii), tmp_path)
    opened = gf.open(tmp_path)
    tested = opened.snapshot().key_file.tested
    assert not tested.any()
    assert torch.equal(opened.snapshot().key_of(4999), keys[4999])
    assert tested.tolist() == [0] * (len(tested) - 2) + [1, 0]
    assert gf.open(tmp_path, verify=True).snapshot().key_file.tested[:-1].all()


# Edits after opening.


def edited(book, keys):
    """Do to a codebook everything that may be done to one."""
    extra = some_keys(1500, WIDTH, seed=5)
    book.append(*extra)
    with book.writing() as draft:
        draft.set_radius(3, 2.0)
        draft.set_radius(4, -1.0)
        draft.set_key(7, keys[100] + 0.01)
        draft.set_key(ROWS + 1, keys[200] - 0.01)
        draft.set_value(9, torch.tensor([7.0, 7.0]))
    book.remove(20)
    book.append(*some_keys(30, WIDTH, seed=6), labels=torch.arange(30))
    return extra[0]


def test_edits_of_an_opened_codebook_are_those_of_one_in_memory(parts, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    book, opened = in_memory(*parts), gf.open(saved)
    old = opened.snapshot()
    for each in (book, opened):
        more = edited(each, parts[0])
    asked = torch.cat([questions(parts[0]), questions(more, 40), parts[0][[3, 4, 7, 9, 20, 100]]])
    assert_same_answers(opened, book, asked)
    for each in (book, opened):
        gf.prepare(each)  # the appended rows become a run
    assert_same_book(opened, book)
    assert_same_answers(opened, book, asked)
    assert torch.equal(gf.find(asked, old).row, gf.find(asked, in_memory(*parts)).row)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_edited_codebook_is_saved_over_itself_while_it_serves(parts, folder):
    opened, book = gf.open(folder), in_memory(*parts)
    for each in (book, opened):
        more = edited(each, parts[0])
    gf.save(opened, folder)
    again = gf.open(folder, verify=True)
    asked = torch.cat([questions(parts[0]), questions(more, 40)])
    assert_same_book(again, book)
    assert_same_answers(again, book, asked)
    assert_same_answers(opened, book, asked)  # its files are gone from the directory
    assert len(list(folder.glob("keys-*"))) == 1
    added = again.append(parts[0][:1], parts[1][:1], parts[2][:1])
    assert int(added) == int(book.ids[-1]) + 1


@compiled
def test_rows_past_what_an_int32_counts_are_read_as_they_are(parts, monkeypatch):
    monkeypatch.setattr(order, "MOST_ROWS", 5000)
    book = in_memory(*parts)
    gf.prepare(book)
    state = certificate.of(book.snapshot()).current
    assert (state.covered, state.runs[-1].last) == (5000, 5000)
    book.append(*some_keys(40, WIDTH, seed=7))
    asked = questions(book.keys, 200)
    coded = gf.find(asked, book)
    assert certificate.of(book.snapshot()).current.covered == 5000
    assert certificate.of(book.snapshot())._builder is None
    expected = gf.find(asked, book, backend="reference")
    assert torch.equal(coded.row, expected.row)


@compiled
def test_the_kd_order_is_the_same_on_any_number_of_threads():
    points = (torch.randn(70_001, 16) * 300).to(torch.int16).numpy()
    made = []
    for threads in (1, 2, 3):
        rows = torch.empty(len(points), dtype=torch.int32)
        native.cpu.kd_order(
            points=points.ctypes.data, count=len(points), order=rows.data_ptr(), threads=threads
        )
        made.append(rows)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0].sort().values, torch.arange(len(points), dtype=torch.int32))


# A build that was interrupted.


class Broken(Exception):
    pass


def broken(parts, after, size=1000):
    for number, block in enumerate(blocks(parts, size)):
        if number == after:
            raise Broken
        yield block


def test_a_build_goes_on_where_its_stream_broke(parts, tmp_path):
    with pytest.raises(Broken):
        gf.build(tmp_path, broken(parts, 5), progress=False)
    with pytest.raises(FileNotFoundError, match="is not a codebook"):
        gf.open(tmp_path)
    with pytest.raises(Broken):
        gf.build(tmp_path, broken(parts, 7, 700), progress=False)  # less than there was
    asked = []

    def rest(first):
        asked.append(first)
        return blocks([part[first:] for part in parts])

    built = gf.build(tmp_path, rest, progress=False)
    assert asked == [5000]
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


def test_a_build_that_was_killed_goes_on_from_its_last_state(parts, tmp_path):
    save_file(dict(zip(("keys", "values", "radii"), parts, strict=True)), tmp_path / "parts")
    script = f"""
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from safetensors.torch import load_file
        from test_out_of_core import blocks
        import grace_fast as gf
        from grace_fast.store import stream
        stream.CHECKPOINT_BYTES = 2000 * 42 * 4
        parts = list(load_file({str(tmp_path / "parts")!r}).values())
        def dying():
            for number, block in enumerate(blocks([parts[n] for n in (0, 2, 1)])):
                if number == 7:
                    os._exit(9)
                yield block
        gf.build({str(tmp_path / "book")!r}, dying(), progress=False)
    """
    ran = run_python(script)
    assert ran.returncode == 9, ran.stderr
    state = json.loads((tmp_path / "book" / resident.BUILDING / stream.STATE).read_text())
    assert 2000 <= state["keys"]["rows"] <= 7000
    built = gf.build(tmp_path / "book", blocks(parts, 1234), progress=False)
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


def run_python(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@compiled
def test_keys_that_were_encoded_are_not_encoded_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHECKPOINT_KEYS", 1024)
    encode, calls = codes.encode_keys, []

    def counted(phi, keys):
        calls.append(len(keys))
        if len(calls) == 12:
            raise Broken
        return encode(phi, keys)

    monkeypatch.setattr(codes, "encode_keys", counted)
    with pytest.raises(Broken):
        gf.build(tmp_path, blocks(parts), progress=False)
    before = len(calls)
    built = gf.build(tmp_path, blocks(parts), progress=False)
    assert len(calls) - before < 18  # of 512 keys each
    assert_same_answers(built, in_memory(*parts), questions(parts[0]))


def test_a_codebook_stays_as_it_was_until_the_new_one_is_whole(parts, folder, monkeypatch):
    other = some_keys(seed=9)
    publish = files.publish

    def full(path, config):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "publish", full)
    with pytest.raises(OSError, match="No space left on device"):
        gf.save(in_memory(*other), folder)
    assert len(list(folder.iterdir())) == 5 - (native.cpu is None)
    with pytest.raises(OSError, match="What it held is as before; build again to go on from here"):
        gf.build(folder, blocks(other), progress=False)
    assert_same_answers(gf.open(folder, verify=True), in_memory(*parts), questions(parts[0]))
    monkeypatch.setattr(files, "publish", publish)
    with pytest.raises(FileExistsError, match="holds an unfinished build; finish it with"):
        gf.save(in_memory(*other), folder)
    built = gf.build(folder, blocks(other), progress=False)
    assert_same_answers(built, in_memory(*other), questions(other[0]))
    assert len(list(folder.iterdir())) == 5 - (native.cpu is None)


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
        gf.save(in_memory(*other), folder)
    with files_no_larger_than(size), pytest.raises(OSError, match=r"stopped: .*What it held is as"):
        gf.build(folder, blocks(other), progress=False)
    assert_same_answers(gf.open(folder, verify=True), in_memory(*parts), questions(parts[0]))
    built = gf.build(folder, blocks(other), progress=False)
    assert_same_answers(built, in_memory(*other), questions(other[0]))


# What a stream may not be.


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
        gf.build(tmp_path, given, progress=False)


def test_another_stream_than_was_begun_with_is_refused(parts, tmp_path):
    with pytest.raises(Broken):
        gf.build(tmp_path, broken(parts, 5), progress=False)
    other = [parts[0].clone(), *parts[1:]]
    other[0][4321, 5] += 1
    with pytest.raises(ValueError, match="has other keys after row 4000 than were written before"):
        gf.build(tmp_path, blocks(other), progress=False)
    few = [part[:3000] for part in parts]
    with pytest.raises(ValueError, match="the stream has 3000 rows, 5000 were written before"):
        gf.build(tmp_path, blocks(few), progress=False)
    state = tmp_path / resident.BUILDING / stream.STATE
    for content, message in {
        b"{": "is not the state of a build",
        b"[]": "is not the state of a build",
        b'{"format": 9}': "has format 9, wanted 1",
    }.items():
        state.write_bytes(content)
        with pytest.raises(gf.CodebookCorrupt, match=message):
            gf.build(tmp_path, blocks(parts), progress=False)


def test_one_directory_takes_one_build_at_a_time(parts, tmp_path):
    def nested():
        with pytest.raises(BlockingIOError, match="another process builds in"):
            gf.build(tmp_path, blocks(parts), progress=False)
        yield from blocks(parts)

    gf.build(tmp_path, nested(), progress=False)


def test_a_directory_with_a_models_edits_is_not_replaced(parts, tmp_path):
    book = in_memory(*parts)
    files.write(tmp_path, {"settings": {}}, layout.pack_codebook(book.snapshot()))
    message = "holds the edits of a model"
    with pytest.raises(FileExistsError, match=message):
        gf.save(book, tmp_path)
    with pytest.raises(FileExistsError, match=message):
        gf.build(tmp_path, blocks(parts), progress=False)
    with pytest.raises(TypeError, match="book must be a Codebook, got dict"):
        gf.save({}, tmp_path / "new")
    assert_same_book(gf.open(tmp_path), book)  # all of it in memory


def test_a_directory_with_files_of_rows_is_read_into_memory_too(parts, saved):
    """As `from_pretrained` reads every directory."""
    tensors = files.read_tensors(saved, files.read_config(saved))
    book = layout.unpack_codebook(tensors, torch.device("cpu"))
    assert book.snapshot().key_file is None
    assert_same_book(book, in_memory(*parts))


# Files that are not what was saved.


def change_config(folder, **changes):
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_mapped(folder, **changes):
    mapped = files.read_config(folder)["mapped"]
    change_config(folder, mapped=mapped | {"keys": mapped["keys"] | changes})


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        file.write(content)


def replace_tensor(folder, which, name, change):
    """Change one tensor, with the checksum that suits it: what checksums do not see."""
    config = files.read_config(folder)
    file = folder / config[which]["file"]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)
    config[which]["sha256"][name] = files.checksum(tensors[name])
    change_config(folder, **{which: config[which]})


def drop_tensor(folder, which, name):
    config = files.read_config(folder)
    file = folder / config[which]["file"]
    tensors = load_file(file)
    del tensors[name], config[which]["sha256"][name]
    save_file(tensors, file)
    change_config(folder, **{which: config[which]})


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
        "is missing: the codebook is not complete",
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
        gf.open(folder)


@compiled
@pytest.mark.parametrize("stem", ["keys", "values"])
def test_a_flipped_bit_is_seen_when_its_block_is_fetched(stem, parts, tmp_path):
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    values = keys.clone() if stem == "values" else values
    gf.save(in_memory(keys, values, radii), tmp_path)
    overwrite(file_of(tmp_path, stem), HEADER_BYTES + BLOCK_BYTES + 99, b"\x77")
    message = rf"{stem}-\w+\.safetensors: block 1, from row 2050 on, is not what was saved \(check"
    opened = gf.open(tmp_path)
    assert gf.find(keys[:1].float(), opened).hits == 1
    assert opened.snapshot().values_of(torch.tensor([0, 5])).shape[0] == 2
    snapshot, rows = opened.snapshot(), torch.tensor([3000])
    asks = {
        "keys": [
            lambda: gf.find(keys[3000:3001].float(), opened),
            lambda: gf.nearest(keys[:3].float(), opened),  # reads every key
            lambda: snapshot.key_of(3000),
            lambda: snapshot.keys_between(2999, 3001),
        ],
        "values": [lambda: snapshot.values_of(rows), lambda: snapshot.value_of(3000)],
    }
    of_all = [
        lambda: gf.open(tmp_path, verify=True),
        snapshot.test_files,
        lambda: gf.save(opened, tmp_path),
        lambda: files.read_tensors(tmp_path, files.read_config(tmp_path)),
    ]
    for ask in asks[stem] + of_all:
        with pytest.raises(gf.CodebookCorrupt, match=message):
            ask()


def test_a_key_that_is_not_finite_is_seen_though_its_checksum_is_right(folder):
    path = file_of(folder, "keys")
    overwrite(path, HEADER_BYTES + 77 * WIDTH * 4, b"\x00\x00\xc0\x7f")
    import zlib

    check = zlib.crc32(path.read_bytes()[HEADER_BYTES:])
    replace_tensor(folder, "tensors", "keys.blocks", lambda t: t.new_tensor([check]))
    with pytest.raises(
        gf.CodebookCorrupt, match="keys must be finite, got NaN or infinity in row 77"
    ):
        gf.open(folder, verify=True)


@compiled
def test_a_file_that_shrinks_under_its_mapping_is_an_error_and_no_crash(tmp_path):
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    gf.save(in_memory(keys, values, radii), tmp_path)
    opened = gf.open(tmp_path)
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


@compiled
def test_a_codebook_larger_than_the_memory_that_may_be_had_is_built_and_serves(tmp_path):
    script = f"""
        import re, resource, torch
        import grace_fast as gf
        torch.set_num_threads(1)
        ROWS, WIDTH, STEP = 250_000, 256, 5_000
        def keys_from(first, count):
            generator = torch.Generator().manual_seed(first)
            return torch.randn(count, WIDTH, generator=generator)
        def parts(first):
            for at in range(first, ROWS, STEP):
                yield keys_from(at, STEP), torch.full((STEP, 2), 1.0), torch.full((STEP,), 1.0)
        warm = gf.Codebook(64, 2)
        warm.append(torch.randn(5000, 64), torch.zeros(5000, 2), torch.ones(5000))
        gf.prepare(warm)  # threads and libraries have what they take
        def taken(name):
            found = re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())
            return int(found[1]) << 10
        limit = taken("VmData") + (128 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        book = gf.build({str(tmp_path)!r}, parts, rows=ROWS, progress=False)
        assert book.snapshot().key_file.shape.nbytes > 1.9 * (128 << 20)
        del book
        base = taken("RssAnon")
        find = gf.prepare(gf.open({str(tmp_path)!r}))
        for first in range(0, ROWS, STEP):
            asked = keys_from(first, STEP)[:3]
            assert find(asked).row.tolist() == [first, first + 1, first + 2]
        grown = taken("RssAnon") - base
        assert grown < 80 << 20, grown
    """
    ran = run_python(script)
    assert ran.returncode == 0, ran.stderr
