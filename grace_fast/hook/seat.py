"""The edited layer in its model, and where it goes: other libraries put modules in its place.

peft puts its own module around a layer, and merging takes it away again; quantisers put another
module there. A layer that only moved is found where it is now. One that has left the model runs no
more, and neither does what hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

from torch import nn

from grace_fast.hook.positions import Query
from grace_fast.hook.virtual_tokens import Virtual
from grace_fast.semantics import Replacement


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
        layer = self._sit(name)
        within = set() if layer is None else set(layer.modules())
        self._others = WeakSet(set(model.modules()) - within)

    def _sit(self, name: str) -> nn.Module | None:
        """Take the place of this name, and return what is there; None where there is no such."""
        self._name = name
        # From the model to the layer: the modules within each, a name, and what was there.
        self.steps: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
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
