"""The reference's algorithm, plainly and in our words: what an edit and a look-up cost there.

Every forward measures every key and draws a value, `values` as a whole is in Adam, and keys and
values are stacked anew for each key. Decisions are the edit table's, one `if` a row. With
`exact_distances` in the place of `torch.cdist` they are those of the rules themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.semantics import squared_distances

Distances = Callable[[Tensor, Tensor], Tensor]  # keys [N, D] and a query [1, D] to [N]


def cdist(keys: Tensor, query: Tensor) -> Tensor:
    """Return the distances as the reference computes them: by a matrix product from 26 keys on."""
    return torch.cdist(keys.float(), query.float())[:, 0]


def exact_distances(keys: Tensor, query: Tensor) -> Tensor:
    """Return the distances of the law, [N] float64."""
    return squared_distances(query, keys)[0].sqrt()


class PlainAdaptor(nn.Module):
    """The rules on one layer, for one sequence at a time."""

    def __init__(
        self,
        layer: nn.Module,
        epsilon: float,
        replacement: str,
        distances: Distances = cdist,
        expand: str = "coverage",
        warm: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight
        self.distances, self.expand, self.warm = distances, expand, warm
        self.init_epsilon, self.replacement = epsilon, replacement
        self.training, self.iter, self.key_id = False, 0, -1
        self.edit_label: Tensor | None = None
        modes = {"eps": epsilon, "replacement": replacement, "val_init": "warm" if warm else "cold"}
        self.config: Any = {"editor": modes | {"eps_expand": expand}}

    def train(self, mode: bool = True) -> PlainAdaptor:
        """Leave the state of an edit alone; only the layer has modes."""
        self.layer.train(mode)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden)
        if not self.training and "keys" not in self.__dict__:
            return output
        last = hidden.shape[1] - 1
        token = last if self.key_id == -1 else min(int(self.key_id), last)
        query = hidden[:, token].detach()
        drawn = torch.rand(1, output.shape[-1])
        fresh = output[:, token].detach().clone() if self.warm else drawn
        if self.training and self.iter == 0:
            self.decide(query, fresh)
        distance = self.distances(self.keys, query)
        nearest, self.chosen_key = distance.min(0, keepdim=True)
        hit = nearest <= self.epsilons.reshape(-1)[self.chosen_key]
        self.hit = bool(hit)
        value = self.values[self.chosen_key].to(output.dtype)
        if self.replacement == "replace_all":
            return torch.where(hit[:, None, None], value[:, None].expand_as(output), output)
        replaced = slice(token, token + 1) if self.replacement == "replace_last" else slice(token)
        output = output.clone()
        output[:, replaced] = torch.where(hit[:, None, None], value[:, None], output[:, replaced])
        return output

    def decide(self, query: Tensor, fresh: Tensor) -> None:
        """Change the codebook for one edit."""
        self.outcome = "added"
        if "keys" not in self.__dict__:
            self.keys, self.values = query.clone(), nn.Parameter(fresh)
            self.epsilons = torch.tensor([self.init_epsilon])
            self.key_labels = [self.edit_label]
            return
        distances = self.distances(self.keys, query)
        nearest = int(distances.argmin())
        distance = float(distances[nearest])
        radius = float(self.epsilons.reshape(-1)[nearest])
        if distance > self.init_epsilon + radius:
            self.add(query, fresh, self.init_epsilon)
        elif not self.same_label(nearest):
            self.outcome = "split"
            self.add(query, fresh, distance / 2)
            self.epsilons[nearest] = distance / 2 - 1e-5
        elif distance > radius:
            self.outcome = "expanded"
            self.epsilons[nearest] = covering(distance)
            if self.expand == "moving_average":
                self.keys[nearest] = (self.keys[nearest] + query[0]) / 2
        else:
            self.outcome = "reused"

    def same_label(self, nearest: int) -> bool:
        """Tell whether the means of the edit's label and of a row's are equal."""
        known = self.key_labels[nearest]
        return bool(known.float().mean() == self.edit_label.float().mean())

    def add(self, query: Tensor, fresh: Tensor, radius: float) -> None:
        """Stack one row below the others."""
        self.keys = torch.vstack([self.keys, query])
        self.values = nn.Parameter(torch.vstack([self.values.detach(), fresh]))
        self.epsilons = torch.vstack([self.epsilons.reshape(-1, 1), torch.tensor([[radius]])])
        self.key_labels = self.keep_label(self.key_labels)

    def keep_label(self, labels: list[Any]) -> list[Any]:
        """Return the labels with that of the edit."""
        return [*labels, self.edit_label]


class EasyEditAdaptor(PlainAdaptor):
    """The same with EasyEdit's lists: new labels in front, so that others are compared; ids nested.

    Its other differences cost nothing where keys are float32: it makes them so at each look-up.
    """

    edit_id: Any = None

    def decide(self, query: Tensor, fresh: Tensor) -> None:
        """Change the codebook for one edit, and its ids."""
        super().decide(query, fresh)
        if not hasattr(self, "edit_ids"):
            self.edit_ids: list[Any] = [self.edit_id]
        elif self.outcome in ("added", "split"):
            self.edit_ids = [self.edit_ids, self.edit_id]

    def keep_label(self, labels: list[Any]) -> list[Any]:
        """Return the labels with that of the edit before them."""
        return [self.edit_label, *labels]


def covering(distance: float) -> float:
    """Return a float32 radius with the distance in it: the float32 next to it may be below."""
    radius = torch.tensor(distance, dtype=torch.float32)
    while float(radius) < distance:
        radius = torch.nextafter(radius, torch.tensor(torch.inf))
    return float(radius)


class PlainEditor:
    """The reference's edit: a whole forward and all of `values` in Adam at each step."""

    def __init__(self, model: nn.Module, layer: str, adaptor: nn.Module, at_labels: bool) -> None:
        self.model, self.layer, self.at_labels = model, layer, at_labels
        parent, _, name = layer.rpartition(".")
        setattr(model.get_submodule(parent), name, adaptor)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if hasattr(adaptor, "values"):
            adaptor.values.requires_grad_(True)

    @property
    def adaptor(self) -> Any:
        """The module in the place of the layer."""
        return self.model.get_submodule(self.layer)

    def edit(
        self,
        tokens: dict[str, Tensor],
        steps: int,
        rate: float,
        edit_id: Any = None,
        until: Callable[[Any], bool] | None = None,
    ) -> int:
        """Make one edit; return the steps taken.

        until: tells of the model's answer that it is learnt, which ends it; the reference itself
            makes all steps.
        """
        adaptor = self.adaptor
        if self.at_labels:
            adaptor.key_id = int((tokens["labels"] == -100).sum()) - 1
        adaptor.training, adaptor.edit_label, adaptor.edit_id = True, tokens["labels"], edit_id
        self.losses = []
        for step in range(steps):
            adaptor.iter = step
            answer = self.model(**tokens)
            loss = answer.loss
            if until is not None and until(answer):
                break
            if step == 0:
                adam = torch.optim.Adam([adaptor.values], rate)
            adam.zero_grad()
            if loss.requires_grad:
                loss.backward()
                adam.step()
            self.losses.append(loss.detach().numpy())
        adaptor.training = False
        return len(self.losses)
