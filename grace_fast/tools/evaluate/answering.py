"""Questions to a model: greedy answers, perplexities, and the batches that edits are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grace_fast.editor import batches, heads
from grace_fast.editor.attach import find_layer
from grace_fast.hook import positions
from grace_fast.hook.wrappers import stack_of
from grace_fast.tools.evaluate.metrics import SCORES
from grace_fast.tools.evaluate.task import Answer, Case, Task


def edit_batch(task: Task, case: Case) -> dict[str, Any]:
    """Return one case as a batch with its labels, as `edit_batch` takes it: a row a phrasing."""
    return training_batch(task, case.phrasings) if case.also else _row(task, case)


def _row(task: Task, case: Case) -> dict[str, Any]:
    """Return one prompt as a batch of one row with its labels.

    A decoder's target closes with its end token, so that an answer ends where the target does.
    """
    kind = heads.kind_of(task.model)
    if kind == "classifier":
        return {**_prompts(task, [case.prompt]), "labels": torch.tensor([int(case.answer)])}
    end = (task.tokenizer.eos_token or "") if kind == "decoder" else ""
    return batches.from_text(case.prompt, f"{case.answer}{end}", task.tokenizer, task.model, kind)


def training_batch(task: Task, cases: Sequence[Case]) -> dict[str, Any]:
    """Return cases as one batch with labels, padded on the right, to train a model on."""
    parts = [_row(task, case) for case in cases]
    names = ("input_ids", "attention_mask", "labels")
    rows = {name: [part[name][0] for part in parts] for name in names}
    return padded(rows, task.tokenizer.pad_token_id)


def padded(columns: Mapping[str, Iterable[Tensor]], pad_token: int = 0) -> dict[str, Tensor]:
    """Return rows by their name as one batch, padded on the right; classes as they are."""
    filler = {"input_ids": pad_token, "attention_mask": 0, "labels": -100}
    batch = {}
    for name, column in columns.items():
        rows = list(column)
        is_class = not rows[0].ndim
        batch[name] = torch.stack(rows) if is_class else pad_sequence(rows, True, filler[name])
    return batch


@torch.no_grad()
def answers(task: Task, cases: Sequence[Case]) -> list[Answer]:
    """Return the model's greedy answer to every prompt; a classifier's is its argmax."""
    given: list[Answer] = [""] * len(cases)
    for picked, batch in _batches(task, [case.prompt for case in cases]):
        if heads.kind_of(task.model) == "classifier":
            said: list[Any] = task.model(**batch).logits.argmax(dim=-1).tolist()
        else:
            tokens = task.model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=task.longest,
                pad_token_id=task.tokenizer.pad_token_id,
            )
            if not task.model.config.is_encoder_decoder:
                tokens = tokens[:, batch["input_ids"].shape[1] :]
            texts = task.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            said = [text.strip() for text in texts]
        for at, answer in zip(picked, said, strict=True):
            given[at] = answer
    return given


@torch.no_grad()
def perplexities(task: Task, cases: Sequence[Case]) -> list[float]:
    """Return the perplexity of every case's answer after its prompt, by a decoder."""
    found = []
    for case in cases:
        batch = _row(task, case)
        logits, labels = task.model(**batch).logits[0, :-1], batch["labels"][0, 1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
        found.append(float(loss.exp()))
    return found


def scores(task: Task, cases: Sequence[Case], given: Sequence[Answer] | None = None) -> list[float]:
    """Return how well the model answers every case, by the metric of the task.

    given: its answers, where they are known.
    """
    if task.metric == "perplexity":
        return perplexities(task, cases)
    score = SCORES[task.metric]
    given = answers(task, cases) if given is None else given
    return [score(answer, case.answer) for answer, case in zip(given, cases, strict=True)]


@torch.no_grad()
def queries_by_layer(task: Task, layers: Sequence[str], cases: Sequence[Case]) -> dict[str, Tensor]:
    """Return what every prompt would ask a codebook at each layer, [M, D] each, from one pass.

    Raises: ValueError for a layer that the model lacks.
    """
    kind = heads.kind_of(task.model)
    starts = {layer: stack_of(task.model, find_layer(task.model, layer)[1])[1] for layer in layers}
    parts: dict[str, list[tuple[list[int], Tensor]]] = {layer: [] for layer in layers}
    with layer_inputs(task.model, layers) as seen:
        for picked, batch in _batches(task, [case.prompt for case in cases]):
            task.model(**batches.runnable(batch, kind, task.model))
            end = positions.prompt_end(positions.read(batch, kind == "decoder"))
            assert end is not None  # the batch has input_ids
            for layer in layers:
                hidden = seen[layer].view(len(picked), -1, seen[layer].shape[-1])
                where = torch.zeros_like(end) if starts[layer] else end
                parts[layer].append((picked, hidden[torch.arange(len(picked)), where]))
    return {layer: in_order(rows) for layer, rows in parts.items()}


@contextmanager
def layer_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill in what each layer gets in the last forward call, within a `with` block."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def keep(_: nn.Module, args: tuple[Tensor, ...], layer: str = layer) -> None:
                seen[layer] = args[0].detach()

            handle = find_layer(model, layer)[1].register_forward_pre_hook(keep)
            hooks.callback(handle.remove)
        yield seen


def in_order(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Return the rows of parts in the order of the texts they are of."""
    order = torch.tensor([at for picked, _ in parts for at in picked])
    return torch.cat([rows for _, rows in parts])[order.argsort()]


def _batches(task: Task, prompts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield batches of prompts of about one length, each with the indices of its prompts."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at].split()))
    for start in range(0, len(order), task.batch):
        picked = order[start : start + task.batch]
        yield picked, _prompts(task, [prompts[at] for at in picked])


def _prompts(task: Task, prompts: Sequence[str]) -> dict[str, Tensor]:
    side = "left" if heads.kind_of(task.model) == "decoder" else "right"
    cut = {} if task.cut is None else {"truncation": True, "max_length": task.cut}
    made = task.tokenizer(
        list(prompts), padding=True, padding_side=side, return_tensors="pt", **cut
    )
    device = next(task.model.parameters()).device
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}
