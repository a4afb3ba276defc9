"""A live reference editor is taken over exactly, and given back with what was edited meanwhile."""

from __future__ import annotations

import warnings

import pytest
import torch
from compat_cases import EPSILON, RATE, STEPS, TASKS, stream
from models import FAMILIES, build, edit_batch, prompts
from reference_rules import EasyEditAdaptor, ExactAdaptor, PlainEditor

import grace_fast as gf
from grace_fast import errors
from grace_fast.compat import easyedit, reference

KINDS = {"authors": ExactAdaptor, "easyedit": EasyEditAdaptor}


def edited(kind, count=25, name="gpt2"):
    """Return a reference's editor after a stream of edits, and the stream."""
    family, model, edits = FAMILIES[name], build(name), stream(name, count, seed=5)
    layer = model.get_submodule(family.layer)
    adaptor = KINDS[kind](layer, EPSILON[name], "replace_all")
    plain = PlainEditor(model, family.layer, adaptor, TASKS[name] == "hallucination")
    for at in range(count):
        plain.edit(edits.batch(at), STEPS, RATE, f"edit {at}")
    return plain, edits


def take(plain):
    """Return the accelerated adaptor, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        return gf.accelerate(plain)


@pytest.mark.parametrize("of", ["editor", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_codebook_is_taken_over_bit_for_bit(kind, of):
    plain, edits = edited(kind)
    before = plain.adaptor
    answers = [plain.model(**edits.batch(at)).logits for at in range(len(edits))]
    handle = take(plain if of == "editor" else plain.model)
    ours = plain.adaptor
    assert ours is handle.adaptor
    assert isinstance(ours, reference.GRACEAdapter if kind == "authors" else easyedit.GRACEAdapter)
    assert torch.equal(ours.keys, before.keys)
    assert torch.equal(ours.values, before.values)
    assert torch.equal(ours.epsilons, before.epsilons)
    in_key_order = before.key_labels if kind == "authors" else before.key_labels[::-1]
    assert all(map(torch.equal, ours.key_labels, in_key_order))
    for at, answer in enumerate(answers):
        assert torch.equal(plain.model(**edits.batch(at)).logits, answer)


def test_easyedit_s_reversed_labels_are_put_right_and_it_says_so():
    plain, _ = edited("easyedit")
    with pytest.warns(gf.GraceWarning, match="labels in the reverse order.*order of the keys now"):
        handle = gf.accelerate(plain)
    ids = handle.adaptor.edit_ids
    assert len(ids) == len(handle.adaptor.keys)
    assert ids[0] == "edit 0"
    assert sorted(ids, key=lambda name: int(name.split()[1])) == ids
    handle.adaptor.delete_key(ids[1])
    assert handle.adaptor.edit_ids == [ids[0], *ids[2:]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_s_own_editor_edits_on(kind):
    plain, _ = edited(kind, 12)
    take(plain)
    keys = len(plain.adaptor.keys)
    other = edit_batch(FAMILIES["gpt2"], [prompts(1, seed=99)[0]], [[7, 8]])
    plain.edit(other, STEPS, RATE, "later")
    assert len(plain.adaptor.keys) == keys + 1
    assert plain.losses[-1] < plain.losses[0]
    for parameter in plain.model.parameters():  # as each new editor of EasyEdit does
        parameter.requires_grad_(False)
    before = plain.adaptor.values.detach().clone()
    plain.edit(other, STEPS, RATE, "again")
    assert len(plain.adaptor.keys) == keys + 1
    assert not torch.equal(plain.adaptor.values, before)


@pytest.mark.parametrize("kind", KINDS)
def test_given_back_the_original_has_the_edits_made_meanwhile(kind):
    plain, edits = edited(kind, 12)
    original = plain.adaptor
    handle = take(plain)
    other = edit_batch(FAMILIES["gpt2"], [prompts(1, seed=99)[0]], [[7, 8]])
    plain.edit(other, STEPS, RATE, "later")
    ours = plain.adaptor
    keys = ours.keys.clone()
    answer = plain.model(**other).logits
    assert handle.restore() is original
    assert plain.adaptor is original
    assert torch.equal(original.keys, keys)
    assert original.epsilons.shape == (len(keys), 1)
    assert torch.equal(plain.model(**other).logits, answer)
    newest = original.key_labels[-1 if kind == "authors" else 0]
    assert torch.equal(newest, other["labels"])
    if kind == "easyedit":
        assert original.edit_ids[-1] == "later"
    plain.edit(edits.batch(3), STEPS, RATE, "after")
    with pytest.raises(RuntimeError, match="was given back already"):
        handle.restore()


def test_the_old_name_of_restore_says_what_it_is_now():
    plain, _ = edited("authors", 1)
    handle = take(plain)
    errors._told.clear()
    with pytest.warns(DeprecationWarning, match=r"give_back\(\) is restore\(\) now"):
        assert handle.give_back() is handle.original


def test_an_editor_without_edits_is_taken_over_too():
    plain, _ = edited("authors", 0)
    handle = gf.accelerate(plain)
    assert not hasattr(handle.adaptor, "keys")
    plain.edit(edit_batch(FAMILIES["gpt2"], prompts(1), [[7, 8]]), 2, RATE)
    assert len(handle.adaptor.keys) == 1


def test_integer_radii_of_the_reference_become_float():
    plain, _ = edited("authors", 3)
    plain.adaptor.epsilons = torch.tensor([[1], [2], [3]])[: len(plain.adaptor.keys)]
    handle = gf.accelerate(plain)
    assert handle.adaptor.epsilons.dtype == torch.float32


def test_what_holds_no_reference_adaptor_is_refused():
    with pytest.raises(ValueError, match="no adaptor of the authors' kind or EasyEdit's"):
        gf.accelerate(build("bert"))
    with pytest.raises(TypeError, match="takes an editor or a model, got str"):
        gf.accelerate("model")
    plain, _ = edited("authors", 2)
    outer = ExactAdaptor(plain.adaptor, 1.0, "replace_all")
    plain.model.transformer.h[1].mlp.c_proj = outer
    with pytest.raises(ValueError, match="must have one adaptor, it has them at"):
        gf.accelerate(plain)
    assert plain.model.transformer.h[1].mlp.c_proj is outer


def test_a_codebook_that_does_not_fit_its_layer_is_refused_and_nothing_swapped():
    plain, _ = edited("authors", 3)
    original = plain.adaptor
    original.keys = original.keys[:, :-1]
    with pytest.raises(ValueError, match=r"keys must be \[N, 128\]"):
        gf.accelerate(plain)
    del original.key_labels
    with pytest.raises(ValueError, match="has keys but no key_labels"):
        gf.accelerate(plain)
    assert plain.adaptor is original
