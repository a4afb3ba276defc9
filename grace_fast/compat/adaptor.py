"""The module that stands in the place of an edited layer, under the references' names.

    query = layer input at t = min(key_id, T - 1);  output = hit ? value : output, by the mode

It holds a `Codebook` whose rows are the reference's rows, so `keys` and `values` are views of the
store. A caller may write to them, or assign others: each forward compares version counters and
starts anew from what was written. Assigning `training`, `iter` and `edit_label` and calling forward
drives an edit, as the references' editors do; `teaching.teach` does the same in a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast import lookup, semantics
from grace_fast.adapter import place
from grace_fast.codebook import DTYPES, Codebook, Draft, Snapshot
from grace_fast.compat.method import Method
from grace_fast.prepared import Prepared, prepare
from grace_fast.semantics import Decision, Rules

CODEBOOK = ("keys", "values", "epsilons", "key_labels")
STORED = (*CODEBOOK, "key_label_sizes")  # in a state_dict


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


@dataclass
class Change:
    """What one decision did to the rows."""

    decision: Decision
    row: int  # the edit lives on it
    neighbour: int | None = None  # the row whose ball was split to make room


class Adaptor(nn.Module):
    """GRACE in the place of one layer; the references' adaptors are made of it."""

    layer: nn.Module
    values: nn.Parameter  # [N, V]; there are none before the first edit

    def __init__(self, layer: nn.Module, method: Method, device: Any, transpose: bool) -> None:
        super().__init__()
        self.key_shape, self.value_shape = widths(layer, transpose)
        self.layer = layer
        self.device = place(layer)[0] if device is None else device
        self._method = method
        self.init_epsilon, self.replacement = method.epsilon, method.replacement
        self.dist_fn, self.num_pert = method.dist_fn, method.num_pert
        self.training = False  # whether an edit is going on; the layer's own mode is the layer's
        self.key_id: int | Tensor = -1
        self.iter = 0
        self.edit_label: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        """Be without a codebook."""
        self._book: Codebook | None = None
        self._find: Prepared | None = None
        self._labels: list[Tensor | None] = []
        self._assigned: dict[str, Any] = {}
        self._handed: dict[str, Tensor] = {}
        self._watched: list[tuple[Tensor, int]] = []
        self._asked: tuple[Tensor, Snapshot] | None = None
        self._chosen: Chosen | None = None
        self._fresh: list[Tensor] | None = None
        self._teaching = False
        self._pinned: int | None = None

    # The names of the references

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def keys(self) -> Tensor:
        """[N, D]; there is none before the first edit."""
        return self._hand_out("keys", lambda snapshot: snapshot.keys)

    @property
    def epsilons(self) -> Tensor:
        """The radii: [1] of one key, [N, 1] of several."""
        return self._hand_out("epsilons", lambda snapshot: as_epsilons(snapshot.radii.clone()))

    @property
    def key_labels(self) -> list[Tensor | None]:
        """N label tensors, in the order of the keys."""
        if "key_labels" in self._assigned:
            return self._assigned["key_labels"]  # type: ignore[no-any-return]
        if self._book is None:
            raise AttributeError("key_labels")
        return self._labels

    @property
    def chosen_key(self) -> Tensor:
        """[B] int64, the nearest rows of the last forward, worked out when it is read."""
        if self._chosen is not None:
            return self._chosen.row
        if self._asked is None:
            raise AttributeError("chosen_key")
        return lookup.nearest(*self._asked).row

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CODEBOOK and "_assigned" in self.__dict__:
            self._assign(name, value)
        else:
            super().__setattr__(name, value)

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
            self._take(self._empty_book(), nn.Parameter(torch.empty(0)), [])
        assert self._book is not None
        return self._book

    def _empty_book(self) -> Codebook:
        device, dtype = place(self.layer)
        return Codebook(self.key_shape, self.value_shape, dtype, device)

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
        book = self._book_for_edits()
        queries = queries.to(book.dtype)
        self._own_values()
        before = list(self._labels)
        values = output[torch.arange(len(output)), _positions(token, output)]
        try:
            with book.writing() as draft:
                for at, query in enumerate(queries):
                    fresh = self._fresh_value(at, values)
                    self._enact(draft, query, labels[at].detach().clone(), fresh)
        except BaseException:
            self._labels = before
            raise
        self._fresh = None
        if not self._teaching:
            self._renew()
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
        return torch.rand(1, self.value_shape)[0]

    def _enact(self, draft: Draft, query: Tensor, label: Tensor, fresh: Tensor) -> Change:
        """Decide one edit and change the rows; query: [D], fresh: [V]."""
        rules = Rules(float(self.init_epsilon), self._method.eps_expand, semantics="reference")
        before = draft.snapshot()
        # A key farther than this has no ball within epsilon of the query: the edit is added.
        within = (rules.epsilon + before.widest) * (1 + 1e-6)
        near = lookup.nearest(query[None], before, within=within)
        row, squared = int(near.row[0]), float(near.squared_distance[0])
        radius, same = 0.0, False
        if row >= 0:
            radius, known = before.radius_of(row), self._label_compared(row)
            same = known is not None and semantics.same_label(rules, label, known)
        decision = semantics.decide(rules, squared, radius, same)
        if decision.outcome in ("added", "split"):
            keys, values = query[None], fresh[None].to(query)
            made = draft.append(keys, values, torch.tensor([decision.radius]), None)[0]
            self._labels.append(label)
            if decision.nearest_radius is None:
                return Change(decision, made)
            draft.set_radius(row, decision.nearest_radius)
            return Change(decision, made, row)
        if decision.moves_key:
            draft.set_key(row, (before.key_of(row).double() + query.double()) / 2)
        if decision.radius != radius:
            draft.set_radius(row, decision.radius)
        return Change(decision, row)

    def _label_compared(self, row: int) -> Tensor | None:
        """Return the label that an edit near a row is compared with."""
        return self._labels[row]

    @contextmanager
    def editing(self, label: Tensor) -> Iterator[None]:
        """Make an edit of the forward calls in the block, with the values of `trained` at its end.

        It is published whole, or not at all.
        """
        self._settle()
        book, before = self._book_for_edits(), self._bookkeeping()
        was_empty = not len(book)
        batch = label.shape[0] if label.ndim else 1
        cold = self._method.val_init == "cold"
        self._fresh = [self.cold_value() for _ in range(batch)] if cold else None
        self.training, self._teaching, self.edit_label, self._chosen = True, True, label, None
        try:
            with book.writing() as draft:
                yield
                chosen = self._chosen
                if chosen is None or chosen.trained is None:
                    raise RuntimeError("the edited layer did not run in the model's forward call")
                with torch.no_grad():
                    draft.snapshot().values[chosen.rows] = chosen.trained.to(book.dtype)
            self._renew()
        except BaseException:
            self._keep_books(before)
            if was_empty:
                self._parameters.pop("values", None)
                self._forget()
            raise
        finally:
            self.training, self._teaching, self._fresh = False, False, None

    @property
    def trained(self) -> Tensor | None:
        """[R, V] float32, what an edit in progress trains; None before its first forward."""
        return None if self._chosen is None else self._chosen.trained

    def _bookkeeping(self) -> Any:
        """Return what an edit that fails has to put back, beside the codebook."""
        return list(self._labels)

    def _keep_books(self, before: Any) -> None:
        self._labels, self._chosen = before, None

    # What callers read, write and assign

    def _hand_out(self, name: str, read: Callable[[Snapshot], Tensor]) -> Tensor:
        if name in self._assigned:
            return self._assigned[name]  # type: ignore[no-any-return]
        if self._book is None:
            raise AttributeError(name)
        if name not in self._handed:
            self._handed[name] = read(self._book.snapshot())
            self._watched.append((self._handed[name], self._handed[name]._version))
        return self._handed[name]

    def _assign(self, name: str, value: Any) -> None:
        if name == "key_labels":
            self._assigned[name] = list(value)
            return
        self._check(name, value)
        self._assigned[name] = value
        if name == "values":
            self._parameters["values"] = (
                value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            )

    def _check(self, name: str, given: Any) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if name == "epsilons":
            return
        width = self.key_shape if name == "keys" else self.value_shape
        if given.ndim != 2 or given.shape[1] != width:
            raise ValueError(f"{name} must be [N, {width}], got {tuple(given.shape)}")
        if given.dtype not in DTYPES:
            raise ValueError(f"{name} must be of {DTYPES}, got {given.dtype}")

    def _settle(self) -> None:
        """Take in what was assigned or written in place since the last call."""
        if self._assigned:
            lacking = [n for n in CODEBOOK[:3] if self._book is None and n not in self._assigned]
            if lacking:
                raise ValueError(f"a codebook needs {CODEBOOK[:3]}; {lacking[0]} is not assigned")
            count = len(self.keys)
            if "key_labels" not in self._assigned and count != len(self._labels):
                self._assigned["key_labels"] = [None] * count
            self.load(self.keys, self.values, self.epsilons, self.key_labels)
        elif any(tensor._version != version for tensor, version in self._watched):
            handed = dict(self._handed)
            self.load(self.keys, self.values, self.epsilons, self.key_labels)
            # Who holds them may write to them again.
            self._handed = handed
            self._watched += [(tensor, tensor._version) for tensor in handed.values()]

    def load(
        self, keys: Tensor, values: Tensor, epsilons: Tensor, labels: list[Tensor | None]
    ) -> None:
        """Take a codebook over: keys [N, D], values [N, V], N radii and N labels.

        Raises: ValueError where they do not fit the layer or each other; the codebook is as before.
        """
        for name, given in zip(CODEBOOK[:3], (keys, values, epsilons), strict=True):
            self._check(name, given)
        radii = epsilons.detach().reshape(-1).float()
        counts = {"keys": len(keys), "values": len(values), "epsilons": len(radii)}
        counts["key_labels"] = len(labels)
        if len(set(counts.values())) != 1:
            raise ValueError(f"a codebook needs as many of each, got {counts}")
        # One element type that holds both exactly: keys may be bf16 where values are fp32.
        dtype = torch.promote_types(keys.dtype, values.dtype)
        book = Codebook(self.key_shape, self.value_shape, dtype, place(self.layer)[0])
        if len(keys):
            book.append(
                keys.detach().to(book.device, dtype), values.detach().to(book.device, dtype), radii
            )
        parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values.detach())
        self._take(book, parameter, list(labels))

    def _take(self, book: Codebook, parameter: nn.Parameter, labels: list[Tensor | None]) -> None:
        self._book, self._labels, self._assigned = book, labels, {}
        self._find = prepare(book, wait=False)
        parameter.data = book.snapshot().values
        self._parameters["values"] = parameter
        self._asked = self._chosen = None
        self._watch()

    def _own_values(self) -> None:
        """Take in values that were put elsewhere, as by `values.data = ...`."""
        assert self._book is not None
        if self.values.data_ptr() != self._book.snapshot().values.data_ptr() and len(self._book):
            self.load(self.keys, self.values, self.epsilons, self.key_labels)

    def _renew(self) -> None:
        """Follow the codebook's new version."""
        assert self._book is not None
        snapshot = self._book.snapshot()
        if len(self.values) != len(snapshot):
            self._parameters["values"] = nn.Parameter(snapshot.values)
        self._watch()

    def _watch(self) -> None:
        assert self._book is not None
        store = self._book.snapshot().key_slots
        self._handed, self._watched = {}, [(store, store._version)]

    # Moving, copying, saving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adaptor:
        if self._book is not None:
            self._settle()
            keys, epsilons, labels = self.keys, self.epsilons, self.key_labels
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._book is not None and self._moved():
            self.load(fn(keys), self.values, epsilons, labels)
        return self

    def _moved(self) -> bool:
        assert self._book is not None
        return self.values.data_ptr() != self._book.values.data_ptr() or (
            (self.values.device, self.values.dtype) != (self._book.device, self._book.dtype)
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        saved = None
        if self._book is not None:
            self._settle()
            parts = (self.keys, self.values.detach(), self.epsilons)
            saved = (*(part.clone() for part in parts), list(self.key_labels))
        parameters = {name: p for name, p in self._parameters.items() if name != "values"}
        state |= {"_parameters": parameters, "_saved": saved}
        for name in ("_book", "_find", "_handed", "_watched", "_asked", "_chosen", "_fresh"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        if saved is not None:
            self.load(*saved)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._book is None:
            return
        self._settle()
        labels = [torch.empty(0) if label is None else label.reshape(-1) for label in self._labels]
        # Copies: the views lie in an address space far larger than what they show.
        saved = {
            "keys": self.keys.clone(),
            "values": self.values.detach().clone(),
            "epsilons": self.epsilons.clone(),
            "key_labels": torch.cat(labels) if labels else torch.empty(0),
            "key_label_sizes": torch.tensor([len(label) for label in labels], dtype=torch.int64),
        }
        destination.update({prefix + name: tensor for name, tensor in saved.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = {n: state_dict[prefix + n] for n in STORED if prefix + n in state_dict}
        if len(saved) < len(STORED):
            if saved or self._book is not None:
                missing_keys += [prefix + name for name in STORED if name not in saved]
            return
        sizes = saved["key_label_sizes"].tolist()
        labels = [label[None] if len(label) else None for label in saved["key_labels"].split(sizes)]
        try:
            self.load(saved["keys"], saved["values"], saved["epsilons"], labels)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def widths(layer: nn.Module, transpose: bool) -> tuple[int, int]:
    """Return D and V of a layer: as it declares them, else from its weight.

    transpose: the weight is [V, D], as a Linear's; else [D, V], as a Conv1D's.

    Raises: ValueError for a layer that cannot be edited, or has an adaptor.
    """
    if isinstance(layer, Adaptor):
        raise ValueError("the layer has an adaptor already; a layer takes one")
    key_dim = getattr(layer, "in_features", getattr(layer, "nx", None))
    value_dim = getattr(layer, "out_features", getattr(layer, "nf", None))
    if isinstance(key_dim, int) and isinstance(value_dim, int):
        return key_dim, value_dim
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Embedding) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            f"a {type(layer).__name__} cannot be edited: it has no weight of two dimensions; "
            "name a linear layer"
        )
    key_dim, value_dim = reversed(weight.shape) if transpose else weight.shape
    return key_dim, value_dim


def as_epsilons(radii: Tensor) -> Tensor:
    """Return radii [N] in the references' shape: [1] of one key, [N, 1] of several."""
    return radii if len(radii) == 1 else radii[:, None]


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
