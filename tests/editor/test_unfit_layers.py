"""Layers that do not see one vector a token are refused, at `attach` or at the first edit."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from models import FAMILIES
from torch import nn

import grace_fast as gf

PROMPT = [5, 17, 23, 42, 8, 61]
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
SETTINGS = {"epsilon": 0.1, "replacement": "replace_last", "iterations": 1}


def whisper():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=100,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def classified_sound():
    return transformers.WhisperForAudioClassification(whisper().config)


def vit():
    sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def switch():
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=100,
            d_model=32,
            d_ff=64,
            d_kv=16,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_heads=2,
            num_experts=2,
            decoder_start_token_id=0,
        )
    )


class OfTorch(nn.Module):
    """A classifier of torch's own encoder layers."""

    def __init__(self, nested=False, odd=None):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.embed = nn.Embedding(100, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.odd, self.head = odd or nn.Identity(), nn.Linear(32, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.head(self.odd(hidden)[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Answer", (), {"loss": loss, "logits": logits})


AT_ATTACH = {
    "a head of kept logits": (lambda: models.build("gpt2"), "lm_head", "logits are kept"),
    "embeddings": (lambda: models.build("llama"), "model.embed_tokens", "token ids"),
    "blocks": (lambda: models.build("llama"), "model.layers", "is not called itself"),
    "a vision tower": (vit, "vit.layers.1.mlp.fc2", "ViTModel around it takes pixel_values"),
    "frames of sound": (classified_sound, "encoder.layers.1.fc2", "takes input_features"),
    "a convolution": (whisper, "model.encoder.conv1", "a convolution's input"),
    "an expert": (switch, "encoder.block.1.layer.1.mlp.experts.expert_0.wo", "routed to it"),
    "attention's own product": (
        OfTorch,
        "encoder.layers.1.self_attn.out_proj",
        "MultiheadAttention computes with its weight",
    ),
    "nested tensors": (
        lambda: OfTorch(nested=True),
        "encoder.layers.1.linear2",
        "enable_nested_tensor=False",
    ),
    "a lazy layer": (lambda: OfTorch(odd=nn.LazyLinear(32)), "odd", "run the model once"),
    "a bilinear layer": (lambda: OfTorch(odd=nn.Bilinear(32, 32, 32)), "odd", "two inputs"),
    "an LSTM": (lambda: OfTorch(odd=nn.LSTM(32, 32)), "odd", "several tensors"),
}


@pytest.mark.filterwarnings("ignore:.*lazy:UserWarning")
@pytest.mark.parametrize("case", list(AT_ATTACH))
def test_what_is_known_to_be_unfit_is_refused_at_attach(case):
    make, layer, why = AT_ATTACH[case]
    model = make().eval()
    with pytest.raises(ValueError, match=f"{layer} cannot take a codebook: .*{why}"):
        gf.attach(model, layer, **SETTINGS)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_head_of_kept_logits_answers_where_each_token_asks_for_itself():
    family, model = FAMILIES["llama"], models.build("llama")
    grace = gf.attach(
        model, "lm_head", query="every_token", epsilon=0.1, iterations=60, learning_rate=0.3
    )
    assert grace.edit(models.edit_batch(family, [PROMPT], [[10]])).correct
    said = model.generate(**models.prompt_batch([PROMPT]), max_new_tokens=1, do_sample=False)
    assert int(said[0, -1]) == 10


def bert(family="bert"):
    return models.build(family)


def classified(rows):
    return {**models.prompt_batch(rows), "labels": torch.tensor([1])}


def translated(rows):
    return {**models.prompt_batch(rows), "labels": torch.tensor([[11, 12]])}


def funnel():
    return transformers.FunnelForSequenceClassification(
        transformers.FunnelConfig(
            vocab_size=100, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=64
        )
    )


def xlnet():
    return transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=2, d_inner=64)
    )


T5_KEYS = "decoder.block.1.layer.1.EncDecAttention.k"
AT_EDIT = {
    "a pooler": (bert, "bert.pooler.dense", classified([PROMPT])),
    "a classifier": (bert, "classifier", classified([PROMPT])),
    "a pooler and a prompt of one token": (bert, "bert.pooler.dense", classified([[7]])),
    "the encoder's states": (lambda: bert("t5-decoder"), T5_KEYS, translated([PROMPT])),
    "as many of the encoder's states": (
        lambda: bert("t5-decoder"),
        T5_KEYS,
        translated([PROMPT[:2]]),
    ),
    "half of the tokens": (
        funnel,
        "funnel.encoder.blocks.1.0.ffn.linear_2",
        classified([PROMPT]),
    ),
    "heads": (
        lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)
        ),
        "model.layers.1.self_attn.q_norm",
        models.edit_batch(FAMILIES["llama"], [PROMPT], [[10]]),
    ),
}


@pytest.mark.parametrize("case", list(AT_EDIT))
def test_the_first_edit_refuses_a_layer_of_other_tokens_and_the_model_goes_on(case):
    make, layer, batch = AT_EDIT[case]
    model = make().eval()
    grace = gf.attach(model, layer, **SETTINGS)
    with pytest.raises(ValueError, match=r"must see one vector for each of the .* tokens.*given"):
        grace.edit(batch)
    assert not grace.edits()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def longformer():
    return transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(**SMALL, attention_window=4, num_labels=4)
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2
        )
    )


TOKENS = {
    "padding within the model": (
        longformer,
        "longformer.encoder.layer.1.output.dense",
        classified([PROMPT]),
    ),
    "all experts together": (
        mixtral,
        "model.layers.1.mlp.experts",
        models.edit_batch(FAMILIES["llama"], [PROMPT], [[10]]),
    ),
    "a head of every token": (
        lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=4)
        ),
        "score",
        classified([PROMPT]),
    ),
    "a prompt of one token": (bert, "bert.encoder.layer.1.output.dense", classified([[7]])),
    "tokens before rows": (xlnet, "transformer.layer.1.ff.layer_2", classified([PROMPT])),
    "torch's encoder": (OfTorch, "encoder.layers.1.linear2", classified([PROMPT])),
    "a bare weight under a norm": (
        lambda: OfTorch(odd=nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))),
        "odd",
        classified([PROMPT]),
    ),
}


@pytest.mark.parametrize("case", list(TOKENS))
def test_a_layer_that_sees_every_token_is_edited(case):
    make, layer, batch = TOKENS[case]
    torch.manual_seed(0)
    model = make().eval()
    changes = {"iterations": 100, "learning_rate": 0.5, "replacement": "replace_all"}
    grace = gf.attach(model, layer, **SETTINGS | changes)
    assert grace.edit(batch).correct
    with torch.no_grad():
        model(**batch)
    assert dict(grace.hits) == {0: 1}


def test_a_layer_of_several_tensors_is_refused_and_the_model_answers_on():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = gf.attach(model, "bert.encoder.layer.1.attention.self", **SETTINGS)
    batch = models.edit_batch(family, [PROMPT], [[1]])
    with pytest.raises(TypeError, match="must return one tensor, got tuple"):
        grace.edit(batch)
    assert model(**batch).logits.isfinite().all()


def test_a_codebook_at_a_layer_of_other_tokens_is_refused_by_the_call():
    model = models.build("bert")
    book = gf.Codebook(32, 32)
    book.append(torch.zeros(1, 32), torch.zeros(1, 32), torch.ones(1))
    gf.attach(model, "bert.pooler.dense", codebook=book)
    with pytest.raises(ValueError, match=r"pooler.dense must see one vector .* was given \[1, 1\]"):
        model(**models.prompt_batch([PROMPT]))


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_dynamically_quantised_model_is_asked_and_not_edited(tmp_path):
    family, model = FAMILIES["bert"], models.build("bert")
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    grace = gf.attach(model, family.layer, **SETTINGS)
    batch = models.edit_batch(family, [PROMPT], [[1]])
    with pytest.raises(ValueError, match=r"no gradient of the loss reaches the value.*quantised"):
        grace.edit(batch)
    query = grace.query_of(batch)
    grace.unload()
    book = gf.Codebook(64, 32)
    book.append(query, torch.ones(1, 32), torch.full((1,), 0.1))
    grace = gf.attach(model, family.layer, codebook=book, **SETTINGS)
    with torch.no_grad():
        answer = model(**batch).logits
    assert dict(grace.hits) == {0: 1}
    grace.save_pretrained(tmp_path)
    grace.unload()
    gf.from_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, answer)


def test_a_layer_that_runs_without_gradients_is_refused_by_the_edit():
    class Frozen(OfTorch):
        def forward(self, input_ids, attention_mask=None, labels=None):
            with torch.no_grad():
                hidden = self.encoder(self.embed(input_ids))
            logits = self.head(hidden[:, 0])
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return type("Answer", (), {"loss": loss, "logits": logits})

    grace = gf.attach(Frozen().eval(), "encoder.layers.0.linear2", **SETTINGS)
    with pytest.raises(ValueError, match=r"no gradient of the loss.*no_grad"):
        grace.edit(classified([PROMPT]))
    assert not grace.edits()
