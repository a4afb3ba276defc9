"""An adaptor's hooks on its layer, wherever that goes, and on the modules around it.

Other libraries put modules in each other's places. peft puts its own module around a layer, and
merging takes it away again; quantisers put another module there. A layer that only moved is found
where it is now. One that has left the model runs no more, and neither does what hangs on it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from grace_fast.codebook import forks
from grace_fast.errors import LookupWarning
from grace_fast.hook import calls, compile, wrappers
from grace_fast.hook.positions import Query
from grace_fast.hook.tensor_parallel import declared_widths
from grace_fast.hook.virtual_tokens import Virtual
from grace_fast.semantics import Replacement

# A layer takes one adaptor of each name.
_attached: WeakKeyDictionary[nn.Module, set[str | None]] = WeakKeyDictionary()


def has_adapter(layer: nn.Module, name: str | None = None) -> bool:
    """Tell whether an adaptor of this name is on a layer, or another one is in its place."""
    return name in _attached.get(layer, ()) or hasattr(layer, "init_epsilon")


@dataclass(eq=False)
class Site:
    """One layer of one model, and how it is edited there.

    `stack` is the module whose forward call names the layer's tokens: the encoder for an encoder
    layer of an encoder-decoder, else the model itself.
    """

    model: nn.Module
    layer: nn.Module  # as it is now
    stack: nn.Module
    replacement: Replacement
    query: Query
    decoder_only: bool
    first_token: bool = False  # a decoder beside an encoder: the query is its start token
    finds_padding: bool = False  # a classifier whose head finds the last token by the padding's id
    name: str | None = None
    layer_name: str = "the edited layer"
    seat_name: str = ""  # the layer's in `model`
    virtual: Virtual | None = None


class Seat:
    """The place of one layer in a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self._first = model, name
        # From the model to the layer: the modules within each, a name, and what was there. It is
        # one list for good: who notes calls has it (csrc/hook.h).
        self.steps: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        layer = self._sit(name)
        within = set() if layer is None else set(layer.modules())
        self._others = WeakSet(set(model.modules()) - within)

    def _sit(self, name: str) -> nn.Module | None:
        """Take the place of this name, and return what is there; None where there is no such."""
        self._name = name
        self.steps.clear()
        module: nn.Module | None = self._model
        for part in name.split("."):
            if module is None:
                break
            child = module._modules.get(part)
            self.steps.append((module._modules, part, child))
            module = child
        return module

    def is_as_before(self) -> bool:
        """Tell whether the layer, and the modules around it, are those that were there."""
        return all(children.get(part) is child for children, part, child in self.steps)

    def find(self, layer: nn.Module) -> nn.Module | None:
        """Return a layer that is still in the model, else what is in its place, if anything is."""
        for name, module in self._model.named_modules():
            if module is layer:
                return self._sit(name)
        return self._sit(self._name) or self._sit(self._first)

    def was_elsewhere(self, module: nn.Module) -> bool:
        """Tell whether a module had a place of its own: the blocks moved up after one was cut."""
        return module in self._others


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
        calls.listen_to_generate(self._site.model, self._adaptor)
        self._hang_on(self._site.layer)

    def remove(self) -> None:
        """Take the hooks out; the model is as it was."""
        self._is_installed = False
        for module in (self._site.layer, *self._site.model.modules()):  # a quantiser copies hooks
            self._take_off(module)
        _attached[self._site.layer].discard(self._site.name)
        self._listen_to([])
        calls.stop_listening(self._site.model, "generate", self._adaptor)

    def look_after_layer(self) -> None:
        """Follow the layer where other libraries moved it or put another module in its place."""
        if self._is_installed and not self.seat.is_as_before():
            self._settle()

    def _hang_on(self, layer: nn.Module) -> None:
        self._site.layer = layer
        self._adaptor.sit_on(layer)
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
                calls.stop_listening(stack, "forward", adaptor)
                if stack is not model:
                    calls.stop_listening(stack, "generate", adaptor)
        for depth, stack in enumerate(stacks):
            if all(stack is not other for other in before):
                calls.listen(stack, adaptor, depth)
                if stack is not model:
                    calls.listen_to_generate(stack, adaptor)

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
