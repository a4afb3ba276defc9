"""Every reader of files that others may have written, and what has to hold whatever they hold.

A reader gives what serves as any other does, or refuses with the package's own error: one that a
`raise` of the package raised, CodebookCorrupt where that is promised. It warns of nothing, writes
nothing outside of its folder, nothing at all where it only reads, and asks for little memory.

An input's first byte chooses the reader, the rest says what is changed (`damage`). No fuzzer is
needed to give one: `take`.
"""

from __future__ import annotations

import atexit
import linecache
import os
import re
import resource
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import golden_codebooks as golden
import torch
import typer
import yaml
from safetensors.torch import load, save
from torch import nn

import grace_fast as gf
from fuzz.damage import PLAIN, change_json, changed_bytes, changed_tensors, damage
from fuzz.draw import Draw
from fuzz.serving import assert_decides_by_the_law, assert_serves
from grace_fast.compat import easyedit, reference
from grace_fast.compat.live import STORED
from grace_fast.editor.attach import read_saved
from grace_fast.index import maintained, segments
from grace_fast.store import archive, files, headers, tensor_files
from grace_fast.store.large import index_file, resident
from grace_fast.store.large.shard_files import FilesOfRows
from grace_fast.store.locks import LOCK
from grace_fast.store.repair import repair
from grace_fast.tools import cli
from grace_fast.tools.evaluate import records

HOST = torch.device("cpu")
PACKAGE = str(Path(gf.__file__).parent) + os.sep
ROOM_BYTES = 1 << 28  # that a reader may ask for beyond what the process has: every input is small
SECRET = "what others have beside the codebook"


class Refused(Exception):
    """A reader has refused an input as it should."""


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Take an error of these kinds for a refusal, if the package has raised it in so many words."""
    try:
        yield
    except gf.CodebookCorrupt as error:
        raise Refused from error
    except kinds as error:
        if not _is_said(error):
            raise
        raise Refused from error


def _is_said(error: BaseException) -> bool:
    """Tell whether a `raise` of the package raised an error, and not what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
        return False
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return line.strip().startswith("raise ")


# The directories that are changed


def _make_bases(folder: Path) -> dict[str, Path]:
    """Save a model's edits, a bare codebook, and edits with a journal; the same bytes each time."""
    tokens = (f"{number:016x}" for number in range(1000))
    with (
        mock.patch("secrets.token_hex", lambda count: next(tokens)[-2 * count :]),
        mock.patch("time.time", return_value=1.0),
    ):
        golden.editor().save_pretrained(folder / "edited")
        golden.book().save(folder / "bare")
        golden.editor(path=folder / "journalled").unload()
        archive.pack(folder / "edited", folder / "packed.grace")
        _leave_a_build(folder / "unfinished")
    return {each.name: each for each in folder.iterdir()}


def _leave_a_build(folder: Path) -> None:
    def interrupted() -> Iterator[Any]:
        yield ROWS
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        gf.Codebook.build(folder, interrupted(), threads=1, progress=False)


def _rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    book = golden.book()
    return book.keys.clone(), book.values.clone(), book.radii.clone()


ROWS = _rows()
ROOM = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
atexit.register(shutil.rmtree, ROOM, True)
(ROOM / "bases").mkdir()
BASES = _make_bases(ROOM / "bases")
DIRECTORIES = ("edited", "bare", "journalled")
BESIDE = ROOM / "beside"  # where a case lies, and a file that is none of its business
CASE, VICTIM = BESIDE / "case", BESIDE / "victim"


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else None
        for path in sorted(folder.rglob("*"))
        if path.name != LOCK
    }


def _copy_damaged(draw: Draw) -> None:
    shutil.copytree(BASES[draw.pick(DIRECTORIES)], CASE)
    for _ in range(1 + draw.below(3)):
        damage(draw, CASE, VICTIM)


# The readers


def header(draw: Draw) -> None:
    """Take a safetensors file: what passes is what safetensors reads."""
    content = draw.rest()
    with refusing():
        found = headers.check(content)
    read = load(content)
    assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read.items()
    }


def directory(draw: Draw) -> None:
    """Take a damaged directory, in every way that one is opened to be read."""
    _copy_damaged(draw)
    before, refused = _contents(CASE), 0
    for opens in (_open_book, _open_saved, _open_editor):
        try:
            opens()
        except Refused:
            refused += 1
        assert _contents(CASE) == before
    if refused:
        raise Refused


def _open_book() -> None:
    with refusing(OSError):
        book = gf.Codebook.open(CASE, verify=True)
    assert_decides_by_the_law(book)


def _open_saved() -> None:
    with refusing(OSError):
        saved = read_saved(CASE)
        book, history = saved.codebook()
    assert_serves(book, history, saved.settings.rules(book.dtype))


def _open_editor() -> None:
    # A model whose layer or width the manifest does not name is refused in other words.
    with refusing(OSError, ValueError):
        grace = gf.from_pretrained(golden.Model().eval(), CASE, golden.tokens)
    _edit(grace)


def _edit(grace: gf.editor.Grace) -> None:
    """Have a model edited on, and its edits undone."""
    try:
        grace.verify()
        with refusing(ValueError):  # where max_radius or the next id allow no edit
            grace.edit("11", 3)
        for edit in list(grace.edits()):
            grace.undo(edit.id)
        assert not grace.edits()
        with torch.no_grad():
            grace.model(torch.tensor([[1]]))
    finally:
        grace.unload()


def editing(draw: Draw) -> None:
    """Take a damaged directory to be edited in, and open it again."""
    _copy_damaged(draw)
    with refusing(OSError, ValueError):
        grace = gf.attach(golden.Model().eval(), golden.LAYER, path=CASE, tokenizer=golden.tokens)
    _edit(grace)
    read_saved(CASE).codebook()


def repairing(draw: Draw) -> None:
    """Repair a damaged directory: it is sound then, or was refused and is as it was."""
    keep_rows, widest = bool(draw.below(2)), draw.pick((None, None, 0.6, 0.1))
    _copy_damaged(draw)
    before = _contents(CASE)
    try:
        with refusing(OSError, ValueError):
            report = repair(CASE, keep_rows=keep_rows, max_radius=widest)
    except Refused:
        assert _contents(CASE) == before
        assert os.listdir(BESIDE) in (["case", "victim"], ["victim", "case"])
        raise
    if report.was_sound:
        assert _contents(CASE) == before
    else:
        _assert_kept(report.kept, before)
        assert report.dropped or report.made_again or _contents(CASE) != before
    again = repair(CASE, keep_rows=keep_rows, max_radius=widest)
    assert again.was_sound
    assert not again.dropped
    assert_decides_by_the_law(gf.Codebook.open(CASE, verify=True, max_radius=widest))
    if "settings" in files.read_config(CASE):
        saved = read_saved(CASE, max_radius=widest)
        book, history = saved.codebook()
        assert_serves(book, history, saved.settings.rules(book.dtype))


def _assert_kept(kept: Path, before: dict[str, bytes | None]) -> None:
    """The regular files of before lie beside, byte for byte."""
    found = _contents(kept)
    assert found == {name: told for name, told in before.items() if told is not None}
    shutil.rmtree(kept)


def codes(draw: Draw) -> None:
    """Take changed codes; what they say is believed, and must end no process."""
    with ORDERED.writing() as draft:
        draft.set_radius(0, 0.25)  # a version that nobody has asked
    snapshot = ORDERED.snapshot()
    with refusing():
        state = index_file.unpack_state(changed_tensors(draw, CODES), snapshot)
    maintained.restore(snapshot, state)
    gf.find(golden.questions(), ORDERED)


def _codes() -> tuple[gf.Codebook, dict[str, torch.Tensor]]:
    book = golden.book(segments.ORDER_ROWS + 64)
    book.save(ROOM / "ordered")
    tensors = tensor_files.read_file(ROOM / "ordered", files.read_config(ROOM / "ordered")["codes"])
    tensors["state"][3] = 0.0  # they pay, whatever was predicted
    return book, tensors


ORDERED, CODES = _codes()


def packed(draw: Draw) -> None:
    """Take a codebook in one file: a directory comes of it, and goes into one file again."""
    source, target = BESIDE / "packed", CASE
    source.write_bytes(_changed_zip(draw, BASES["packed.grace"]))
    try:
        with refusing():
            count = archive.unpack(source, target)
    except Refused:
        assert not target.exists()
        source.unlink()
        raise
    again = BESIDE / "again"
    assert archive.pack(target, again) == count
    source.unlink()
    again.unlink()
    _open_saved()


def _changed_zip(draw: Draw, place: Path) -> bytes:
    if draw.below(3) == 0:
        return changed_bytes(draw, place.read_bytes())
    with zipfile.ZipFile(place) as whole:
        members = [(each.filename, whole.read(each)) for each in whole.infolist()]
    for _ in range(1 + draw.below(2)):
        at, how = draw.below(len(members)), draw.below(5)
        name, content = members[at]
        if how == 0:
            name = draw.pick(("../victim", "/etc/x", "a/b", "lock", "é", "", name + "/", "x" * 300))
        elif how == 1:
            content = changed_bytes(draw, content)
        elif how == 2:
            name = draw.short().decode("latin-1")
        elif how == 3:
            members.append((draw.short().decode("latin-1"), draw.short()))
        else:
            name, content = draw.pick(members)
        members[at] = (name, content)
    target = BESIDE / "made"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name twice
        with zipfile.ZipFile(target, "w") as made:
            for name, content in members:
                info = zipfile.ZipInfo(name.replace("\0", ""))
                info.compress_type = draw.pick((zipfile.ZIP_STORED,) * 7 + (zipfile.ZIP_DEFLATED,))
                info.external_attr = draw.pick((0o600, 0o120777, 0o40777)) << 16
                made.writestr(info, content)
    content = target.read_bytes()
    target.unlink()
    return changed_bytes(draw, content) if draw.below(4) == 3 else content


def rows(draw: Draw) -> None:
    """Take a file of rows to build from."""
    place = BESIDE / "rows.safetensors"
    tensors = dict(zip(("keys", "values", "radii"), ROWS, strict=True))
    if draw.below(2):
        content = save({n: t.contiguous() for n, t in changed_tensors(draw, tensors).items()})
    else:
        content = changed_bytes(draw, save(tensors))
    place.write_bytes(content)
    radius = draw.pick((None, 0.5))
    try:
        with refusing(ValueError, TypeError):
            given = FilesOfRows([place], radius)
            book = gf.Codebook.build(CASE, given.blocks, rows=given.rows, threads=1, progress=False)
        assert_decides_by_the_law(book)
    finally:
        place.unlink()


def build(draw: Draw) -> None:
    """Go on with an unfinished build that was changed."""
    shutil.copytree(BASES["unfinished"], CASE)
    work = CASE / resident.BUILDING
    for _ in range(1 + draw.below(2)):
        _change_build(draw, work)
    with refusing(ValueError, TypeError):
        book = gf.Codebook.build(CASE, [ROWS], threads=1, progress=False)
    assert_decides_by_the_law(book)


def _change_build(draw: Draw, work: Path) -> None:
    import json

    state = work / "state.json"
    if draw.below(4) == 0:
        found = sorted(path for path in work.iterdir() if path.name != "lock")
        path = draw.pick(found)
        path.write_bytes(changed_bytes(draw, path.read_bytes()))
        return
    with suppress(ValueError):
        said = json.loads(state.read_bytes())
        change_json(draw, said)
        state.write_text(json.dumps(said))


def checkpoint(draw: Draw) -> None:
    """Take the state of a reference's adaptor: it is taken whole, or the codebook is as before."""
    adaptor = _adaptor(draw.below(2) == 1)
    if draw.below(2):
        adaptor.load(*_codebook(), [torch.tensor([[1]])] * 4)
    before = _codebook_of(adaptor)
    told = {name: part for name, part in STATE.items() if name in STORED}
    given = {name: STATE[name] for name in STATE.keys() - told.keys()}
    given |= changed_tensors(draw, told)
    try:
        adaptor.load_state_dict(given, strict=bool(draw.below(2)))
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        after = _codebook_of(adaptor)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        raise Refused from error
    adaptor(torch.zeros(1, 3, golden.WIDTH))
    adaptor.state_dict()


def _codebook_of(adaptor: Any) -> dict[str, torch.Tensor]:
    return {name: part for name, part in adaptor.state_dict().items() if name in STORED}


def _codebook() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values, radii = (part[:4].clone() for part in ROWS)
    return keys, values[:, :4].contiguous(), radii


def _adaptor(of_easyedit: bool) -> Any:
    layer = nn.Linear(golden.WIDTH, 4)
    if of_easyedit:
        return easyedit.GRACEAdapter(easyedit.GraceHyperParams(["layer"]), layer)
    return reference.GRACEAdapter({"editor": CONFIG}, layer)


CONFIG = {
    "eps": 1.0,
    "dist_fn": "euc",
    "replacement": "replace_all",
    "num_pert": 8,
    "val_init": "cold",
    "val_train": "sgd",
    "eps_expand": "coverage",
    "n_iter": 3,
    "edit_lr": 0.5,
}


def _state() -> dict[str, torch.Tensor]:
    adaptor = _adaptor(False)
    adaptor.load(*_codebook(), [torch.tensor([[1, 2]]), None, torch.tensor([[3]]), None])
    return dict(adaptor.state_dict())


STATE = _state()


class Foreign(nn.Module):
    """An adaptor with the attributes of a reference's."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(golden.WIDTH, 4)
        self.init_epsilon, self.replacement, self.key_id = 1.0, "replace_all", -1
        self.config = CONFIG
        for name, part in parts.items():
            setattr(self, name, part)


def live(draw: Draw) -> None:
    """Take over a foreign adaptor whose parts were changed, and give it back."""
    parts = dict(zip(("keys", "values", "epsilons"), _codebook(), strict=True))
    given: dict[str, Any] = changed_tensors(draw, parts)
    given["key_labels"] = [torch.tensor([[1]])] * (3 + draw.below(3))
    if draw.below(4) == 0:
        given[draw.pick(("keys", "values", "epsilons", "key_labels"))] = draw.pick(PLAIN)
    if draw.below(4) == 0:
        given["config"] = CONFIG | {draw.pick(sorted(CONFIG)): draw.pick(PLAIN)}
    if draw.below(4) == 0:
        given["edit_ids"] = draw.pick(([], [[["a"], "b"], "c"], [1, 2, 3, 4], None))
        given["delete_key"] = None
        given["config"] = easyedit.GraceHyperParams(["layer"])
    model = nn.ModuleDict({"one": Foreign(**given)})
    foreign = model["one"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)  # of the order of EasyEdit's labels
        try:
            with refusing(ValueError, TypeError):
                accelerated = gf.accelerate(model)
        except Refused:
            assert model["one"] is foreign
            raise
    accelerated.adaptor(torch.zeros(1, 3, golden.WIDTH))
    assert accelerated.restore() is foreign


def hparams(draw: Draw) -> None:
    """Take EasyEdit's YAML; what is taken makes an adaptor, or is refused by it in words."""
    place = BESIDE / "hparams.yaml"
    if draw.below(2):
        said: dict[str, Any] = {"alg_name": "GRACE", "inner_params": ["layer"]} | CONFIG
        change_json(draw, said)
        place.write_text(yaml.safe_dump(said))
    else:
        place.write_bytes(draw.rest())
    try:
        with refusing(ValueError):
            given = easyedit.GraceHyperParams.from_hparams(place)
            easyedit.GRACEAdapter(given, nn.Linear(golden.WIDTH, 4))
    finally:
        place.unlink()


def evaluated(draw: Draw) -> None:
    """Take records to evaluate with, JSON lines or CSV."""
    place = BESIDE / draw.pick(("records.jsonl", "records.csv"))
    place.write_bytes(draw.rest())
    try:
        with refusing(ValueError):
            records.read(place, {"prompt": records.text, "target": records.text})
    finally:
        place.unlink()


def edits(draw: Draw) -> None:
    """Take edits for the command line: a failure has its own status, and a message."""
    place = BESIDE / "edits.jsonl"
    place.write_bytes(draw.rest())
    try:
        cli.edit_file.read_edits(place)
    except typer.Exit as error:
        raise Refused from error
    finally:
        place.unlink()


READERS: tuple[Callable[[Draw], None], ...] = (
    *(header, directory, editing, repairing, codes, packed, rows, build),
    *(checkpoint, live, hparams, evaluated, edits),
)


# One input


def take(content: bytes) -> bool:
    """Give an input to the reader that its first byte names; return whether it was refused.

    Raises: whatever a reader must not raise, AssertionError where what was taken does not serve.
    """
    draw = Draw(content)
    reader = draw.pick(READERS)
    _clear()
    VICTIM.write_text(SECRET)
    try:
        with warnings.catch_warnings(), _little_memory():
            warnings.simplefilter("error")
            reader(draw)
    except Refused:
        return True
    finally:
        left = {each.name for each in BESIDE.iterdir()} - {"case", "victim"}
        told = VICTIM.read_text()
    assert not left, f"files outside of the folder: {sorted(left)}"
    assert told == SECRET
    return False


def _clear() -> None:
    shutil.rmtree(BESIDE, ignore_errors=True)
    BESIDE.mkdir()


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let the process have little more memory than it has."""
    told = Path("/proc/self/status").read_text()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    found = re.search(r"VmData:\s+(\d+) kB", told)
    assert found is not None
    resource.setrlimit(resource.RLIMIT_DATA, ((int(found[1]) << 10) + ROOM_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
