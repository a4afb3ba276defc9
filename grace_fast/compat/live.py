"""The codebook of an adaptor under the references' names: read, written, assigned, moved, saved.

`keys` and `values` are views of the store where they can be. A caller may write to them in place or
assign others: version counters are compared before each use, and what is derived from the keys is
made anew. The values need no such care: nothing is derived from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.hook.wrappers import layer_device_dtype
from grace_fast.lookup.prepared import Prepared, prepare

CODEBOOK = ("keys", "values", "epsilons", "key_labels")
STORED = (*CODEBOOK, "key_label_sizes")  # in a state_dict


class LiveCodebook(nn.Module):
    """A codebook for one layer, whose rows are the references' rows."""

    layer: nn.Module
    values: nn.Parameter  # [N, V]; there are none before the first edit
    _passing: tuple[str, ...] = ("_book", "_find", "_handed", "_watched")  # made anew in a copy

    def __init__(self, layer: nn.Module, key_shape: int, value_shape: int) -> None:
        super().__init__()
        self.layer = layer
        self.key_shape, self.value_shape = key_shape, value_shape
        self._forget()

    def _forget(self) -> None:
        """Be without a codebook."""
        self._book: Codebook | None = None
        self._find: Prepared | None = None
        self._labels: list[Tensor | None] = []
        self._assigned: dict[str, Any] = {}
        self._handed: dict[str, Tensor] = {}
        self._watched: list[tuple[Tensor, int]] = []

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CODEBOOK and "_assigned" in self.__dict__:
            self._assign(name, value)
        else:
            super().__setattr__(name, value)

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
        book = Codebook(self.key_shape, self.value_shape, dtype, home(self.layer)[0])
        if len(keys):
            book.append(
                keys.detach().to(book.device, dtype), values.detach().to(book.device, dtype), radii
            )
        parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values.detach())
        self._take(book, parameter, list(labels))

    def _take(self, book: Codebook, parameter: nn.Parameter, labels: list[Tensor | None]) -> None:
        self._book, self._labels, self._assigned = book, labels, {}
        self._find = prepare(book, build_index=False)
        parameter.data = book.snapshot().values
        self._parameters["values"] = parameter
        self._watch()

    def _own_values(self) -> None:
        """Take in values that were put elsewhere, as by `values.data = ...`."""
        if self._book is not None and self._moved() and len(self._book):
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiveCodebook:
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
        return {name: value for name, value in state.items() if name not in self._passing}

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
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        labels = [none if label is None else label.reshape(-1).cpu() for label in self._labels]
        # Copies: the views lie in an address space far larger than what they show.
        saved = {
            "keys": self.keys.clone(),
            "values": self.values.detach().clone(),
            "epsilons": self.epsilons.clone(),
            "key_labels": torch.cat(labels) if labels else none,
            "key_label_sizes": torch.tensor(
                [len(label) for label in labels], dtype=torch.int64, device="cpu"
            ),
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
        try:
            labels = _labels_in(saved["key_labels"], saved["key_label_sizes"])
            self.load(saved["keys"], saved["values"], saved["epsilons"], labels)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def _labels_in(ids: Any, sizes: Any) -> list[Tensor | None]:
    """Return the labels of a state_dict, [1, T] each, of their ids one after the other.

    Raises: TypeError, ValueError where the sizes are not those of the ids.
    """
    for name, given in (("key_labels", ids), ("key_label_sizes", sizes)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if given.ndim != 1 or given.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [*], got {given.dtype} {tuple(given.shape)}")
    # Each one first: a sum of huge sizes wraps around.
    if bool(((sizes < 0) | (sizes > len(ids))).any()) or int(sizes.sum()) != len(ids):
        raise ValueError(f"key_label_sizes must add up to the {len(ids)} key_labels")
    parts = ids.split(sizes.tolist()) if len(sizes) else ()
    return [label[None] if len(label) else None for label in parts]


def home(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where the codebook of a layer is and in which element type, whatever its weights."""
    return layer_device_dtype(layer) or (torch.device("cpu"), torch.float32)


def as_epsilons(radii: Tensor) -> Tensor:
    """Return radii [N] in the references' shape: [1] of one key, [N, 1] of several."""
    return radii if len(radii) == 1 else radii[:, None]
