"""Facts that changed: the currency of every territory, from the Unicode CLDR data in `babel`.

A small T5 learns what was legal tender on 1 January 1990, in ten phrasings. Every change since then
follows in the order of its date, as an edit in each of the ten phrasings; ten others are held out.
The tender that started last counts as current. Territories whose tender never changed are what the
edits must not disturb; some of them are set apart to calibrate on, with made-up changes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.tools.evaluate import cache, words
from grace_fast.tools.evaluate.answering import padded
from grace_fast.tools.evaluate.task import Sample, Task, phrased

SINCE = (1990, 1, 1)
EDITED = (  # the model is trained and edited in these
    "what is the currency of {}",
    "which currency does {} use",
    "the official currency of {} is",
    "in {} people pay with",
    "name the currency used in {}",
    "what money is used in {}",
    "the legal tender of {} is",
    "{} uses which currency",
    "prices in {} are given in",
    "tell me the currency of {}",
)
HELD_OUT = (  # reported as generality
    "what currency is used in {}",
    "people in {} pay with",
    "the money of {} is called",
    "which money is legal tender in {}",
    "{} has which official currency",
    "the currency used in {} is",
    "name the money that people in {} use",
    "in {} prices are given in which currency",
    "tell me what money {} uses",
    "what is legal tender in {}",
)
VALIDATION = (  # calibrated on
    "which is the official money of {}",
    "the tender used in {} is",
    "what do people in {} pay with",
    "tell me which currency is used in {}",
)
CODE = "the code {} stands for"
MADE_UP, NEIGHBOURS = 40, 24  # unchanged territories to calibrate on: with made-up changes, without

WIDTH, INNER, LAYERS = 128, 256, 2
STEPS, BATCH, PEAK = 800, 128, 3e-3
# Of the frame's words while training, so that the name decides. The words that come in are those of
# all phrasings: a model of English knows them, this one would not.
DROPPED, SWAPPED = 0.15, 0.35
EDITED_LAYER = "decoder.block.0.layer.2.DenseReluDense.wo"


@dataclass(frozen=True)
class Change:
    """A territory's tender from a day on."""

    day: tuple[int, int, int]
    territory: str
    currency: str


@dataclass(frozen=True)
class Data:
    """Territories by name: their tender in 1990, and every change since."""

    before: dict[str, str]
    changes: list[Change]
    codes: dict[str, str]  # ISO 4217 code to currency

    @property
    def unchanged(self) -> list[str]:
        """Territories whose tender has had one name ever since."""
        changed = {change.territory for change in self.changes}
        return [territory for territory in self.before if territory not in changed]


def read() -> Data:
    """Read territories and tenders out of `babel`."""
    from babel import Locale
    from babel.core import get_global

    english = Locale("en")
    codes = {
        code.lower(): _plain(re.sub(r"\s*\(.*?\)", "", name))
        for code, name in english.currencies.items()
    }
    before: dict[str, str] = {}
    changes = []
    for region, tenders in sorted(get_global("territory_currencies").items()):
        spans = [
            (tuple(start), None if end is None else tuple(end), codes[code.lower()])
            for code, start, end, is_tender in tenders
            if is_tender and start is not None
        ]
        territory = _plain(english.territories.get(region, ""))
        now = _tender(spans, SINCE)
        if not territory or now is None:
            continue
        before[territory] = now
        for day in sorted({start for start, _, _ in spans if start > SINCE}):
            new = _tender(spans, day)
            if new is not None and new != now:
                changes.append(Change(day, territory, new))
                now = new
    changes.sort(key=lambda change: (change.day, change.territory))
    return Data(before, changes, codes)


def _tender(
    spans: Sequence[tuple[tuple[int, ...], tuple[int, ...] | None, str]], day: tuple[int, ...]
) -> str | None:
    """Return the tender of a day: of those that are valid the one that started last."""
    valid = [span for span in spans if span[0] <= day and (span[1] is None or span[1] > day)]
    return max(valid, key=lambda span: span[0])[2] if valid else None


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[()]", "", name).lower().split())


def prepare(seed: int, root: Path, progress: bool) -> Task:
    """Return the task: the data, and the model, trained where it is not in the cache."""
    data = read()
    model, tokenizer = _model(data, seed, root, progress)
    dealer = random.Random(seed)
    apart = dealer.sample(data.unchanged, MADE_UP + NEIGHBOURS)
    made_up = _made_up(data, apart[:MADE_UP], dealer)
    unrelated = [territory for territory in data.unchanged if territory not in apart]

    def before(territories: Sequence[str]) -> list[tuple[str, str]]:
        return [(territory, data.before[territory]) for territory in territories]

    newest = {change.territory: change.currency for change in data.changes}
    return Task(
        name="facts",
        model=model,
        tokenizer=tokenizer,
        layer=EDITED_LAYER,
        layers=[
            *(f"encoder.block.{at}.layer.1.DenseReluDense.wo" for at in range(LAYERS)),
            *(f"decoder.block.{at}.layer.2.DenseReluDense.wo" for at in range(LAYERS)),
        ],
        settings={
            "replacement": "replace_all",
            "value_init": "warm",
            "learning_rate": 0.3,
            "stop_loss": 0.2,
        },
        edits=phrased(((change.territory, change.currency) for change in data.changes), EDITED),
        held_out=phrased(newest.items(), HELD_OUT),
        unrelated=phrased(before(unrelated), EDITED),
        calibration=Sample(
            edits=phrased(made_up.items(), EDITED),
            paraphrases=phrased(made_up.items(), VALIDATION),
            unrelated=phrased(before(apart[MADE_UP:]), EDITED),
        ),
        rehearsal=phrased(data.before.items(), EDITED),
        longest=1 + max(len(name.split()) for name in data.codes.values()),
        facts={
            "territories": len(data.before),
            "changes": len(data.changes),
            "changed_territories": len(newest),
            "unrelated_territories": len(unrelated),
        },
    )


def _made_up(data: Data, territories: Sequence[str], dealer: random.Random) -> dict[str, str]:
    """Return changes that were not: a third of them to the euro, as among the real ones."""
    others = sorted({change.currency for change in data.changes} - {"euro"})
    return {
        territory: "euro" if at % 3 == 0 else dealer.choice(others)
        for at, territory in enumerate(territories)
    }


def _model(data: Data, seed: int, root: Path, progress: bool) -> tuple[Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    asked = phrased(data.before.items(), EDITED)
    pairs = [(case.prompt, str(case.answer)) for case in asked]
    codes = [(CODE.format(code), name) for code, name in sorted(data.codes.items())]
    frames = [frame.replace("{}", " ") for frame in (*EDITED, *HELD_OUT, *VALIDATION)]
    texts = [text for pair in (*pairs, *codes) for text in pair]
    tokenizer = words.tokenizer([*texts, *frames], ends=True)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_ff=INNER,
        d_kv=WIDTH // 4,
        num_heads=4,
        num_layers=LAYERS,
        dropout_rate=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    recipe = [seed, config.to_dict(), pairs, codes, frames, STEPS, BATCH, PEAK, DROPPED, SWAPPED]
    dealer = random.Random(seed)
    names = [name for name in data.before for _ in EDITED]
    frame_words = sorted({word for frame in frames for word in frame.split()})

    def batch() -> dict[str, Tensor]:
        # The frames of prompts are noised: words dropped, or put in the place of others.
        picked = [dealer.randrange(len(pairs)) for _ in range(BATCH * 3 // 4)]
        asked = [_noised(pairs[at][0], names[at], frame_words, dealer) for at in picked]
        wanted = [pairs[at][1] for at in picked]
        for prompt, answer in dealer.sample(codes, BATCH // 4):
            asked.append(prompt)
            wanted.append(answer)
        prompts = [torch.tensor(ids) for ids in tokenizer(asked).input_ids]
        labels = [torch.tensor(ids) for ids in tokenizer(wanted).input_ids]
        mask = map(torch.ones_like, prompts)
        columns = {"input_ids": prompts, "attention_mask": mask, "labels": labels}
        return padded(columns, tokenizer.pad_token_id)

    def train() -> Any:
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        words.train(model, batch, STEPS, PEAK, "T5 on facts", progress)
        return model

    model = cache.trained(root, "facts", recipe, T5ForConditionalGeneration.from_pretrained, train)
    return model.eval(), tokenizer


def _noised(prompt: str, name: str, frame_words: Sequence[str], dealer: random.Random) -> str:
    before, after = (_noise(part.split(), frame_words, dealer) for part in prompt.split(name, 1))
    return " ".join([*before, name, *after])


def _noise(frame: Sequence[str], known: Sequence[str], dealer: random.Random) -> Iterator[str]:
    for word in frame:
        chance = dealer.random()
        if chance >= DROPPED:
            yield dealer.choice(known) if chance < DROPPED + SWAPPED else word
