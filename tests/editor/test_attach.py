"""What `attach` and `from_pretrained` are given: settings whole or one by one, and old words."""

from __future__ import annotations

import inspect
from dataclasses import fields

import models
import pytest
from models import FAMILIES

import grace_fast as gf
from grace_fast import errors
from grace_fast.editor import attach as front
from grace_fast.edits.settings import Settings

FAMILY = FAMILIES["bert"]


def batch():
    return models.edit_batch(FAMILY, models.prompts(1), [[1]])


def test_every_setting_is_a_keyword_and_is_told_of():
    whole = {each.name for each in fields(Settings)}
    extra = {"calibration_inputs", "calibration_edits", "restart"}
    assert front.Fields.__annotations__.keys() | {"layer", "epsilon"} == whole | extra
    assert all(f"{name}" in gf.attach.__doc__ for name in whole | extra)
    assert len(inspect.signature(gf.attach).parameters) <= 12


def test_settings_are_given_whole_or_one_by_one():
    asked = {
        "replacement": "replace_all",
        "iterations": 3,
        "query": "every_step",
        "max_radius": 9.0,
    }
    settings = Settings(FAMILY.layer, 0.2, **asked)
    one = gf.attach(models.build("bert"), FAMILY.layer, 0.2, **asked)
    whole = gf.attach(models.build("bert"), settings=settings)
    assert one.settings == whole.settings == settings
    other = gf.attach(models.build("bert"), FAMILY.layer, 0.5, settings=settings, iterations=4)
    changed = {"epsilon": 0.5, "iterations": 4}
    assert other.settings == Settings(**{**vars(settings), **changed})


def test_a_layer_is_needed_from_somewhere():
    with pytest.raises(TypeError, match=r"needs the name of a layer, or settings="):
        gf.attach(models.build("bert"))


@pytest.mark.parametrize(
    ("given", "near"),
    {"iteration": "iterations", "lr_rate": "learning_rate", "readonly": "read_only"}.items(),
)
def test_an_unknown_keyword_is_refused_with_the_nearest(given, near):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{given}'.*'{near}'"):
        gf.attach(models.build("bert"), FAMILY.layer, **{given: 1})


def test_restart_begins_anew_with_settings_and_a_model_of_its_own(tmp_path):
    first = gf.attach(models.build("bert"), FAMILY.layer, FAMILY.epsilon, path=tmp_path)
    first.edit(batch())
    with pytest.raises(gf.CodebookLocked):
        gf.attach(models.build("bert"), FAMILY.layer, path=tmp_path, restart=True)
    first.unload()
    other = models.build("bert", seed=3)
    again = gf.attach(other, FAMILY.layer, 0.5, path=tmp_path, restart=True)
    assert (again.edits(), again.settings.epsilon, len(again.codebook)) == ([], 0.5, 0)
    again.edit(batch())
    again.unload()
    opened = gf.attach(other, FAMILY.layer, path=tmp_path)
    assert [edit.id for edit in opened.edits()] == [0]
    opened.unload()
    absent = gf.attach(other, FAMILY.layer, path=tmp_path / "absent", restart=True)
    absent.unload()


def test_restart_refuses_what_it_may_not_forget(tmp_path):
    model, key = models.build("bert"), b"0123456789abcdef"
    with pytest.raises(ValueError, match="restart=True needs the path"):
        gf.attach(model, FAMILY.layer, restart=True)
    gf.attach(model, FAMILY.layer, path=tmp_path / "signed", hmac_key=key).unload()
    for wrong in (None, key[::-1]):
        with pytest.raises(ValueError, match=r"is signed: give|hmac"):
            gf.attach(model, FAMILY.layer, path=tmp_path / "signed", restart=True, hmac_key=wrong)
    gf.attach(model, FAMILY.layer, path=tmp_path / "signed", restart=True, hmac_key=key).unload()
    gf.Codebook(4, 4).save(tmp_path / "alone")
    with pytest.raises(gf.CodebookCorrupt, match="holds a codebook alone"):
        gf.attach(model, FAMILY.layer, path=tmp_path / "alone", restart=True)


def test_a_saved_codebook_is_copied_gone_on_with_or_followed(tmp_path):
    model = models.build("bert")
    first = gf.attach(model, FAMILY.layer, FAMILY.epsilon, path=tmp_path)
    first.edit(batch())
    first.unload()
    copied = gf.from_pretrained(model, tmp_path)
    copied.undo(0)
    copied.unload()
    followed = gf.from_pretrained(model, tmp_path, read_only=True)
    with pytest.raises(gf.CodebookReadOnly):
        followed.undo(0)
    gone_on = gf.from_pretrained(models.build("bert"), tmp_path, read_only=False)
    gone_on.undo(0)
    assert followed.refresh()
    assert followed.edits() == gone_on.edits() == []


@pytest.mark.parametrize(("word", "means"), [("durable", False), ("follow", True)])
def test_old_words_are_understood_for_one_version(word, means, tmp_path):
    grace = gf.attach(models.build("bert"), FAMILY.layer, FAMILY.epsilon, path=tmp_path)
    grace.unload()
    errors._told.clear()
    told = rf"from_pretrained\({word}=True\) is read_only={means} now"
    with pytest.warns(DeprecationWarning, match=told) as heard:
        again = gf.from_pretrained(grace.model, tmp_path, **{word: True})
    assert heard[0].filename == __file__
    again.unload()
    again = gf.from_pretrained(grace.model, tmp_path, **{word: True})  # told once in a process
    assert (again._context.directory.store is None) == means
    with pytest.raises(TypeError, match="unexpected keyword argument 'writable'"):
        gf.from_pretrained(grace.model, tmp_path, writable=True)
