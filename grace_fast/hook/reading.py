"""Calls as one adaptor reads them: which tokens they are of, and of which sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_fast.hook import calls, generation, positions
from grace_fast.hook.attachment import Site
from grace_fast.hook.calls import Entered, Frame
from grace_fast.hook.generation import Generation, Source
from grace_fast.hook.modes import Modes
from grace_fast.hook.positions import Call


class Reader:
    """What the calls of a thread say to one adaptor; nothing is read before it is asked for."""

    def __init__(self, adaptor: Any, site: Site, modes: Modes) -> None:
        self.adaptor, self.site, self.modes = adaptor, site, modes
        self._continues = site.decoder_only or site.first_token or site.finds_padding
        self.padding = positions.Padding.of(getattr(site.model, "config", None))

    def read(self, arguments: Mapping[str, Any], in_cache: int | Tensor | None = None) -> Call:
        """Return what the arguments of a forward call say of its tokens."""
        site = self.site
        call = positions.read(arguments, site.decoder_only, in_cache)
        if site.virtual is not None:
            call = site.virtual.without(call, self.modes.newest(Generation) is not None)
        return self.padding.shown(call) if site.finds_padding else call

    def frame(self) -> Frame | None:
        """Return what the call in progress says, with those around it; None outside of any."""
        found: Frame | None = None
        for entered in calls.in_progress.stack:
            depth = entered.depths.get(self.adaptor)
            if depth is None:
                continue
            if entered.frames is None:
                entered.frames = {}
            if self.adaptor not in entered.frames:
                entered.frames[self.adaptor] = self._frame_of(entered, depth, found)
            found = entered.frames[self.adaptor]
        return found

    def call(self) -> Call | None:
        """Return what the call in progress says of its tokens; None outside of any."""
        frame = self.frame()
        return None if frame is None else frame.call

    def _frame_of(self, entered: Entered, depth: int, outer: Frame | None) -> Frame:
        given = entered.arguments
        if outer is None or outer.depth >= depth:  # the model may run itself, in a hook
            source = Source.of(given, self._continues)
            return Frame(self.read(given, entered.cached), source, depth, entered)
        said, source = outer.call, outer.source  # mostly it has said it all
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if (
            said.tokens is not None
            and isinstance(tokens, Tensor)
            and tokens.shape[:2] == said.tokens.shape[:2]
            and given.get("attention_mask") is said.mask
            and given.get("past_key_values") is source.cache
        ):
            return outer
        call = self.read(given, entered.cached)
        if not self.site.first_token:
            call = positions.within(said, call)
        elif call.tokens is None:
            call = said
        if source.cache is None:
            source = Source.of(given, self._continues)
        return Frame(call, source, depth, None)

    def sequences(self) -> Generation | None:
        """Return what is held of the sequences that the call in progress is of."""
        held, frame = self.modes.all(Generation), self.frame()
        if frame is None:
            return held[-1] if held else None
        if frame.sequences is None and held:
            frame.sequences = generation.of_call(held, frame.call, frame.source)
        return frame.sequences

    def refuse_hidden_padding(self, call: Call) -> None:
        """Refuse prompts of a decoder that end in padding which no mask shows.

        Raises: ValueError.
        """
        if self.site.decoder_only:
            positions.refuse_hidden_padding(call, self.padding)
