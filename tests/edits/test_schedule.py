"""Schedules: what they stand for, how they are chosen, kept and refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import models
import pytest
import torch
from models import FAMILIES

import grace_fast as gf
from grace_fast.editor import heads
from grace_fast.edits.settings import Schedule, Settings

FAMILY = FAMILIES["gpt2"]


def attached(**given):
    return gf.attach(models.build("gpt2"), FAMILY.layer, FAMILY.epsilon, **given)


def batch():
    return models.edit_batch(FAMILY, models.prompts(1, shortest=5), [[11]])


def test_the_default_stays_the_papers():
    plain = Settings("layer", 1.0)
    assert plain.schedule() == Schedule() == Schedule.paper()
    assert asdict(Schedule()) == {
        "iterations": 100,
        "learning_rate": 1.0,
        "stop_loss": 0.1,
        "keep_best": True,
        "optimiser": "adam",
        "margin": None,
        "value_init": "cold",
    }


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_a_name_stands_for_the_fields_of_its_schedule(name):
    wanted = getattr(Schedule, name)()
    by_name, by_schedule = (attached(schedule=given) for given in (name, wanted))
    assert by_name.settings == by_schedule.settings
    assert by_name.settings.schedule() == wanted


def test_what_is_given_beside_a_schedule_counts_instead():
    settings = attached(schedule="fast", iterations=7, margin=None, stop_loss=0.3).settings
    assert (settings.optimiser, settings.iterations) == ("lbfgs", 7)
    assert (settings.margin, settings.stop_loss) == (None, 0.3)


def test_a_schedule_counts_instead_of_given_settings():
    given = Settings(FAMILY.layer, 2.0, iterations=3)
    settings = gf.attach(models.build("gpt2"), settings=given, schedule="fast").settings
    assert (settings.epsilon, settings.iterations) == (2.0, 100)


WRONG = {
    "a name that does not exist": (
        {"schedule": "quick"},
        ValueError,
        r'schedule must be "paper", "fast" or a Schedule, got \'quick\'',
    ),
    "a number": ({"schedule": 3}, TypeError, 'schedule must be "paper", "fast".*got int'),
    "the last value": (
        {"schedule": Schedule(keep_best=False)},
        ValueError,
        'keep_best=False is what semantics="reference" does',
    ),
    "an optimiser that does not exist": (
        {"optimiser": "sgd"},
        ValueError,
        r"optimiser must be one of \('adam', 'lbfgs'\), got 'sgd'",
    ),
    "a margin below zero": ({"margin": -1}, ValueError, "margin must be a number >= 0.*got -1"),
    "no margin": ({"margin": math.nan}, ValueError, "margin must be a number.*got nan"),
    "the reference's semantics": (
        {"schedule": "fast", "semantics": "reference"},
        ValueError,
        'reference semantics train by Adam, to the last step; take schedule="paper"',
    ),
}


@pytest.mark.parametrize(("fields", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_in_words(fields, error, message):
    with pytest.raises(error, match=message):
        attached(**fields)


def test_the_reference_semantics_keep_their_own():
    settings = attached(semantics="reference", schedule="paper").settings
    assert settings.schedule() == Schedule(keep_best=False)


def test_fields_at_their_defaults_are_not_written(tmp_path):
    """Then versions that do not know them open the directory, and a checksum stays what it was."""
    for fields, there in (({}, False), ({"schedule": "fast"}, True)):
        grace = attached(**fields)
        grace.edit(batch())
        grace.save_pretrained(tmp_path / str(there))
        written = json.loads((tmp_path / str(there) / "grace_config.json").read_text())["settings"]
        assert [name in written for name in ("optimiser", "margin")] == [there, there]
        again = gf.from_pretrained(models.build("gpt2"), tmp_path / str(there))
        assert again.settings == grace.settings


def test_a_margin_is_halved_with_every_twenty_steps():
    asked = [Schedule.fast().margin_at(step) for step in (0, 20, 40)]
    assert asked == [2.0, 1.0, 0.5]
    assert Schedule().margin_at(5) is None


def ahead(grace):
    """By how much the target of the edit is ahead now."""
    given = batch()
    with torch.no_grad():
        logits = grace.model(**given).logits
    return float(heads.margins(logits, given["labels"], "decoder"))


def test_fast_learns_in_fewer_steps_and_with_a_margin():
    steps = {}
    for name in ("paper", "fast"):
        grace = attached(schedule=name, replacement="replace_all")
        (edit,) = [grace.edit(batch())]
        assert edit.correct
        steps[name] = edit.steps
        if name == "fast":
            assert ahead(grace) >= Schedule.fast().margin_at(edit.steps)
        grace.unload()
    assert 0 < steps["fast"] < steps["paper"]


def test_many_at_once_are_trained_as_one_after_the_other():
    prompts, wanted = models.prompts(6, shortest=5), [[11 + at] for at in range(6)]
    whole = models.edit_batch(FAMILY, prompts, wanted)
    done = {}
    for name in ("together", "alone"):
        grace = attached(schedule="fast", replacement="replace_all")
        if name == "together":
            done[name] = grace.edit_batch(whole)
        else:
            alone = [{key: value[at : at + 1] for key, value in whole.items()} for at in range(6)]
            done[name] = [grace.edit(one) for one in alone]
        grace.unload()
    told = {
        name: [(one.outcome, one.row, one.correct) for one in edits] for name, edits in done.items()
    }
    assert told["together"] == told["alone"]
    assert all(edit.correct for edit in done["together"])
