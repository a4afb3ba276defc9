"""The hooks of one adaptor: on its layer, wherever that goes, and on the modules around it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from grace_fast.codebook import forks
from grace_fast.hook import calls, compile, generation, wrappers
from grace_fast.hook.counters import LookupWarning
from grace_fast.hook.seat import Seat, Site
from grace_fast.hook.tensor_parallel import declared_widths

# A layer takes one adaptor of each name.
_attached: WeakKeyDictionary[nn.Module, set[str | None]] = WeakKeyDictionary()


def has_adapter(layer: nn.Module, name: str | None = None) -> bool:
    """Tell whether an adaptor of this name is on a layer, or another one is in its place."""
    return name in _attached.get(layer, ()) or hasattr(layer, "init_epsilon")


class Attachment:
    """The hooks of one adaptor, from `__init__` until `remove`.

    adaptor: what calls and `generate` are told to; hook: the forward hook of the layer.
    """

    def __init__(self, site: Site, adaptor: Any, hook: Callable[..., Any]) -> None:
        self._site, self._adaptor, self._hook = site, adaptor, hook
        self.seat = Seat(site.model, site.seat_name)
        self.is_lost = False  # the layer left the model, and nothing like it is in its place
        self.knows_tokens = False  # whether any module around the layer names its tokens
        self._stacks: list[nn.Module] = []
        self._is_installed = False
        self._settling = threading.Lock()
        forks.guard(self, "_settling")

    def install(self) -> None:
        """Put the hooks in."""
        self._is_installed = True
        generation.listen(self._site.model, self._adaptor)
        self._hang_on(self._site.layer)

    def remove(self) -> None:
        """Take the hooks out; the model is as it was."""
        self._is_installed = False
        for module in (self._site.layer, *self._site.model.modules()):  # a quantiser copies hooks
            self._take_off(module)
        _attached[self._site.layer].discard(self._site.name)
        self._listen_to([])
        generation.stop_listening(self._site.model, self._adaptor)

    def look_after_layer(self) -> None:
        """Follow the layer where other libraries moved it or put another module in its place."""
        if self._is_installed and not self.seat.is_as_before():
            self._settle()

    def _hang_on(self, layer: nn.Module) -> None:
        self._site.layer = layer
        layer.register_forward_hook(self._hook, with_kwargs=True)
        _attached.setdefault(layer, set()).add(self._site.name)
        self._listen_to(wrappers.stacks_of(self._site.stack, layer))

    def _take_off(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if hook == self._hook:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)

    def _listen_to(self, stacks: list[nn.Module]) -> None:
        """Be told of the calls of these modules, outermost first, and of no others any more."""
        before, self._stacks = self._stacks, stacks
        self.knows_tokens = any(map(wrappers.names_tokens, stacks))
        model, adaptor = self._site.model, self._adaptor
        for stack in before:
            if all(stack is not other for other in stacks):
                calls.stop_listening(stack, adaptor)
                if stack is not model:
                    generation.stop_listening(stack, adaptor)
        for depth, stack in enumerate(stacks):
            if all(stack is not other for other in before):
                calls.listen(stack, adaptor, depth)
                if stack is not model:
                    generation.listen(stack, adaptor)

    def _settle(self) -> None:
        """Find the layer; where it left the model, go to the module that was put in its place.

        A hit replaces the output at that place, whoever computes it.
        """
        site = self._site
        with self._settling:
            before, there = site.layer, self.seat.find(site.layer)
            self.is_lost = there is not before and not self._can_go_to(there)
            if there is before:
                return
            if there is not None and not self.is_lost:
                for module in (before, there):  # a quantiser may have copied the hook
                    self._take_off(module)
                _attached[before].discard(site.name)
                self._hang_on(there)
                compile.forget_compiled_code()
        found = "nothing" if there is None else f"a {_type_name(there)}"
        effect = (
            "edits answer no more; unload() the editor and attach its codebook to another layer"
            if self.is_lost
            else f"edits go on there; they were made at a {_type_name(before)}"
        )
        warnings.warn(
            f"{site.layer_name} left the model, with {found} in its place: its {effect}",
            LookupWarning,
            stacklevel=2,
        )

    def _can_go_to(self, module: nn.Module | None) -> bool:
        site = self._site
        if module is None or has_adapter(module, site.name) or self.seat.was_elsewhere(module):
            return False
        return declared_widths(module) == declared_widths(site.layer)


def _type_name(module: nn.Module) -> str:
    """Return a class with its package: several have a Linear."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
