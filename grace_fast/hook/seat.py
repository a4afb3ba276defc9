"""Where a layer is in its model: other libraries put modules in each other's places.

peft puts its own module around a layer, and merging takes it away again; quantisers put another
module there. A layer that only moved is found where it is now. One that has left the model runs no
more, and neither does what hangs on it.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import nn


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
        self._steps: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        module: nn.Module | None = self._model
        for part in name.split("."):
            if module is None:
                break
            child = module._modules.get(part)
            self._steps.append((module._modules, part, child))
            module = child
        return module

    def is_as_before(self) -> bool:
        """Tell whether the layer, and the modules around it, are those that were there."""
        for children, part, child in self._steps:  # noqa: SIM110  # each call asks
            if children.get(part) is not child:
                return False
        return True

    def find(self, layer: nn.Module) -> nn.Module | None:
        """Return a layer that is still in the model, else what is in its place, if anything is."""
        for name, module in self._model.named_modules():
            if module is layer:
                return self._sit(name)
        return self._sit(self._name) or self._sit(self._first)

    def was_elsewhere(self, module: nn.Module) -> bool:
        """Tell whether a module had a place of its own: the blocks moved up after one was cut."""
        return module in self._others
