"""The reference's adaptor and editor, plainly: its rules word for word, with exact distances.

One loop, one `if` a row of the edit table, nothing shared with the package but the order of the
sum. It costs what the reference costs: every key at every forward, every value in Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.semantics import squared_distances


def exact_distances(keys: Tensor, query: Tensor) -> Tensor:
    """Return the distance of every key [N, D] to one query [1, D], [N] float64."""
    return squared_distances(query, keys)[0].sqrt()


class PlainAdaptor(nn.Module):
    """The rules on one layer, for one sequence at a time."""

    distances = staticmethod(exact_distances)

    def __init__(self, layer: nn.Module, epsilon: float, replacement: str, **modes: str) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight
        self.init_epsilon, self.replacement = epsilon, replacement
        self.expand = modes.get("expand", "coverage")
        self.start = modes.get("start", "cold")
        self.training, self.iter, self.key_id = False, 0, -1
        self.edit_label: Tensor | None = None

    def train(self, mode: bool = True):
        self.layer.train(mode)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden)
        if not self.training and "keys" not in self.__dict__:
            return output
        last = hidden.shape[1] - 1
        token = last if self.key_id == -1 else min(int(self.key_id), last)
        query = hidden[:, token].detach()
        if self.training and self.iter == 0:
            self.decide(query, output[:, token].detach())
        distance = self.distances(self.keys, query)
        self.chosen_key = distance.argmin()[None]
        radius = self.epsilons.reshape(-1)[self.chosen_key]
        self.hit = bool(distance[self.chosen_key] <= radius)
        value = self.values[self.chosen_key].to(output.dtype)
        output = output.clone()
        if self.hit and self.replacement == "replace_all":
            output[:] = value
        elif self.hit and self.replacement == "replace_last":
            output[:, token] = value
        elif self.hit and self.replacement == "replace_prompt":
            output[:, :token] = value
        return output

    def decide(self, query: Tensor, own: Tensor) -> None:
        fresh = torch.rand(1, own.shape[-1]) if self.start == "cold" else own
        if "keys" not in self.__dict__:
            self.keys, self.values = query.clone(), nn.Parameter(fresh.clone())
            self.epsilons = torch.tensor([self.init_epsilon])
            self.key_labels = [self.edit_label]
            self.outcome = "added"
            return
        self.outcome = "reused"
        distances = self.distances(self.keys, query)
        nearest = int(distances.argmin())
        distance = float(distances[nearest])
        radius = float(self.epsilons.reshape(-1)[nearest])
        if distance > self.init_epsilon + radius:
            self.outcome = "added"
            self.add(query, fresh, self.init_epsilon)
        elif not self.same_label(nearest):
            self.outcome = "split"
            self.add(query, fresh, distance / 2)
            self.epsilons[nearest] = distance / 2 - 1e-5
        elif distance > radius:
            self.outcome = "expanded"
            self.epsilons[nearest] = self.covering(distance)
            if self.expand == "moving_average":
                self.keys[nearest] = (self.keys[nearest] + query[0]) / 2

    def same_label(self, nearest: int) -> bool:
        known = self.key_labels[nearest]
        return bool(known.float().mean() == self.edit_label.float().mean())

    @staticmethod
    def covering(distance: float) -> float:
        """Return a float32 radius with the distance in it: the float32 next to it may be below."""
        radius = torch.tensor(distance, dtype=torch.float32)
        while float(radius) < distance:
            radius = torch.nextafter(radius, torch.tensor(torch.inf))
        return float(radius)

    def add(self, query: Tensor, fresh: Tensor, radius: float) -> None:
        self.keys = torch.vstack([self.keys, query])
        self.values = nn.Parameter(torch.vstack([self.values.detach(), fresh]))
        self.epsilons = torch.vstack([self.epsilons.reshape(-1, 1), torch.tensor([[radius]])])
        self.key_labels = self.keep_label(self.key_labels)

    def keep_label(self, labels: list[Any]) -> list[Any]:
        return [*labels, self.edit_label]


class EasyEditAdaptor(PlainAdaptor):
    """The same with EasyEdit's lists: new labels in front, ids nested."""

    edit_id = None

    def decide(self, query: Tensor, own: Tensor) -> None:
        super().decide(query, own)
        if not hasattr(self, "edit_ids"):
            self.edit_ids: list[Any] = [self.edit_id]
        elif self.outcome in ("added", "split"):
            self.edit_ids = [self.edit_ids, self.edit_id]

    def keep_label(self, labels: list[Any]) -> list[Any]:
        return [self.edit_label, *labels]

    def delete_key(self, edit_id: str) -> None:
        """Be there: it is one of the names by which the adaptor is known."""
        raise NotImplementedError(edit_id)


class PlainEditor:
    """The reference's edit: whole `values` in Adam, a plain forward at each step."""

    def __init__(self, model: nn.Module, layer: str, adaptor: nn.Module, at_labels: bool) -> None:
        self.model, self.layer, self.at_labels = model, layer, at_labels
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, adaptor)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def adaptor(self) -> Any:
        return self.model.get_submodule(self.layer)

    def edit(self, tokens: dict[str, Tensor], steps: int, rate: float, edit_id: Any = None) -> None:
        adaptor = self.adaptor
        if self.at_labels:
            adaptor.key_id = int((tokens["labels"] == -100).sum()) - 1
        adaptor.training, adaptor.edit_label, adaptor.edit_id = True, tokens["labels"], edit_id
        self.losses = []
        for step in range(steps):
            adaptor.iter = step
            loss = self.model(**tokens).loss
            if step == 0:
                adam = torch.optim.Adam([adaptor.values], rate)
            adam.zero_grad()
            if loss.requires_grad:
                loss.backward()
                adam.step()
            self.losses.append(loss.detach().numpy())
        adaptor.training = False
