"""Every family of transformers that generates: what `docs/families.md` says of it is so."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import families
import family_outcomes
import pytest
import torch
import transformers

import grace_fast as gf
from grace_fast.editor import heads, session
from grace_fast.editor.prefix_cache import PrefixCache

TABLE = family_outcomes.table()
IS_OF_TABLE = transformers.__version__ in family_outcomes.TABLE.read_text().split("\n")[2]

# Those that are used most, and one of each way to be odd. The others are slow together, not alone.
_USED = """
    LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM GemmaForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Phi3ForCausalLM PhiForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM
    GPTJForCausalLM GPTNeoForCausalLM GPTBigCodeForCausalLM OPTForCausalLM BloomForCausalLM
    FalconForCausalLM MptForCausalLM StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM
    Cohere2ForCausalLM Olmo2ForCausalLM OlmoeForCausalLM GraniteForCausalLM
    GraniteMoeHybridForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4ForCausalLM
    GptOssForCausalLM SmolLM3ForCausalLM BartForCausalLM BertLMHeadModel RobertaForCausalLM
    XLNetLMHeadModel ReformerModelWithLMHead CpmAntForCausalLM HrmTextForCausalLM
    MambaForCausalLM Mamba2ForCausalLM RwkvForCausalLM RecurrentGemmaForCausalLM
    BambaForCausalLM Lfm2ForCausalLM ZambaForCausalLM
    T5ForConditionalGeneration MT5ForConditionalGeneration BartForConditionalGeneration
    PegasusForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration
    FSMTForConditionalGeneration LEDForConditionalGeneration T5Gemma2ForConditionalGeneration
    WhisperForConditionalGeneration Speech2TextForConditionalGeneration
    LlavaForConditionalGeneration Qwen2VLForConditionalGeneration
    Gemma3ForConditionalGeneration
"""
USED = frozenset(_USED.split())

EVERYONE = {family.name: family for family in families.everyone()}


def the(name):
    return pytest.param(name, marks=[] if name in USED else pytest.mark.slow)


@pytest.mark.skipif(not IS_OF_TABLE, reason="the table is of another version of transformers")
@pytest.mark.parametrize("name", [the(name) for name in EVERYONE])
def test_a_family_does_what_the_table_says(name):
    assert [compared(one) for one in family_outcomes.outcomes(EVERYONE[name])] == [
        compared(one) for one in TABLE[name]
    ]


def compared(outcome):
    """Why a family is not tried depends on what else is installed."""
    return outcome._replace(why="") if outcome.result == "not tried" else outcome


@pytest.mark.skipif(not IS_OF_TABLE, reason="the table is of another version of transformers")
def test_the_table_lists_every_family_and_nothing_wrong():
    assert list(TABLE) == list(EVERYONE)
    assert set(EVERYONE) >= USED
    results = {one.result for found in TABLE.values() for one in found}
    assert results <= {"same", "itself", "refused", "not tried"}
    silent = [one for found in TABLE.values() for one in found if one.result != "same"]
    assert all(one.why for one in silent)


class Whole(PrefixCache):
    """Every step runs the whole model."""

    def step(self):
        return nullcontext()


def edit_of(family, model):
    """Return what an edit is given: a prompt of six tokens and a target of two."""
    ids = [9, 33, 71, 12, 55, 14]
    if heads.kind_of(model) == "seq2seq":
        return family.batch([ids], "right") | {"labels": torch.tensor([[10, 11]])}
    labels = torch.tensor([[-100] * len(ids) + [10, 11]])
    return family.batch([[*ids, 10, 11]], "left") | {"labels": labels}


@pytest.mark.skipif(not IS_OF_TABLE, reason="the table is of another version of transformers")
@pytest.mark.parametrize("name", [the(name) for name in EVERYONE])
def test_a_family_learns_the_same_value_where_what_lies_below_runs_once(name, monkeypatch):
    family = EVERYONE[name]
    for layer in [one.layer for one in TABLE[name] if one.result in ("same", "itself")]:
        learnt = []
        for kind in (PrefixCache, Whole):
            monkeypatch.setattr(session, "PrefixCache", kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                learnt.append(learn(family, layer))
        (value, loss, *said), (other, other_loss, *other_said) = learnt
        assert torch.equal(value, other)
        assert str(said) == str(other_said)
        # A call that is recorded is judged in the end without gradients, by other kernels perhaps.
        if isinstance(loss, float):
            other_loss = pytest.approx(other_loss, rel=1e-6, nan_ok=True)
            assert loss == other_loss
        else:
            assert str(loss) == str(other_loss)


def learn(family, layer):
    """Return the value that an edit is learnt by, and what is said of it."""
    model = family.build()
    settings = {"replacement": "replace_all", "iterations": 4, "stop_loss": 0.0}
    grace = gf.attach(model, layer, epsilon=0.05, **settings)
    try:
        edit = grace.edit(edit_of(family, model))
    except Exception as error:  # some compute no loss of a text alone
        return torch.empty(0), error
    value = grace.codebook.snapshot().row(edit.row).value
    return value.clone(), edit.loss, edit.steps, edit.radius
