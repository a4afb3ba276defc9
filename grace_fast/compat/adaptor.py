"""The module that stands in the place of an edited layer, under the references' names.

    query = layer input at t = min(key_id, T - 1);  output = hit ? value : output, by the mode

The codebook is under the names of `live`. Assigning `training`, `iter` and `edit_label` and calling
forward drives an edit, as the references' editors do; `teaching.teach` does the same in a draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast import semantics
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.compat.live import LiveCodebook, home
from grace_fast.compat.method import Method
from grace_fast.edits.apply import Applied, apply
from grace_fast.hook.tensor_parallel import declared_widths
from grace_fast.lookup import lookup
from grace_fast.semantics import Rules, Semantics


@dataclass
class Chosen:
    """The decision of one edit, from its first step on."""

    queries: Tensor  # [B, D]
    row: Tensor  # [B] int64, the nearest
    hit: Tensor  # [B] bool
    rows: Tensor  # [R] int64, those that are trained
    which: Tensor  # [B] int64, row = rows[which]; -1 for a row that is not trained
    others: Tensor | None = None  # [B, V], the values of the nearest rows, where some are not
    trained: Tensor | None = None  # [R, V] float32, the values of rows in training
    where: Tensor | None = None  # [B, T, 1] bool, the tokens that are replaced


class Adaptor(LiveCodebook):
    """GRACE in the place of one layer; the references' adaptors are made of it."""

    _passing = (*LiveCodebook._passing, "_asked", "_chosen", "_fresh")

    def __init__(self, layer: nn.Module, method: Method, device: Any, transpose: bool) -> None:
        super().__init__(layer, *widths(layer, transpose))
        self.device = home(layer)[0] if device is None else device
        self._method = method
        self._semantics: Semantics = "reference"
        self.init_epsilon, self.replacement = method.epsilon, method.replacement
        self.dist_fn, self.num_pert = method.dist_fn, method.num_pert
        self.training = False  # whether an edit is going on; the layer's own mode is the layer's
        self.key_id: int | Tensor = -1
        self.iter = 0
        self.edit_label: Tensor | None = None

    def _forget(self) -> None:
        super()._forget()
        self._asked: tuple[Tensor, Snapshot] | None = None
        self._chosen: Chosen | None = None
        self._fresh: list[Tensor] | None = None
        self._teaching = False
        self._pinned: int | None = None

    def _take(self, book: Codebook, parameter: nn.Parameter, labels: list[Tensor | None]) -> None:
        super()._take(book, parameter, labels)
        self._asked = self._chosen = None

    # The names of the references

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def chosen_key(self) -> Tensor:
        """[B] int64, the nearest rows of the last forward, worked out when it is read."""
        if self._chosen is not None:
            return self._chosen.row
        if self._asked is None:
            raise AttributeError("chosen_key")
        return lookup.nearest(*self._asked).row

    def train(self, mode: bool = True) -> Adaptor:
        """Set the mode of the layer; an edit is neither started nor stopped by it."""
        self.layer.train(mode)
        return self

    def extra_repr(self) -> str:
        """Return the number of keys and the settings."""
        keys = 0 if self._book is None else len(self._book)
        return f"{keys} keys, epsilon={self.init_epsilon:g}, replacement={self.replacement!r}"

    # A forward call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output, with values where the queries hit."""
        output = self.layer(*args, **kwargs)
        if self._book is None and not self._assigned and not self._edits():
            return output
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the edited layer must return one tensor, got {type(output).__name__}; "
                "name a linear layer"
            )
        hidden = args[0] if args else next(iter(kwargs.values()))
        if hidden.ndim == 2:  # one sequence, without its batch
            return self._replace(hidden[None], output[None])[0]
        return self._replace(hidden, output)

    def _edits(self) -> bool:
        return self.training and (self._book is not None or self.iter == 0)

    def _replace(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Return output [B, T, V] with the values of those rows of hidden [B, T, D] that hit."""
        if not self._teaching:  # whose own writes are not a caller's
            self._settle()
        token = self._token(hidden)
        if isinstance(token, int):
            queries = hidden[:, token].detach()
        else:
            queries = hidden[torch.arange(len(hidden), device=hidden.device), token].detach()
        if self.training:
            return self._replace_in_training(queries, output, token)
        if self._book is None or self._find is None:
            return output
        if queries.dtype != self._book.dtype:
            queries = queries.to(self._book.dtype)
        match = self._find(queries)
        # A copy: the input may be written to before anyone reads `chosen_key`.
        self._chosen, self._asked = None, (queries.clone(), self._book.snapshot())
        if match.hits == 0:
            return output
        values = self.values[match.row.clamp(min=0)]
        mask = semantics.replacement_mask(
            self.replacement, _positions(token, output), output.shape[1]
        )
        return semantics.replace(output, match.hit, values, mask)

    def _token(self, hidden: Tensor) -> int | Tensor:
        """Return the query position, of all rows or [B] of each."""
        last = hidden.shape[1] - 1
        key_id = self.key_id
        if isinstance(key_id, Tensor):
            if key_id.numel() > 1:
                wanted = key_id.reshape(-1).to(hidden.device)
                if len(wanted) != len(hidden):
                    raise ValueError(
                        f"key_id must be one number or {len(hidden)}, one for each row, "
                        f"got {len(wanted)}"
                    )
                return torch.where(wanted < 0, wanted + last + 1, wanted).clamp(0, last)
            key_id = int(key_id)
        if self._pinned is not None and key_id == -1:
            if self._pinned < 0:
                self._pinned = last
            return min(self._pinned, last)
        return min(key_id, last) if key_id >= 0 else max(0, last + 1 + key_id)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep a query at the last position where the first forward of the block found it."""
        self._pinned = -1
        try:
            yield
        finally:
            self._pinned = None

    # An edit

    def _replace_in_training(self, queries: Tensor, output: Tensor, token: int | Tensor) -> Tensor:
        if self.iter == 0:
            self._decide(queries, output.detach(), token)
        assert self._book is not None
        queries, chosen = queries.to(self._book.dtype), self._chosen
        if chosen is None or not torch.equal(chosen.queries, queries):
            snapshot = self._snapshot()
            if not len(snapshot):
                return output
            self._chosen = chosen = _choose(queries, snapshot, chosen)
        if chosen.where is None or chosen.where.shape[:2] != output.shape[:2]:
            positions = _positions(token, output)
            mask = semantics.replacement_mask(self.replacement, positions, output.shape[1])
            chosen.where = (chosen.hit[:, None] & mask)[:, :, None]
        values = self.values[chosen.row] if chosen.trained is None else _in_training(chosen)
        return torch.where(chosen.where, values.to(output.dtype)[:, None, :], output)

    def _book_for_edits(self) -> Codebook:
        if self._book is None:
            none = torch.empty(0, dtype=torch.float32, device="cpu")
            device, dtype = home(self.layer)
            book = Codebook(self.key_shape, self.value_shape, dtype, device)
            self._take(book, nn.Parameter(none), [])
        assert self._book is not None
        return self._book

    def _snapshot(self) -> Snapshot:
        """Return the codebook as the edit in progress has it."""
        assert self._book is not None
        if not self._teaching:
            return self._book.snapshot()
        with self._book.writing() as draft:
            return draft.snapshot()

    def _decide(self, queries: Tensor, output: Tensor, token: int | Tensor) -> None:
        """Decide an edit for every row of a batch, in order, and do it but for its training."""
        label = self.edit_label
        if label is None:
            raise ValueError("an edit needs edit_label: the label tensor of its tokens")
        if not queries.isfinite().all():
            raise ValueError("the query of an edit must be finite, got NaN or infinity")
        labels = [label] if len(queries) == 1 else list(torch.split(label, 1))
        if len(labels) != len(queries):
            raise ValueError(
                f"edit_label must have {len(queries)} rows like the batch, got {len(labels)}"
            )
        if not self._teaching:
            self._own_values()
        book = self._book_for_edits()
        queries = queries.to(book.dtype)
        values = output[torch.arange(len(output), device=output.device), _positions(token, output)]
        with self._attempting(), book.writing() as draft:
            for at, query in enumerate(queries):
                fresh = self._fresh_value(at, values)
                self._edit_row(draft, query, labels[at].detach().clone(), fresh)
        self._fresh = None
        if not self._teaching:
            self._renew()
            self.values.requires_grad_()  # who freezes a whole model means its weights
        snapshot = self._snapshot()
        self._chosen = _choose(queries, snapshot)
        if self._teaching:
            self._chosen.trained = snapshot.values[self._chosen.rows].float().requires_grad_()

    def _fresh_value(self, at: int, outputs: Tensor) -> Tensor:
        if self._method.val_init == "warm":
            return outputs[at]
        if self._fresh is not None and at < len(self._fresh):
            return self._fresh[at]
        return self.cold_value()

    def cold_value(self) -> Tensor:
        """Draw the value that a key starts with, [V], from the global generator."""
        return torch.rand(1, self.value_shape, dtype=torch.float32, device="cpu")[0]

    def _edit_row(self, draft: Draft, query: Tensor, label: Tensor, fresh: Tensor) -> Applied:
        """Decide one edit and change the rows; query: [D], fresh: [V]."""
        rules = Rules(float(self.init_epsilon), self._method.eps_expand, semantics=self._semantics)
        return apply(draft, rules, query, label, fresh.to(query), self._labels)

    @contextmanager
    def _attempting(self) -> Iterator[None]:
        """Put back what is kept beside the codebook where an edit fails."""
        labels = list(self._labels)
        try:
            yield
        except BaseException:
            self._labels = labels
            self._watch()  # what the dropped draft wrote is not a caller's
            raise

    @contextmanager
    def editing(self, label: Tensor) -> Iterator[None]:
        """Make an edit of the forward calls in the block, with the values of `trained` at its end.

        It is published whole, or not at all.
        """
        self._settle()
        self._own_values()
        book = self._book_for_edits()
        was_empty = not len(book)
        batch = label.shape[0] if label.ndim else 1
        cold = self._method.val_init == "cold"
        self._fresh = [self.cold_value() for _ in range(batch)] if cold else None
        self.training, self._teaching, self.edit_label, self._chosen = True, True, label, None
        try:
            with self._attempting(), book.writing() as draft:
                yield
                trained, chosen = self.trained, self._chosen
                assert chosen is not None
                if not trained.isfinite().all():
                    raise ValueError("training led to a value that is not finite; lower edit_lr")
                with torch.no_grad():
                    draft.snapshot().values[chosen.rows] = trained.to(book.dtype)
            self._renew()
        except BaseException:
            self._chosen = None
            if was_empty:
                self._parameters.pop("values", None)
                self._forget()
            raise
        finally:
            self.training, self._teaching, self._fresh = False, False, None

    @property
    def trained(self) -> Tensor:
        """[R, V] float32, what an edit in progress trains.

        Raises: RuntimeError before its first forward.
        """
        if self._chosen is None or self._chosen.trained is None:
            raise RuntimeError("the edited layer did not run in the model's forward call")
        return self._chosen.trained


def widths(layer: nn.Module, transpose: bool) -> tuple[int, int]:
    """Return D and V of a layer: as it declares them, else from its weight.

    transpose: the weight is [V, D], as a Linear's; else [D, V], as a Conv1D's.

    Raises: ValueError for a layer that cannot be edited, or has an adaptor.
    """
    if isinstance(layer, Adaptor):
        raise ValueError("the layer has an adaptor already; a layer takes one")
    key_dim, value_dim = declared_widths(layer)
    if key_dim is not None and value_dim is not None:
        return key_dim, value_dim
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            f"a {type(layer).__name__} cannot be edited: it has no weight of two dimensions; "
            "name a linear layer"
        )
    key_dim, value_dim = reversed(weight.shape) if transpose else weight.shape
    return key_dim, value_dim


def _choose(queries: Tensor, snapshot: Snapshot, before: Chosen | None = None) -> Chosen:
    """Return the rows that answer queries [B, D]; `before` are those of an earlier step."""
    near = lookup.nearest(queries, snapshot)
    hit = semantics.in_ball(near.squared_distance, snapshot.radii_of(near.row))
    if before is None or before.trained is None:
        rows, which = torch.unique(near.row, return_inverse=True)
        return Chosen(queries.clone(), near.row, hit, rows, which)
    # Dropout moved the query: what was chosen first is trained, other rows answer as they are.
    same = near.row[:, None] == before.rows[None, :]
    which = torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)
    others = snapshot.values_of(near.row)
    return Chosen(queries.clone(), near.row, hit, before.rows, which, others, before.trained)


def _in_training(chosen: Chosen) -> Tensor:
    """Return the nearest rows' values [B, V], so that gradients reach those in training."""
    assert chosen.trained is not None
    if chosen.others is None:
        return chosen.trained[chosen.which]
    trained = chosen.trained[chosen.which.clamp(min=0)]
    return torch.where((chosen.which >= 0)[:, None], trained, chosen.others.float())


def _positions(token: int | Tensor, output: Tensor) -> Tensor:
    if isinstance(token, Tensor):
        return token
    return torch.full((len(output),), token, dtype=torch.int64, device=output.device)
