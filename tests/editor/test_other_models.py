"""Models that keep no count of what is cached, turn rows and tokens round, or read no text."""

from __future__ import annotations

import families
import models
import pytest
import torch

import grace_fast as gf
from grace_fast.editor import batches
from grace_fast.hook import positions

FAMILIES = {family.name: family for family in families.everyone()}
STATES = {  # a model, its layer, and the argument that its state is given by
    "MambaForCausalLM": ("backbone.layers.1.mixer.out_proj", "cache_params"),
    "RwkvForCausalLM": ("rwkv.blocks.1.feed_forward.value", "state"),
}
MODES = ("replace_all", "replace_last", "replace_prompt")
PROMPT, OTHER = models.prompts(2, seed=3, shortest=6, longest=6)


def attached(name, layer, replacement="replace_last", prompts=(PROMPT,)):
    model = FAMILIES[name].build()
    grace = gf.attach(model, layer, epsilon=0.05, replacement=replacement, iterations=0)
    models.remember(grace, list(prompts))
    grace.hits.clear()
    return model, grace


def decoded(model, argument, parts, steps=3):
    """Compute a prompt in parts and go on from it, in a loop of one's own."""
    said, state = [], {}
    with torch.no_grad():
        for part in parts:
            out = model(torch.tensor([part]), use_cache=True, **state)
            state = {argument: getattr(out, argument)}
        for _ in range(steps):
            said.append(out.logits[:, -1])
            out = model(said[-1].argmax(1)[:, None], use_cache=True, **state)
            state = {argument: getattr(out, argument)}
    return torch.stack(said)


def generated(model, prompt, steps=3, **settings):
    said = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=steps,
        min_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(said.logits)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("replacement", MODES)
def test_a_state_without_a_count_goes_on_where_the_prompt_ended(name, replacement):
    layer, argument = STATES[name]
    model, grace = attached(name, layer, replacement)
    with grace.disable_adapter():
        plain = generated(model, PROMPT)
    whole = generated(model, PROMPT, use_cache=False)
    assert not torch.allclose(whole[0], plain[0], rtol=1e-2)
    torch.testing.assert_close(generated(model, PROMPT), whole, rtol=1e-4, atol=1e-4)
    with grace.prompt([len(PROMPT) - 1]):
        own = decoded(model, argument, [PROMPT])
    torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)
    assert dict(grace.hits) == {0: 3}


@pytest.mark.parametrize("name", STATES)
def test_a_step_from_a_state_is_no_prompt_of_one_token(name):
    layer, argument = STATES[name]
    first = int(decoded(FAMILIES[name].build(), argument, [OTHER], steps=1).argmax())
    model, grace = attached(name, layer, prompts=[PROMPT, [first]])
    decoded(model, argument, [OTHER])
    assert not grace.hits
    decoded(model, argument, [PROMPT])
    assert dict(grace.hits) == {0: 1}


# Mamba itself computes a part shorter than its convolution otherwise, but for one token.
@pytest.mark.parametrize(
    ("name", "ends"), [("MambaForCausalLM", (5,)), ("RwkvForCausalLM", (2, 4, 5))]
)
def test_a_prompt_in_parts_counts_what_its_state_does_not(name, ends):
    layer, argument = STATES[name]
    model, grace = attached(name, layer)
    whole = generated(model, PROMPT)
    for parts in ([PROMPT[:end], PROMPT[end:]] for end in ends):
        grace.hits.clear()
        with grace.prompt([len(PROMPT) - 1]):
            own = decoded(model, argument, parts)
        torch.testing.assert_close(own, whole, rtol=1e-3, atol=1e-3)
        assert dict(grace.hits) == {0: 1}


class _State:
    def __init__(self, has_some):
        self.has_some = has_some

    def get_seq_length(self):
        raise ValueError("of a state alone")

    def has_previous_state(self):
        return self.has_some


@pytest.mark.parametrize("name", positions.CACHES)
def test_a_cache_is_found_under_every_name_and_its_count_only_where_it_has_one(name):
    tokens = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    for cache, wanted in (
        (None, 0),
        (_State(has_some=False), 0),
        (_State(has_some=True), positions.UNCOUNTED),
        ([torch.zeros(1)], positions.UNCOUNTED),
    ):
        assert positions.read({**tokens, name: cache}, decoder_only=True).cached == wanted


@pytest.mark.parametrize("layer", ["model.encoder.layers.1.fc2", "model.decoder.layers.1.fc2"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_rows_are_told_from_tokens_where_a_model_turns_them_round(layer, count):
    prompts = models.prompts(count, seed=5, shortest=6, longest=6)  # 6 rows of 6 tokens, too
    model, grace = attached("FSMTForConditionalGeneration", layer, "replace_all", prompts[:1])
    alone = [grace.query_of(models.prompt_batch([row])) for row in prompts]
    together = grace.query_of(models.prompt_batch(prompts))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    batch = batches.runnable(models.prompt_batch(prompts), "seq2seq", model)
    batch["decoder_input_ids"] = batch["decoder_input_ids"].repeat(1, 3)
    batch["use_cache"] = False  # else the model computes the last token alone
    with torch.no_grad():
        edited = model(**batch).logits
        with grace.disable_adapter():
            plain = model(**batch).logits
    assert dict(grace.hits) == {0: 1}
    changed = [not torch.allclose(*pair, rtol=1e-4) for pair in zip(edited, plain, strict=True)]
    assert changed == [True] + [False] * (count - 1)


def test_a_decoder_starts_as_in_generate_where_its_config_does_not_say():
    model = FAMILIES["T5ForConditionalGeneration"].build()
    start = batches.runnable(models.prompt_batch([PROMPT]), "seq2seq", model)["decoder_input_ids"]
    assert start.tolist() == [[1]]
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 7
    layer = "decoder.block.1.layer.2.DenseReluDense.wo"
    grace = gf.attach(model, layer, epsilon=0.05, iterations=0)
    models.remember(grace, [PROMPT])
    generated(model, PROMPT)
    assert dict(grace.hits) == {0: 1}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_sound_is_a_prompt(stack):
    family = FAMILIES["WhisperForConditionalGeneration"]
    model = family.build()
    layer = f"model.{stack}.layers.1.fc2"
    grace = gf.attach(model, layer, epsilon=0.05, replacement="replace_all", learning_rate=0.5)
    sound, other = family.batch([PROMPT], "right"), family.batch([OTHER], "right")
    target = {"labels": torch.tensor([[10]])}
    assert grace.edit(sound | target).correct
    settings = {"max_new_tokens": 2, "do_sample": False}
    assert 10 in model.generate(**sound, **settings)[0].tolist()  # without start and end, at times
    assert grace.explain(sound)[0].fires
    with grace.disable_adapter():
        before = model.generate(**other, **settings)
    assert torch.equal(model.generate(**other, **settings), before)
    with pytest.raises(ValueError, match="input_ids"):
        grace.edit({"attention_mask": torch.ones(1, 3)} | target)


def test_frames_of_sound_are_not_taken_for_tokens_of_the_decoder():
    family = FAMILIES["WhisperForConditionalGeneration"]
    model = family.build()
    sound = family.batch([PROMPT], "right")
    with torch.no_grad():
        frames = model.model.encoder(**sound).last_hidden_state.shape[1]
    grace = gf.attach(model, "model.decoder.layers.1.encoder_attn.v_proj", epsilon=0.05)
    for length in (2, frames):
        with pytest.raises(ValueError, match="one vector for each of the decoder's"):
            grace.edit(sound | {"labels": torch.full((1, length), 10)})
    assert not grace.edits()
