"""The references' adaptor as it lives: loaded, served, edited on, its tensors written to by others.

Its rows are renumbered and its codebook is made anew whenever somebody writes, so it has a life of
its own: what a forward call replaces, and with what, is the law's.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import nn

from grace_fast.compat.reference import GRACEAdapter
from life.drawing import Drawing
from life.law import Model
from life.living import Wrong

WIDTH, VALUES = 8, 3
CONFIG = {
    "editor": {
        **{"eps": 1.0, "dist_fn": "euc", "replacement": "replace_all", "num_pert": 8},
        **{"val_init": "cold", "val_train": "sgd", "eps_expand": "coverage", "reg": "early_stop"},
    }
}


class DropIn:
    """An adaptor around one layer, and the model of its codebook."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()
        self.adaptor = GRACEAdapter(CONFIG, nn.Linear(WIDTH, VALUES), transpose=True)
        self.adaptor.training = False
        kind = str(self.rng.choice(["normal", "clusters", "lattice", "one slot"]))
        self.drawing = Drawing(kind, WIDTH, torch.float32, self.rng)
        self.model = Model(WIDTH, VALUES)
        self.step, self.operation = 0, ""

    def live(self, steps: int) -> DropIn:
        """Change and ask; raise `Wrong` where an answer is not the law's."""
        changes = {
            **{"load": self.load, "edit": self.edit, "radii in place": self.write_radii},
            **{"keys in place": self.write_keys, "values in place": self.write_values},
            **{"assign": self.assign, "state": self.load_state},
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.load()
            for self.step in range(steps):
                self.operation = str(self.rng.choice(list(changes)))
                if self.model.rows or self.operation in ("load", "edit"):
                    changes[self.operation]()
                self.ask()
        return self

    def _drawn(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, radii = self.drawing.keys(count), np.abs(self.drawing.radii(count)).clip(0, 1e6)
        values = self.rng.standard_normal((count, VALUES)).astype(np.float32)
        return torch.from_numpy(keys), torch.from_numpy(values), torch.from_numpy(radii)

    def _take(self, keys: torch.Tensor, values: torch.Tensor, radii: torch.Tensor) -> None:
        self.model = Model(WIDTH, VALUES)
        self.model.append(keys.numpy(), values.detach().numpy(), radii.numpy())

    def load(self) -> None:
        keys, values, radii = self._drawn(int(self.rng.choice([1, 2, 30, 90])))
        self._take(keys, values, radii)
        self.adaptor.load(keys, values, radii, [torch.tensor([[1]])] * len(keys))

    def assign(self) -> None:
        """As one loads a codebook into the references' adaptor."""
        keys, values, radii = self._drawn(self.model.rows + int(self.rng.integers(3)))
        self._take(keys, values, radii)
        self.adaptor.keys, self.adaptor.values = keys, nn.Parameter(values.clone())
        self.adaptor.epsilons = radii if len(radii) == 1 else radii[:, None]
        self.adaptor.key_labels = [torch.tensor([[1]])] * len(keys)

    def load_state(self) -> None:
        """What was saved comes back, over what came since."""
        saved, before = self.adaptor.state_dict(), self.model.copy()
        self.edit()
        self.ask()
        self.adaptor.load_state_dict(saved)
        self.model = before

    def edit(self) -> None:
        """As the authors' editor drives an edit from outside: a key far from all others."""
        key = self.drawing.keys(1) + np.float32(50 + 10 * self.rng.random())
        told = self.model.ask(key.astype(np.float64))
        reach = float(self.model.radius.max(initial=0)) + 1.0
        if self.model.rows and np.sqrt(told.apart[0]) <= 1.01 * reach:
            return
        adaptor = self.adaptor
        adaptor.training, adaptor.edit_label, adaptor.key_id = True, torch.tensor([[2]]), -1
        adaptor.iter = 0
        adaptor(torch.from_numpy(key)[:, None].expand(1, 3, WIDTH).contiguous())
        adaptor.training = False
        value = adaptor.values.detach().numpy()[-1:]
        self.model.append(key, value, np.ones(1, np.float32))

    def _row(self) -> int:
        return int(self.rng.integers(self.model.rows))

    def write_radii(self) -> None:
        row = self._row()
        radius = np.float32(self.drawing.spacing * 10.0 ** self.rng.uniform(-1, 2))
        radii = self.adaptor.epsilons
        radii.view(-1)[row] = float(radius)
        self.model.radius[row] = radius

    def write_keys(self) -> None:
        row, key = self._row(), self.drawing.keys(1)[0]
        self.adaptor.keys[row] = torch.from_numpy(key)
        self.model.columns[:, row] = key

    def write_values(self) -> None:
        row, value = self._row(), self.rng.standard_normal(VALUES).astype(np.float32)
        with torch.no_grad():
            self.adaptor.values[row] = torch.from_numpy(value)
        self.model.values[row] = value

    def ask(self) -> None:
        points = self.drawing.questions(12, self.model, [])
        queries = self.drawing.cast(points, torch.float32)
        queries = queries[queries.isfinite().all(dim=1)]
        told = self.model.ask(queries.double().numpy())
        with torch.no_grad():
            hidden = queries[:, None].expand(-1, 2, WIDTH).contiguous()
            found, plain = self.adaptor(hidden), self.adaptor.layer(hidden)
        wanted = plain.clone()
        for at in np.flatnonzero(told.hit):
            wanted[at] = torch.from_numpy(self.model.values[told.nearest[at]])
        wrong = (found != wanted).flatten(1).any(dim=1)
        self.counts["drop-in"] += len(queries)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise Wrong(
                f"drop-in: {int(wrong.sum())} of {len(queries)} outputs wrong, query {at} first, "
                f"by the law row {told.row[at]}; seed {self.seed}, step {self.step} "
                f"({self.operation!r}), {self.model.rows} rows"
            )
