"""Where an editor comes from: a layer of a model and an empty codebook, or one that was saved."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from grace_fast.codebook import scalars
from grace_fast.codebook.codebook import Codebook
from grace_fast.editor import calibrate
from grace_fast.editor.calibrate import CalibrationEdit, Labelled
from grace_fast.editor.context import EditContext
from grace_fast.editor.fingerprint import differences, fingerprint, usual_settings
from grace_fast.editor.grace import Grace
from grace_fast.editor.training import frozen
from grace_fast.edits.history import History
from grace_fast.edits.settings import Optimiser, Schedule, Settings, ValueInit
from grace_fast.errors import CodebookMismatch, warn_of_old_name
from grace_fast.hook.attachment import has_adapter
from grace_fast.hook.positions import Query
from grace_fast.hook.tensor_parallel import declared_widths
from grace_fast.hook.wrappers import host_of, layer_device_dtype, uncompiled
from grace_fast.lookup.sharded import ShardedCodebook
from grace_fast.semantics import Expand, Replacement, Semantics
from grace_fast.store import atomic, files, manifest
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import Lock
from grace_fast.store.saved import Saved, read_saved

USUAL_EPSILON = float("1")  # an object of its own, to tell what is left out from a 1 that is given


class Fields(TypedDict, total=False):
    """What `attach` takes by keyword: the fields of `Settings`, and how a codebook is begun."""

    semantics: Semantics
    replacement: Replacement
    iterations: int
    learning_rate: float
    expand: Expand
    expand_margin: float | None
    value_init: ValueInit
    query: Query
    stop_loss: float | None
    store_text: bool
    max_radius: float | None
    optimiser: Optimiser
    margin: float | None
    calibration_inputs: Iterable[Mapping[str, Any] | str] | None
    calibration_edits: Iterable[CalibrationEdit] | None
    restart: bool


def attach(
    model: nn.Module,
    layer: str | None = None,
    epsilon: float | Literal["auto"] = USUAL_EPSILON,
    tokenizer: Any = None,
    *,
    settings: Settings | None = None,
    schedule: Schedule | Literal["paper", "fast"] | None = None,
    codebook: Codebook | ShardedCodebook | None = None,
    path: str | Path | None = None,
    read_only: bool = False,
    name: str | None = None,
    hmac_key: bytes | None = None,
    **fields: Unpack[Fields],
) -> Grace:
    """Put a codebook on one layer of a model, which answers as before until it is edited.

    model: a module, or wrappers around one (DistributedDataParallel, peft, a value head): the
        model in them that makes a loss is edited.
    layer: the dotted name of a linear layer, as in `model.named_modules()`; it has to see one
        vector for each token.
    epsilon: the radius of a new key, in the units of the layer's input, by default 1; "auto"
        measures it on `calibration_inputs`, at least 8 unrelated batches or texts, and where there
        are any on `calibration_edits`, a sample of what will be edited: see `calibrate`.
    tokenizer: for prompts that are given as text.
    settings: all of it at once; what is given beside it counts instead of its fields.
    schedule: how values are trained: "paper", as by default; "fast", in a few steps of L-BFGS
        from the layer's own output, until the answer is generated with a margin; or a `Schedule`.
        It sets the fields below from `iterations` to `margin`; what is given beside it counts
        instead.
    codebook: the one to put there, by default an empty one; `Codebook.open` gives one that stays on
        the disk, of millions of keys, and a `ShardedCodebook` is spread over processes, which then
        make the same calls of model and editor. Its rows answer at once; they are no edits, and
        edits beside them leave its files as they are.
    path: a directory; every edit is on its disk before anybody is answered by it, and a codebook
        that is there already is opened, with the settings it was made with. One editor at a time
        has it, until it is unloaded.
    read_only: open `path` to be read, beside whoever edits it; see `refresh`.
    restart=False: forget the edits that `path` holds, of whichever model, and begin anew, in one
        step.
    name: several codebooks fit on one layer where their names differ; a named one answers within
        `using(name)` only.
    hmac_key: what the manifest of `path` is signed with: at least 16 random bytes, kept elsewhere.
        A directory that was not signed with it, or changed afterwards, is refused.

    The other fields of `Settings`:

    semantics="paper": by whose rules edits are decided; "reference" or "easyedit" reproduce old
        results.
    replacement="replace_prompt": the tokens that a hit replaces: `replace_prompt` (those before the
        query token), `replace_last` (the query token) or `replace_all`. A decoder beside an encoder
        asks at its start token, which has none before it: there it becomes `replace_last`.
    iterations=100, learning_rate=1.0: of the training of a value; the rate is Adam's, and of L-BFGS
        how much of the way to its aim the first step goes.
    stop_loss: it stops below this loss once the prediction is right; .1 by default where there is
        no margin, never in `reference` semantics.
    value_init="cold": a value starts at random, or "warm" as the layer's own output.
    optimiser="adam": or "lbfgs".
    margin: training stops once each token of the target is so many log-odds ahead of the next best;
        it is halved with every 20 steps, so that what can hardly be learnt comes to an end.
    expand="coverage": how a ball grows, or "moving_average".
    expand_margin: m in radius = distance * (1 + m) of an expanded ball; by default what the element
        type needs for the same prompt in another batch.
    max_radius: an edit whose ball would be wider is refused, and so is a stored one.
    query="prompt_end": which token asks: `prompt_end` (once a sequence, at the end of its prompt),
        `every_step` (the newest token of each forward call) or `every_token` (each for itself, and
        it is what a hit replaces).
    store_text=False: keep prompts and targets of edits made by text, for `info`; they may be
        personal data.

    Raises: ValueError for an unknown layer (naming the nearest), a layer that has an adaptor or
    sees something else than tokens, or a setting that does not exist; TypeError for what is no
    module, or an unknown keyword (naming the nearest); CodebookMismatch for a codebook of another
    model.
    """
    _refuse_unknown(fields)
    inputs = fields.pop("calibration_inputs", None)
    sample = fields.pop("calibration_edits", None)
    restart = fields.pop("restart", False)
    if path is not None:
        path = atomic.absolute(path)
    if layer is None and settings is None:
        raise TypeError("attach() needs the name of a layer, or settings=")
    found, module = find_layer(model, settings.layer if layer is None and settings else str(layer))
    _refuse_second(found, module, name)
    if codebook is not None:
        _refuse_unfit(codebook, found, module, path)
    if hmac_key is not None:
        manifest.require_key(hmac_key)
    if restart:
        _refuse_restart(path, read_only, hmac_key)
    if read_only or (path is not None and files.holds_codebook(path) and not restart):
        if path is None:
            raise ValueError("read_only=True needs the path of a codebook that is read")
        widest = fields.get("max_radius", None if settings is None else settings.max_radius)
        return from_pretrained(
            model,
            path,
            tokenizer,
            read_only=read_only,
            name=name,
            max_radius=widest,
            hmac_key=hmac_key,
        )
    auto = isinstance(epsilon, str)
    if auto and epsilon != "auto":
        raise ValueError(f'epsilon must be a number or "auto", got {epsilon!r}')
    if epsilon is USUAL_EPSILON or auto:
        radius = 1.0 if settings is None else settings.epsilon
    else:
        radius = float(scalars.number("epsilon", epsilon))
    chosen = {} if settings is None else dict(vars(settings))
    if schedule is not None:
        chosen |= Schedule.named(schedule).settings()
    settings = Settings(**{**chosen, **fields, "layer": found, "epsilon": radius})
    settings.rules(torch.float32)  # refuses what no codebook could be edited with
    if auto and inputs is None:
        raise ValueError('epsilon="auto" needs calibration_inputs: unrelated batches or texts')
    with ExitStack() as taken:
        lock = None if path is None else taken.enter_context(closing(Lock(path)))
        context = EditContext(model, module, settings, tokenizer, path, name, hmac_key, lock)
        taken.callback(context.unload)
        if codebook is not None:
            context.take(cast(Codebook, codebook), History())
        if auto:
            assert inputs is not None
            _calibrate(context, inputs, sample)
        context.directory.begin(context.adapter.book)
        taken.pop_all()
    return Grace(context)


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    """Refuse keywords that `attach` does not take.

    Raises: TypeError naming the nearest that it does.
    """
    known = [*Fields.__annotations__, *inspect.signature(attach).parameters]
    known.remove("fields")
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TypeError(
                f"attach() got an unexpected keyword argument {name!r}; the nearest is {near[0]!r}"
            )


def _refuse_second(layer: str, module: nn.Module, name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"name must be a word, or None, got {name!r}")
    if has_adapter(module, name):
        named, advice = (" ", ", or give it a name") if name is None else (f" named {name!r} ", "")
        raise ValueError(f"{layer} has an adaptor{named}already; unload() it first{advice}")


def _refuse_restart(path: Path | None, read_only: bool, hmac_key: bytes | None) -> None:
    """Raise where a directory holds something else than edits of ours, which nobody may forget."""
    if path is None or read_only:
        raise ValueError("restart=True needs the path of a codebook that is edited")
    is_signed = files.holds_codebook(path) and "hmac" in read_saved(path, hmac_key).config
    if is_signed and hmac_key is None:
        raise ValueError(f"{path} is signed: give its hmac_key to begin it anew")


def _calibrate(
    context: EditContext,
    inputs: Iterable[Mapping[str, Any] | str],
    edits: Iterable[CalibrationEdit] | None,
) -> None:
    """Set epsilon from how far apart unrelated inputs are, and paraphrases of a sample of edits.

    Raises: ValueError for fewer than 8 inputs, no edit, or inputs that the layer cannot tell apart.
    """
    unrelated = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
    if edits is not None:
        calibrate.require_enough(len(unrelated))

    def queries(prompts: Sequence[Any]) -> Tensor:
        found = [context.query_of(context.batch_of(prompt)) for prompt in prompts]
        none = torch.empty(0, 0, dtype=torch.float32, device="cpu")
        return torch.cat(found) if found else none

    with frozen(context.model):
        if edits is None:
            epsilon = calibrate.epsilon_from(queries(unrelated))
        else:
            sample = list(edits)
            again = [(text, edit) for edit in sample for text in edit.paraphrases]
            rules = context.settings.rules(context.codebook.dtype)
            prompts, targets = [edit.prompt for edit in sample], [edit.target for edit in sample]
            measured = calibrate.measure(
                context.settings.layer,
                Labelled(queries(prompts), targets, prompts),
                Labelled(
                    queries([text for text, _ in again]),
                    [edit.target for _, edit in again],
                    [edit.prompt for _, edit in again],
                ),
                Labelled(queries(unrelated), [None] * len(unrelated), range(len(unrelated))),
            )
            epsilon = calibrate.recommend([measured], rules).epsilon
    context.settings = replace(context.settings, epsilon=epsilon)


def from_pretrained(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    *,
    read_only: bool | None = None,
    name: str | None = None,
    max_radius: float | None = None,
    hmac_key: bytes | None = None,
    **old: bool,
) -> Grace:
    """Attach a saved codebook to its model.

    read_only: as in `attach(path=, read_only=)`. False: every further edit goes to the same
        directory, which is the editor's until it is unloaded; True: nothing is edited here, and
        `refresh` takes up what others edit. By default it is a copy in memory: it may be edited,
        and the directory stays as it is.
    max_radius: in place of the one that was saved; name, hmac_key: as in `attach`.

    Raises: FileNotFoundError, CodebookCorrupt, CodebookMismatch saying what differs, ValueError as
    `attach`. The model is as before then.
    """
    for word, means in (("durable", False), ("follow", True)):
        if word in old:
            warn_of_old_name(f"from_pretrained({word}=True)", f"read_only={means}")
            read_only = means if old.pop(word) else read_only
    if old:
        raise TypeError(f"from_pretrained() got an unexpected keyword argument {next(iter(old))!r}")
    path = atomic.absolute(path)
    with ExitStack() as taken:
        lock = None if read_only is not False else taken.enter_context(closing(Lock(path)))

        def opened() -> tuple[Saved, nn.Module, Codebook, History, JournalFile | None]:
            saved = read_saved(path, hmac_key, max_radius)
            if lock is not None and saved.hmac_key is None and "hmac" in saved.config:
                raise ValueError(f"{path} is signed, and further edits must be: give its hmac_key")
            layer, module = find_layer(model, saved.settings.layer)
            _refuse_second(layer, module, name)
            bare = uncompiled(host_of(model, layer).called)
            odd = differences(saved.fingerprint, fingerprint(bare, module), usual_settings(bare))
            if odd:
                raise CodebookMismatch(f"{path} is of another model: {'; '.join(odd)}")
            placed = layer_device_dtype(module)
            device = "cpu" if placed is None else placed[0]
            book, history, journal = saved.open(device, read_only=lock is None)
            _refuse_other_widths(str(path), layer, module, book)
            return saved, module, book, history, journal

        saved, module, book, history, journal = files.steadily(path, opened)
        kept, key = path if lock is not None or read_only else None, saved.hmac_key
        context = EditContext(model, module, saved.settings, tokenizer, kept, name, key, lock)
        taken.callback(context.unload)
        context.adapter.hits.update(saved.hits)
        context.take(book, history)
        if read_only:
            context.directory.follow(journal)
        else:
            context.directory.begin(book, journal)
        taken.pop_all()
    return Grace(context)


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
    wanted, given = layer_device_dtype(module), (book.device, book.dtype)
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
        inner = "; give its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{inner}")
    modules = dict(uncompiled(model).named_modules())
    if name and name in modules:
        return name, modules[name]
    alike = difflib.get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.3)
    raise ValueError(f"the model has no layer {layer!r}; the nearest names are {alike}")
