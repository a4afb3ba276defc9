"""The surface of the authors' code: `GRACE(config, model)`, its adaptor, and the notebook form.

Decisions are those of `semantics="reference"`, in exact arithmetic. docs/differences.md lists what
is not as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, get_args

from torch import Tensor, nn

from grace_fast.compat.adaptor import Adaptor
from grace_fast.compat.method import Read, Task, one_of, read_method, read_steps, steps_of
from grace_fast.compat.teaching import prompt_end, teach
from grace_fast.editor.attach import find_layer
from grace_fast.edits.settings import Schedule
from grace_fast.hook.attachment import has_adapter

_NAMES = {
    "editor": "eps, replacement, val_init, eps_expand, n_iter and edit_lr",
    "model": "inner_params",
    "experiment": f"task, one of {get_args(Task)}",
}


class GRACEAdapter(Adaptor):
    """The module in the place of the edited layer.

    config: nested, `config["editor"]` says how to edit; transpose: the weight is [V, D], as a
    Linear's, and not [D, V], as a Conv1D's.

    Raises: KeyError for a config without a needed key, ValueError for a mode that does not exist or
    a layer that cannot be edited.
    """

    def __init__(self, config: Mapping[str, Any], layer: nn.Module, transpose: bool = True) -> None:
        method = read_method(_reader(config, "editor"), lambda name: config["editor"].get(name))
        super().__init__(layer, method, config.get("device"), transpose)
        self.config = config


class Editor(nn.Module):
    """What the references' editors have in common: an adaptor put on a layer of a model.

    After an edit, `log_dict` holds `chosen_key` and `nkeys`, `losses` the loss before each step as
    numpy scalars, and `loss` the last of them.
    """

    def __init__(
        self, model: nn.Module, layer: str, stand_in: Callable[[nn.Module, bool], Adaptor]
    ) -> None:
        name, replaced = find_layer(model, layer)
        if has_adapter(replaced):
            raise ValueError(f"{name} has an adaptor already; a layer takes one")
        adaptor = stand_in(replaced, type(replaced).__name__ != "Conv1D")
        self._resume(model, name)
        put(self.model, self.layer, adaptor)

    def _resume(self, model: nn.Module, layer: str) -> None:
        """Use the adaptor that is on a layer, or will be."""
        super().__init__()
        self.layer, self.model = find_layer(model, layer)[0], model
        self.log_dict: dict[str, Any] = {}
        self.losses: list[Any] = []
        self.loss: Tensor | None = None

    @property
    def adaptor(self) -> Adaptor:
        """The module in the place of the layer."""
        found = self.model.get_submodule(self.layer)
        if not isinstance(found, Adaptor):
            raise RuntimeError(f"{self.layer} has no adaptor any more")
        return found

    @property
    def _asks_at_labels(self) -> bool:  # a call; `generate` asks where prompts end then
        return False

    def forward(self, **tokens: Any) -> Any:
        """Return what the edited model answers; labels may say where it asks."""
        if self._asks_at_labels and isinstance(tokens.get("labels"), Tensor):
            self.adaptor.key_id = prompt_end(tokens["labels"])
        return self.model(**tokens)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the edited model generates, asking at the prompt's last token."""
        with ExitStack() as asking:
            if self._asks_at_labels:
                self.adaptor.key_id = -1
                asking.enter_context(self.adaptor.pinned())
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def teach(self, tokens: Mapping[str, Any], steps: Schedule, at_labels: bool) -> None:
        """Make one edit and log it; at_labels: the query is before the first label."""
        adaptor = self.adaptor
        self.losses, self.loss = teach(adaptor, self.model, tokens, steps, at_labels)
        self.log_dict["chosen_key"] = adaptor.chosen_key
        self.log_dict["nkeys"] = len(adaptor.keys)


class GRACE(Editor):
    """The authors' editor on `model.model`; several edits go into one codebook.

    config: nested; read are `["model"]["inner_params"][0]`, `["device"]`, `["experiment"]["task"]`
    and of `["editor"]` eps, replacement, val_init, eps_expand, n_iter and edit_lr.

    Raises: KeyError for a config without a needed key, ValueError for a task or mode that does not
    exist, an unknown layer, or one that cannot be edited or has an adaptor.
    """

    def __init__(self, config: Mapping[str, Any], model: Any) -> None:
        one_of("task", _reader(config, "experiment")("task"), Task)
        if "device" not in config:
            raise KeyError('config["device"] is needed')
        read_steps(_reader(config, "editor"))
        layers = _reader(config, "model")("inner_params")
        super().__init__(model.model, layers[0], functools.partial(GRACEAdapter, config))
        self.config, self.device = config, config["device"]
        self.tokenizer = getattr(model, "tokenizer", None)

    @property
    def _asks_at_labels(self) -> bool:
        return bool(self.config["experiment"]["task"] == "hallucination")

    def edit(
        self, config: Mapping[str, Any] | None, tokens: Mapping[str, Any], batch_history: Any = None
    ) -> None:
        """Make the model answer tokens with their `labels`, by exactly `n_iter` steps of Adam.

        Of a batch every row is edited, in order. `batch_history` is not used.

        Raises: as the constructor, ValueError for tokens without labels. Nothing has changed then.
        """
        steps = read_steps(_reader(self.config if config is None else config, "editor"))
        self.teach(tokens, steps, at_labels=self._asks_at_labels)


class GRACE_barebones(Editor):
    """The notebook's form: 200 steps, cold, replace_prompt, coverage.

    generation: take the query from before the first label, instead of at the last token.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        init_epsilon: float,
        learning_rate: float,
        device: Any = None,
        generation: bool = False,
    ) -> None:
        config = {
            "device": device,
            "editor": {
                "eps": init_epsilon,
                "replacement": "replace_prompt",
                "val_init": "cold",
                "eps_expand": "coverage",
            },
        }
        super().__init__(model, layer, functools.partial(GRACEAdapter, config))
        self.config, self.device, self.generation = config, device, generation
        self._steps = steps_of(200, learning_rate)

    def edit(self, tokens: Mapping[str, Any]) -> None:
        """Make the model answer tokens with their `labels`."""
        self.teach(tokens, self._steps, at_labels=self.generation)


def put(model: nn.Module, layer: str, module: nn.Module) -> None:
    """Put a module in the place of a layer."""
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _reader(config: Mapping[str, Any], part: str) -> Read:
    """Return a function that reads one part of a nested config.

    Raises: KeyError that names what is missing.
    """

    def read(name: str) -> Any:
        if part not in config:
            raise KeyError(f'config["{part}"] is needed; it holds {_NAMES[part]}')
        if name not in config[part]:
            raise KeyError(f'config["{part}"]["{name}"] is needed')
        return config[part][name]

    return read
