"""Numbers as numpy and torch write them do what Python's do, and are saved as such."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction

import models
import numpy as np
import pytest
import torch
from models import FAMILIES

import grace_fast as gf
from grace_fast.edits.settings import Settings
from grace_fast.lookup.faiss import FaissIndex

FAMILY = FAMILIES["llama"]
ROWS, TARGETS = [[5, 17, 23, 42]], [[9]]


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("epsilon", np.float32(0.5), 0.5),
        ("epsilon", np.array(0.5), 0.5),
        ("epsilon", torch.tensor(0.5), 0.5),
        ("epsilon", np.int64(1), 1.0),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        ("iterations", np.int64(2), 2),
        ("iterations", torch.tensor(2), 2),
        ("store_text", np.bool_(True), True),
        ("max_radius", np.float16(9), 9.0),
        ("expand_margin", np.float32(0.25), 0.25),
        ("stop_loss", np.array(0.25, np.float32), 0.25),
        ("epsilon", Decimal("0.5"), 0.5),
        ("learning_rate", Fraction(1, 2), 0.5),
        ("max_radius", Decimal(9), 9.0),
        ("expand_margin", np.longdouble(0.25), 0.25),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_a_setting_is_kept_as_pythons_own_number(tmp_path, name, given, kept):
    settings = {"epsilon": 0.1, "iterations": 0, "replacement": "replace_last", name: given}
    grace = gf.attach(models.build("llama"), FAMILY.layer, path=tmp_path / "book", **settings)
    held = getattr(grace.settings, name)
    assert held == kept
    assert type(held) in (bool, int, float)
    grace.edit(models.edit_batch(FAMILY, ROWS, TARGETS))
    grace.save_pretrained(tmp_path / "saved")
    grace.unload()
    config = json.loads((tmp_path / "saved" / "grace_config.json").read_text())
    assert config["settings"][name] == kept


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("epsilon", np.array([0.5, 0.5])),
        ("learning_rate", np.bool_(True)),
        ("iterations", np.float32(2.5)),
        ("iterations", True),
        ("stop_loss", float("nan")),
        ("expand_margin", Decimal("sNaN")),
        ("max_radius", Fraction(10**400, 3)),
        ("store_text", np.int64(1)),
    ],
    ids=str,
)
def test_what_is_no_such_number_is_refused_as_before(name, given):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Settings(**{"layer": "x", "epsilon": 1.0, name: given})


def test_versions_edits_and_rows_are_named_by_any_whole_number(tmp_path):
    grace = gf.attach(models.build("llama"), FAMILY.layer, 0.1, path=tmp_path, iterations=0)
    for target in (9, 11):
        grace.edit(models.edit_batch(FAMILY, ROWS, [[target]]))
    version = grace.codebook.version
    assert grace.diff(np.int64(version - 1), torch.tensor(version)).made
    grace.checkout(np.int64(version - 1))
    with pytest.raises(TypeError, match=r"edit_id must be a whole number, got 0.5"):
        grace.undo(0.5)
    assert grace.undo(np.int64(0)).id == 0
    grace.unload()


def test_a_codebook_takes_numbers_of_numpy():
    book = gf.Codebook(np.int64(4), np.int32(2))
    book.append(torch.zeros(1, 4), torch.zeros(1, 2), torch.ones(1))
    with book.writing() as draft:
        draft.set_radius(np.int64(0), np.float32(0.5))
    assert (book.key_dim, float(book.radii[0])) == (4, 0.5)
    assert FaissIndex("Flat", nprobe=np.int64(3)) == FaissIndex("Flat", nprobe=3)


@pytest.mark.parametrize("given", ["Auto", "0.5", None, np.array([0.5]), True], ids=str)
def test_an_epsilon_that_is_none_is_refused_in_words(given):
    with pytest.raises(ValueError, match="epsilon must be a number"):
        gf.attach(models.build("llama"), FAMILY.layer, given)
