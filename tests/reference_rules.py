"""The references' rules in exact arithmetic, as a live editor: the oracle of the compat tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

# Behind everything else, so that an installed package is not shadowed by the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from torch import nn

from benchmarks import reference_rule
from benchmarks.reference_rule import PlainAdaptor, PlainEditor, exact_distances

__all__ = ["EasyEditAdaptor", "ExactAdaptor", "PlainEditor", "exact_distances"]


class ExactAdaptor(PlainAdaptor):
    """The authors' adaptor."""

    def __init__(
        self, layer: nn.Module, epsilon: float, replacement: str, expand: str = "coverage"
    ) -> None:
        super().__init__(layer, epsilon, replacement, exact_distances, expand)


class EasyEditAdaptor(reference_rule.EasyEditAdaptor):
    """The same with EasyEdit's lists, and a config that is read by attribute."""

    def __init__(self, layer: nn.Module, epsilon: float, replacement: str) -> None:
        super().__init__(layer, epsilon, replacement, exact_distances)
        self.config = SimpleNamespace(**self.config["editor"])

    def delete_key(self, edit_id: str) -> None:
        """Be there: it is one of the names by which the adaptor is known."""
        raise NotImplementedError(edit_id)
