"""The authors' surface: decisions of the reference's rules at every step, and what is put right."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compat_cases import EPSILON, RATE, STEPS, TASKS, config, editor, stream, wrapped
from models import FAMILIES, build, edit_batch, prompt_batch, prompts
from reference_rules import ExactAdaptor, PlainEditor, exact_distances
from safetensors.torch import load_file
from torch import nn

import grace_fast as gf
from grace_fast.compat.reference import GRACE_barebones, GRACEAdapter

FOLDER = Path(__file__).parents[1] / "golden"
TRACES = json.loads((FOLDER / "index.json").read_text())


def linear_adaptor(**more):
    """Return an adaptor in front of a seeded Linear(6, 4)."""
    torch.manual_seed(0)
    given = config("layer", "qa", 1.0, "replace_all", **more)
    return GRACEAdapter(given, nn.Linear(6, 4), transpose=True)


def drive(adaptor, hidden, label, steps=1):
    """Edit as the authors' editor does, from outside; no value is trained."""
    adaptor.training, adaptor.edit_label = True, torch.tensor([label])
    for step in range(steps):
        adaptor.iter = step
        output = adaptor(hidden)
    adaptor.training = False
    return output


@pytest.mark.parametrize("trace", TRACES, ids=[trace["file"].split(".")[0] for trace in TRACES])
def test_the_adaptor_makes_every_recorded_decision_again(trace):
    recorded = load_file(FOLDER / trace["file"])
    layer = nn.Linear(24, 12)
    layer.load_state_dict({"weight": recorded["weight"], "bias": recorded["bias"]})
    names = {"eps_expand": trace["eps_expand"], "val_init": trace["val_init"]}
    given = config("layer", "qa", trace["eps"], trace["replacement"], **names)
    adaptor = GRACEAdapter(given, layer, transpose=True)
    for step, (x, label) in enumerate(zip(recorded["x"], recorded["label"], strict=True)):
        hidden = x.reshape(1, 5, 24)
        if label >= 0:
            drive(adaptor, hidden, int(label))
            row = len(adaptor.keys) - 1
            if trace["val_init"] == "cold":
                adaptor.values.data[row] = recorded["values"][row]
        with torch.no_grad():
            output = adaptor(hidden)
        keys = len(adaptor.keys) if hasattr(adaptor, "keys") else 0
        assert keys == recorded["n_keys"][step], step
        if keys:
            assert adaptor.chosen_key.item() == recorded["nearest"][step], step
            assert adaptor.epsilons.shape == ((1,) if keys == 1 else (keys, 1))
            radii = recorded["radii"][step][:keys]
            torch.testing.assert_close(adaptor.epsilons.reshape(-1), radii, rtol=0, atol=1e-5)
            distance = exact_distances(adaptor.keys, hidden[:, -1])[adaptor.chosen_key]
            hit = distance <= adaptor.epsilons.reshape(-1)[adaptor.chosen_key]
            assert bool(hit) == bool(recorded["hit"][step]), step
        torch.testing.assert_close(output[0], recorded["out"][step], rtol=0, atol=1e-5)
    torch.testing.assert_close(adaptor.keys, recorded["keys"], rtol=0, atol=1e-5)
    torch.testing.assert_close(adaptor.values.detach(), recorded["values"], rtol=0, atol=1e-5)
    assert [int(label) for label in adaptor.key_labels] == recorded["key_labels"].tolist()


def plain_twin(name, model, replacement, **modes):
    """Return the reference's editor, in our words, on a copy of a model."""
    family, twin = FAMILIES[name], copy.deepcopy(model)
    layer = twin.get_submodule(family.layer)
    adaptor = ExactAdaptor(layer, EPSILON[name], replacement, **modes)
    return PlainEditor(twin, family.layer, adaptor, TASKS[name] == "hallucination")


@pytest.mark.parametrize("expand", ["coverage", "moving_average"])
@pytest.mark.parametrize("replacement", ["replace_all", "replace_last", "replace_prompt"])
@pytest.mark.parametrize("name", TASKS)
def test_a_stream_of_edits_is_decided_as_by_the_reference_at_every_step(name, replacement, expand):
    edits, outcomes = stream(name, 48), set()
    ours = editor(name, replacement, eps_expand=expand)
    plain = plain_twin(name, build(name), replacement, expand=expand)
    for at in range(len(edits)):
        tokens = edits.batch(at)
        torch.manual_seed(at)
        ours.edit(ours.config, tokens, None)
        torch.manual_seed(at)
        plain.edit(tokens, STEPS, RATE)
        mine, theirs = ours.adaptor, plain.adaptor
        assert torch.equal(mine.keys, theirs.keys), at
        assert mine.epsilons.shape == theirs.epsilons.shape, at
        # A split's radius is a difference of float32 there and of float64 here.
        torch.testing.assert_close(mine.epsilons, theirs.epsilons, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine.chosen_key, theirs.chosen_key), at
        assert all(map(torch.equal, mine.key_labels, theirs.key_labels)), at
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours.losses, [float(x) for x in plain.losses], rtol=1e-4, atol=1e-4
        )
        assert ours.log_dict["nkeys"] == len(theirs.keys)
        outcomes.add(theirs.outcome)
    assert outcomes == {"added", "split", "expanded", "reused"}


def handed_over(ours, name, replacement):
    """Return the reference's rules with the codebook of an editor of ours."""
    plain = plain_twin(name, build(name), replacement)
    mine, theirs = ours.adaptor, plain.adaptor
    theirs.keys, theirs.values = mine.keys.clone(), nn.Parameter(mine.values.detach().clone())
    theirs.epsilons, theirs.key_labels = mine.epsilons.clone(), list(mine.key_labels)
    return plain


@pytest.mark.parametrize("replacement", ["replace_all", "replace_last", "replace_prompt"])
@pytest.mark.parametrize("name", TASKS)
def test_the_reference_s_rules_answer_alike_with_the_same_codebook(name, replacement):
    edits = stream(name, 40)
    ours = editor(name, replacement)
    for at in range(len(edits)):
        ours.edit(ours.config, edits.batch(at), None)
    plain = handed_over(ours, name, replacement)
    others = prompts(20, seed=77)
    hits = 0
    for at in range(60):
        known = at < 40
        tokens = edits.batch(at) if known else prompt_batch([others[at - 40]])
        tokens = (
            tokens
            if known or name != "t5-encoder"
            else tokens | {"labels": torch.ones(1, 2).long()}
        )
        labels = tokens.get("labels")
        end = -1
        if name == "gpt2" and labels is not None:
            end = int((labels == -100).sum()) - 1
        ours.adaptor.key_id = plain.adaptor.key_id = end
        with torch.no_grad():
            mine, theirs = ours(**tokens).logits, plain.model(**tokens).logits
        assert torch.equal(mine, theirs), at
        assert torch.equal(ours.adaptor.chosen_key, plain.adaptor.chosen_key)
        hits += plain.adaptor.hit
        if name != "bert":
            ids = torch.tensor([(edits.prompts + others)[at]])
            asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
            plain.adaptor.key_id = ids.shape[1] - 1
            ours.adaptor.key_id = plain.adaptor.key_id if name != "gpt2" else -1
            assert torch.equal(ours.generate(**asked), plain.model.generate(**asked)), at
    assert 20 <= hits < 60


def test_assigning_training_iter_and_label_edits_and_the_model_s_modes_do_not():
    model = build("bert")
    family = FAMILIES["bert"]
    ours = gf.GRACE(config(family.layer, "scotus", 0.2, "replace_all"), wrapped(model))
    tokens = prompt_batch(prompts(1))
    model.train()
    model(**tokens)
    assert not hasattr(ours.adaptor, "keys")
    assert ours.adaptor.training is False
    assert ours.adaptor.layer.training
    ours.adaptor.training, ours.adaptor.iter = True, 0
    ours.adaptor.edit_label = torch.tensor([1])
    model.eval()
    assert ours.adaptor.training is True
    model(**tokens)
    assert len(ours.adaptor.keys) == 1
    ours.adaptor.training = False
    model.train().eval()
    model(**prompt_batch(prompts(3, seed=9)))
    assert len(ours.adaptor.keys) == 1


def test_an_edit_driven_from_outside_trains_values_with_any_optimiser():
    family, model = FAMILIES["bert"], build("bert")
    ours = gf.GRACE(config(family.layer, "scotus", 0.2, "replace_all"), wrapped(model))
    twin = editor("bert")
    for at, prompt in enumerate(prompts(3)):
        tokens = edit_batch(family, [prompt], [[at]])
        torch.manual_seed(at)
        twin.edit(twin.config, tokens, None)
        adaptor = ours.adaptor
        adaptor.training, adaptor.edit_label = True, tokens["labels"]
        torch.manual_seed(at)
        for step in range(STEPS):
            adaptor.iter = step
            loss = model(**tokens).loss
            if step == 0:
                adam = torch.optim.Adam([adaptor.values], RATE)
            adam.zero_grad()
            loss.backward()
            adam.step()
        adaptor.training = False
    torch.testing.assert_close(ours.adaptor.values, twin.adaptor.values)
    assert torch.equal(ours.adaptor.keys, twin.adaptor.keys)
    answered = ours(**edit_batch(family, [prompts(3)[1]], [[1]])).logits
    assert torch.equal(answered, twin(**edit_batch(family, [prompts(3)[1]], [[1]])).logits)


def test_a_look_up_writes_no_byte_and_draws_no_random_number():
    ours, edits = editor("gpt2", n_iter=1), stream("gpt2", 12)
    for at in range(len(edits)):
        ours.edit(ours.config, edits.batch(at), None)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    drawn, numbers = torch.get_rng_state(), (ours.adaptor.key_id, ours.adaptor.iter)
    for at in range(len(edits)):
        ours.model(**edits.batch(at))
        ours.model(**prompt_batch([prompts(12, seed=5)[at]]))
        _ = ours.adaptor.chosen_key
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (ours.adaptor.key_id, ours.adaptor.iter) == numbers
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_cold_value_is_the_first_draw_of_the_edit():
    ours = editor("gpt2", edit_lr=1e-30)
    ours.model.train()  # whose dropout draws too
    for at, prompt in enumerate(prompts(3)):
        torch.manual_seed(at)
        ours.edit(ours.config, edit_batch(FAMILIES["gpt2"], [prompt], [[5, 6]]), None)
        torch.manual_seed(at)
        assert torch.equal(ours.adaptor.values[at], torch.rand(1, 32)[0])


def test_one_step_is_enough_for_an_edit_and_does_not_make_look_ups_add_keys():
    ours = editor("bert", n_iter=1)
    ours.edit(ours.config, edit_batch(FAMILIES["bert"], [prompts(1)[0]], [[1]]), None)
    assert len(ours.losses) == 1
    ours(**prompt_batch(prompts(4, seed=3)))
    assert len(ours.adaptor.keys) == 1


def test_losses_are_numpy_scalars_from_before_each_step():
    ours, tokens = editor("bert"), edit_batch(FAMILIES["bert"], [prompts(1)[0]], [[1]])
    ours.edit(ours.config, tokens, [])
    assert [type(loss).__name__ for loss in ours.losses] == ["float32"] * STEPS
    assert isinstance(ours.loss, torch.Tensor)
    assert float(ours.loss) == ours.losses[-1]
    assert ours.losses[-1] < ours.losses[0]
    assert ours.log_dict == {"chosen_key": torch.tensor([0]), "nkeys": 1}
    assert ours.layer == "bert.encoder.layer.1.output.dense"


def test_only_the_value_that_is_trained_moves():
    ours = editor("bert")
    for at, prompt in enumerate(prompts(4)):
        before = ours.adaptor.values.detach().clone() if at else None
        ours.edit(ours.config, edit_batch(FAMILIES["bert"], [prompt], [[at]]), None)
        if before is not None:
            assert torch.equal(ours.adaptor.values[:at], before)
    assert ours.adaptor.values.grad is None
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert all(parameter.requires_grad for parameter in ours.model.parameters())


def test_a_batch_is_looked_up_row_by_row():
    ours, rows = editor("bert", "replace_prompt"), prompts(4, shortest=6, longest=6)
    for at in (0, 2):
        ours.edit(ours.config, edit_batch(FAMILIES["bert"], [rows[at]], [[at]]), None)
    whole = ours(**prompt_batch(rows)).logits
    for at, row in enumerate(rows):
        torch.testing.assert_close(whole[at], ours(**prompt_batch([row])).logits[0])
    assert ours.adaptor.chosen_key.shape == (1,)


def test_a_batch_is_edited_row_by_row():
    ours, one_by_one = editor("gpt2"), editor("gpt2")
    rows, family = prompts(3, shortest=5, longest=5), FAMILIES["gpt2"]
    answers = [[7, 8], [9, 10], [11, 12]]
    ours.edit(ours.config, edit_batch(family, rows, answers), None)
    for row, answer in zip(rows, answers, strict=True):
        one_by_one.edit(one_by_one.config, edit_batch(family, [row], [answer]), None)
    torch.testing.assert_close(ours.adaptor.keys, one_by_one.adaptor.keys, rtol=0, atol=1e-5)
    assert [label.tolist() for label in ours.adaptor.key_labels] == [
        label.tolist() for label in one_by_one.adaptor.key_labels
    ]
    assert ours.log_dict["chosen_key"].tolist() == [0, 1, 2]


def test_keys_that_are_written_in_place_are_looked_up():
    adaptor = linear_adaptor()
    hidden = torch.randn(3, 2, 6)
    for at in range(3):
        drive(adaptor, hidden[at : at + 1], at)
    keys, elsewhere = adaptor.keys, torch.full((6,), 50.0)
    for step in range(3):  # who holds them may write again
        keys[1] = elsewhere + step
        moved = keys[1][None, None]
        assert not torch.equal(adaptor(moved), adaptor.layer(moved))
        assert torch.equal(adaptor(hidden[1:2]), adaptor.layer(hidden[1:2]))
    adaptor.epsilons[1] = -1.0
    assert torch.equal(adaptor(moved), adaptor.layer(moved))
    assert adaptor.epsilons.reshape(-1).tolist() == [1.0, -1.0, 1.0]


def test_keys_and_values_are_views_of_the_store():
    adaptor = linear_adaptor()
    for at in range(2):
        drive(adaptor, torch.randn(1, 2, 6) * 9, at)
    assert adaptor.keys.data_ptr() == adaptor._book.keys.data_ptr()
    assert adaptor.values.data_ptr() == adaptor._book.values.data_ptr()
    with torch.no_grad():
        adaptor.values[1] = 3.0
    output = adaptor(adaptor.keys[1][None, None])
    assert torch.equal(output, torch.full((1, 1, 4), 3.0))


def test_a_codebook_is_loaded_by_assigning_it():
    ours, edits = editor("gpt2"), stream("gpt2", 15)
    for at in range(len(edits)):
        ours.edit(ours.config, edits.batch(at), None)
    other = editor("gpt2")
    theirs, mine = other.adaptor, ours.adaptor
    theirs.key_labels, theirs.epsilons = list(mine.key_labels), mine.epsilons.clone()
    theirs.values, theirs.keys = nn.Parameter(mine.values.detach().clone()), mine.keys.clone()
    theirs.iter = 1
    for at in range(len(edits)):
        tokens = edits.batch(at)
        assert torch.equal(ours(**tokens).logits, other(**tokens).logits)
    other.edit(other.config, edits.batch(3), None)
    assert len(theirs.keys) == len(mine.keys)


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("keys", torch.zeros(2, 5), ValueError, r"keys must be \[N, 6\], got \(2, 5\)"),
        ("values", torch.zeros(2, 6), ValueError, r"values must be \[N, 4\], got \(2, 6\)"),
        ("keys", torch.zeros(2, 6, dtype=torch.int64), ValueError, "keys must be of .*int64"),
        ("epsilons", [1.0], TypeError, "epsilons must be a tensor, got list"),
    ],
)
def test_a_codebook_that_does_not_fit_the_layer_is_refused(name, given, error, message):
    adaptor = linear_adaptor()
    drive(adaptor, torch.ones(1, 2, 6), 1)
    before = adaptor.state_dict()
    with pytest.raises(error, match=message):
        setattr(adaptor, name, given)
    assert all(torch.equal(adaptor.state_dict()[n], t) for n, t in before.items())


def test_a_codebook_of_unequal_parts_is_refused_when_it_is_used():
    adaptor = linear_adaptor()
    adaptor.keys, adaptor.values = torch.zeros(2, 6), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"needs .*'epsilons'.*; epsilons is not assigned"):
        adaptor(torch.ones(1, 1, 6))
    adaptor.epsilons = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"as many of each, got {'keys': 2, 'values': 3"):
        adaptor(torch.ones(1, 1, 6))


def test_a_saved_state_holds_the_codebook_and_gives_it_back():
    ours, edits = editor("gpt2"), stream("gpt2", 10)
    for at in range(len(edits)):
        ours.edit(ours.config, edits.batch(at), None)
    state = ours.model.state_dict()
    assert {name.rpartition(".")[2] for name in state} >= {"keys", "values", "epsilons"}
    other = editor("gpt2")
    assert not other.model.load_state_dict(state).missing_keys
    twin = copy.deepcopy(ours.model)
    for at in range(len(edits)):
        tokens = edits.batch(at)
        expected = ours(**tokens).logits
        other.adaptor.key_id = twin.get_submodule(ours.layer).key_id = ours.adaptor.key_id
        assert torch.equal(other.model(**tokens).logits, expected)
        assert torch.equal(twin(**tokens).logits, expected)
    assert torch.equal(other.adaptor.keys, ours.adaptor.keys)
    narrow = linear_adaptor()
    odd = {f"layer.{n}": t for n, t in narrow.layer.state_dict().items()}
    odd |= {
        n.rpartition(".")[2]: t
        for n, t in state.items()
        if ours.layer in n and "layer." not in n[len(ours.layer) :]
    }
    with pytest.raises(RuntimeError, match=r"keys must be \[N, 6\]"):
        narrow.load_state_dict(odd)


def test_an_edited_model_can_be_saved(tmp_path):
    ours = editor("bert")
    ours.edit(ours.config, edit_batch(FAMILIES["bert"], [prompts(1)[0]], [[1]]), None)
    ours.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = f"{ours.layer}.keys"
    assert torch.equal(saved[name], ours.adaptor.keys)
    torch.save(ours.model.state_dict(), tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 1 << 20


def test_moving_the_model_moves_the_codebook():
    ours = editor("bert")
    ours.edit(ours.config, edit_batch(FAMILIES["bert"], [prompts(1)[0]], [[1]]), None)
    ours.model.to(torch.bfloat16)
    assert ours.adaptor.keys.dtype == ours.adaptor.values.dtype == torch.bfloat16
    assert ours.adaptor.epsilons.dtype == torch.float32
    ours(**prompt_batch(prompts(2, shortest=5, longest=5)))


def test_bf16_models_are_edited_on_the_host():
    family = FAMILIES["bert"]
    model = build("bert", torch.bfloat16)
    ours = gf.GRACE(config(family.layer, "scotus", 0.2, "replace_all", n_iter=20), wrapped(model))
    tokens = edit_batch(family, [prompts(1)[0]], [[1]])
    ours.edit(ours.config, tokens, None)
    assert ours.adaptor.keys.dtype == torch.bfloat16
    assert ours(**tokens).logits.argmax() == 1


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("editor", "eps"),
        ("editor", "replacement"),
        ("editor", "n_iter"),
        ("editor", "edit_lr"),
        ("model", "inner_params"),
        ("experiment", "task"),
    ],
)
def test_a_config_without_a_needed_key_is_refused_by_its_name(part, name):
    given, model = config(FAMILIES["bert"].layer, "qa", 1.0, "replace_all"), build("bert")
    del given[part][name]
    with pytest.raises(KeyError, match=rf'config\["{part}"\]\["{name}"\] is needed'):
        gf.GRACE(given, wrapped(model))
    del given[part]
    with pytest.raises(KeyError, match=rf'config\["{part}"\] is needed; it holds .*{name}'):
        gf.GRACE(given, wrapped(model))
    assert not any(isinstance(module, GRACEAdapter) for module in model.modules())


@pytest.mark.parametrize(
    ("part", "name", "given", "message"),
    [
        ("experiment", "task", "zsre", "task must be one of .*'qa', 'scotus', 'hallucination'"),
        ("editor", "replacement", "all", "replacement must be one of .*replace_prompt.*'all'"),
        ("editor", "val_init", "hot", "val_init must be one of .*'cold', 'warm'.*'hot'"),
        ("editor", "eps_expand", "half", "eps_expand must be one of .*'moving_average'"),
        ("editor", "eps", 0, "epsilon must be a positive number of float32, got 0"),
        ("editor", "n_iter", 0, "n_iter must be at least 1, got 0"),
        ("editor", "edit_lr", -1, "edit_lr must be a number > 0, got -1"),
    ],
)
def test_a_mode_that_does_not_exist_is_refused_with_those_that_do(part, name, given, message):
    modes = config(FAMILIES["bert"].layer, "qa", 1.0, "replace_all")
    modes[part][name] = given
    with pytest.raises(ValueError, match=message):
        gf.GRACE(modes, wrapped(build("bert")))


@pytest.mark.parametrize("layer", ["bert.encoder.layer.1.output.LayerNorm", "bert.encoder.layer"])
def test_a_layer_that_cannot_be_edited_is_refused(layer):
    model = build("bert")
    before = model.get_submodule(layer)
    with pytest.raises(ValueError, match=r"cannot be edited.*name a linear layer"):
        gf.GRACE(config(layer, "qa", 1.0, "replace_all"), wrapped(model))
    assert model.get_submodule(layer) is before


def test_a_layer_takes_one_adaptor():
    ours = editor("bert")
    with pytest.raises(ValueError, match="has an adaptor already"):
        gf.GRACE(ours.config, wrapped(ours.model))
    with pytest.raises(ValueError, match="has an adaptor already"):
        gf.attach(ours.model, ours.layer)
    model = build("bert")
    gf.attach(model, ours.layer)
    with pytest.raises(ValueError, match="has an adaptor already"):
        gf.GRACE(ours.config, wrapped(model))


def test_an_edit_that_fails_changes_nothing():
    ours, edits = editor("gpt2"), stream("gpt2", 8)
    with pytest.raises(ValueError, match=r"needs tokens\['labels'\]"):
        ours.edit(ours.config, prompt_batch(prompts(1)), None)
    assert not hasattr(ours.adaptor, "keys")
    bad = edits.batch(0) | {
        "position_ids": torch.tensor([[9999] * edits.batch(0)["input_ids"].shape[1]])
    }
    with pytest.raises(IndexError):
        ours.edit(ours.config, bad, None)
    assert not hasattr(ours.adaptor, "keys")
    for at in range(7):
        ours.edit(ours.config, edits.batch(at), None)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    learning = [parameter.requires_grad for parameter in ours.model.parameters()]
    book = ours.adaptor._book
    real, calls = ours.model.lm_head.forward, []

    def fail_late(hidden):
        calls.append(1)
        if len(calls) == STEPS:
            raise RuntimeError("out of memory")
        return real(hidden)

    ours.model.lm_head.forward = fail_late
    for at in range(8):
        with pytest.raises(RuntimeError, match="out of memory"):
            ours.edit(ours.config, edits.batch(at), None)
        calls.clear()
    ours.model.lm_head.forward = real
    after = ours.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [parameter.requires_grad for parameter in ours.model.parameters()] == learning
    assert not ours.adaptor.training
    ours.edit(ours.config, edits.batch(7), None)
    assert ours.adaptor._book is book  # and nothing had to be made anew


def test_an_edit_whose_training_runs_away_is_refused():
    ours, tokens = editor("bert"), edit_batch(FAMILIES["bert"], [prompts(1)[0]], [[1]])
    ours.edit(ours.config, tokens, None)
    values = ours.adaptor.values.detach().clone()
    steep = copy.deepcopy(ours.config)
    steep["editor"]["edit_lr"] = float("inf")
    with pytest.raises(ValueError, match="value that is not finite; lower edit_lr"):
        ours.edit(steep, tokens, None)
    assert torch.equal(ours.adaptor.values, values)


def test_values_that_were_put_elsewhere_are_taken_in_by_the_next_edit():
    ours, edits = editor("bert"), prompts(2)
    ours.edit(ours.config, edit_batch(FAMILIES["bert"], [edits[0]], [[1]]), None)
    ours.adaptor.values.data = torch.full((1, 32), 2.5)
    ours.edit(ours.config, edit_batch(FAMILIES["bert"], [edits[1]], [[2]]), None)
    assert ours.adaptor.values[0].tolist() == [2.5] * 32
    assert len(ours.adaptor.values) == 2


def test_an_expanded_ball_is_found_again_from_the_26th_key_on():
    adaptor = linear_adaptor(eps_expand="coverage")
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(60, 6, generator=generator) * 40
    for at, centre in enumerate(centres):
        near = centre + torch.randn(6, generator=generator)
        drive(adaptor, centre[None, None], at)
        drive(adaptor, near[None, None], at)
        assert not torch.equal(adaptor(near[None, None]), adaptor.layer(near[None, None])), at


def test_the_exact_repeat_with_a_new_label_leaves_both_keys_dead():
    adaptor, hidden = linear_adaptor(), torch.ones(1, 2, 6)
    drive(adaptor, hidden, 1)
    drive(adaptor, hidden, 2)
    assert adaptor.epsilons.reshape(-1).tolist() == pytest.approx([-1e-5, 0.0])
    assert torch.equal(adaptor(hidden), adaptor.layer(hidden))
    assert adaptor.chosen_key.tolist() == [0]


def test_key_id_is_never_replaced_by_the_position_it_stood_for():
    ours = editor("gpt2")
    ours.edit(ours.config, edit_batch(FAMILIES["gpt2"], [prompts(1)[0]], [[5, 6]]), None)
    assert ours.adaptor.key_id == len(prompts(1)[0]) - 1
    ours.adaptor.key_id = -1
    ours.model(**prompt_batch(prompts(1, shortest=9)))
    assert ours.adaptor.key_id == -1
    ours.adaptor.key_id = 3
    ours.generate(**prompt_batch(prompts(1)), max_new_tokens=2)
    assert ours.adaptor.key_id == -1


@pytest.mark.parametrize("cached", [True, False])
def test_generation_asks_at_the_end_of_the_prompt_with_a_cache_or_without(cached):
    ours = editor("gpt2", "replace_last", n_iter=30)
    prompt = prompts(1, shortest=8)[0]
    ours.edit(ours.config, edit_batch(FAMILIES["gpt2"], [prompt], [[41, 42]]), None)
    asked = prompt_batch([prompt]) | {"max_new_tokens": 2, "do_sample": False}
    assert ours.generate(**asked, use_cache=cached)[0, len(prompt)] == 41


@pytest.mark.parametrize("generation", [False, True])
def test_the_notebook_s_form_edits_in_two_hundred_steps(generation):
    name = "gpt2" if generation else "bert"
    family, model = FAMILIES[name], build(name)
    bare = GRACE_barebones(model, family.layer, family.epsilon, 0.5, "cpu", generation)
    prompt = prompts(1, shortest=7)[0]
    tokens = edit_batch(family, [prompt], [[3, 4]])
    bare.edit(tokens)
    assert len(bare.losses) == 200
    assert bare.losses[-1] < bare.losses[0]
    adaptor = bare.adaptor
    assert adaptor.key_id == (len(prompt) - 1 if generation else -1)
    assert adaptor.replacement == "replace_prompt"
    if not generation:
        assert bare(**tokens).logits.argmax() == 3


def test_nothing_of_the_references_is_read_before_it_is_asked_for():
    asked = (
        "import sys, grace_fast as gf; "
        "assert not [name for name in sys.modules if 'grace_fast.compat' in name]; "
        "assert gf.GRACE.__module__ == 'grace_fast.compat.reference'; gf.accelerate"
    )
    subprocess.run([sys.executable, "-c", asked], check=True)
    with pytest.raises(AttributeError, match="'grace_fast' has no attribute 'GRACES'"):
        _ = gf.GRACES


def test_the_adaptor_has_the_names_of_the_reference():
    adaptor = linear_adaptor()
    for name in ("keys", "values", "epsilons", "key_labels", "chosen_key"):
        assert not hasattr(adaptor, name)
    assert adaptor.weight is adaptor.layer.weight
    assert (adaptor.key_shape, adaptor.value_shape, adaptor.init_epsilon) == (6, 4, 1.0)
    assert (adaptor.replacement, adaptor.num_pert, adaptor.dist_fn) == ("replace_all", 8, "euc")
    assert (adaptor.device, adaptor.key_id, adaptor.training) == ("cpu", -1, False)
    assert adaptor.config["editor"]["eps"] == 1.0
    drive(adaptor, torch.ones(1, 2, 6), 3)
    assert adaptor.keys.tolist() == [[1.0] * 6]
    assert isinstance(adaptor.values, nn.Parameter)
    assert adaptor.values.shape == (1, 4)
    assert adaptor.epsilons.shape == (1,)
    drive(adaptor, torch.full((1, 2, 6), 9.0), 4)
    assert adaptor.epsilons.tolist() == [[1.0], [1.0]]
    assert [label.tolist() for label in adaptor.key_labels] == [[3], [4]]
    assert [name for name, _ in adaptor.named_parameters()] == [
        "values",
        "layer.weight",
        "layer.bias",
    ]


def test_a_convolution_s_weight_is_read_the_other_way_round():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4))

    given = config("layer", "qa", 1.0, "replace_all")
    one, other = (GRACEAdapter(given, Turned(), transpose) for transpose in (False, True))
    assert (one.key_shape, one.value_shape) == (6, 4)
    assert (other.key_shape, other.value_shape) == (4, 6)
