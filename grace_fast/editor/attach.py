"""Where an editor comes from: a layer of a model and an empty codebook, or one that was saved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from grace_fast.codebook import scalars
from grace_fast.codebook.codebook import Codebook
from grace_fast.editor import calibrate
from grace_fast.editor.calibrate import CalibrationEdit, Labelled
from grace_fast.editor.fingerprint import differences, fingerprint, usual_settings
from grace_fast.editor.grace import Grace
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings, ValueInit
from grace_fast.errors import CodebookMismatch as CodebookMismatch
from grace_fast.hook.adapter import has_adapter
from grace_fast.hook.positions import Query
from grace_fast.hook.tensor_parallel import declared_widths
from grace_fast.hook.wrappers import host_of, place, uncompiled
from grace_fast.lookup.sharded import ShardedCodebook
from grace_fast.semantics import Expand, Replacement, Semantics
from grace_fast.store import atomic, files, manifest
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import Lock
from grace_fast.store.saved import Saved as Saved
from grace_fast.store.saved import read_saved as read_saved


def attach(
    model: nn.Module,
    layer: str,
    epsilon: float | Literal["auto"] = 1.0,
    tokenizer: Any = None,
    *,
    semantics: Semantics = "paper",
    replacement: Replacement = "replace_prompt",
    iterations: int = 100,
    learning_rate: float = 1.0,
    expand: Expand = "coverage",
    expand_margin: float | None = None,
    value_init: ValueInit = "cold",
    query: Query = "prompt_end",
    name: str | None = None,
    stop_loss: float | None = None,
    calibration_inputs: Iterable[Mapping[str, Any] | str] | None = None,
    calibration_edits: Iterable[CalibrationEdit] | None = None,
    codebook: Codebook | ShardedCodebook | None = None,
    path: str | Path | None = None,
    store_text: bool = False,
    max_radius: float | None = None,
    hmac_key: bytes | None = None,
    read_only: bool = False,
) -> Grace:
    """Put a codebook on one layer of a model, which answers as before until it is edited.

    model: a module, or wrappers around one (DistributedDataParallel, peft, a value head): the
        model in them that makes a loss is edited.
    layer: the dotted name of a linear layer, as in `model.named_modules()`; it has to see one
        vector for each token.
    epsilon: the radius of a new key, in the units of the layer's input; "auto" measures it on
        `calibration_inputs`, at least 8 unrelated batches or texts, and where there are any on
        `calibration_edits`, a sample of what will be edited: see `calibrate`.
    replacement: the tokens that a hit replaces: `replace_prompt` (those before the query token),
        `replace_last` (the query token) or `replace_all`. A decoder beside an encoder asks at its
        start token, which has none before it: there `replace_prompt` becomes `replace_last`.
    query: which token asks: `prompt_end` (once a sequence, at the end of its prompt), `every_step`
        (the newest token of each forward call) or `every_token` (each for itself, and it is what a
        hit replaces).
    name: several codebooks fit on one layer where their names differ; a named one answers within
        `using(name)` only.
    expand_margin: m in radius = distance * (1 + m) of an expanded ball; by default what the element
        type needs for the same prompt in another batch.
    stop_loss: training stops below this loss once the prediction is right; .1 by default, never in
        `reference` semantics.
    codebook: the one to put there, by default an empty one; `gf.open` gives one that stays on the
        disk, of millions of keys, and a `ShardedCodebook` is spread over processes, which then
        make the same calls of model and editor. Its rows answer at once; they are no edits, and
        edits beside them leave its files as they are.
    path: a directory; every edit is on its disk before anybody is answered by it, and a codebook
        that is there already is opened, with the settings it was made with. One editor at a time
        has it, until it is unloaded.
    read_only: open `path` to be read, beside whoever edits it; see `refresh`.
    store_text: keep prompts and targets of edits made by text, for `info`; they may be personal
    data.
    max_radius: an edit whose ball would be wider is refused, and so is a stored one.
    hmac_key: what the manifest of `path` is signed with: at least 16 random bytes, kept elsewhere.
        A directory that was not signed with it, or changed afterwards, is refused.

    Raises: ValueError for an unknown layer (naming the nearest), a layer that has an adaptor or
    sees something else than tokens, or a setting that does not exist; TypeError for what is no
    module; CodebookMismatch for a codebook of another model.
    """
    if path is not None:
        path = atomic.absolute(path)
    found, module = find_layer(model, layer)
    _refuse_second(found, module, name)
    if codebook is not None:
        _refuse_unfit(codebook, found, module, path)
    if hmac_key is not None:
        manifest.require_key(hmac_key)
    if read_only or (path is not None and files.holds_codebook(path)):
        if path is None:
            raise ValueError("read_only=True needs the path of a codebook that is read")
        return from_pretrained(
            model,
            path,
            tokenizer,
            durable=not read_only,
            name=name,
            max_radius=max_radius,
            hmac_key=hmac_key,
            follow=read_only,
        )
    auto = isinstance(epsilon, str) and epsilon == "auto"
    if isinstance(epsilon, str) and not auto:
        raise ValueError(f'epsilon must be a number or "auto", got {epsilon!r}')
    settings = Settings(
        layer=found,
        epsilon=1.0 if auto else float(scalars.number("epsilon", epsilon)),
        semantics=semantics,
        replacement=replacement,
        iterations=iterations,
        learning_rate=learning_rate,
        expand=expand,
        expand_margin=expand_margin,
        value_init=value_init,
        query=query,
        stop_loss=stop_loss,
        store_text=store_text,
        max_radius=max_radius,
    )
    settings.rules(torch.float32)  # refuses what no codebook could be edited with
    if auto and calibration_inputs is None:
        raise ValueError('epsilon="auto" needs calibration_inputs: unrelated batches or texts')
    lock = None if path is None else Lock(path)
    try:
        grace = Grace(model, module, settings, tokenizer, path, name, hmac_key, lock)
        if codebook is not None:
            grace.take(cast(Codebook, codebook), History())
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    try:
        if auto:
            assert calibration_inputs is not None
            if calibration_edits is None:
                grace.calibrate(calibration_inputs)
            else:
                _calibrate(grace, list(calibration_edits), list(calibration_inputs))
        grace.begin()
    except BaseException:
        grace.unload()
        raise
    return grace


def _refuse_second(layer: str, module: nn.Module, name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name must be a word, or None, got {name!r}")
    if not has_adapter(module, name):
        return
    if name is None:
        raise ValueError(f"{layer} has an adaptor already; unload() it first, or give it a name")
    raise ValueError(f"{layer} has an adaptor named {name!r} already; unload() it first")


def _calibrate(
    grace: Grace, edits: Sequence[CalibrationEdit], unrelated: Sequence[Mapping[str, Any] | str]
) -> None:
    """Set epsilon from a sample of edits, their paraphrases and unrelated inputs.

    Raises: ValueError for fewer than 8 unrelated inputs, or no edit.
    """
    if len(unrelated) < calibrate.CALIBRATION_INPUTS:
        raise ValueError(
            f'epsilon="auto" needs at least {calibrate.CALIBRATION_INPUTS} unrelated '
            f"calibration_inputs, got {len(unrelated)}"
        )
    paraphrases = [(text, edit) for edit in edits for text in edit.paraphrases]
    measured = calibrate.measure(
        grace.settings.layer,
        _labelled(grace, [(edit.prompt, edit.target, edit.prompt) for edit in edits]),
        _labelled(grace, [(text, edit.target, edit.prompt) for text, edit in paraphrases]),
        _labelled(grace, [(text, None, at) for at, text in enumerate(unrelated)]),
    )
    rules = grace.settings.rules(grace.codebook.dtype)
    epsilon = calibrate.recommend([measured], rules).epsilon
    grace.settings = replace(grace.settings, epsilon=epsilon)


def _labelled(grace: Grace, asked: Sequence[tuple[Any, Hashable, Hashable]]) -> Labelled:
    queries = [grace.query_of(prompt) for prompt, _, _ in asked]
    return Labelled(
        torch.cat(queries) if queries else torch.empty(0, 0, dtype=torch.float32, device="cpu"),
        [label for _, label, _ in asked],
        [about for _, _, about in asked],
    )


def from_pretrained(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    *,
    durable: bool = False,
    name: str | None = None,
    max_radius: float | None = None,
    hmac_key: bytes | None = None,
    follow: bool = False,
) -> Grace:
    """Attach a saved codebook to its model.

    durable: every further edit goes to the same directory, which is the editor's until it is
    unloaded; follow: nothing is edited here, and `refresh` takes up what others edit; name,
    max_radius, hmac_key: as in `attach`, max_radius in place of the one that was saved.

    Raises: FileNotFoundError, CodebookCorrupt, CodebookMismatch saying what differs, ValueError as
    `attach`. The model is as before then.
    """
    path = atomic.absolute(path)
    lock = Lock(path) if durable else None
    try:
        opened = files.steadily(path, lambda: _open(model, path, name, max_radius, hmac_key, lock))
        return _attach_saved(model, opened, tokenizer, name, lock, follow)
    except BaseException:
        if lock is not None:
            lock.close()
        raise


@dataclass(frozen=True)
class _Opened:
    """A saved codebook that fits a layer of a model."""

    saved: Saved
    module: nn.Module  # the layer
    book: Codebook
    history: History
    journal: JournalFile | None


def _open(
    model: nn.Module,
    path: Path,
    name: str | None,
    max_radius: float | None,
    hmac_key: bytes | None,
    lock: Lock | None,
) -> _Opened:
    saved, durable = read_saved(path, hmac_key, max_radius), lock is not None
    if durable and saved.hmac_key is None and "hmac" in saved.config:
        raise ValueError(f"{path} is signed, and further edits must be: give its hmac_key")
    layer, module = find_layer(model, saved.settings.layer)
    _refuse_second(layer, module, name)
    bare = uncompiled(host_of(model, layer).called)
    odd = differences(saved.fingerprint, fingerprint(bare, module), usual_settings(bare))
    if odd:
        raise CodebookMismatch(f"{path} is of another model: {'; '.join(odd)}")
    placed = place(module)
    book, history, journal = saved.open(
        "cpu" if placed is None else placed[0], read_only=not durable
    )
    _refuse_other_widths(str(path), layer, module, book)
    return _Opened(saved, module, book, history, journal)


def _attach_saved(
    model: nn.Module,
    opened: _Opened,
    tokenizer: Any,
    name: str | None,
    lock: Lock | None,
    follow: bool,
) -> Grace:
    saved = opened.saved
    kept = saved.path if lock is not None or follow else None
    grace = Grace(model, opened.module, saved.settings, tokenizer, kept, name, saved.hmac_key, lock)
    grace.hits.update(saved.hits)
    if follow:
        grace.read(opened.book, opened.history, opened.journal)
        return grace
    grace.take(opened.book, opened.history)
    try:
        grace.begin(opened.journal)
    except BaseException:
        grace.unload()
        raise
    return grace


def _refuse_other_widths(
    name: str, layer: str, module: nn.Module, book: Codebook | ShardedCodebook
) -> None:
    wanted, given = declared_widths(module), (book.key_dim, book.value_dim)
    if any(width not in (None, other) for width, other in zip(wanted, given, strict=True)):
        raise CodebookMismatch(
            f"{name} has keys and values of the widths {given}, {layer} wants {wanted}"
        )


def _refuse_unfit(
    book: Codebook | ShardedCodebook, layer: str, module: nn.Module, path: str | Path | None
) -> None:
    """Raise where a codebook cannot answer for a layer, or not be kept in a directory."""
    if not isinstance(book, Codebook | ShardedCodebook):
        raise TypeError(f"codebook must be a Codebook, got {type(book).__name__}")
    _refuse_other_widths("the codebook", layer, module, book)
    wanted, given = place(module), (book.device, book.dtype)
    if wanted is not None and wanted != given:
        raise CodebookMismatch(
            f"the codebook holds {given[1]} on {given[0]}, "
            f"{layer} computes {wanted[1]} on {wanted[0]}"
        )
    if path is None:
        return
    if isinstance(book, ShardedCodebook):
        raise book.unsaved("path=")
    if files.holds_codebook(path):
        raise ValueError(f"{path} holds a codebook already: give either path or codebook")
    if book.snapshot().key_file is not None:
        raise ValueError(
            "a codebook that lies in files of its own takes edits in memory only: leave out path"
        )


def find_layer(model: nn.Module, layer: str) -> tuple[str, nn.Module]:
    """Return a layer and its dotted name; `h[3]` and a trailing `.weight` are understood.

    Raises: TypeError for what is no module, as a pipeline around one; ValueError naming the
    layers that are spelt most alike.
    """
    name = re.sub(r"\[(\d+)\]", r".\1", str(layer))
    name = re.sub(r"\.(weight|bias)$", "", name)
    if not isinstance(model, nn.Module):
        inner = ""
        if isinstance(getattr(model, "model", None), nn.Module):
            inner = "; give its .model"
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{inner}")
    modules = dict(uncompiled(model).named_modules())
    if name and name in modules:
        return name, modules[name]
    alike = difflib.get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.3)
    raise ValueError(f"the model has no layer {layer!r}; the nearest names are {alike}")
