"""EasyEdit's surface: hparams by attribute, one editor a model, edits named by their target text.

Decisions are those of the authors' rules; labels stand in the order of the keys and ids are flat,
so that any edit can be rolled back. EasyEdit itself compares an edit with the label of another row
(`semantics.label_row`); `semantics="easyedit"` does so too, to have old results again.
"""

from __future__ import annotations

import copy as copying
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from grace_fast import errors
from grace_fast.codebook.draft import Draft
from grace_fast.compat.adaptor import Adaptor
from grace_fast.compat.method import number, read_method, read_steps
from grace_fast.compat.reference import Editor, put
from grace_fast.compat.rollback import Rollback
from grace_fast.editor.attach import find_layer
from grace_fast.edits.apply import Applied
from grace_fast.semantics import IGNORED_LABEL
from grace_fast.store.strict_json import read_bounded

_MOST_YAML_BYTES = 1 << 16  # a thousand times that of memory is made of it
# What PyYAML raises, beside its own, for tags that do not suit their text, and for deep ones.
_ODD_YAML = (ValueError, TypeError, AttributeError, LookupError, RecursionError)


@dataclass
class GraceHyperParams:
    """The settings of EasyEdit's GRACE YAML; those after `eps_expand` change no decision."""

    inner_params: list[str]
    edit_lr: float = 1.0
    n_iter: int = 100
    eps: float = 1.0
    val_init: str = "cold"
    replacement: str = "replace_last"
    eps_expand: str = "coverage"
    dist_fn: str = "euc"
    val_train: str = "sgd"
    val_reg: Any = None
    reg: str = "early_stop"
    num_pert: int = 8
    dropout: float = 0.0
    alg_name: str = "GRACE"
    model_name: str = ""
    device: Any = None
    batch_size: int = 1
    max_length: int = 30
    model_parallel: bool = False

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> GraceHyperParams:
        """Read a YAML file; `.yaml` may be left out of its name.

        Raises: FileNotFoundError, ValueError for what is no YAML, another algorithm, a rate or
        radius that is no number, or without `inner_params`.
        """
        try:
            import yaml
        except ModuleNotFoundError as error:
            raise errors.missing("reading hparams", "yaml") from error

        path = Path(hparams_name_or_path)
        path = path if ".yaml" in path.name else path.with_name(f"{path.name}.yaml")
        try:
            content = read_bounded(os.open(path, os.O_RDONLY), _MOST_YAML_BYTES)
            given = yaml.safe_load(content.decode("utf-8"))
        except (yaml.YAMLError, *_ODD_YAML) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(given, dict) or given.get("alg_name") != "GRACE":
            found = given.get("alg_name") if isinstance(given, dict) else given
            # Not repr: an alias within aliases is short in a file and endless when written out.
            raise ValueError(f"{path} must have alg_name: GRACE, got {reprlib.repr(found)}")
        layers = given.get("inner_params")
        if not (isinstance(layers, list) and layers and all(isinstance(n, str) for n in layers)):
            raise ValueError(f"{path} needs inner_params: a list of the layers to edit")
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        # YAML takes 1e-3 for text.
        known |= {name: number(name, known[name]) for name in ("edit_lr", "eps") if name in known}
        return cls(**known)


class GRACEAdapter(Adaptor):
    """The module in the place of the edited layer, with `edit_id`, `edit_ids` and `delete_key`.

    config: hparams by attribute; semantics: "reference", or "easyedit" to compare labels in
    EasyEdit's order.

    Raises: AttributeError for hparams without a needed name, ValueError for a mode that does not
    exist or a layer that cannot be edited.
    """

    def __init__(
        self,
        config: Any,
        layer: nn.Module,
        transpose: bool = True,
        semantics: Literal["reference", "easyedit"] = "reference",
    ) -> None:
        method = read_method(_reader(config), lambda name: getattr(config, name, None))
        super().__init__(layer, method, None, transpose)
        self.config = config
        self.edit_id: Any = None
        self._semantics = semantics
        self._rollback = Rollback()

    @property
    def edit_ids(self) -> list[Any]:
        """The id of each key, in the order of the keys: of the oldest edit that remains on it."""
        if self._book is None:
            raise AttributeError("edit_ids")
        self._settle()
        return self._rollback.row_names()

    def load(
        self,
        keys: Tensor,
        values: Tensor,
        epsilons: Tensor,
        labels: list[Tensor | None],
        edit_ids: Sequence[Any] | None = None,
    ) -> None:
        """Take a codebook over, with an id for each key or those of as many keys before.

        Raises: as `Adaptor.load`.
        """
        self._check("keys", keys)
        ids = self._rollback.row_names() if edit_ids is None else edit_ids
        if edit_ids is not None and len(ids) != len(keys):
            raise ValueError(f"edit_ids must be {len(keys)}, one for each key, got {len(ids)}")
        super().load(keys, values, epsilons, labels)
        if len(ids) != len(keys):
            ids = [None] * len(keys)
        self._rollback = Rollback.of(self.keys, self.epsilons.reshape(-1).tolist(), ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GRACEAdapter:
        kept = self._rollback
        super()._apply(fn, recurse)
        if self._rollback is not kept:  # loaded anew, elsewhere
            kept.move(fn)
            self._rollback = kept
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state["_rollback"]
        super().__setstate__(state)
        self._rollback = kept

    def _edit_row(self, draft: Draft, query: Tensor, label: Tensor, fresh: Tensor) -> Applied:
        applied = super()._edit_row(draft, query, label, fresh)
        self._rollback.add(applied, self.edit_id, draft.snapshot())
        return applied

    @contextmanager
    def _attempting(self) -> Iterator[None]:
        with super()._attempting(), self._rollback.history.attempting():
            yield

    def delete_key(self, edit_id: Any) -> None:
        """Take back every edit of an id: a key goes with its last edit, and its split with it.

        A key that has other edits keeps the ball and the value of the newest of them.

        Raises: KeyError where no edit has the id, naming those that remain.
        """
        self._settle()
        if edit_id not in (known := self._rollback.names()):
            there = sorted({str(name) for name in known})[:9]
            raise KeyError(f"no edit has the id {edit_id!r}; there are {there}")
        kept, keys, values = self._rollback, self.keys.clone(), self.values.detach().clone()
        radii = self.epsilons.reshape(-1).clone()
        staying = kept.take_back(edit_id, keys, values, radii)
        labels = [self._labels[row] for row in staying]
        picked = torch.tensor(staying, dtype=torch.int64, device=keys.device)
        super().load(keys[picked], values[picked], radii[picked], labels)
        self._rollback = kept


class GRACE(Editor):
    """EasyEdit's editor on a transformers model.

    config: hparams by attribute: inner_params, eps, replacement, val_init, eps_expand, n_iter,
    edit_lr. A layer that has such an adaptor already is edited on.

    Raises: as `GRACEAdapter`, ValueError for an unknown layer or one that has another adaptor.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        device: Any = None,
        semantics: Literal["reference", "easyedit"] = "reference",
    ) -> None:
        read_steps(_reader(config))
        inner = _reader(config)("inner_params")[0]
        there = find_layer(model, inner)[1]
        if isinstance(there, GRACEAdapter):
            self._resume(model, inner)
        else:
            super().__init__(model, inner, partial(GRACEAdapter, config, semantics=semantics))
        self.config, self.device = config, device

    def edit(self, config: Any, tokens: Mapping[str, Any], edit_id: Any) -> None:
        """Make the model answer tokens with their `labels`, by exactly `n_iter` steps of Adam.

        edit_id: the name to roll the edit back by, in EasyEdit the target's text.
        """
        steps = read_steps(_reader(self.config if config is None else config))
        before, self.adaptor.edit_id = self.adaptor.edit_id, edit_id
        try:
            self.teach(tokens, steps, at_labels=True)
        except BaseException:
            self.adaptor.edit_id = before
            raise

    @property
    def _asks_at_labels(self) -> bool:
        return True

    def rolllback(self, edit_id: Any) -> None:
        """Take back every edit of an id, whatever came after it.

        Raises: KeyError where no edit has the id.
        """
        cast(GRACEAdapter, self.adaptor).delete_key(edit_id)

    def reset_layer(self) -> None:
        """Put the original layer back."""
        put(self.model, self.layer, self.adaptor.layer)


def apply_grace_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[GRACE, Callable[[], None]]:
    """Edit the first request (`prompt`, `target_new`) into a model; return editor and its undoing.

    A model that is edited already, or its editor, is edited on; with `copy` a copy of it.
    `return_orig_weights` and `keep_original_weight` have no effect: the weights never change, and
    what is returned second is `reset_layer`.
    """
    inner = model.model if isinstance(model, GRACE) else model
    if copy:
        inner = copying.deepcopy(inner)
    editor = GRACE(hparams, inner, next(inner.parameters()).device)
    request = requests[0]
    editor.edit(hparams, tokenize(request, tok, editor.device), request["target_new"])
    return editor, editor.reset_layer


def tokenize(request: Mapping[str, Any], tok: Any, device: Any) -> dict[str, Tensor]:
    """Return the tokens of one request: prompt and target, of which the target is labelled."""
    prompt, target = str(request["prompt"]), str(request["target_new"])
    whole = tok(f"{prompt} {target}", return_tensors="pt")
    ids: Tensor = whole["input_ids"]
    labels = ids.clone()
    labels[:, : len(tok(prompt)["input_ids"])] = IGNORED_LABEL
    mask = whole["attention_mask"]
    tokens = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tokens.items()}


def install() -> Callable[[], None]:
    """Put `apply_grace_to_model` and `GRACE` in the place of those of an imported EasyEdit.

    Every module of `easyeditor` that holds the originals gets ours, and so does its table of
    algorithms. Returns a function that puts the originals back.

    Raises: RuntimeError where EasyEdit is not imported or has no GRACE.
    """
    modules = [
        module
        for name, module in list(sys.modules.items())
        if module is not None and (name == "easyeditor" or name.startswith("easyeditor."))
    ]
    ours = {"apply_grace_to_model": apply_grace_to_model, "GRACE": GRACE}
    changes: list[tuple[dict[Any, Any], Any, Any]] = []
    for module in modules:
        names = vars(module)
        for name, replacement in ours.items():
            # `GRACE` names a module in its package and a class in that module.
            if callable(names.get(name)) and names[name] is not replacement:
                changes.append((names, name, names[name]))
                names[name] = replacement
        table = names.get("ALG_DICT")
        if isinstance(table, dict) and table.get("GRACE") not in (None, apply_grace_to_model):
            changes.append((table, "GRACE", table["GRACE"]))
            table["GRACE"] = apply_grace_to_model
    if not any(name == "apply_grace_to_model" for _, name, _ in changes):
        wanted = "import easyeditor first" if not modules else "this easyeditor has no GRACE"
        raise RuntimeError(f"there is nothing to install into: {wanted}")

    def uninstall() -> None:
        for names, name, original in changes:
            names[name] = original

    return uninstall


def _reader(config: Any) -> Callable[[str], Any]:
    """Return a function that reads hparams by attribute.

    Raises: AttributeError that names what is missing.
    """

    def read(name: str) -> Any:
        if not hasattr(config, name):
            raise AttributeError(f"hparams.{name} is needed")
        return getattr(config, name)

    return read
