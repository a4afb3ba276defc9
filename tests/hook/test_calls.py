"""Every way that a call reaches the edited layer: by name, from within, beside others, traced."""

from __future__ import annotations

import contextvars
import functools
import threading

import models
import pytest
import torch
from models import FAMILIES
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

import grace_fast as gf
from grace_fast.errors import SelectionWarning
from grace_fast.hook import calls, positions

MODES = ("replace_all", "replace_last", "replace_prompt")
EDITED, OTHER = models.prompts(2, shortest=6, longest=6)
SHORT = EDITED[:4]  # padded beside the others
STEPS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def attached(name="llama", replacement="replace_last", known=(EDITED,), model=None, **settings):
    family = FAMILIES[name]
    model = models.build(name) if model is None else model
    chosen = {"epsilon": 0.1, "replacement": replacement, "iterations": 0, **settings}
    grace = gf.attach(model, chosen.pop("layer", family.layer), **chosen)
    models.remember(grace, [*known])
    grace.hits.clear()
    return model, grace


def padded(family):
    batch = models.prompt_batch([SHORT, OTHER])
    if family.labels == "target":
        batch["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
    return batch


@pytest.mark.parametrize("name", list(FAMILIES))
def test_forward_called_by_name_asks_as_the_model_does(name):
    model, grace = attached(name, known=[SHORT])
    batch = padded(FAMILIES[name])
    with torch.no_grad():
        plain = models.build(name)(**batch).logits
        called = model(**batch).logits
        by_name = model.forward(**batch).logits
        in_place = batch.values() if name in ("bert", "llama", "qwen") else ()
        by_place = model.forward(*in_place).logits if in_place else by_name
    assert not torch.equal(called[0], plain[0])
    assert torch.equal(by_name, called)
    assert torch.equal(by_place, called)
    assert dict(grace.hits) == {0: 3 if in_place else 2}


@pytest.mark.parametrize("replacement", MODES)
def test_labels_say_where_the_prompt_ends_in_a_call_by_name(replacement):
    model, grace = attached(replacement=replacement)
    batch = models.edit_batch(FAMILIES["llama"], [EDITED], [[10, 11]])
    with torch.no_grad():
        assert torch.equal(model.forward(**batch).logits, model(**batch).logits)
    assert dict(grace.hits) == {0: 2}


@pytest.mark.parametrize("replacement", MODES)
def test_the_inner_stack_asks_as_the_model_around_it(replacement):
    model, grace = attached(replacement=replacement, known=[SHORT])
    batch = padded(FAMILIES["llama"])
    with torch.no_grad():
        expected = model(**batch).logits
        for ask in (model.model, model.model.forward):
            assert torch.equal(model.lm_head(ask(**batch).last_hidden_state), expected)
    assert dict(grace.hits) == {0: 3}


def test_a_decoder_that_flattens_its_tokens_is_asked_by_its_inner_stack():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    )
    model = OPTForCausalLM(config).eval()
    model, _ = attached(
        model=model, layer="model.decoder.layers.1.fc2", replacement="replace_all", known=[SHORT]
    )
    batch = padded(FAMILIES["llama"])
    with torch.no_grad():
        expected = model(**batch).logits
        for ask in (model.model, model.model.decoder, model.model.decoder.forward):
            said = model.lm_head(ask(**batch).last_hidden_state)
            torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)


def blip2(text):
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 32, "vocab_size": 100},
        text_config={"vocab_size": 100, "pad_token_id": 0, **text},
        num_query_tokens=4,
        image_token_index=99,
    )
    return Blip2ForConditionalGeneration(config).eval()


OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
INNER = [
    *((OPT, "model.decoder.layers.1.fc2", mode) for mode in MODES),
    (T5, "encoder.block.1.layer.1.DenseReluDense.wo", "replace_all"),
    (T5, "decoder.block.1.layer.2.DenseReluDense.wo", "replace_all"),
]


@pytest.mark.parametrize(("text", "layer", "replacement"), INNER)
def test_a_language_model_that_generates_within_another_says_the_same_without_a_cache(
    text, layer, replacement
):
    model = blip2(text)
    grace = gf.attach(model, f"language_model.{layer}", replacement=replacement, iterations=0)
    batch = models.prompt_batch([[99] * 4 + EDITED]) | {"pixel_values": torch.randn(1, 3, 8, 8)}
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if text is T5 else {}
    query = grace.query_of(batch | start)
    value = 3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    grace.codebook.append(query, value, torch.tensor([0.05]))
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached = model.generate(**batch, **steps)
    assert dict(grace.hits) == {0: 1}
    assert torch.equal(model.generate(**batch, **steps, use_cache=False), cached)
    assert dict(grace.hits) == {0: 2}


def test_a_layer_that_runs_outside_any_call_of_tokens_says_so():
    model, grace = attached(replacement="replace_all")
    layer, seen = model.get_submodule(FAMILIES["llama"].layer), []
    with layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        model(torch.tensor([EDITED]))
    with pytest.raises(ValueError, match=r"ran outside a call.*LlamaForCausalLM.*grace\.prompt"):
        layer(seen[0])
    with grace.prompt([len(EDITED) - 1]):
        assert torch.equal(layer(seen[0])[0, 0], grace.codebook.values[0])
    with grace.disable_adapter():
        layer(seen[0])
    grace.unload()
    model, grace = attached(query="every_token", model=model)
    assert torch.equal(layer(seen[0])[0, -1], grace.codebook.values[0])


def guided(model, prompt, negative, **settings):
    ids = None if negative is None else torch.tensor([negative])
    given = {"negative_prompt_ids": ids, "guidance_scale": 2.0, **STEPS, **settings}
    return model.generate(**models.prompt_batch([prompt]), **given)


@pytest.mark.parametrize("replacement", MODES)
def test_guidance_compares_the_prompt_with_its_own_negative_one(replacement):
    model, grace = attached(replacement=replacement)
    with torch.no_grad():
        one, two = (
            model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in (EDITED, OTHER)
        )
    for prompt, negative, wanted in (
        (EDITED, OTHER, 2 * one - two),
        (OTHER, EDITED, 2 * two - one),
    ):
        said = guided(model, prompt, negative, output_scores=True, return_dict_in_generate=True)
        torch.testing.assert_close(said.scores[0][0], wanted, rtol=1e-4, atol=1e-3)
    grace.hits.clear()
    for negative in (None, OTHER, EDITED, EDITED[:3], [*OTHER, *EDITED]):
        cached = guided(model, EDITED, negative)
        assert torch.equal(guided(model, EDITED, negative, use_cache=False), cached)
    cached = guided(model, OTHER, EDITED)
    assert torch.equal(guided(model, OTHER, EDITED, use_cache=False), cached)


@pytest.mark.parametrize("replacement", MODES)
def test_a_negative_prompt_may_be_asked_before_the_prompt_while_an_assistant_drafts(replacement):
    model, grace = attached(replacement=replacement)
    asked = []
    with model.register_forward_pre_hook(
        lambda _, args, given: asked.append((args or (given["input_ids"],))[0].tolist()),
        with_kwargs=True,
    ):
        guided(model, EDITED, OTHER, assistant_model=models.build("llama", seed=1))
    prompt = next(at for at, (row,) in enumerate(asked) if row[: len(EDITED)] == EDITED)
    assert asked.index([OTHER]) < prompt
    assert dict(grace.hits) == {0: 1}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("replacement", MODES)
def test_a_criterion_may_ask_the_model_something_else_between_steps(replacement, use_cache):
    model, _grace = attached(replacement=replacement)
    asked = [torch.tensor([row]) for row in (EDITED, OTHER, [7], [*OTHER, 5])]
    with torch.no_grad():
        expected = [model(ids).logits for ids in asked]
    alone = [
        model.generate(torch.tensor([row]), **STEPS, use_cache=use_cache) for row in (EDITED, OTHER)
    ]
    seen = []

    def ask(ids, *_, **__):
        seen.append([model(other).logits for other in asked])
        return torch.zeros(len(ids), dtype=torch.bool)

    for row, plain in zip((EDITED, OTHER), alone, strict=True):
        batch = models.prompt_batch([row])
        said = model.generate(**batch, **STEPS, use_cache=use_cache, stopping_criteria=[ask])
        assert torch.equal(said, plain)
    for answers in seen:
        for answer, right in zip(answers, expected, strict=True):
            torch.testing.assert_close(answer, right, rtol=1e-4, atol=1e-4)


def streamed(model, grace, prompt, tokens=5):
    """Decode greedily, a token at a time; what a generator begins may never end."""
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
    with grace.prompt():
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache).logits[:, -1].argmax(1)[:, None]
            yield int(ids)


@pytest.mark.parametrize("replacement", MODES)
def test_generators_that_take_turns_or_are_given_up_do_not_mix(replacement):
    model, grace = attached(replacement=replacement)
    with torch.no_grad():
        one, two = (
            model.generate(torch.tensor([row]), **STEPS)[0, len(row) :].tolist()
            for row in (EDITED, OTHER)
        )
        pairs = zip(streamed(model, grace, EDITED), streamed(model, grace, OTHER), strict=True)
        assert list(pairs) == list(zip(one, two, strict=True))
        given_up = streamed(model, grace, EDITED)
        next(given_up)
        assert list(streamed(model, grace, OTHER)) == two
        assert list(streamed(model, grace, EDITED)) == one
        with grace.disable_adapter():
            plain = model(torch.tensor([OTHER])).logits
        assert torch.equal(model(torch.tensor([OTHER])).logits, plain)
        given_up.close()


@pytest.mark.parametrize("replacement", MODES)
def test_rows_that_become_several_on_one_cache_share_their_decision(replacement):
    model, grace = attached(replacement=replacement)
    cache, newer = DynamicCache(config=model.config), [[10], [11], [12]]
    with torch.no_grad(), grace.prompt():
        model(torch.tensor([EDITED]), past_key_values=cache)
        cache.batch_repeat_interleave(3)
        step = model(torch.tensor(newer), past_key_values=cache).logits[:, -1]
    with torch.no_grad(), grace.prompt([len(EDITED) - 1]):
        whole = model(torch.tensor([EDITED + one for one in newer])).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_a_call_that_is_broken_off_leaves_nothing():
    model, _ = attached(known=[SHORT])
    batch = padded(FAMILIES["llama"])
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state

    def stop(*_):
        raise KeyboardInterrupt

    with model.model.layers[2].register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        model(torch.tensor([EDITED]), labels=torch.tensor([EDITED]))
    with torch.no_grad():
        assert torch.equal(model.model(**batch).last_hidden_state, expected)
    assert not calls.in_progress.stack


def test_a_replica_runs_its_own_modules():
    model, grace = attached()
    replica = model._replicate_for_data_parallel()
    replica.lm_head = torch.nn.Linear(32, models.VOCABULARY, bias=False)
    ids = torch.tensor([EDITED])
    with torch.no_grad():
        expected = replica.lm_head(model.model(ids).last_hidden_state)
        assert torch.equal(replica(ids).logits, expected)
    assert dict(grace.hits) == {0: 2}


def test_forward_is_given_back_whoever_wraps_it_meanwhile():
    model, grace = attached()
    plain = models.build("llama")(torch.tensor([EDITED])).logits
    second = gf.attach(model, "model.layers.2.mlp.down_proj", iterations=0)
    grace.unload()
    second.unload()
    assert "forward" not in vars(model) | vars(model.model)
    model, grace = attached(model=model)
    ours = model.forward
    wrapped = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    model.forward = wrapped
    grace.unload()
    assert model.forward is wrapped
    assert torch.equal(model(torch.tensor([EDITED])).logits, plain)
    model, grace = attached(model=model)
    assert not torch.equal(model(torch.tensor([EDITED])).logits, plain)
    assert dict(grace.hits) == {0: 1}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_that_would_repeat_one_decision_is_refused():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3))
    grace = gf.attach(layers, "0", iterations=0)
    hidden = torch.randn(1, 2, 4)
    grace.codebook.append(hidden[:, -1], torch.ones(1, 3), torch.ones(1))
    for known in (True, False):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.trace records what is decided for one"
        ):
            torch.jit.trace(layers, hidden, check_trace=False)
        if known:
            grace.codebook.remove(0)  # what is added later would be missed, too
    with grace.disable_adapter():
        assert torch.equal(torch.jit.trace(layers, hidden)(hidden), layers(hidden))


def test_a_transform_that_hides_numbers_is_refused_where_there_is_something_to_look_up():
    model, grace = attached("llama")
    weights = {name: one.detach() for name, one in model.named_parameters()}
    ids = torch.tensor([EDITED])

    def loss(weights):
        called = torch.func.functional_call(model, weights, (ids,), {"use_cache": False})
        return called.logits.sum()

    with torch.no_grad():
        assert torch.equal(loss(weights), model(ids).logits.sum())
    with pytest.raises(RuntimeError, match=r"torch\.func.*disable_adapter"):
        torch.func.grad(loss)(weights)
    with grace.disable_adapter():
        torch.func.grad(loss)(weights)
    model(ids)
    assert dict(grace.hits) == {0: 3}


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_blocks_that_are_compiled_one_by_one_are_told_apart_by_their_hooks(dynamo):
    model, grace = attached(known=[SHORT])
    batch = padded(FAMILIES["llama"]) | {"use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
        for block in model.model.layers:
            block.compile(backend="eager")
        assert torch.equal(model(**batch).logits, expected)
    assert dict(grace.hits) == {0: 2}


def test_a_compiled_part_of_the_model_asks_as_the_whole(dynamo):
    model, grace = attached(known=[SHORT])
    batch = padded(FAMILIES["llama"]) | {"use_cache": False}
    labelled = models.edit_batch(FAMILIES["llama"], [SHORT], [[10, 11]]) | {"use_cache": False}
    with torch.no_grad():
        expected, answered = model(**batch).logits, model(**labelled).logits
        by_name = torch.compile(model.forward, backend="eager", fullgraph=True)
        assert torch.equal(by_name(**batch).logits, expected)
        inner = torch.compile(model.model, backend="eager", fullgraph=True)
        assert torch.equal(model.lm_head(inner(**batch).last_hidden_state), expected)
        model.model.compile(backend="eager")  # within a call that has the labels
        assert torch.equal(model(**labelled).logits, answered)
    assert dict(grace.hits) == {0: 5}


def classifier(name):
    torch.manual_seed(0)
    wide = {"vocab_size": models.VOCABULARY, "pad_token_id": 0, "num_labels": 3}
    if name == "gpt2":
        config = GPT2Config(**wide, n_embd=32, n_layer=3, n_head=2, initializer_range=0.15)
        return GPT2ForSequenceClassification(config).eval()
    config = LlamaConfig(
        **wide,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoders_classifier_finds_the_end_without_a_mask_as_its_head_does(name, replacement):
    model, grace = attached(name, replacement, model=classifier(name), known=[SHORT])
    for side in ("right", "left"):
        batch = models.prompt_batch([SHORT, OTHER], side)
        if side == "right":
            with torch.no_grad():
                alone = model(torch.tensor([SHORT])).logits
                masked = model(**batch).logits
            torch.testing.assert_close(masked[:1], alone, rtol=1e-4, atol=1e-4)
            grace.hits.clear()
            with torch.no_grad():
                hidden = model(batch["input_ids"]).logits
            torch.testing.assert_close(hidden, masked, rtol=1e-4, atol=1e-4)
            assert dict(grace.hits) == {0: 1}
            query = grace.query_of({"input_ids": batch["input_ids"]})
            torch.testing.assert_close(query, grace.query_of(batch), rtol=1e-4, atol=1e-4)
        else:
            call = grace._adapter.read({"input_ids": batch["input_ids"]})
            assert positions.prompt_end(call).tolist() == [5, 5]


def test_packed_rows_are_told_by_their_bounds_whatever_mask_keeps_them_apart():
    tokens = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "attention_mask": torch.ones(1, 1, 5, 5),
    }
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3, 5])}
    new = tokens | bounds | {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert positions.packed(positions.read(new, True)).position.tolist() == [2, 4]
    going_on = tokens | bounds | {"position_ids": torch.tensor([[0, 1, 2, 6, 7]])}
    with pytest.raises(ValueError, match=r"continuous batching.*attach with query='every_token'"):
        positions.packed(positions.read(going_on, True))


def in_a_thread(work):
    caught = []

    def run():
        try:
            work()
        except Warning as warning:  # they are errors here
            caught.append(warning)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught


def test_a_thread_that_does_not_take_over_the_codebook_in_use_is_warned_once():
    model, grace = attached(name="llama")
    grace.unload()
    grace = gf.attach(model, FAMILIES["llama"].layer, name="tenant", iterations=0)
    models.remember(grace, [EDITED])

    def ask():
        model(torch.tensor([EDITED]))

    def choose_none():
        with gf.using(None):
            ask()

    assert not in_a_thread(ask)
    with gf.using("tenant"):
        grace.hits.clear()
        (told,) = in_a_thread(ask)
        assert isinstance(told, SelectionWarning)
        assert "asks without the codebook 'tenant'" in str(told)
        assert not grace.hits
        assert not in_a_thread(choose_none)
        assert not in_a_thread(functools.partial(contextvars.copy_context().run, ask))
        assert dict(grace.hits) == {0: 1}
    with gf.using(["tenant"]):
        assert len(in_a_thread(ask)) == 1
    asked, go = threading.Event(), threading.Event()

    def serve_without():
        ask()
        asked.set()
        go.wait(60)
        ask()  # as it did before the other thread chose

    seen = []
    worker = threading.Thread(target=lambda: seen.append(serve_without()))
    worker.start()
    asked.wait(60)
    with gf.using("tenant"):
        go.set()
        worker.join()
    assert seen == [None]
