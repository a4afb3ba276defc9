"""Several layers, and several named codebooks on one layer, chosen for each request."""

from __future__ import annotations

import asyncio
import threading

import models
import pytest
import torch
from models import FAMILIES

import grace_fast as gf

FAMILY = FAMILIES["llama"]
PROMPTS = models.prompts(4, shortest=6, longest=6)


def attached(model, *names, layer=FAMILY.layer, **settings):
    """Attach a codebook of each name; each knows the first prompt, by a value of its own."""
    chosen = {"epsilon": 0.1, "replacement": "replace_all", "iterations": 0, **settings}
    graces = [gf.attach(model, layer, name=name, **chosen) for name in names]
    for seed, grace in enumerate(graces):
        models.remember(grace, PROMPTS[:1], seed=seed)
    return graces


def logits(model, rows=PROMPTS[:1]):
    with torch.no_grad():
        return model(torch.tensor(rows), use_cache=False).logits


def alone(value):
    """Return what the model answers with one value for the first prompt."""
    model = models.build("llama")
    grace = gf.attach(model, FAMILY.layer, replacement="replace_all", iterations=0)
    query = grace.query_of(models.prompt_batch(PROMPTS[:1]))
    grace.codebook.append(query, value[None], torch.ones(1) * 0.01)
    return logits(model)


def test_a_named_codebook_answers_only_where_it_is_used():
    model = models.build("llama")
    base = logits(model)
    one, two = attached(model, "tenant-a", "tenant-b")
    assert torch.equal(logits(model), base)
    with gf.using("tenant-a"):
        first = logits(model)
        with gf.using("tenant-b"):
            second = logits(model)
        assert torch.equal(logits(model), first)
        with gf.using(None):
            assert torch.equal(logits(model), base)
    with gf.using("tenant-c"):
        assert torch.equal(logits(model), base)
    assert torch.equal(first, alone(one.codebook.values[0]))
    assert torch.equal(second, alone(two.codebook.values[0]))
    assert (one.hits[0], two.hits[0]) == (2, 1)


def test_an_unnamed_codebook_always_answers_and_a_named_one_after_it():
    model = models.build("llama")
    common, named = attached(model, None, "tenant-a")
    assert torch.equal(logits(model), alone(common.codebook.values[0]))
    with gf.using("tenant-a"):
        assert torch.equal(logits(model), alone(named.codebook.values[0]))
    named.unload()
    with gf.using("tenant-a"):
        assert torch.equal(logits(model), alone(common.codebook.values[0]))


@pytest.mark.parametrize("query", ["prompt_end", "every_token"])
def test_names_can_be_chosen_row_by_row(query):
    model = models.build("llama")
    rows = [PROMPTS[0]] * 4
    base = logits(model, rows)
    attached(model, "tenant-a", "tenant-b", query=query)
    expected = []
    for name in ("tenant-a", None, "tenant-b", "tenant-a"):
        with gf.using(name):
            expected.append(logits(model, rows)[0])
    with gf.using(["tenant-a", None, "tenant-b", "tenant-a"]):
        assert torch.equal(logits(model, rows), torch.stack(expected))
    assert torch.equal(expected[1], base[0])
    refused = pytest.raises(ValueError, match=r"given 3 names, and the batch has 4 rows")
    with gf.using(["tenant-a", "tenant-b", None]), refused:
        logits(model, rows)


def test_the_beams_of_a_row_use_its_codebook():
    model = models.build("llama")
    one, two = attached(model, "tenant-a", "tenant-b")
    with gf.using(["tenant-a", "tenant-b", None]):
        model.generate(torch.tensor([PROMPTS[0]] * 3), num_beams=2, max_new_tokens=2)
    assert (one.hits[0], two.hits[0]) == (2, 2)


def test_threads_and_tasks_use_their_own():
    model = models.build("llama")
    attached(model, "tenant-a", "tenant-b")
    expected = {}
    for name in ("tenant-a", "tenant-b", None):
        with gf.using(name):
            expected[name] = logits(model)
    found = []

    def serve(name):
        with gf.using(name):
            found.extend(torch.equal(logits(model), expected[name]) for _ in range(20))

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def answer(name):
        with gf.using(name):
            await asyncio.sleep(0)  # the other tasks choose meanwhile
            found.append(torch.equal(logits(model), expected[name]))

    async def serve_all():
        await asyncio.gather(*(answer(name) for name in expected))

    asyncio.run(serve_all())
    assert found == [True] * 63


def test_a_compiled_model_sees_which_codebook_is_used():
    model = models.build("llama")
    attached(model, "tenant-a", "tenant-b")
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    logits(compiled)
    made = len(graphs)
    for name in (None, "tenant-a", "tenant-b"):
        with gf.using(name):
            assert torch.equal(logits(compiled), logits(model)), name
    assert len(graphs) == made
    torch.compiler.reset()


def test_two_adaptors_of_one_name_on_a_layer_are_refused(tmp_path):
    model = models.build("llama")
    (one,) = attached(model, "tenant-a")
    one.save_pretrained(tmp_path)
    for again in (
        lambda: gf.attach(model, FAMILY.layer, name="tenant-a"),
        lambda: gf.from_pretrained(model, tmp_path, name="tenant-a"),
    ):
        with pytest.raises(ValueError, match="has an adaptor named 'tenant-a' already; unload"):
            again()
    gf.attach(model, FAMILY.layer)
    with pytest.raises(ValueError, match=r"has an adaptor already; unload.* or give it a name"):
        gf.attach(model, FAMILY.layer)
    for wrong in ("", 3):
        with pytest.raises(ValueError, match="name must be a word, or None"):
            gf.attach(model, FAMILY.layer, name=wrong)
    other = gf.from_pretrained(model, tmp_path, name="tenant-b")
    with gf.using("tenant-b"):
        logits(model)
    assert other.hits[0] == 1
    one.unload()
    assert gf.attach(model, FAMILY.layer, name="tenant-a").name == "tenant-a"


def test_an_edit_under_a_name_is_of_that_codebook_alone():
    model = models.build("llama")
    base = logits(model, PROMPTS)
    settings = {"epsilon": 0.1, "iterations": 60, "learning_rate": 0.3}
    grace = gf.attach(model, FAMILY.layer, name="tenant-a", replacement="replace_all", **settings)
    report = grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]]))
    assert report.correct
    assert torch.equal(logits(model, PROMPTS), base)
    with gf.using("tenant-a"):
        assert int(logits(model)[0, -1].argmax()) == 10
    assert grace.verify().ok


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_several_layers_hold_codebooks_of_their_own(name):
    family, model = FAMILIES[name], models.build(name)
    other = family.layer.replace(".1.", ".2.")
    settings = {"replacement": "replace_all", "iterations": 60, "learning_rate": 0.3}
    graces = [
        gf.attach(model, layer, epsilon=family.epsilon, **settings)
        for layer in (family.layer, other)
    ]
    prompts = models.prompts(3)
    for grace, prompt, target in zip(graces, prompts, ([3], [2]), strict=False):
        assert grace.edit(models.edit_batch(family, [prompt], [target])).correct
    for prompt, target in zip(prompts, (3, 2), strict=False):
        with torch.no_grad():
            said = model(**models.prompt_batch([prompt])).logits
        assert int(said.reshape(-1, said.shape[-1])[-1].argmax()) == target
    assert [dict(grace.hits) for grace in graces] == [{0: 1}, {0: 1}]
    with torch.no_grad():
        edited = model(**models.prompt_batch([prompts[2]])).logits
        for grace in graces:
            grace.unload()
        assert torch.equal(model(**models.prompt_batch([prompts[2]])).logits, edited)
