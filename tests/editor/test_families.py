"""Every family of transformers that generates: what `docs/families.md` says of it is so."""

from __future__ import annotations

import families
import family_outcomes
import pytest
import transformers

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
