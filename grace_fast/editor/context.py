"""The context of an edit: a model with a hook on one layer, the layer's codebook and history."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.codebook import forks
from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.editor import batches, heads, memory, unfit
from grace_fast.editor.batches import Batch
from grace_fast.editor.directory import Directory
from grace_fast.editor.fingerprint import fingerprint
from grace_fast.editor.prompts import Prompt, Target
from grace_fast.editor.shortcuts import Shortcuts
from grace_fast.editor.training import frozen
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.hook import compile, positions
from grace_fast.hook.adapter import Adapter
from grace_fast.hook.attachment import Site
from grace_fast.hook.modes import LayerSeen, Observation
from grace_fast.hook.virtual_tokens import Virtual
from grace_fast.hook.wrappers import declared_codebook, finds_padding, host_of, stack_of, uncompiled
from grace_fast.store import manifest
from grace_fast.store.locks import Lock


class EditContext:
    """One layer of one model, as sessions, versions and the API see it."""

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        settings: Settings,
        tokenizer: Any = None,
        path: Path | None = None,
        name: str | None = None,
        hmac_key: bytes | None = None,
        lock: Lock | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.host = host_of(model, settings.layer)
        base = self.host.model
        self.kind = heads.kind_of(base)
        unfit.refuse(self.host, layer, settings.query, self.kind)
        stack, in_decoder = stack_of(base, layer)
        before_it_is_nothing = in_decoder and settings.replacement == "replace_prompt"
        if before_it_is_nothing or settings.query == "every_token":
            settings = replace(settings, replacement="replace_last")
        self.settings = settings
        self.history = History()
        self._asked_of: Any = None  # whose signature is known
        self.tokens_are_checked = self.scale_is_checked = False
        self.rows_are_apart = True  # rows of a batch are as they are alone, as far as is known
        self.shortcuts = Shortcuts()
        self.at_once = memory.MOST  # edits for which there was memory, as far as is known
        self._making = threading.Lock()
        site = Site(
            model=base,
            layer=layer,
            stack=stack,
            replacement=settings.replacement,
            query=settings.query,
            decoder_only=self.kind == "decoder",
            first_token=in_decoder,
            finds_padding=self.kind == "classifier" and finds_padding(base),
            name=name,
            layer_name=settings.layer,
            seat_name=self.host.layer,
            virtual=Virtual.of(self.host.called, base),
        )
        self.adapter = Adapter(site, declared_codebook(layer))
        self.directory = Directory(path, lock, hmac_key, lambda: self.history, self._described)
        compile.forget_compiled_code()
        self.adapter.install()
        self.is_attached = True
        forks.guard(self, "_making", forks.Order.MAKING, EditContext._take_back_in_child)

    # The codebook and its history

    @property
    def codebook(self) -> Codebook:
        """The codebook of the layer.

        Raises: ValueError before the first edit of a layer that does not declare its widths.
        """
        if self.adapter.book is None:
            raise ValueError(
                f"{self.settings.layer} does not declare its widths; "
                "its codebook is made at the first edit"
            )
        return self.adapter.book

    def take(self, book: Codebook, history: History) -> None:
        """Use a codebook and the edits that made it."""
        self.adapter.book, self.history = book, history

    def refresh(self) -> bool:
        """Take up the versions that another process made since; tell whether there were any."""
        now = self.codebook
        version = now.version
        book, history = self.directory.newer(now, self.history, self.settings.max_radius)
        if book is not now:
            self.take(book, history)
        return book.version != version

    def book_for(self, seen: Observation) -> Codebook:
        """Return the codebook, or an empty one of the widths that the layer has."""
        if self.adapter.book is not None:
            return self.adapter.book
        dtype = seen.hidden.dtype if seen.hidden.dtype in DTYPES else torch.float32
        return Codebook(seen.hidden.shape[-1], seen.output.shape[-1], dtype, seen.hidden.device)

    def query_of(self, batch: Batch) -> Tensor:
        """Return what a batch asks the codebook, [B, D], as the codebook would store it."""
        seen = self.observe(batch)
        return seen.queries.to(self.book_for(seen).dtype)

    def own_book(self, seen: Observation) -> Codebook:
        """Return the codebook that edits go to, made by the first of them."""
        with self._making:
            if self.adapter.book is None:
                book = self.book_for(seen)
                self.directory.begin(book)
                self.adapter.book = book
            return self.adapter.book

    def held(self) -> AbstractContextManager[object]:
        """Hold other threads' edits off: the history is noted before its version is published."""
        return nullcontext() if self.adapter.book is None else self.adapter.book.held()

    @contextmanager
    def noting(self) -> Iterator[Draft]:
        """Open a draft; where it is not published, the history is as it was before."""
        # Nobody gets an id of a draft's before it is published or forgotten.
        book = self.codebook
        with book.held(), self.history.attempting(), book.writing() as draft:
            yield draft

    def _take_back_in_child(self, _: bool) -> None:
        """Forget in a forked child the edit that another thread was in the middle of."""
        book = self.adapter.book
        if book is not None and book.was_forked_in_writing:
            self.history.take_back_attempts()

    def _described(self) -> dict[str, Any]:
        """Return what the manifest of a directory says beside its codebook."""
        return {
            "settings": self.settings.saved(),
            "fingerprint": fingerprint(uncompiled(self.host.called), self.adapter.layer),
            "hits": manifest.counted(dict(self.adapter.hits)),
        }

    def unload(self) -> None:
        """Take the hook off the layer, and give the directory back."""
        self.directory.close(dict(self.adapter.hits))
        if self.is_attached:
            self.adapter.remove()
            self.is_attached = False

    def require_attached(self) -> None:
        """Raise RuntimeError where the layer is out of reach."""
        if not self.is_attached:
            raise RuntimeError("this editor was unloaded; attach() again")
        self.adapter.attachment.look_after_layer()
        if self.adapter.attachment.is_lost:
            raise RuntimeError(
                f"{self.settings.layer} left the model: unload() this editor, and attach its "
                "codebook to another layer"
            )

    # The model

    def batch_of(
        self,
        batch: Mapping[str, Any] | Prompt,
        target: Target | None = None,
        joint: str | None = None,
    ) -> Batch:
        """Return a batch of tensors: as it was given, or of a prompt and a target in words."""
        if isinstance(batch, Mapping):
            if target is not None or joint is not None:
                raise ValueError("a batch of tensors holds its target in labels; give no target")
            return dict(batch)
        return batches.from_text(batch, target, self.tokenizer, self.host.model, self.kind, joint)

    def observe(
        self, batch: Batch, in_training: bool = False, to_layer: bool = False
    ) -> Observation:
        """Run the model once and return what the layer sees; nothing is replaced.

        in_training: in the mode of a training's steps, which go on with what it computes;
        to_layer: no further than the layer, where nobody minds: that it runs once is known.

        Raises: ValueError for a layer that does not run once, or tokens that the model lacks.
        """
        self.require_attached()
        adapter, where, length = self.adapter, None, None
        if not adapter.first_token and adapter.stack is adapter.model:
            call = adapter.read(batch)
            adapter.refuse_hidden_padding(call)
            where = positions.prompt_end(call)
            length = None if call.tokens is None else call.tokens.shape[1]
        asked = batches.runnable(batch, self.kind, self.host.model)
        if self.kind != "seq2seq":  # no loss is wanted, and labels may be outside the classes
            asked = {name: value for name, value in asked.items() if name not in heads.TARGETS}
        with (
            torch.set_grad_enabled(in_training),
            frozen(self.model),
            adapter.asking_at(where, length),
            adapter.observing(to_layer and self._may_be_left) as seen,
            suppress(LayerSeen),
        ):
            self.call(asked)
        if len(seen) != 1:
            raise ValueError(
                f"{self.settings.layer} must run once in a forward call to be edited, "
                f"it ran {len(seen)} times"
            )
        return seen[0]

    @property
    def _may_be_left(self) -> bool:
        """Tell whether a call of the model may end at the layer: who gathers weights may mind."""
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        offloads = any("_hf_hook" in vars(module) for module in self.model.modules())
        return not (self.host.is_wrapper or is_shared or offloads)

    def call(self, batch: Batch) -> Any:
        """Run the model on a batch, uncompiled, without a cache of keys and values.

        Raises: ValueError for tokens that the model lacks.
        """
        reads = self.host.called if self.host.is_wrapper else self.host.model
        forward = getattr(reads.forward, "__func__", reads.forward)
        if forward is not self._asked_of:
            self._takes_cache = "use_cache" in inspect.signature(reads.forward).parameters
            self._asked_of = forward
        cacheless = {"use_cache": False} if self._takes_cache else {}
        try:
            with compile.stood_aside():
                return self.host.called(**{**cacheless, **batch})
        except IndexError as error:
            raise ValueError(batches.out_of_range(batch, self.host.model, error)) from error
