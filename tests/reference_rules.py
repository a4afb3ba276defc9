"""The references' rules in exact arithmetic, as a live editor: the oracle of the compat tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Behind everything else, so that an installed package is not shadowed by the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from torch import Tensor, nn

from benchmarks.reference_rule import PlainAdaptor, PlainEditor, exact_distances

__all__ = ["EasyEditAdaptor", "ExactAdaptor", "PlainEditor", "exact_distances"]


class ExactAdaptor(PlainAdaptor):
    """The authors' adaptor."""

    def __init__(
        self, layer: nn.Module, epsilon: float, replacement: str, expand: str = "coverage"
    ) -> None:
        super().__init__(layer, epsilon, replacement, exact_distances, expand)


class EasyEditAdaptor(ExactAdaptor):
    """The same with EasyEdit's lists: new labels in front, ids nested."""

    edit_id = None

    def __init__(self, layer: nn.Module, epsilon: float, replacement: str) -> None:
        super().__init__(layer, epsilon, replacement)
        self.config = SimpleNamespace(**self.config["editor"])

    def decide(self, query: Tensor, fresh: Tensor) -> None:
        super().decide(query, fresh)
        if not hasattr(self, "edit_ids"):
            self.edit_ids: list[Any] = [self.edit_id]
        elif self.outcome in ("added", "split"):
            self.edit_ids = [self.edit_ids, self.edit_id]

    def keep_label(self, labels: list[Any]) -> list[Any]:
        return [self.edit_label, *labels]

    def delete_key(self, edit_id: str) -> None:
        """Be there: it is one of the names by which the adaptor is known."""
        raise NotImplementedError(edit_id)
