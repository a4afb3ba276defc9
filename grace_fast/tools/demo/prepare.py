"""Before the first edit: the docstrings dealt out, the head trained, layer and epsilon chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from grace_fast.tools.demo import calibration, data
from grace_fast.tools.demo.calibration import Scale
from grace_fast.tools.demo.model import (
    LENGTH,
    Features,
    Inputs,
    ModuleForSequenceClassification,
    Tokens,
    features_of,
    fit_head,
    load,
)


@dataclass(frozen=True)
class Encoder:
    """Texts to the token ids that the model gets, cut off."""

    tokenizer: Any

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the token ids of every text."""
        if not texts:
            return []
        ids: list[Tokens] = self.tokenizer(list(texts), truncation=True, max_length=LENGTH)[
            "input_ids"
        ]
        return ids


@dataclass(frozen=True)
class Prepared:
    """The model with its trained head, and the docstrings as it sees them."""

    model: ModuleForSequenceClassification
    encode: Encoder
    layers: list[str]  # the middle ones
    found: int  # docstrings in the sources
    different: int  # of those, as the model sees them
    splits: data.Splits
    inputs: dict[str, Inputs]  # by split
    features: dict[str, Features]  # by split


def bar(name: str, total: int, progress: bool) -> Any:
    """Return a progress bar on standard error, off where that is not a terminal."""
    return tqdm(total=total, desc=name, disable=None if progress else True, leave=False)


def prepare(seed: int, per_module: int, progress: bool) -> Prepared:
    """Read the docstrings, run the encoder over them once and fit the head."""
    model, tokenizer = load(len(data.MODULES))
    encode = Encoder(tokenizer)
    found = data.docstrings()
    docs = data.distinct(found, encode)
    splits = data.split(docs, seed, per_module)
    inputs = {
        name: Inputs(encode([doc.text for doc in part]), torch.tensor([doc.label for doc in part]))
        for name, part in vars(splits).items()
    }
    # Middle: with a layer before and one after.
    layers = [
        f"encoder.encoder.layer.{at}.output.dense"
        for at in range(1, model.config.num_hidden_layers - 1)
    ]
    features = {}
    with bar("features", sum(map(len, inputs.values())), progress) as ticks:
        for name, part in inputs.items():  # train is the first, so the others' logits are real
            features[name] = features_of(model, part.tokens, layers, ticks)
            if name == "train":
                fit_head(model.head, features[name].mean, part.labels)
    return Prepared(model, encode, layers, len(found), len(docs), splits, inputs, features)


def calibrate(prepared: Prepared, progress: bool) -> tuple[list[Scale], Scale]:
    """Return the scale of every middle layer and the chosen one.

    Only inputs that are not held out are looked at: no figure of the stream is measured on them.
    """
    reworded = data.rewordings(prepared.splits.validation, prepared.encode)
    texts = prepared.encode([one.text for one in reworded])
    with bar("calibration", len(texts), progress) as ticks:
        after = features_of(prepared.model, texts, prepared.layers, ticks)
    train, validation = prepared.features["train"], prepared.features["validation"]
    labels = torch.cat([prepared.inputs[name].labels for name in ("train", "validation")])
    originals = [one.of for one in reworded]
    scales = [
        calibration.measure(
            layer,
            torch.cat([train.queries[layer], validation.queries[layer]]),
            labels,
            validation.queries[layer][originals],
            after.queries[layer],
        )
        for layer in prepared.layers
    ]
    return scales, calibration.choose(scales)
