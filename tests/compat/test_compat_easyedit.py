"""EasyEdit's surface: any edit rolled back, its YAML read, its functions swapped."""

from __future__ import annotations

import copy
import random
import sys
import types

import pytest
import torch
from compat_cases import EPSILON, RATE, STEPS, stream
from models import FAMILIES, build, edit_batch, prompt_batch, prompts
from reference_rules import EasyEditAdaptor, PlainEditor
from torch import nn
from words import WORDS, tokenizer

import grace_fast as gf
from grace_fast import semantics
from grace_fast.compat import easyedit
from grace_fast.compat.easyedit import GRACE, GRACEAdapter, GraceHyperParams, apply_grace_to_model
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History

FAMILY = FAMILIES["gpt2"]
YAML = """
alg_name: "GRACE"
model_name: "./hugging_cache/gpt2-xl"
device: 0
inner_params:
- transformer.h[1].mlp.c_proj.weight
edit_lr: 5e-1
n_iter: 40
eps: 1.0
dist_fn: euc # euc, mmd, cos
val_init: cold # cold, warm
val_train: sgd # sgd, pert
val_reg: None # early
reg: early_stop # early_stop
replacement: replace_last # replace_last, replace_all, replace_prompt
eps_expand: coverage # , moving_avg, decay
num_pert: 8
dropout: 0.0
"""


def hparams(**more):
    """Return settings as EasyEdit's YAML gives them."""
    given = {"inner_params": [f"{FAMILY.layer}.weight"], "edit_lr": RATE, "n_iter": STEPS}
    return GraceHyperParams(**given | {"eps": EPSILON["gpt2"], "replacement": "replace_all"} | more)


def editor(**more):
    """Return a new editor of EasyEdit's kind on a tiny GPT-2."""
    return GRACE(hparams(**more), build("gpt2"), "cpu")


def tokens_of(prompt, answer):
    """Return one edit as tokens with labels."""
    return edit_batch(FAMILY, [prompt], [answer])


def state(adaptor):
    """Return a codebook as plain numbers."""
    parts = (adaptor.keys, adaptor.values, adaptor.epsilons.reshape(-1))
    return [part.detach().clone() for part in parts] + [
        label.clone() for label in adaptor.key_labels
    ]


@pytest.mark.parametrize("order", ["reference", "easyedit"])
def test_a_stream_is_decided_as_by_the_rules_with_labels_in_either_order(order):
    edits, outcomes = stream("gpt2", 120, seed=5), set()
    model = build("gpt2")
    twin = copy.deepcopy(model)
    rules = EasyEditAdaptor(twin.get_submodule(FAMILY.layer), EPSILON["gpt2"], "replace_all")
    if order == "reference":  # labels in the order of the keys
        rules.keep_label = lambda labels: [*labels, rules.edit_label]
    plain = PlainEditor(twin, FAMILY.layer, rules, at_labels=True)
    ours = GRACE(hparams(n_iter=1), model, "cpu", semantics=order)
    for at in range(len(edits)):
        tokens = edits.batch(at)
        torch.manual_seed(at)
        ours.edit(ours.config, tokens, str(at))
        torch.manual_seed(at)
        plain.edit(tokens, 1, RATE, str(at))
        assert torch.equal(ours.adaptor.keys, rules.keys), at
        torch.testing.assert_close(ours.adaptor.epsilons, rules.epsilons, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours.adaptor.chosen_key, rules.chosen_key)
        outcomes.add(rules.outcome)
    theirs = rules.key_labels if order == "reference" else rules.key_labels[::-1]
    assert all(map(torch.equal, ours.adaptor.key_labels, theirs))
    assert outcomes == {"added", "split", "expanded", "reused"}


def test_attached_with_easyedit_s_semantics_an_edit_meets_the_label_of_another_row():
    keys = torch.tensor([[0.0], [10.0], [20.0]])
    labels = [torch.tensor([n]) for n in (1, 2, 3)]
    outcomes = {}
    for name in ("reference", "easyedit"):
        rules = semantics.Rules(1.0, semantics=name)
        book, history = gf.Codebook(1, 1), History()
        book.append(keys, torch.zeros(3, 1), torch.ones(3), labels)
        with book.writing() as draft:
            query = torch.tensor([0.5])
            done = history.apply(draft, rules, query, torch.tensor([3]), torch.zeros(1), 0)
        outcomes[name] = done.outcome
    assert outcomes == {"reference": "split", "easyedit": "reused"}


def test_a_removed_row_has_no_part_in_easyedit_s_order():
    book = gf.Codebook(1, 1)
    labels = [torch.tensor([n]) for n in (9, 1, 2)]
    book.append(torch.tensor([[0.0], [10.0], [20.0]]), torch.zeros(3, 1), torch.ones(3), labels)
    book.remove(0)
    rules = semantics.Rules(1.0, semantics="easyedit")
    with book.writing() as draft:
        query = torch.tensor([10.5])
        done = History().apply(draft, rules, query, torch.tensor([2]), torch.zeros(1), 0)
    assert done.outcome == "reused"


def test_attach_takes_easyedit_s_semantics_and_trains_every_step():
    grace = gf.attach(build("gpt2"), FAMILY.layer, 1.0, semantics="easyedit", iterations=4)
    reports = [grace.edit(tokens_of(prompt, [5, 6])) for prompt in prompts(3)]
    assert [report.steps for report in reports] == [4, 4, 4]
    with pytest.raises(ValueError, match=r"semantics must be one of .*'easyedit'"):
        gf.attach(build("gpt2"), FAMILY.layer, semantics="easyedits")


def test_any_edit_can_be_rolled_back_whatever_came_after_it():
    edits = stream("gpt2", 40, seed=3)
    whole = editor()
    for at in range(len(edits)):
        torch.manual_seed(at)
        whole.edit(whole.config, edits.batch(at), f"edit {at}")
    rows = len(whole.adaptor.keys)
    assert len(set(whole.adaptor.edit_ids)) == rows
    for at in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist():
        whole.rolllback(f"edit {at}")
        whole.model(**edits.batch(at))
    assert len(whole.adaptor.keys) == 0
    untouched = build("gpt2")
    for at in range(len(edits)):
        assert torch.equal(
            whole.model(**edits.batch(at)).logits, untouched(**edits.batch(at)).logits
        )


def test_a_roll_back_of_the_newest_edit_restores_what_was_there():
    edits, ours = stream("gpt2", 40, seed=3), editor()
    for at in range(len(edits)):
        before = state(ours.adaptor) if at else None
        ours.edit(ours.config, edits.batch(at), "newest")
        if before is not None:
            after = state(ours.adaptor)
            ours.rolllback("newest")
            assert all(map(torch.equal, state(ours.adaptor), before)), at
            ours.edit(ours.config, edits.batch(at), f"edit {at}")
            assert len(after) == len(state(ours.adaptor))
        else:
            ours.rolllback("newest")
            ours.edit(ours.config, edits.batch(at), f"edit {at}")


@pytest.mark.parametrize("seed", range(6))
def test_a_roll_back_leaves_what_undo_leaves(seed):
    """Whatever the order, rows are those of a history of the same edits that took them back."""
    drawn = random.Random(seed)
    expand = ("coverage", "moving_average")[seed % 2]
    adaptor = GRACEAdapter(hparams(eps=1.0, val_init="warm", eps_expand=expand), nn.Linear(2, 2))
    rules = semantics.Rules(1.0, expand, semantics="reference")
    book, history, names = gf.Codebook(2, 2), History(), {}
    for number in range(24):
        query = torch.tensor([0.4 * drawn.randint(-6, 6), 0.4 * drawn.randint(-1, 1)])
        label = torch.tensor([[drawn.randint(0, 2)]])
        adaptor.training, adaptor.iter, adaptor.edit_label = True, 0, label
        names[number] = adaptor.edit_id = f"edit {drawn.randint(0, 12)}"
        adaptor(query[None, None])
        adaptor.training = False
        with book.writing() as draft:
            done = history.apply(draft, rules, query, label[0], torch.zeros(2), number)
            draft.set_value(done.row, torch.full((2,), float(number)))
            after = draft.snapshot().row(done.row)
        with torch.no_grad():  # as an optimiser of the caller's, in place
            adaptor.values[done.row] = float(number)
        edit = Edit(number, done.outcome, done.row, 0.0, 0.0, query, label, None, after.value_slot)
        history.record(edit, after.label_slot)
    ids = sorted(set(names.values()))
    drawn.shuffle(ids)
    for name in ids:
        adaptor.delete_key(name)
        with book.writing() as draft:
            for number in [each for each in history.edits if names[each] == name]:
                history.undo(draft, number)
        live = book.live
        assert torch.equal(adaptor.keys, book.keys[live])
        assert torch.equal(adaptor.epsilons.reshape(-1), book.radii[live])
        labels = [label for label, on in zip(book.labels, live.tolist(), strict=True) if on]
        assert [each.reshape(-1).tolist() for each in adaptor.key_labels] == [
            each.tolist() for each in labels
        ]
        assert torch.equal(adaptor.values, book.values[live])
    assert len(adaptor.keys) == 0


def test_an_id_that_no_edit_has_is_refused_with_those_there_are():
    ours = editor()
    ours.edit(ours.config, tokens_of(prompts(1)[0], [5, 6]), "Paris")
    with pytest.raises(KeyError, match=r"no edit has the id 'Rome'; there are \['Paris'\]"):
        ours.rolllback("Rome")
    assert ours.adaptor.edit_ids == ["Paris"]


def test_nothing_is_inserted_by_a_look_up_after_the_last_key_went():
    ours, tokens = editor(), tokens_of(prompts(1)[0], [5, 6])
    ours.edit(ours.config, tokens, "only")
    ours.rolllback("only")
    drawn = torch.get_rng_state()
    ours(**tokens)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(ours.adaptor.keys) == 0
    ours.edit(ours.config, tokens, "again")
    assert ours.adaptor.edit_ids == ["again"]


def test_ids_outlive_a_move_and_a_copy_of_the_model():
    ours, edits = editor(), stream("gpt2", 20, seed=3)
    for at in range(len(edits)):
        ours.edit(ours.config, edits.batch(at), f"edit {at}")
    twin = copy.deepcopy(ours.model).get_submodule(FAMILY.layer)
    assert twin.edit_ids == ours.adaptor.edit_ids
    ours.model.bfloat16()
    for at in range(20):
        ours.rolllback(f"edit {at}")
        twin.delete_key(f"edit {at}")
    assert len(ours.adaptor.keys) == len(twin.keys) == 0


def test_the_layer_is_reset_to_the_module_that_was_there():
    model = build("gpt2")
    layer = model.get_submodule(FAMILY.layer)
    ours = GRACE(hparams(), model, "cpu")
    ours.edit(ours.config, tokens_of(prompts(1)[0], [5, 6]), "x")
    ours.reset_layer()
    assert model.get_submodule(FAMILY.layer) is layer
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_edit_that_fails_leaves_ids_as_they_were():
    ours, edits = editor(), stream("gpt2", 12, seed=3)
    for at in range(11):
        ours.edit(ours.config, edits.batch(at), f"edit {at}")
    before, real = state(ours.adaptor), ours.model.lm_head.forward

    def fail(hidden):
        raise RuntimeError("out of memory")

    for at in range(12):
        ours.model.lm_head.forward = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            ours.edit(ours.config, edits.batch(at), "failed")
        ours.model.lm_head.forward = real
        assert ours.adaptor.edit_id == "edit 10"
        with pytest.raises(KeyError, match="no edit has the id 'failed'"):
            ours.rolllback("failed")
    assert all(map(torch.equal, state(ours.adaptor), before))
    for at in range(11):
        ours.rolllback(f"edit {at}")
    assert len(ours.adaptor.keys) == 0


def test_an_adaptor_of_another_kind_on_the_layer_is_refused():
    model = build("gpt2")
    gf.attach(model, FAMILY.layer)
    with pytest.raises(ValueError, match="has an adaptor already"):
        GRACE(hparams(), model)
    ours = editor()
    again = GRACE(hparams(), ours.model)  # EasyEdit makes an editor for each edit
    assert again.adaptor is ours.adaptor


def test_generation_sets_key_id_and_keeps_it():
    ours = editor(n_iter=40, replacement="replace_last")
    prompt = prompts(1, shortest=8)[0]
    ours.edit(ours.config, tokens_of(prompt, [41, 42]), "x")
    assert ours.adaptor.key_id == len(prompt) - 1
    out = ours.generate(**prompt_batch([prompt]), max_new_tokens=1, do_sample=False)
    assert ours.adaptor.key_id == -1
    assert out[0, -1] == 41


def word_model():
    """Return a GPT-2 whose tokens are those of the word tokenizer."""
    model = build("gpt2")
    assert len(WORDS) <= model.config.vocab_size
    return model


def test_apply_edits_the_first_request_and_returns_editor_and_undoing():
    model, tok = word_model(), tokenizer()
    layer = model.get_submodule(FAMILY.layer)
    requests = [{"prompt": "the capital of france is", "target_new": "paris"}, {"prompt": "the"}]
    settings = hparams(n_iter=60, replacement="replace_last")
    ours, undo = apply_grace_to_model(model, tok, requests, settings)
    assert isinstance(ours, GRACE)
    assert ours.model is model
    asked = tok("the capital of france is", return_tensors="pt")
    asked.pop("token_type_ids", None)
    said = ours.generate(**asked, max_new_tokens=1, do_sample=False)[0, -1]
    assert tok.decode(said) == "paris"
    again, _ = apply_grace_to_model(
        ours, tok, [{"prompt": "the capital is", "target_new": "rome"}], settings
    )
    assert again.adaptor is ours.adaptor
    assert again.adaptor.edit_ids == ["paris", "rome"]
    apart, _ = apply_grace_to_model(model, tok, requests, settings, copy=True)
    assert apart.adaptor is not ours.adaptor
    assert len(ours.adaptor.keys) == 2
    undo()
    assert model.get_submodule(FAMILY.layer) is layer


def test_easyedit_s_yaml_is_read(tmp_path):
    (tmp_path / "gpt2-xl.yaml").write_text(YAML)
    for path in (tmp_path / "gpt2-xl.yaml", str(tmp_path / "gpt2-xl")):
        read = GraceHyperParams.from_hparams(path)
        assert (read.edit_lr, read.n_iter, read.eps, read.device) == (0.5, 40, 1.0, 0)
        assert read.inner_params == ["transformer.h[1].mlp.c_proj.weight"]
        assert read.replacement == "replace_last"
    ours = GRACE(read, build("gpt2"))
    assert ours.layer == "transformer.h.1.mlp.c_proj"
    (tmp_path / "rome.yaml").write_text("alg_name: ROME\ninner_params: [x]")
    with pytest.raises(ValueError, match="must have alg_name: GRACE, got 'ROME'"):
        GraceHyperParams.from_hparams(tmp_path / "rome")
    (tmp_path / "no.yaml").write_text("alg_name: GRACE")
    with pytest.raises(ValueError, match="needs inner_params"):
        GraceHyperParams.from_hparams(tmp_path / "no")


def test_hparams_without_a_needed_name_are_refused_by_it():
    model = build("gpt2")
    for name in (
        "inner_params",
        "eps",
        "replacement",
        "val_init",
        "eps_expand",
        "n_iter",
        "edit_lr",
    ):
        given = types.SimpleNamespace(**vars(hparams()))
        delattr(given, name)
        with pytest.raises(AttributeError, match=f"hparams.{name} is needed"):
            GRACE(given, model, "cpu")
    with pytest.raises(ValueError, match=r"replacement must be one of .*'replace_first'"):
        GRACE(hparams(replacement="replace_first"), model, "cpu")
    assert not any(isinstance(module, GRACEAdapter) for module in model.modules())


@pytest.fixture
def easyeditor(monkeypatch):
    """Import a package that is laid out as EasyEdit is."""

    def theirs(*given, **more):
        raise AssertionError("the original was called")

    grace = type("GRACE", (), {})
    modules = {}
    for name, content in {
        "easyeditor": {},
        "easyeditor.models": {},
        "easyeditor.models.grace": {"apply_grace_to_model": theirs},
        "easyeditor.models.grace.GRACE": {"GRACE": grace},
        "easyeditor.models.grace.grace_main": {"GRACE": grace, "apply_grace_to_model": theirs},
        "easyeditor.util.alg_dict": {"ALG_DICT": {"GRACE": theirs, "ROME": print}},
        "easyeditor.editors.editor": {"apply_grace_to_model": theirs},
    }.items():
        modules[name] = module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    modules["easyeditor.models.grace"].GRACE = modules["easyeditor.models.grace.GRACE"]
    return modules


def test_install_swaps_it_into_an_imported_easyedit_and_back(easyeditor):
    before = {name: dict(vars(module)) for name, module in easyeditor.items()}
    table = dict(easyeditor["easyeditor.util.alg_dict"].ALG_DICT)
    uninstall = easyedit.install()
    assert easyeditor["easyeditor.util.alg_dict"].ALG_DICT["GRACE"] is apply_grace_to_model
    assert easyeditor["easyeditor.util.alg_dict"].ALG_DICT["ROME"] is print
    for name in ("models.grace", "models.grace.grace_main", "editors.editor"):
        assert easyeditor[f"easyeditor.{name}"].apply_grace_to_model is apply_grace_to_model
    assert easyeditor["easyeditor.models.grace.GRACE"].GRACE is GRACE
    assert isinstance(easyeditor["easyeditor.models.grace"].GRACE, types.ModuleType)
    uninstall()
    assert {name: dict(vars(module)) for name, module in easyeditor.items()} == before
    assert table == easyeditor["easyeditor.util.alg_dict"].ALG_DICT


def test_install_says_what_is_missing(monkeypatch):
    with pytest.raises(RuntimeError, match="import easyeditor first"):
        easyedit.install()
    monkeypatch.setitem(sys.modules, "easyeditor", types.ModuleType("easyeditor"))
    with pytest.raises(RuntimeError, match="this easyeditor has no GRACE"):
        easyedit.install()
