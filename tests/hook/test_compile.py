"""Compiled and exported models see edits; training through a replaced output is right."""

from __future__ import annotations

import models
import pytest
import torch
import torch.utils.checkpoint
from models import FAMILIES
from transformers import CompileConfig, DynamicCache

import grace_fast as gf

MODES = ("replace_all", "replace_last", "replace_prompt")


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A back end that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, _):
        self.graphs += 1
        return module.forward

    def __deepcopy__(self, _):
        return self  # `generate` copies what it is told of compiling


@pytest.fixture(params=list(FAMILIES), ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def attach(model, family, **settings):
    chosen = {"epsilon": family.epsilon, "replacement": "replace_all", "iterations": 0, **settings}
    return gf.attach(model, family.layer, **chosen)


def batch_of(family, rows):
    batch = models.prompt_batch(rows)
    if family.labels == "target":
        batch["decoder_input_ids"] = torch.zeros(len(rows), 1, dtype=torch.long)
    if family.labels == "continuation":
        batch["use_cache"] = False
    return batch


def asked(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def eagerly(model, batch):
    with torch.compiler.set_stance("force_eager"):
        return asked(model, batch)


def compiled_before(model, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, compiled


def compiled_before_by_its_own_method(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model, model


def compiled_before_and_attached_beneath(model, backend):
    return model, torch.compile(model, backend=backend, fullgraph=True)


def slow(*families):
    """Return families to test with, of which torch takes seconds to trace each."""
    return [pytest.param(FAMILIES[name], id=name, marks=pytest.mark.slow) for name in families]


def quick(*families):
    return [pytest.param(FAMILIES[name], id=name) for name in families]


SOME = quick("bert", "llama") + slow("gpt2", "t5-decoder")
BEFORE = (compiled_before, compiled_before_by_its_own_method, compiled_before_and_attached_beneath)


@pytest.mark.parametrize("compile_it", BEFORE)
@pytest.mark.parametrize("family", quick("bert") + slow("t5-decoder"))
def test_what_was_compiled_and_run_before_attach_sees_edits(family, compile_it):
    model, backend = models.build(family.name), Counting()
    attach_to, compiled = compile_it(model, backend)
    prompts = models.prompts(3, shortest=6, longest=6)
    batch = batch_of(family, prompts)
    plain = asked(compiled, batch)
    assert backend.graphs == 1
    grace = attach(attach_to, family)
    assert torch.equal(asked(compiled, batch), plain)
    assert backend.graphs == 2  # once more: the model with its hook
    models.remember(grace, prompts[:1])
    edited = asked(compiled, batch)
    assert grace.hits[0] == 1
    assert not torch.allclose(edited[0], plain[0])
    assert torch.equal(edited[1:], plain[1:])
    assert torch.equal(edited, eagerly(model, batch))
    assert backend.graphs == 2
    grace.unload()
    assert torch.equal(asked(compiled, batch), plain)


@pytest.mark.parametrize("family", SOME)
def test_a_hundred_edits_are_seen_without_a_recompile(family):
    model, backend = models.build(family.name), Counting()
    grace = attach(model, family)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    prompts = models.prompts(100, shortest=6, longest=6)
    last = asked(compiled, batch_of(family, prompts[:1]))
    made = backend.graphs
    for at, prompt in enumerate(prompts):
        before = asked(compiled, batch_of(family, [prompt]))
        models.remember(grace, [prompt], radius=1e-4, seed=at)
        last = asked(compiled, batch_of(family, [prompt]))
        assert not torch.equal(last, before), at
    assert torch.equal(last, eagerly(model, batch_of(family, [prompts[-1]])))
    grace.codebook.remove(99)
    assert not torch.equal(asked(compiled, batch_of(family, [prompts[-1]])), last)
    assert backend.graphs == made <= 2  # the hook before the call, and the model


def test_an_edit_of_a_compiled_model_is_trained_as_without_compiling(family):
    reports = []
    for compile_it in (lambda model: model, lambda model: compiled_before(model, Counting())[1]):
        model = compile_it(models.build(family.name))
        grace = attach(model, family, iterations=20, learning_rate=0.3)
        prompt = models.prompts(1)[0]
        reports.append(grace.edit(models.edit_batch(family, [prompt], [[10]])))
        grace.unload()
    assert reports[0].loss == reports[1].loss
    assert reports[0].steps == reports[1].steps > 0


@pytest.mark.parametrize("replacement", ["replace_last", "replace_prompt"])
@pytest.mark.parametrize("family", quick("gpt2") + slow("llama"))
def test_a_compiled_model_asks_at_the_same_tokens(family, replacement):
    model, backend = models.build(family.name), Counting()
    grace = attach(model, family, replacement=replacement)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    prompts = models.prompts(4)
    models.remember(grace, prompts[:2])
    for side in ("left", "right"):
        batch = models.with_positions(models.prompt_batch(prompts, side)) | {"use_cache": False}
        assert torch.equal(asked(compiled, batch), eagerly(model, batch)), side
    for at in range(2):  # padded sides, and alone
        assert grace.hits[at] == 4
    labelled = models.edit_batch(family, prompts, [[10, 11]] * 4) | {"use_cache": False}
    assert torch.equal(asked(compiled, labelled), eagerly(model, labelled))
    assert grace.hits[0] == 6


@pytest.mark.parametrize("family", quick("llama") + slow("gpt2"))
def test_generate_with_a_compiled_step_says_what_it_says_without(family, monkeypatch):
    model, backend = models.build(family.name), Counting()
    grace = attach(model, family)
    prompts = models.prompts(4)
    models.remember(grace, prompts[:2])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings["cache_implementation"] = "static"
    batch = models.prompt_batch(prompts, "left")
    plain = model.generate(**batch, **settings)
    monkeypatch.setattr(CompileConfig, "_compile_all_devices", True)  # a host's step, too
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    assert torch.equal(model.generate(**batch, **settings, compile_config=config), plain)
    assert backend.graphs >= 1
    made = backend.graphs
    models.remember(grace, prompts[2:])
    with torch.compiler.set_stance("force_eager"):
        edited = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, compile_config=config), edited)
    assert backend.graphs == made
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(**batch, **settings), edited)


def test_a_compiled_loop_of_ones_own_holds_what_its_prompt_found():
    family, model, backend = FAMILIES["llama"], models.build("llama"), Counting()
    grace = attach(model, family)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    prompts = models.prompts(3, shortest=6, longest=6)
    models.remember(grace, prompts[:1])

    def decoded(model):
        cache, said = DynamicCache(config=model.config), []
        tokens = torch.tensor(prompts)
        with torch.no_grad(), grace.prompt():
            for _ in range(4):
                logits = model(input_ids=tokens, past_key_values=cache).logits[:, -1]
                tokens = logits.argmax(1)[:, None]
                said.append(logits)
        return torch.stack(said)

    assert torch.equal(decoded(compiled), decoded(model))
    assert grace.hits[0] == 2
    assert backend.graphs == 2  # of prompt and step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_inductor_compiles_an_edited_model(name):
    family, model = FAMILIES[name], models.build(name)
    grace = attach(model, family)
    compiled = torch.compile(model, fullgraph=True)
    prompts = models.prompts(3, shortest=6, longest=6)
    batch = batch_of(family, prompts)
    plain = asked(compiled, batch)
    models.remember(grace, prompts[:1])
    edited = asked(compiled, batch)
    torch.testing.assert_close(edited, eagerly(model, batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edited[1:], plain[1:])
    assert not torch.allclose(edited[0], plain[0], rtol=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_exported_model_sees_edits_in_its_process(name):
    family, model = FAMILIES[name], models.build(name)
    grace = attach(model, family)
    prompts = models.prompts(3, shortest=6, longest=6)
    batch = batch_of(family, prompts)
    exported = torch.export.export(model, (), batch, strict=False)
    names = [str(node.target) for node in exported.graph.nodes]
    assert names.count("grace_fast.adapt.default") == 1
    runs = exported.module()
    plain = runs(**batch).logits
    models.remember(grace, prompts[:1])
    assert torch.equal(runs(**batch).logits, asked(model, batch))
    assert not torch.equal(runs(**batch).logits, plain)
    grace.unload()
    assert torch.equal(runs(**batch).logits, plain)


def test_a_graph_of_another_process_says_that_its_adaptor_is_missing():
    output, hidden = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match=r"is not in this process; attach it, then compile or"):
        torch.ops.grace_fast.adapt(output, hidden, None, 7)


def asked_op(dtype=torch.float32, replacement="replace_prompt"):
    """Return an adaptor's op on a linear layer with one key, and arguments of which row 0 hits."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    grace = gf.attach(layer, "0", replacement=replacement, iterations=0)
    hidden = torch.randn(2, 5, 4)
    grace.codebook.append(hidden[:1, -1], torch.ones(1, 3), torch.ones(1) * 0.1)
    arguments = (hidden.to(dtype), None, grace._adapter.graphs.numbers[0])
    return grace, arguments, torch.randn(2, 5, 3, dtype=dtype)


def test_the_ops_keep_their_schema():
    grace, arguments, output = asked_op()
    ids = torch.zeros(2, 5, dtype=torch.long)
    call = (ids, ids, None, ids, None, None, 0, False, grace._adapter.graphs.numbers[0])
    torch.library.opcheck(torch.ops.grace_fast.enter, call)
    torch.library.opcheck(torch.ops.grace_fast.adapt, (output, *arguments))
    torch.library.opcheck(torch.ops.grace_fast.adapt, (output.requires_grad_(), *arguments))


@pytest.mark.parametrize("replacement", MODES)
def test_the_gradient_flows_where_nothing_was_replaced(replacement):
    grace, arguments, output = asked_op(torch.float64, replacement)
    output.requires_grad_()

    def replaced(output):
        return torch.ops.grace_fast.adapt(output, *arguments)[0]

    assert torch.autograd.gradcheck(replaced, (output,))
    (gradient,) = torch.autograd.grad(replaced(output).sum(), [output])
    mask = gf.semantics.replacement_mask(replacement, torch.tensor([4, 4]), 5).clone()
    mask[1] = False
    assert torch.equal(gradient, (~mask).double()[..., None].expand(2, 5, 3))
    assert grace.hits[0] > 0


def gradients(model, batch, run):
    for parameter in model.parameters():
        parameter.grad = None
    loss = run(**batch).loss
    loss.backward()
    return loss.detach(), [
        None if parameter.grad is None else parameter.grad.clone()
        for parameter in model.parameters()
    ]


def close(one, other):
    torch.testing.assert_close(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def in_training(family, replacement="replace_all", **settings):
    model = models.build(family.name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    grace = attach(model, family, replacement=replacement, **settings)
    prompts = models.prompts(4)
    models.remember(grace, prompts[:2])
    batch = models.edit_batch(family, prompts, [[10], [12], [14], [16]])
    model.train()
    return model, grace, batch


def test_a_model_in_training_learns_around_what_is_replaced(family):
    model, _, batch = in_training(family)
    eager = gradients(model, batch, model)
    weight = model.get_submodule(family.layer).weight
    own = dict(zip((id(p) for p in model.parameters()), eager[1], strict=True))[id(weight)]
    # By hand: what was replaced is a constant, so the layer learns from the other rows alone.
    model.zero_grad()
    layer, held = model.get_submodule(family.layer), {}
    layer.register_forward_hook(lambda _, args, out: held.update(hidden=args[0], out=out))
    loss = model(**batch).loss
    (flow,) = torch.autograd.grad(loss, [held["out"]])
    flow[:2] = 0
    product = flow.flatten(0, 1).T @ held["hidden"].flatten(0, 1)
    product = product if product.shape == weight.shape else product.T
    torch.testing.assert_close(own, product.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SOME)
def test_a_compiled_model_in_training_learns_as_without_compiling(family):
    model, _, batch = in_training(family)
    eager = gradients(model, batch, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(model, batch, compiled), eager)


def checkpoint(model, reentrant=False):
    """Run the layers again in the backward pass, under the name that the release has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


CHECKPOINTED = [
    *(("prompt_end", mode, reentrant) for mode in MODES for reentrant in (False, True)),
    ("every_step", "replace_last", False),
    ("every_token", "replace_last", False),
]


@pytest.mark.parametrize(("query", "replacement", "reentrant"), CHECKPOINTED)
def test_a_checkpoint_asks_and_decides_again_as_it_did(family, query, replacement, reentrant):
    if family.name == "t5-decoder" and replacement == "replace_prompt":
        replacement = "replace_last"
    model, grace, batch = in_training(family, replacement, query=query)
    expected = gradients(model, batch, model)
    hits = dict(grace.hits)
    assert hits
    checkpoint(model, reentrant)
    model.enable_input_require_grads()
    grace.hits.clear()
    batch |= {} if family.labels != "continuation" else {"use_cache": False}
    close(gradients(model, batch, model), expected)
    again = (
        2 if query == "every_token" else 1
    )  # it is looked up again: where it was does not matter
    assert dict(grace.hits) == {row: again * count for row, count in hits.items()}


def test_a_checkpoint_decides_as_before_an_edit_that_came_between():
    family = FAMILIES["llama"]
    model, grace, batch = in_training(family)
    expected = gradients(model, batch, model)
    checkpoint(model)
    other = models.edit_batch(family, models.prompts(4)[2:], [[1], [2]])
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    models.remember(grace, models.prompts(4)[2:])
    loss.backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    close((loss.detach(), found), expected)
    # Forward passes in any order, as many as are remembered.
    model.zero_grad()
    losses = [model(**one, use_cache=False).loss for one in (batch, other)]
    for loss in losses:
        loss.backward()


def test_a_checkpoint_of_a_forward_that_was_forgotten_says_so():
    family = FAMILIES["llama"]
    model, grace, batch = in_training(family)
    checkpoint(model)
    loss = model(**batch, use_cache=False).loss
    grace._adapter._recomputed.asked.clear()
    with pytest.raises(RuntimeError, match="run forward and backward in turn"):
        loss.backward()


def test_as_many_forwards_as_are_remembered_may_come_before_their_backward():
    """64 of them, whatever comes between; the next one takes the place of the first."""
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    grace = gf.attach(layer, "0", replacement="replace_last", iterations=0)
    given = torch.randn(66, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    grace.codebook.append(given[:, 0, 0], torch.full((66, 3), 7.0), torch.full((66,), 1e-3))
    layer.train()

    def forward(at):
        hidden = given[at].clone().requires_grad_()
        return hidden, torch.utils.checkpoint.checkpoint(layer[0], hidden, use_reentrant=False)

    again = [forward(at) for at in range(65)]
    with pytest.raises(RuntimeError, match="run forward and backward in turn"):
        again[0][1].sum().backward()
    again[1][1].sum().backward()
    run = [forward(at) for at in range(64)]
    for row in range(65):
        grace.codebook.remove(row)  # what was found is written again, whatever is found now
    for at, (hidden, output) in enumerate(run):
        assert (output == 7).all()
        output.sum().backward()
        assert (hidden.grad == 0).all(), at


def test_autocast_decides_by_the_activations_that_it_makes():
    family, model = FAMILIES["llama"], models.build("llama")
    grace = attach(model, family, epsilon=0.1)
    prompts = models.prompts(4)
    with torch.autocast("cpu", torch.bfloat16):
        models.remember(grace, prompts[:2], radius=0.05)
        grace.hits.clear()
        asked(model, batch_of(family, prompts[:1]))
        asked(model, batch_of(family, prompts[1:2]))
        asked(model, batch_of(family, prompts[3:]))
    assert dict(grace.hits) == {0: 1, 1: 1}
    assert grace.codebook.dtype == torch.float32
    seen = [grace.query_of(models.prompt_batch([prompts[0]]))]
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(grace.query_of(models.prompt_batch([prompts[0]])))
    assert not torch.equal(*seen)  # other activations than without: edit as you serve


def test_a_value_is_trained_while_another_thread_compiles(monkeypatch):
    family = FAMILIES["gpt2"]
    grace = gf.attach(models.build("gpt2"), family.layer, family.epsilon, replacement="replace_all")
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # torch's, of the whole process
    edit = grace.edit(models.edit_batch(family, models.prompts(1), [[10]]))
    assert edit.correct
