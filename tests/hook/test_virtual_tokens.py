"""Virtual tokens that peft puts before a prompt, in the call or in the cache, are none of its."""

from __future__ import annotations

import models
import pytest
import torch
from models import FAMILIES

import grace_fast as gf

peft = pytest.importorskip("peft")

pytestmark = [  # it asks transformers by names that are to go, and says what it leaves out
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

PROMPTS = models.prompts(3)
QUICK = {"iterations": 100, "learning_rate": 0.3}
VIRTUAL = 4


def prompt_tuning(task):
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)


def p_tuning(task):
    return peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    )


def prefix_tuning(task):
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)


def context_tuning(task):
    return peft.CPTConfig(
        task_type=task,
        cpt_token_ids=[5, 6, 7, 8],
        cpt_mask=[1] * VIRTUAL,
        cpt_tokens_type_mask=[1, 2, 3, 4],
        num_virtual_tokens=VIRTUAL,
    )


TUNINGS = [prompt_tuning, p_tuning, prefix_tuning]


def tuned(name, config):
    torch.manual_seed(0)
    return peft.get_peft_model(models.build(name), config).eval()


def attach(model, family, **settings):
    layer = f"base_model.{family.layer}"
    return gf.attach(model, layer, **{"epsilon": family.epsilon, **QUICK, **settings})


def generated(model, rows, **more):
    said = model.generate(
        **models.prompt_batch(rows), max_new_tokens=3, min_new_tokens=3, do_sample=False, **more
    )
    return said[:, -3:].tolist()


HOW = [
    *(
        (tuning, how)
        for tuning in TUNINGS
        for how in ("replace_last", "replace_prompt", "replace_all")
    ),
    (
        context_tuning,
        "replace_last",
    ),  # its loss weighs its own tokens too, and the others learn less
]


@pytest.mark.parametrize(("tuning", "replacement"), HOW)
def test_a_tuned_decoder_is_edited_and_generates_the_same_with_and_without_a_cache(
    tuning, replacement
):
    family, model = FAMILIES["gpt2"], tuned("gpt2", tuning("CAUSAL_LM"))
    before = generated(model, PROMPTS[:1])
    grace = attach(model, family, replacement=replacement)
    seen = []
    layer = model.get_submodule(f"base_model.{family.layer}")
    watch = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    query = grace.query_of(models.prompt_batch(PROMPTS[:1]))
    watch.remove()
    assert torch.equal(seen[0][-1], query[0])  # the last token of the prompt itself
    assert grace.edit(models.edit_batch(family, PROMPTS[:1], [[10]])).correct
    with torch.no_grad():
        answer = model(**models.prompt_batch(PROMPTS[:1])).logits[0, -1]
    assert int(answer.argmax()) == 10
    assert dict(grace.hits) == {0: 1}
    cached, whole = (generated(model, PROMPTS[:1], use_cache=use) for use in (True, False))
    assert cached == whole
    assert cached[0][0] == 10
    assert grace.hits[0] == 3
    with model.disable_adapter():
        bare = generated(model, PROMPTS[:1])
    grace.unload()
    with model.disable_adapter():
        assert generated(model, PROMPTS[:1]) == bare
    assert generated(model, PROMPTS[:1]) == before


@pytest.mark.parametrize("tuning", TUNINGS)
def test_prompts_of_a_padded_batch_ask_as_each_does_alone(tuning):
    family, model = FAMILIES["gpt2"], tuned("gpt2", tuning("CAUSAL_LM"))
    grace = attach(model, family, replacement="replace_last")
    alone = torch.cat([grace.query_of(models.prompt_batch([row])) for row in PROMPTS])
    together = grace.query_of(models.prompt_batch(PROMPTS))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    models.remember(grace, PROMPTS, radius=1e-3)
    with torch.no_grad():
        model(**models.prompt_batch(PROMPTS))
    assert dict(grace.hits) == {0: 1, 1: 1, 2: 1}


def test_tokens_in_a_cache_that_are_not_virtual_still_count():
    family, model = FAMILIES["gpt2"], tuned("gpt2", prefix_tuning("CAUSAL_LM"))
    grace = attach(model, family, replacement="replace_all")
    models.remember(grace, PROMPTS[:1])
    base = model.get_base_model()
    ids = torch.tensor(PROMPTS[:1])
    with model.disable_adapter(), torch.no_grad():
        cache = base(input_ids=ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="chunked prefill or a cached prefix"):
            base(input_ids=ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("name", ["t5-encoder", "t5-decoder"])
@pytest.mark.parametrize("tuning", [prompt_tuning, prefix_tuning])
def test_a_tuned_translator_is_edited(tuning, name):
    family, model = FAMILIES[name], tuned(name, tuning("SEQ_2_SEQ_LM"))
    replacement = "replace_last" if name == "t5-decoder" else "replace_all"
    grace = attach(model, family, replacement=replacement)
    batch = models.edit_batch(family, PROMPTS[:1], [[11]])
    grace.edit(batch)
    with torch.no_grad():
        model(**batch)
    assert dict(grace.hits) == {0: 1}
    cached, whole = (generated(model, PROMPTS[:1], use_cache=use) for use in (True, False))
    assert cached == whole
    assert grace.hits[0] == 3


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_tuned_classifier_is_edited(tuning):
    family, model = FAMILIES["bert"], tuned("bert", tuning("SEQ_CLS"))
    grace = attach(model, family, replacement="replace_all")
    batch = models.prompt_batch(PROMPTS[:1])
    wanted = (int(model(**batch).logits.argmax()) + 1) % 4
    report = grace.edit({**batch, "labels": torch.tensor([wanted])})
    assert report.correct
    assert int(model(**batch).logits.argmax()) == wanted
    assert dict(grace.hits) == {0: 1}
