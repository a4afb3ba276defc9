"""Sequences computed over several calls: caches, chunks, beams, drafts and loops of one's own."""

from __future__ import annotations

import random

import models
import numpy as np
import pytest
import torch
from models import FAMILIES
from transformers import DynamicCache, StaticCache

import grace_fast as gf

MODES = ("replace_all", "replace_last", "replace_prompt")


def attached(name, replacement="replace_all", query="prompt_end", edited=3, radius=1e-2):
    family, model = FAMILIES[name], models.build(name)
    grace = gf.attach(
        model,
        family.layer,
        epsilon=family.epsilon,
        replacement=replacement,
        query=query,
        iterations=0,
    )
    if edited:
        models.remember(grace, models.prompts(6)[:edited], radius)
    grace.hits.clear()
    return model, grace


def generated(model, rows, tokens=4, **settings):
    """Return the tokens and the logits of each new one."""
    torch.manual_seed(0)
    said = model.generate(
        **models.prompt_batch(rows, "left"),
        **{"do_sample": False, "eos_token_id": None, **settings},
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return said.sequences[:, -tokens:], torch.stack(said.logits)


def same(one, other):
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4)


ALL = (*models.DECODERS, "t5-encoder", "t5-decoder")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("replacement", MODES)
def test_with_and_without_a_cache_the_same_is_generated(name, replacement):
    prompts = models.prompts(6)
    model, grace = attached(name, replacement)
    cached = generated(model, prompts)
    assert dict(grace.hits) == {0: 1, 1: 1, 2: 1}
    same(generated(model, prompts, use_cache=False), cached)
    assert dict(grace.hits) == {0: 2, 1: 2, 2: 2}
    with grace.disable_adapter():
        plain = generated(model, prompts)
    changed = [
        not torch.allclose(*pair, rtol=1e-3) for pair in zip(plain[1][0], cached[1][0], strict=True)
    ]
    assert changed == [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("replacement", MODES)
def test_a_static_cache_and_a_growing_one_hold_the_same(name, replacement):
    prompts = models.prompts(6)
    model, grace = attached(name, replacement)
    growing = generated(model, prompts)
    same(generated(model, prompts, cache_implementation="static"), growing)
    assert dict(grace.hits) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_generates_what_its_prompts_generate_alone(name):
    prompts = models.prompts(6)
    model, grace = attached(name)
    tokens, logits = generated(model, prompts)
    hits = dict(grace.hits)
    for at, row in enumerate(prompts):
        same(generated(model, [row]), (tokens[at : at + 1], logits[:, at : at + 1]))
    assert dict(grace.hits) == {row: 2 * count for row, count in hits.items()}


ASKING_IN_CHUNKS = [("prompt_end", "replace_last"), ("every_token", "replace_last")]


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize(("query", "replacement"), ASKING_IN_CHUNKS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_chunks_is_answered_as_a_whole(name, query, replacement, cache):
    prompts = models.prompts(6)
    model, grace = attached(name, replacement, query)
    whole = generated(model, prompts)
    hits = dict(grace.hits)
    assert set(hits) == {0, 1, 2}
    for size in (1, 2, 3, 5):  # of 9 tokens; 2 leaves the last token to a chunk of its own
        grace.hits.clear()
        same(generated(model, prompts, prefill_chunk_size=size, cache_implementation=cache), whole)
        assert dict(grace.hits) == hits, size


NAMES_BOTH = "attach with replacement='replace_last' or query='every_token'"


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("replacement", ["replace_all", "replace_prompt"])
def test_modes_that_write_before_the_prompts_end_refuse_chunks_and_cached_prefixes(
    name, replacement
):
    prompt = models.prompts(1)[0]
    model, grace = attached(name, replacement)
    version = grace.codebook.version
    with pytest.raises(ValueError, match=NAMES_BOTH):
        generated(model, [prompt], prefill_chunk_size=3)
    cache = DynamicCache(config=model.config)
    with grace.disable_adapter(), torch.no_grad():
        model(torch.tensor([prompt[:3]]), past_key_values=cache)
    with pytest.raises(ValueError, match=NAMES_BOTH):
        generated(model, [prompt], past_key_values=cache)
    assert grace.codebook.version == version
    assert not grace.hits
    generated(model, [prompt])
    assert dict(grace.hits) == {0: 1}


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize(("query", "replacement"), ASKING_IN_CHUNKS)
def test_a_cached_prefix_is_answered_as_a_whole(name, query, replacement):
    prompt = models.prompts(1)[0]
    model, grace = attached(name, replacement, query)
    whole = generated(model, [prompt])
    for length in (2, len(prompt) - 1):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), grace.prompt([len(prompt) - 1]):
            model(torch.tensor([prompt[:length]]), past_key_values=cache)
        same(generated(model, [prompt], past_key_values=cache), whole)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_beams_of_a_prompt_share_its_look_up(name, settings):
    prompts = models.prompts(6)
    model, grace = attached(name)
    cached, _ = generated(model, prompts, **settings)
    # An encoder runs before its prompts are made several.
    each = 1 if name == "t5-encoder" else settings["num_beams"]
    assert dict(grace.hits) == {0: each, 1: each, 2: each}
    uncached, _ = generated(model, prompts, use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    with grace.disable_adapter():
        plain, _ = generated(model, prompts, **settings)
    rows = settings.get("num_return_sequences", 1)
    assert torch.equal(plain[3 * rows :], cached[3 * rows :])
    assert not torch.equal(plain[: 3 * rows], cached[: 3 * rows])


def test_several_samples_of_a_prompt_ask_alike():
    prompts = models.prompts(6)
    model, grace = attached("llama")
    settings = {"do_sample": True, "num_return_sequences": 3}
    cached = generated(model, prompts, **settings)
    assert dict(grace.hits) == {0: 3, 1: 3, 2: 3}
    same(generated(model, prompts, use_cache=False, **settings), cached)


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("replacement", MODES)
def test_assisted_decoding_generates_what_greedy_does(name, replacement):
    prompts = models.prompts(2)
    model, grace = attached(name, replacement, edited=1)
    assistant = models.build(name, seed=1)
    edited_too = gf.attach(assistant, FAMILIES[name].layer, replacement=replacement, iterations=0)
    models.remember(edited_too, prompts)
    for row in prompts:
        greedy, _ = generated(model, [row], tokens=8)
        for drafts in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            grace.hits.clear()
            assisted, _ = generated(model, [row], tokens=8, **drafts)
            assert torch.equal(assisted, greedy), drafts
            assert dict(grace.hits) == ({0: 1} if row is prompts[0] else {})


def decoded(model, rows, static, chunks=(99,), tokens=4):
    """Decode greedily in a loop of one's own, with the positions that padding on the left has."""
    batch = models.with_positions(models.prompt_batch(rows, "left"))
    ids, mask, at = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
    cache = (
        StaticCache(config=model.config, max_cache_len=32)
        if static
        else DynamicCache(config=model.config)
    )
    parts, start = [], 0
    for size in chunks:
        parts.append(slice(start, min(start + size, ids.shape[1])))
        start += size
    said = []
    for part in parts:
        logits = model(
            ids[:, part],
            attention_mask=mask[:, : part.stop],
            position_ids=at[:, part],
            past_key_values=cache,
        ).logits
    for _ in range(tokens):
        said.append(logits[:, -1])
        mask, at = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1), at[:, -1:] + 1
        logits = model(
            said[-1].argmax(1)[:, None],
            attention_mask=mask,
            position_ids=at,
            past_key_values=cache,
        ).logits
    return torch.stack(said)


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("replacement", MODES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_loop_of_ones_own_within_prompt_decodes_as_generate_does(name, replacement, static):
    prompts = models.prompts(6)
    model, grace = attached(name, replacement)
    logits = generated(model, prompts)[1]
    last = max(map(len, prompts)) - 1
    with torch.no_grad():
        for positions in (None, [last] * 6, torch.full((6,), last)):
            with grace.prompt(positions):
                own = decoded(model, prompts, static)
            torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-4)
        if replacement == "replace_last":
            with grace.prompt([last] * 6):
                own = decoded(model, prompts, static, chunks=(4, 4, 4))
            torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-4)
        else:
            with grace.prompt([last] * 6), pytest.raises(ValueError, match=NAMES_BOTH):
                decoded(model, prompts, static, chunks=(4, 4, 4))


def test_prompt_refuses_positions_that_are_none():
    _, grace = attached("llama")
    for wrong in ([-1, 3], [[1, 2]]):
        refused = pytest.raises(ValueError, match=r"positions must be \[B\] and at least 0")
        with refused, grace.prompt(wrong):
            pass


def test_the_newest_token_asks_at_every_step():
    prompt = models.prompts(1)[0]
    model, grace = attached("llama", "replace_last", "every_step", edited=0)
    first = int(generated(model, [prompt], tokens=1)[0])
    models.remember(grace, [[*prompt, first]])
    grace.hits.clear()
    plain_model = models.build("llama")
    plain, edited = generated(plain_model, [prompt]), generated(model, [prompt])
    assert dict(grace.hits) == {0: 1}
    torch.testing.assert_close(plain[1][0], edited[1][0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain[1][1], edited[1][1], rtol=1e-2)


def test_a_generation_that_is_broken_off_holds_nothing():
    prompts = models.prompts(2)
    model, _ = attached("llama", edited=1)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([prompts[0]]), stopping_criteria=[stop], max_new_tokens=2)
    alone = generated(model, [prompts[1]])
    same(generated(models.build("llama"), [prompts[1]]), alone)


def state(model, grace):
    book = grace.codebook
    tensors = [*model.state_dict().values(), book.keys, book.values, book.radii, book.live]
    return [tensor.clone() for tensor in tensors], book.version


def generators():
    """Return what the global generators would draw from."""
    legacy = np.random.get_state()  # noqa: NPY002, it is the global one that is looked at
    return torch.get_rng_state().tolist(), str(legacy), random.getstate()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_look_up_changes_no_byte_and_draws_from_no_generator(name):
    prompts = models.prompts(6)
    model, grace = attached(name)
    tensors, version = state(model, grace)
    batch = models.prompt_batch(prompts, "right")
    if FAMILIES[name].labels == "target":
        batch["decoder_input_ids"] = torch.zeros(6, 1, dtype=torch.long)
    drawn = generators()
    with torch.no_grad():
        model(**batch)
        if name != "bert":
            settings = {"max_new_tokens": 3, "do_sample": False}
            model.generate(**models.prompt_batch(prompts, "left"), **settings)
    assert sum(grace.hits.values()) >= 3
    after, same_version = state(model, grace)
    assert same_version == version
    assert all(torch.equal(one, other) for one, other in zip(tensors, after, strict=True))
    assert generators() == drawn


@pytest.mark.parametrize("name", list(FAMILIES))
def test_train_and_eval_do_not_start_or_stop_an_edit(name):
    prompts = models.prompts(6)
    model, grace = attached(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    batch = models.prompt_batch(prompts, "right")
    if FAMILIES[name].labels == "target":
        batch["decoder_input_ids"] = torch.zeros(6, 1, dtype=torch.long)
    version, rows = grace.codebook.version, len(grace.codebook)
    for mode in (model.train, model.eval, model.train):
        mode()
        grace.hits.clear()
        model(**batch)
        assert set(grace.hits) >= {0, 1, 2}
        assert (grace.codebook.version, len(grace.codebook)) == (version, rows)
    with grace.disable_adapter():
        model.train()
        grace.hits.clear()
        model(**batch)
        assert not grace.hits
