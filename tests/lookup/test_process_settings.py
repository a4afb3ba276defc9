"""What a process sets for everybody changes no decision and stops no edit."""

from __future__ import annotations

import ast
import contextlib
import random
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from models import FAMILIES
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grace_fast as gf

FAMILY = FAMILIES["llama"]
PROMPTS = models.prompts(2, shortest=5)
ROWS, WIDTH = 2100, 24  # enough that codes are made
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def in_force(set_it, put_back):
    set_it()
    try:
        yield
    finally:
        put_back()


def default_dtype(dtype):
    usual = torch.get_default_dtype()
    return in_force(lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(usual))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "another default device": lambda: in_force(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    ),
    "deterministic": lambda: in_force(
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "coarse products": lambda: in_force(
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "flushed denormals": lambda: in_force(
        lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)
    ),
    "a function mode": Functions,
    "a dispatch mode": Dispatch,
    "numpy raises": lambda: np.errstate(all="raise"),
}


def some_rows(dtype):
    drawn = torch.Generator(device="cpu").manual_seed(0)
    made = {"generator": drawn, "dtype": torch.float32, "device": "cpu"}
    keys = torch.randn(ROWS, WIDTH, **made)
    near = keys[:20] + 0.02 * torch.randn(20, WIDTH, **made)
    queries = torch.cat([near, torch.randn(10, WIDTH, **made)])
    queries[25, 0], queries[26, 1], queries[27] = torch.nan, torch.inf, 1e-41
    return keys.to(dtype), queries.to(dtype)


def decided(folder):
    """Return what look-ups of two codebooks say, before and after they were saved."""
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        keys, queries = some_rows(dtype)
        book = gf.Codebook(WIDTH, 3, dtype)
        values = torch.ones(ROWS, 3, dtype=dtype, device="cpu")
        book.append(keys, values, [0.1] * ROWS)
        book.append(keys[:2] + 3, values[:2], np.array([0.1, 0.3]))
        book.save(folder / str(dtype))
        for one in (book, gf.Codebook.open(folder / str(dtype))):
            match, near = gf.find(queries, one), gf.nearest(queries, one)
            alone = [gf.find(query[None], one).row.tolist() for query in queries]
            told += [match.row.tolist(), near.row.tolist(), near.squared_distance.tolist(), alone]
            assert one.radii.dtype == torch.float32
            told.append(one.radii[-3:].tolist())
    return told


def edited(model, folder):
    """Return what becomes of a few edits, in words and numbers."""
    one, two = PROMPTS
    settings = {"epsilon": FAMILY.epsilon, "replacement": "replace_last", "iterations": 3}
    told = []
    grace = gf.attach(model, FAMILY.layer, path=folder, learning_rate=0.3, **settings)
    for row, target in ((one, 10), (two, 11), (one, 12)):
        edit = grace.edit(edit_of(row, target))
        told.append((edit.outcome, edit.row, edit.distance, edit.radius, edit.loss, edit.steps))
    asked = {name: field for name, field in edit_of(one).items() if name != "labels"}
    told.append(repr(grace.explain(asked)))
    told.append(repr(grace.verify()))
    with torch.no_grad():
        told.append(model(**asked).logits.double().tolist())
    grace.undo(1)
    grace.compact()
    grace.save_pretrained(folder / "copy")
    grace.unload()
    for path in (folder, folder / "copy"):
        grace = gf.from_pretrained(model, path)
        assert grace.codebook.radii.dtype == torch.float32
        told += [repr(grace.verify()), grace.codebook.radii.tolist()]
        grace.edit(edit_of(two, 13))
        grace.unload()
    return told


def edit_of(row, *target):
    ids, labels = row + list(target), [-100] * len(row) + list(target)
    made = {"dtype": torch.int64, "device": "cpu"}
    return {
        "input_ids": torch.tensor([ids], **made),
        "attention_mask": torch.ones(1, len(ids), **made),
        "labels": torch.tensor([labels], **made),
    }


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    model, folder = models.build("llama"), tmp_path_factory.mktemp("usual")
    return model, decided(folder / "keys"), edited(model, folder / "edits")


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_look_ups_edits_and_files_are_as_without_a_setting(usual, setting, tmp_path):
    model, found, told = usual
    drawn, shuffled = torch.get_rng_state(), random.getstate()
    with setting():
        now = decided(tmp_path / "keys"), edited(model, tmp_path / "edits")
    assert now[0] == found
    assert now[1] == told
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == shuffled


OF_THE_MODEL = {  # which computes otherwise, by rounding or by another way
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a counter of operations": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("setting", OF_THE_MODEL.values(), ids=OF_THE_MODEL)
def test_what_changes_the_model_s_numbers_changes_no_decision(usual, setting, tmp_path):
    model, found, told = usual
    with setting():
        assert decided(tmp_path / "keys") == found
        now = edited(model, tmp_path / "edits")
    assert [line[:2] for line in now[:3]] == [line[:2] for line in told[:3]]
    assert now[4] == told[4]


def test_what_is_made_in_inference_mode_is_edited_outside_of_it(tmp_path):
    model, (one, two) = models.build("llama"), PROMPTS
    keys, queries = some_rows(torch.float32)
    with torch.inference_mode():
        grace = gf.attach(model, FAMILY.layer, 0.1, path=tmp_path, replacement="replace_last")
        book = gf.Codebook(WIDTH, 3)
        book.append(keys, torch.zeros(ROWS, 3), [0.1] * ROWS)
        first = grace.edit(edit_of(one, 10))
        gf.find(queries, book)
    book.append(keys[:1] + 5, torch.zeros(1, 3), [0.1])
    with book.writing() as draft:
        draft.set_radius(0, 0.5)
        draft.set_value(1, torch.ones(3))
    assert gf.find(keys[:1] + 5, book).row.tolist() == [ROWS]
    assert grace.edit(edit_of(two, 11)).correct
    assert first.correct
    grace.undo(first.id)
    grace.unload()
    with torch.inference_mode():
        grace = gf.attach(model, FAMILY.layer, path=tmp_path)
    grace.checkout(1)
    assert grace.edit(edit_of(two, 12)).correct
    assert grace.verify().ok


def test_a_model_that_was_made_in_inference_mode_is_not_edited():
    with torch.inference_mode():
        model = models.build("llama")
    grace = gf.attach(model, FAMILY.layer, 0.1, replacement="replace_last")
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        grace.edit(edit_of([5, 6, 7], 10))
    assert len(grace.query_of({"input_ids": torch.tensor([[5, 6, 7]])})) == 1


def test_flushed_denormals_make_no_hit_of_a_miss():
    tiny = 1e-40  # a float32 that a flushing processor takes for 0
    book = gf.Codebook(4, 1)
    keys = torch.tensor([[0.0, 0, 0, tiny]]).repeat(40, 1)
    book.append(keys, torch.zeros(40, 1), [tiny / 100] * 40)
    queries = torch.zeros(70, 4)
    before = torch.get_num_threads()
    with SETTINGS["flushed denormals"]():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert not gf.find(queries, book).hit.any()
            assert gf.find(keys, book).hit.all()
            assert gf.nearest(queries, book).squared_distance.min() > 0
        torch.set_num_threads(before)


MADE = {"zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "eye"}
MADE |= {"linspace", "logspace", "tensor", "as_tensor", "asarray", "scalar_tensor"}
OF_THE_DEFAULT = MADE - {"randint", "randperm", "arange", "as_tensor", "asarray"}
PROGRAMS = ("demo", "evaluate", "bench")  # processes of their own


def test_every_tensor_of_ours_is_made_with_its_type_and_place():
    found = []
    for path in [*ROOT.glob("grace_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        if any(part in PROGRAMS for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of, name = node.func.value, node.func.attr
            if not (isinstance(of, ast.Name) and of.id == "torch" and name in MADE):
                continue
            said = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} | ({"dtype"} if name in OF_THE_DEFAULT else set())
            if wanted - said:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}: {wanted - said}")
    assert not found, "a process may change what torch makes by default; say:\n" + "\n".join(found)
