"""What kind of answer a model gives: how it is labelled, kept, compared and found right.

Tokens and classes are whole numbers. The numbers of a regression head and of a head with several
labels at once are compared as numbers: .1 and .9 are different answers. A span is its two ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace_fast.semantics import IGNORED_LABEL, Semantics, label_ids, score_label

# `decoder`: labels beside the prompt's own tokens, predicted one token ahead; `seq2seq`: labels of
# a second sequence; `classifier`: predicted in place.
Kind = Literal["decoder", "seq2seq", "classifier"]
# What a classifier's labels are: whole numbers, one a row or one a token; numbers, of a regression;
# a truth for each class; where in the prompt the answer starts and ends.
Head = Literal["tokens", "classes", "scores", "several", "span"]

SPAN = ("start_positions", "end_positions")
TARGETS = ("labels", *SPAN)  # the fields of a batch that hold what is wanted
# A score is right within this of its target, or this much of it where it is above 1: bfloat16 tells
# numbers apart that differ by .4 %.
SCORE_TOLERANCE = 0.01

# Those of transformers whose loss goes by `problem_type`.
_BY_PROBLEM = ("ForSequenceClassification", "ForImageClassification")
_PROBLEMS: dict[str, Head] = {
    "regression": "scores",
    "single_label_classification": "classes",
    "multi_label_classification": "several",
}
_SEVERAL_SEQUENCES = "ForMultipleChoice"
_INDEX = re.compile(r"[0-9]{1,9}(\.0+)?")  # a class, as a text


def kind_of(model: nn.Module) -> Kind:
    """Return how a model reads labels, from its config and whether it generates.

    Raises: ValueError for a model that reads several sequences for one answer.
    """
    name = type(model).__name__
    if name.endswith(_SEVERAL_SEQUENCES):
        raise ValueError(
            f"{name} reads several sequences for one answer, and each asks for itself: no edit "
            "answers for all of them; use a model that reads one sequence a row"
        )
    can_generate = getattr(model, "can_generate", None)
    generates = None if can_generate is None else bool(can_generate())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "classifier" if generates is False else "seq2seq"
    return "decoder" if generates else "classifier"


def head_of(model: nn.Module, kind: Kind, labels: Any = None) -> Head:
    """Return what kind of labels a model takes; `labels` are those of a batch, if there are any."""
    if kind != "classifier":
        return "tokens"
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith("ForQuestionAnswering"):
        return "span"
    is_float = isinstance(labels, Tensor) and labels.is_floating_point()
    if name.endswith(_BY_PROBLEM):
        problem = getattr(config, "problem_type", None)
        if problem is not None:
            return _PROBLEMS.get(problem, "classes")
        if getattr(config, "num_labels", None) == 1:
            return "scores"
        return "several" if is_float else "classes"
    # A module of the user's own takes what its loss takes, whatever config it shows.
    is_foreign = not (
        hasattr(config, "problem_type") and type(model).__module__.startswith("transformers.")
    )
    return "scores" if is_float and is_foreign else "classes"


def classes_of(model: nn.Module, kind: Kind) -> int | None:
    """Return how many labels a model tells apart, where its config says so."""
    config, name = getattr(model, "config", None), type(model).__name__
    if kind != "classifier" or name.endswith("ForMaskedLM"):
        count = getattr(config, "vocab_size", None)
    elif name.endswith("ForNextSentencePrediction"):
        count = 2
    elif name.endswith("Classification"):
        count = getattr(config, "num_labels", None)
    else:  # every config has a num_labels; only a classifier's means anything
        return None
    return count if isinstance(count, int) else None


def targets_of(batch: Mapping[str, Any], head: Head, count: int) -> Tensor:
    """Return what every row of a batch wants: [B, ...] as the batch has it, of a span [B, 2].

    count: B.

    Raises: ValueError where there is none.
    """
    found = []
    for name in SPAN if head == "span" else ("labels",):
        labels = batch.get(name)
        if not isinstance(labels, Tensor) or labels.ndim == 0 or len(labels) != count:
            given = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"an edit needs {name}, one row for each of {count} prompts, got {given}"
            )
        found.append(labels)
    return found[0] if head != "span" else torch.cat([each.reshape(count, 1) for each in found], 1)


def check_targets(targets: Tensor, head: Head, classes: int | None, length: int) -> None:
    """Check what every row wants: [B, ...], of prompts of a length.

    classes: how many labels there are, where that is known.

    Raises: ValueError naming the row.
    """
    flat = targets.reshape(len(targets), -1)
    if head in ("scores", "several"):
        _check_numbers(flat, head, classes)
        return
    if flat.is_floating_point() or flat.is_complex():
        raise ValueError(
            f"labels of this model must be whole numbers, got {flat.dtype}; for a regression or "
            "several labels at once set config.problem_type"
        )
    counted = flat != IGNORED_LABEL
    if head == "span":
        counted, classes = torch.ones_like(counted), length
    if not counted.any(dim=1).all():
        row = int((~counted.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of the batch has a target without tokens: every label is -100")
    if classes is None:
        return
    outside = counted & ((flat < 0) | (flat >= classes))
    if outside.any():
        row = int(outside.any(dim=1).nonzero()[0])
        label = int(flat[row][outside[row]][0])
        if head == "span":
            names = " and ".join(SPAN)
            raise ValueError(f"{names} must be in [0, {classes}), got {label} in row {row}")
        raise ValueError(f"labels must be in [0, {classes}) or -100, got {label} in row {row}")


def _check_numbers(flat: Tensor, head: Head, classes: int | None) -> None:
    what = "regression" if head == "scores" else "several labels at once"
    if classes is not None and flat.shape[1] != classes:
        raise ValueError(
            f"labels of {what} must be [B, {classes}], got {flat.shape[1]} numbers a row"
        )
    if not flat.isfinite().all():
        row = int((~flat.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"labels of {what} must be finite, got NaN or infinity in row {row}")
    if head == "several" and ((flat < 0) | (flat > 1)).any():
        row = int(((flat < 0) | (flat > 1)).any(dim=1).nonzero()[0])
        raise ValueError(f"labels of {what} must be in [0, 1], got {flat[row].tolist()}")


def for_loss(batch: Mapping[str, Any], head: Head, dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch whose labels are of the type that the loss takes: numbers in `dtype`."""
    wanted = dtype if head in ("scores", "several") else torch.int64
    return {
        name: value.to(wanted) if name in TARGETS and isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def label_of(targets: Tensor, head: Head, padding: int | None, whole: bool) -> Tensor:
    """Return the label of one row as it is stored: [L] int64.

    whole: keep -100 and padding, as the reference compares them.
    """
    if head in ("scores", "several"):
        return score_label(targets)
    if whole or head == "span":
        return targets.detach().reshape(-1).to("cpu", torch.int64)
    return label_ids(targets, padding)


def labels_of(
    targets: Iterable[Tensor], head: Head, kind: Kind, model: nn.Module, semantics: Semantics
) -> list[Tensor]:
    """Return the labels of rows as they are stored, each [L] int64; targets: what each wants."""
    padding = None
    if kind != "classifier":
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return [label_of(row, head, padding, semantics != "paper") for row in targets]


def prediction_of(answer: Any, head: Head) -> Tensor | None:
    """Return what a model says, [B, ..., C]; None where its answer has no such field."""
    names = ("start_logits", "end_logits") if head == "span" else ("logits",)
    found = [getattr(answer, name, None) for name in names]
    logits = [each for each in found if isinstance(each, Tensor)]
    if len(logits) < len(names):
        return None
    return torch.stack(logits, dim=1) if head == "span" else logits[0]


def is_correct(logits: Tensor, targets: Tensor, kind: Kind, head: Head = "tokens") -> bool:
    """Tell whether the model's own prediction is the target, for every row; see `correct_rows`."""
    return bool(correct_rows(logits, targets, kind, head).all())


def correct_rows(logits: Tensor, targets: Tensor, kind: Kind, head: Head = "tokens") -> Tensor:
    """Tell of each row whether the model's own prediction is the target, [B] bool.

    logits: [B, C] or [B, T, C], virtual tokens before those of the targets included, of a span
    [B, 2, T]; targets: [B, ...], with -100 where nothing is asked of tokens and classes.
    """
    if head in ("scores", "several"):
        said, wanted = _numbers(logits, targets)
        if head == "several":
            return ((said > 0) == (wanted > 0.5)).all(dim=1)
        room = SCORE_TOLERANCE * wanted.abs().clamp(min=1)
        return ((said - wanted).abs() <= room).all(dim=1)
    logits, targets, asked = _asked(logits, targets, kind)
    right = torch.ones_like(asked)
    right[asked] = logits[asked].argmax(dim=-1) == targets[asked]
    return right.all(dim=1)


def margins(logits: Tensor, targets: Tensor, kind: Kind, head: Head = "tokens") -> Tensor:
    """Return by how much each row's target is ahead, [B] float32: the least of its tokens' margins.

    That of a token or a class is its logit less the highest other one, the log of how many times
    likelier it is; that of one of several labels its logit, towards the truth. A number has none:
    it is infinite. Where it is above 0 the prediction is right. Arguments as `correct_rows`.
    """
    if head == "scores":
        return torch.full((len(targets),), torch.inf, dtype=torch.float32, device=logits.device)
    if head == "several":
        said, wanted = _numbers(logits, targets)
        return torch.where(wanted > 0.5, said, -said).amin(dim=1)
    logits, targets, asked = _asked(logits, targets, kind)
    margin = logits.new_full(asked.shape, torch.inf, dtype=torch.float32)
    margin[asked] = ahead(logits[asked].float(), targets[asked])
    return margin.amin(dim=1)


def ahead(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return by how much wanted tokens [N] are ahead of the next ones, [N]; logits: [N, C]."""
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(dim=1)
    return logits.gather(1, wanted[:, None])[:, 0] - others


def losses(
    logits: Tensor, targets: Tensor, kind: Kind, head: Head = "tokens"
) -> tuple[Tensor, Tensor]:
    """Return the sum of each row's losses and how many there are, both [B].

    The mean of all of them is the loss of transformers' models; arguments as `correct_rows`.
    """
    if head in ("scores", "several"):
        said, wanted = _numbers(logits, targets)
        each = (
            (said - wanted).square()
            if head == "scores"
            else F.binary_cross_entropy_with_logits(said, wanted, reduction="none")
        )
        return each.sum(dim=1), each.new_full((len(each),), each.shape[1])
    logits, targets, asked = _asked(logits, targets, kind)
    each = F.cross_entropy(logits[asked].float(), targets[asked], reduction="none")
    row = asked.nonzero()[:, 0]
    return each.new_zeros(len(asked)).index_add(0, row, each), asked.sum(dim=1)


def _numbers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a model says and what is wanted, both [B, C] float32."""
    count = len(targets)
    said = logits.float().reshape(count, -1)
    return said, targets.to(said.device).reshape(count, -1).float()


def _asked(logits: Tensor, targets: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [B, L, C], targets [B, L] and where one is asked for, [B, L] bool."""
    if logits.ndim == 3 and targets.ndim == 2:
        logits = logits[:, -targets.shape[1] :]
    if kind == "decoder" and logits.ndim == 3:
        logits, targets = logits[:, :-1], targets[:, 1:]
    targets = targets.to(logits.device).reshape(len(targets), -1)
    return logits.reshape(*targets.shape, logits.shape[-1]), targets, targets != IGNORED_LABEL


def label_from_text(target: Any, model: nn.Module) -> Tensor:
    """Return the label [1] of one prompt of a classifier, given in words or as a number.

    Raises: ValueError for what is no class, or no number where one is wanted.
    """
    head = head_of(model, "classifier")
    if head == "span":
        raise ValueError(
            f"{type(model).__name__} answers with a part of its prompt: give a batch with "
            f"{' and '.join(SPAN)}, which are numbers of tokens"
        )
    if head == "several":
        raise ValueError(
            f"{type(model).__name__} takes several labels at once: give a batch with labels [1, C]"
        )
    if head == "scores":
        try:
            return torch.tensor([float(target)], dtype=torch.float32, device="cpu")
        except (TypeError, ValueError):
            raise ValueError(
                f"the target of a regression must be a number, got {target!r}"
            ) from None
    return torch.tensor([_class_index(target, model)], dtype=torch.int64, device="cpu")


def _class_index(target: Any, model: nn.Module) -> int:
    if not isinstance(target, str) and hasattr(target, "__index__"):
        if not -(2**63) <= int(target) < 2**63:
            raise ValueError(f"the target must be a class index, got {target}")
        return int(target)
    names: dict[str, int] = getattr(getattr(model, "config", None), "label2id", None) or {}
    if isinstance(target, float) and target.is_integer():  # as tables with gaps hold whole numbers
        return int(target)
    if target not in names and isinstance(target, str) and _INDEX.fullmatch(target.strip()):
        return int(float(target))  # a cell of CSV is a text
    if target not in names:
        raise ValueError(
            f"the target must be a class index or one of {sorted(names)}, got {target!r}"
        )
    return names[target]
