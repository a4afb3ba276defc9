"""Word-level tokenizers and small models trained from nothing on what they should know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PAD, END, UNKNOWN, START = "<pad>", "</s>", "<unk>", "<s>"


def tokenizer(texts: Iterable[str], ends: bool) -> Any:
    """Return a tokenizer whose words are those of the texts, and that keeps case.

    ends: close every text with the end token, as T5's does.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    known = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: at for at, word in enumerate((PAD, END, UNKNOWN, START, *known))}
    made = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words, with one space between
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        bos_token=START,
        clean_up_tokenization_spaces=False,
    )


def continuations(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Return prompts with what follows them as one batch for a decoder; only the latter counts."""
    whole, labels = [], []
    for prompt, text in pairs:
        asked, wanted = tokenizer(prompt)["input_ids"], tokenizer(text + END)["input_ids"]
        whole.append(asked + wanted)
        labels.append([-100] * len(asked) + wanted)
    length = max(map(len, whole))
    gap = [length - len(ids) for ids in whole]
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor(
            [ids + [pad] * short for ids, short in zip(whole, gap, strict=True)]
        ),
        "labels": torch.tensor(
            [ids + [-100] * short for ids, short in zip(labels, gap, strict=True)]
        ),
        "attention_mask": torch.tensor([[1] * (length - short) + [0] * short for short in gap]),
    }
