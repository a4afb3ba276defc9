"""Word-level tokenizers and small models trained from nothing on what they should know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grace_fast.tools.evaluate.answering import padded

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
        whole.append(torch.tensor(asked + wanted))
        labels.append(torch.tensor([-100] * len(asked) + wanted))
    rows = {"input_ids": whole, "labels": labels, "attention_mask": map(torch.ones_like, whole)}
    return padded(rows, tokenizer.pad_token_id)


def train(
    model: nn.Module,
    batch: Callable[[], dict[str, Tensor]],
    steps: int,
    peak: float,
    title: str,
    progress: bool,
) -> None:
    """Train every weight on batches drawn one by one, at one cycle of rates with this peak."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), desc=f"training {title}", disable=None if progress else True)
    for _ in bar:
        loss = model(**batch()).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
