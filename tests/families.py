"""Every family of transformers that generates, as a tiny model of random weights.

A family is a model class. Its tiny config is made by one rule for all: each size that the config
has is made small, in its parts too. What that leaves too large or at odds is in `MORE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import models
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

VOCABULARY = 100
LAYERS = 3

KINDS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")

_SIZES: dict[str, Any] = {
    name: size
    for size, names in {
        VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size src_vocab_size "
        "tgt_vocab_size",
        32: "hidden_size out_hidden_size text_hidden_size d_model n_embd n_embed dim emb_dim "
        "embedding_size word_embed_proj_dim "
        "embed_dim text_embed_dim vision_embed_dim hidden_dim projection_dim d_embed",
        64: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size d_inner decoder_ffn_dim "
        "encoder_ffn_dim dff max_position_embeddings n_positions max_source_positions "
        "max_target_positions n_ctx max_seq_len max_length shared_expert_intermediate_size "
        "text_ffn_dim n_embd_ff speech_encoder_intermediate_size",
        16: "head_dim mamba_d_head mamba_head_dim d_kv moe_intermediate_size image_size "
        "num_mel_bins v_head_dim "
        "qk_nope_head_dim q_lora_rank kv_lora_rank index_head_dim linear_key_head_dim "
        "linear_value_head_dim",
        8: "patch_size qk_rope_head_dim rotary_dim mamba_d_state state_size chunk_size "
        "mamba_chunk_size ssm_state_size hidden_size_per_layer_input",
        LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers encoder_num_hidden_layers "
        "speech_encoder_layers "
        "decoder_num_hidden_layers",
        2: "attn_layer_period num_attention_heads num_key_value_heads n_head n_heads num_heads "
        "depth num_kv_heads "
        "decoder_attention_heads encoder_attention_heads encoder_num_attention_heads "
        "decoder_num_attention_heads num_experts_per_tok num_experts_per_token eos_token_id "
        "linear_num_key_heads linear_num_value_heads index_n_heads",
        4: "num_filters mamba_n_heads n_mamba_heads mamba_num_heads sliding_window "
        "attention_window window_size num_experts num_local_experts n_routed_experts "
        "moe_num_experts",
        1: "n_group topk_group attn_layer_offset bos_token_id decoder_start_token_id "
        "n_shared_experts mamba_n_groups n_groups",
        0: "pad_token_id",
    }.items()
    for name in names.split()
} | {"is_decoder": True}


# What is set beside the sizes, by model class: `part.name` is of a part of the config.
def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


MORE: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {
        "encoder_hash_byte_group_vocab": 100,
        **{
            f"{part}.{name}": value
            for part in ("encoder_config", "decoder_config", "global_config", "patcher_config")
            for name, value in {"hidden_size_global": 32}.items()
        },
    },
    "CodeGenForCausalLM": {"n_head": 4, "rotary_dim": 4},
    "CpmAntForCausalLM": {"dim_head": 16, "dim_ff": 64, "prompt_length": 4},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]]},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "LongcatFlashForCausalLM": {"head_dim": 8, "zero_expert_num": 2},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16},
    "MiMoV2FlashForCausalLM": {
        "n_group": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "ReformerModelWithLMHead": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 16,
        "feed_forward_size": 64,
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "xLSTMForCausalLM": {"num_blocks": 3, "chunk_size": 16, "qk_dim_factor": 0.5},
    "ZambaForCausalLM": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "T5ForConditionalGeneration": {"decoder_start_token_id": 1},
    "UdopForConditionalGeneration": {"decoder_start_token_id": 1},
    "EncoderDecoderModel": {"decoder.add_cross_attention": True, "decoder_start_token_id": 1},
    "SpeechEncoderDecoderModel": {"decoder.add_cross_attention": True, "decoder_start_token_id": 1},
    "VisionEncoderDecoderModel": {"decoder.add_cross_attention": True, "decoder_start_token_id": 1},
    "XLMWithLMHeadModel": {"mask_token_id": 98, "mask_index": 98, "pad_index": 0},
    "Glm5NextForConditionalGeneration": {
        "text_config.qk_rope_head_dim": 0,
        "text_config.linear_head_dim": 16,
        "text_config.linear_num_heads": 2,
    },
    "Qwen2VLForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Qwen2_5_VLForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "PaddleOCRVLForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Glm4vForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Glm46VForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "GlmOcrForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Glm4vMoeForConditionalGeneration": {
        "text_config.rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.5)
    },
    "HunYuanVLForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Cosmos3EdgeForConditionalGeneration": {"text_config.rope_parameters": _rope(4, 2, 2)},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config.rope_parameters": _rope(4, 2, 2),
        "vision_start_token_id": 97,
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 97},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "CohereCompassForConditionalGeneration": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4}
        }
    },
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config.moe_intermediate_size": [16, 16]},
    "KyutaiSpeechToTextForConditionalGeneration": {
        "audio_pad_token_id": 99,
        "codebook_vocab_size": 98,
    },
    "MuseSparkForConditionalGeneration": {"vision_config.num_hidden_layers": 4},
    "KimiLinearForCausalLM": {"linear_head_dim": 16, "linear_num_heads": 2},
}


def _signal(*shape: int) -> Any:
    """Return what makes a signal of its own for each prompt."""

    def make(prompts: list[list[int]]) -> Tensor:
        generator = torch.Generator()
        return torch.stack(
            [torch.randn(*shape, generator=generator.manual_seed(sum(row))) for row in prompts]
        )

    return make


# What a model is given in place of tokens, or beside them.
SIGNALS: dict[str, dict[str, Any]] = {
    "WhisperForConditionalGeneration": {"input_features": _signal(16, 128)},
    "Speech2TextForConditionalGeneration": {"input_features": _signal(32, 80)},
    "MoonshineForConditionalGeneration": {"input_values": _signal(4000)},
    "SpeechT5ForSpeechToText": {"input_values": _signal(4000)},
    "SpeechEncoderDecoderModel": {"input_values": _signal(4000)},
    "SeamlessM4TForSpeechToText": {"input_features": _signal(32, 160)},
    "SeamlessM4Tv2ForSpeechToText": {"input_features": _signal(32, 160)},
    "CanaryForConditionalGeneration": {"input_features": _signal(64, 16)},
    "CohereAsrForConditionalGeneration": {"input_features": _signal(64, 16)},
    "VisionEncoderDecoderModel": {"pixel_values": _signal(3, 16, 16)},
    "PPFormulaNetForConditionalGeneration": {"pixel_values": _signal(3, 16, 16)},
    "Pix2StructForConditionalGeneration": {"flattened_patches": _signal(8, 770)},
}


@dataclass(frozen=True)
class Family:
    """One model class that generates."""

    name: str  # of the class
    kind: str  # which of transformers' mappings names it

    @property
    def model_class(self) -> type[nn.Module]:
        return getattr(transformers, self.name)

    def build(self) -> Any:
        """Return a tiny model in eval mode, whose weights say varied things."""
        model_class: Any = self.model_class
        torch.manual_seed(0)
        config = tiny(model_class.config_class, MORE.get(self.name, {}))
        model = model_class(config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.25, generator=generator)
            elif not parameter.isfinite().all():
                nn.init.zeros_(parameter)
        return model

    def batch(self, prompts: list[list[int]], side: str) -> dict[str, Tensor]:
        """Return prompts as the model takes them: tokens, padded on one side, or a signal."""
        signals = SIGNALS.get(self.name)
        if signals is not None:
            return {name: make(prompts) for name, make in signals.items()}
        main: Any = getattr(self.model_class, "main_input_name", "input_ids")
        if main != "input_ids":
            raise NotImplementedError(f"its input is {main}")
        return models.prompt_batch(prompts, side)


def parameters(model: nn.Module) -> set[str]:
    """Return the names of what a model is called with."""
    return set(inspect.signature(model.forward).parameters)


def everyone() -> Iterator[Family]:
    """Return every model class of the mappings, once."""
    seen = set()
    for kind in KINDS:
        for name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            if name not in seen:
                seen.add(name)
                yield Family(name, kind)


def tiny(config_class: Any, more: Mapping[str, Any]) -> Any:
    """Return a config with every size that it has made small, in its parts too."""
    try:
        usual: Any = config_class()
    except Exception:  # one that has no defaults
        usual = None
    settable = [name for name in _SIZES if usual is None or _is_settable(usual, name)]
    given = {name: _SIZES[name] for name in settable} | _of_layers(usual)
    for part in getattr(config_class, "sub_configs", {}):
        inner = {
            name.removeprefix(f"{part}."): value
            for name, value in more.items()
            if name.startswith(f"{part}.")
        }
        known = getattr(usual, part, None)
        if isinstance(known, transformers.PreTrainedConfig):
            given[part] = tiny(type(known), inner).to_dict()
    given |= {name: value for name, value in more.items() if "." not in name}
    for name, target in config_class.attribute_map.items():
        if target in given:
            given.pop(name, None)  # another name of the same
    return config_class(**{name: value for name, value in given.items() if value is not DEFAULT})


def _of_layers(usual: Any) -> dict[str, Any]:
    """Return what a config says of its layers one by one, for as few layers as there are here."""
    found: dict[str, Any] = {}
    for name, value in vars(usual).items() if usual is not None else ():
        if name.endswith("layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            # All kinds that there are, the middle layer of the commonest that attends.
            found[name] = [kinds[at % len(kinds)] for at in range(max(LAYERS, len(kinds)))]
        if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            found[name] = value | {"mrope_section": [4, 2, 2]}
    if hasattr(usual, "qk_rope_head_dim"):
        found["head_dim"] = DEFAULT  # follows from it
    return found


DEFAULT = object()  # leave what the config has by itself


def _is_settable(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    return name in vars(config) or name in type(config).attribute_map
