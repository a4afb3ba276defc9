"""What a miss costs in Python: the frames of this package in one forward call of a model."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import models
import pytest
import torch

import grace_fast as gf
from grace_fast import _native
from grace_fast.hook import calls

KEYS = 100
MOST = 12
MOST_OF_PLAIN = 4  # a module's call each, of which a model has two, and the layer's hook


@contextmanager
def frames_of_the_package():
    """Collect the Python functions of the package that are called, within a `with` block.

    By the module that they were made in, so that what is generated (`__init__` of a dataclass)
    counts as well.
    """
    called, before = [], sys.getprofile()

    def note(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.partition(".")[0] == "grace_fast":
            called.append(f"{module}.{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("way", ["the extension's", "Python's"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_miss_takes_few_python_frames(name, way, monkeypatch):
    family, model = models.FAMILIES[name], models.build(name)
    batch = models.prompt_batch(models.prompts(1))
    with torch.no_grad():
        own = model(**batch).logits
    grace = gf.attach(model, family.layer)
    width, value_width = grace.codebook.key_dim, grace.codebook.value_dim
    far = 50 + torch.randn(KEYS, width)
    grace.codebook.append(far, torch.zeros(KEYS, value_width), torch.full((KEYS,), 0.1))
    gf.prepare(grace.codebook)
    is_plain = way == "the extension's" and _native.cpu is not None
    if not is_plain:
        monkeypatch.setattr(calls, "notes_plainly", False)
        grace._adapter._respond_plainly = None
    with torch.no_grad():
        model(**batch)  # the first call of a version makes what later ones use
        with frames_of_the_package() as called:
            logits = model(**batch).logits
    assert torch.equal(logits, own)
    assert (grace.counters.queries, grace.counters.hits) == (2, 0)
    assert len(called) <= (MOST_OF_PLAIN if is_plain else MOST), called
