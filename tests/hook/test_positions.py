"""Which token of each sequence asks, and that padding, batching and packing do not matter to it."""

from __future__ import annotations

import models
import pytest
import torch
from models import FAMILIES, PADDING

import grace_fast as gf
from grace_fast.hook import positions

MODES = ("replace_all", "replace_last", "replace_prompt")


def ends(decoder_only=True, **arguments):
    tensors = {name: torch.as_tensor(value) for name, value in arguments.items()}
    found = positions.prompt_end(positions.read(tensors, decoder_only))
    return None if found is None else found.tolist()


IDS = [[5, 6, 7, 8], [5, 6, 7, 8]]
LABELS = [[-100, -100, 7, 8], [-100, 6, 7, 8]]

SOURCES = {
    "the last token": ({"input_ids": IDS}, [3, 3]),
    "the last token of embeddings": ({"inputs_embeds": torch.zeros(2, 4, 8)}, [3, 3]),
    "a mask with padding on the right": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]]},
        [1, 3],
    ),
    "a mask with padding on the left": (
        {"input_ids": IDS, "attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]]},
        [3, 3],
    ),
    "a mask that reaches back into a cache": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]},
        [2, 3],
    ),
    "a row without any token": (
        {"input_ids": IDS, "attention_mask": [[0, 0, 0, 0], [1, 0, 0, 0]]},
        [3, 0],
    ),
    "labels before the mask": (
        {"input_ids": IDS, "labels": LABELS, "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]},
        [1, 0],
    ),
    "labels that hold no prompt": (
        {"input_ids": IDS, "labels": [[5, 6, 7, 8], [-100, -100, -100, -100]]},
        [3, 3],
    ),
    "labels of another shape": ({"input_ids": IDS, "labels": [1, 0]}, [3, 3]),
    "position ids where a 4-D mask says nothing": (
        {
            "input_ids": IDS,
            "attention_mask": torch.zeros(2, 1, 4, 9),
            "position_ids": [[0, 1, 2, 0], [0, 0, 1, 2]],
        },
        [2, 3],
    ),
    "position ids of all rows": ({"input_ids": IDS, "position_ids": [[7, 8, 9, 10]]}, [3, 3]),
    "the mask before position ids": (
        {"input_ids": IDS, "attention_mask": [[1, 1, 0, 0]] * 2, "position_ids": [[0, 1, 2, 3]]},
        [1, 1],
    ),
}


@pytest.mark.parametrize("source", list(SOURCES))
def test_a_prompt_ends_at(source):
    arguments, expected = SOURCES[source]
    assert ends(**arguments) == expected


def test_labels_of_a_classifier_say_nothing_of_the_prompt():
    assert ends(decoder_only=False, input_ids=IDS, labels=LABELS) == [3, 3]
    assert ends(pixel_values=torch.zeros(1, 3, 8, 8)) is None


def packing(**arguments):
    tensors = {name: torch.as_tensor(value) for name, value in arguments.items()}
    found = positions.packed(positions.read(tensors, True))
    return None if found is None else (found.owner.tolist(), found.position.tolist())


def test_packed_sequences_end_where_the_next_begins():
    ids = [[5, 6, 7, 8, 9]]
    expected = ([0, 0, 0, 1, 1], [2, 4])
    assert packing(input_ids=ids, position_ids=[[0, 1, 2, 0, 1]]) == expected
    assert packing(input_ids=ids, cu_seq_lens_q=[0, 3, 5]) == expected
    assert packing(input_ids=ids, position_ids=[[0, 1, 2, 3, 4]]) is None
    mask = [[1, 1, 1, 1, 1]]
    assert packing(input_ids=ids, position_ids=[[0, 1, 2, 0, 1]], attention_mask=mask) is None
    labels = [[-100, 6, 7, -100, -100]]
    assert packing(input_ids=ids, position_ids=[[0, 1, 2, 0, 1]], labels=labels)[1] == [0, 4]


def test_packed_sequences_that_go_on_from_an_earlier_call_are_refused():
    with pytest.raises(ValueError, match=r"goes on from an earlier call.*query='every_token'"):
        packing(input_ids=[[5, 6, 7]], position_ids=[[0, 1, 8]])


@pytest.fixture(params=list(FAMILIES), ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def attached(family, replacement, query="prompt_end", **settings):
    model = models.build(family.name)
    chosen = {
        "epsilon": family.epsilon,
        "replacement": replacement,
        "query": query,
        "iterations": 0,
    }
    return model, gf.attach(model, family.layer, **{**chosen, **settings})


def answers(model, family, batch):
    """Return each row's own logits, at its last token."""
    if family.labels == "continuation":
        batch = models.with_positions(batch)
    if family.labels == "target":
        start = torch.full((len(batch["input_ids"]), 1), PADDING)
        batch = batch | {"decoder_input_ids": start}
    with torch.no_grad():
        logits = model(**batch).logits
    if family.labels != "continuation":
        return logits
    last = positions.prompt_end(positions.read(batch, True))
    return logits[torch.arange(len(logits)), last]


def sides(family):
    """Return where a family may be padded: BERT's and T5's positions count padding on the left."""
    return ("left", "right") if family.labels == "continuation" else ("right",)


ASKING = [(query, mode) for query in ("prompt_end", "every_step") for mode in MODES]
ASKING.append(("every_token", "replace_last"))  # a token that asks for itself is what is replaced


@pytest.mark.parametrize(("query", "replacement"), ASKING)
def test_left_right_and_no_padding_are_answered_alike(family, query, replacement):
    model, grace = attached(family, replacement, query)
    prompts = models.prompts(6)
    base = [answers(model, family, models.prompt_batch([row])) for row in prompts]
    models.remember(grace, prompts[:3])
    grace.hits.clear()
    alone = torch.cat([answers(model, family, models.prompt_batch([row])) for row in prompts])
    hits = dict(grace.hits)
    assert sum(hits.values()) >= 3  # a token that asks for itself may be found within a prompt
    changed = [not torch.equal(one, other[0]) for one, other in zip(alone, base, strict=True)]
    assert changed[:3] == [True] * 3
    assert changed[3:] == [False] * 3
    for side in sides(family):
        grace.hits.clear()
        together = answers(model, family, models.prompt_batch(prompts, side))
        assert dict(grace.hits) == hits, side
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.DECODERS)
@pytest.mark.parametrize("replacement", MODES)
def test_packed_rows_are_answered_as_rows_of_their_own(name, replacement):
    family = FAMILIES[name]
    model, grace = attached(family, replacement)
    prompts = models.prompts(4)
    models.remember(grace, [prompts[0], prompts[2]])
    alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in prompts]
    packed = {
        "input_ids": torch.tensor([[token for row in prompts for token in row]]),
        "position_ids": torch.tensor([[at for row in prompts for at in range(len(row))]]),
    }
    grace.hits.clear()
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0]
    assert dict(grace.hits) == {0: 1, 1: 1}
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    with grace.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(**packed, use_cache=False).logits[0], together)


@pytest.mark.parametrize("name", models.DECODERS)
def test_hidden_padding_on_the_right_of_a_decoder_is_refused(name):
    family = FAMILIES[name]
    model, grace = attached(family, "replace_all")
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    batch = models.pad([short, long], "right")
    model(input_ids=batch)  # no edit: nothing is asked
    models.remember(grace, [short])
    version = grace.codebook.version
    for ask in (model, lambda input_ids: model.generate(input_ids, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"row 0 ends in padding.*no attention_mask"):
            ask(input_ids=batch)
    assert grace.codebook.version == version
    model(input_ids=models.pad([short, long], "left"))
    model(input_ids=batch, attention_mask=(batch != PADDING).long())
    assert grace.hits[0] == 1


def test_an_end_token_at_the_end_is_not_padding():
    family = FAMILIES["gpt2"]
    model = models.build("gpt2")
    model.config.pad_token_id = model.config.eos_token_id
    grace = gf.attach(model, family.layer, epsilon=1.0)
    models.remember(grace, [[5, 6, 2]])
    model(input_ids=torch.tensor([[5, 6, 2]]))
    assert grace.hits[0] == 1
    for padding in (2, None):
        model.config.pad_token_id = padding
        grace.unload()
        grace = gf.attach(model, family.layer, epsilon=1.0)
        models.remember(grace, [[5, 6, 2]])
        padded = {"input_ids": torch.tensor([[5, 6, 2, 2]])}
        with pytest.raises(ValueError, match="ends in padding"):
            model(**padded)
        with pytest.raises(ValueError, match="ends in padding"):
            grace.explain(padded)


def test_a_token_that_asks_for_itself_is_what_is_replaced():
    family = FAMILIES["llama"]
    model, grace = attached(family, "replace_prompt", "every_token")
    assert grace.settings.replacement == "replace_last"
    layer, seen = model.get_submodule(family.layer), []
    prompts = models.prompts(2, shortest=6, longest=6)
    models.remember(grace, [prompts[0][:4]])
    layer.register_forward_hook(lambda _, __, output: seen.append(output))
    both = {"input_ids": torch.tensor(prompts)}
    with torch.no_grad():
        model(**both)
        with grace.disable_adapter():
            model(**both)
    edited, plain = seen
    assert torch.equal(edited[0, 3], grace.codebook.values[0])
    edited[0, 3] = plain[0, 3]
    assert torch.equal(edited, plain)


def test_an_edit_whose_tokens_ask_for_themselves_is_trained_beside_the_others():
    family = FAMILIES["gpt2"]
    model, grace = attached(
        family, "replace_last", "every_token", iterations=60, learning_rate=0.3, epsilon=0.01
    )
    prompt = models.prompts(1, shortest=8, longest=8)[0]
    models.remember(grace, [prompt[:4]])  # what the prompt passes on its way
    report = grace.edit(models.edit_batch(family, [prompt], [[10]]))
    assert report.correct
    with torch.no_grad():
        loss = model(**models.edit_batch(family, [prompt], [[10]])).loss
    assert float(loss) == pytest.approx(report.loss, rel=1e-3)
    assert grace.hits == {0: 1, report.row: 1}


def test_a_padded_batch_of_edits_decides_as_edits_one_by_one(family):
    prompts = [*models.prompts(4), models.prompts(4)[1]]
    targets = [[10], [11], [12], [13], [11]]
    model, grace = attached(family, "replace_all", epsilon=family.epsilon)
    one_by_one = [
        grace.edit(models.edit_batch(family, [row], [target]))
        for row, target in zip(prompts, targets, strict=True)
    ]
    for side in sides(family):
        grace.unload()
        grace = gf.attach(
            model, family.layer, epsilon=family.epsilon, replacement="replace_all", iterations=0
        )
        batch = models.edit_batch(family, prompts, targets, side)
        if family.labels == "continuation":
            batch["attention_mask"] = (batch["input_ids"] != PADDING).long()
            batch = models.with_positions(batch)
        together = grace.edit_batch(batch)
        assert [edit.outcome for edit in together] == [edit.outcome for edit in one_by_one], side
        assert [edit.row for edit in together] == [edit.row for edit in one_by_one], side
