"""Signature of an edit: which prompt and which answer, to find it again in a history."""

from __future__ import annotations

from torch import nn

from grace_fast.editor import batches, heads
from grace_fast.editor.batches import Batch
from grace_fast.editor.heads import Kind
from grace_fast.edits.edit import Edit
from grace_fast.semantics import Semantics

Signature = tuple[int, tuple[int, ...]]  # checksum of the prompt's tokens, ids of the label


def of_edit(edit: Edit) -> Signature:
    """Return the signature of an edit that was made."""
    return edit.prompt, () if edit.label is None else tuple(edit.label.tolist())


def of_batch(batch: Batch, model: nn.Module, kind: Kind, semantics: Semantics) -> Signature:
    """Return the signature that the edit of a batch of one row will have.

    Raises: ValueError where the batch is none that can be edited, as far as the model need not run.
    """
    head = heads.head_of(model, kind, batch.get("labels"))
    batches.check(batch, kind, head, heads.classes_of(model, kind))
    (label,) = heads.labels_of(heads.targets_of(batch, head, 1), head, kind, model, semantics)
    return batches.prompt_checksum(batch, 0, kind), tuple(label.tolist())
