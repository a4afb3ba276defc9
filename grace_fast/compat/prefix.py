"""What of a model's forward call does not depend on the value in training, computed once an edit.

The weights are frozen and the tokens stay, so every module that ends before the edited layer begins
returns the same tensors at each step. The first step keeps them, the others return them: bit for
bit the same, without the layers below the edit. A model that draws random numbers is run whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.compat.adaptor import Adaptor

Kept = tuple[Any, list[tuple[Tensor, int]]]  # an output, and its tensors' versions


class Prefix:
    """The modules of one model that run before an adaptor."""

    def __init__(self, model: nn.Module, adaptor: Adaptor) -> None:
        self._beside = list(_beside(model, adaptor))
        self._adaptor = adaptor
        # Whoever drops out, or patched a module's forward, wants it to run.
        self._steady = not any(
            module.training for module in model.modules() if not isinstance(module, Adaptor)
        )
        self._kept: dict[nn.Module, Kept] = {}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what the modules return in the one forward call of the block."""
        if not self._steady:
            yield
            return
        calls: Counter[nn.Module] = Counter()
        reached: list[bool] = []

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            calls[module] += 1
            tensors = _tensors(output)
            if not reached and tensors is not None:
                self._kept[module] = (output, [(tensor, tensor._version) for tensor in tensors])

        drawn = torch.get_rng_state()
        with ExitStack() as hooks:
            for module in self._beside:
                hooks.callback(module.register_forward_hook(keep).remove)
            reach = self._adaptor.register_forward_pre_hook(lambda *_: reached.append(True))
            hooks.callback(reach.remove)
            yield
        once = len(reached) == 1 and torch.equal(torch.get_rng_state(), drawn)
        self._kept = {
            module: kept for module, kept in self._kept.items() if once and calls[module] == 1
        }

    @contextmanager
    def returning(self) -> Iterator[None]:
        """Let the modules return what was kept, in the forward calls of the block."""
        patched = [module for module in self._kept if "forward" not in vars(module)]
        for module in patched:
            vars(module)["forward"] = _returning(module.forward, *self._kept[module])
        try:
            yield
        finally:
            for module in patched:
                del vars(module)["forward"]


def _returning(
    forward: Callable[..., Any], output: Any, versions: list[tuple[Tensor, int]]
) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        if any(tensor._version != version for tensor, version in versions):
            return forward(*args, **kwargs)  # the caller wrote to what it was given
        return output

    return kept


def _beside(model: nn.Module, adaptor: Adaptor) -> Iterator[nn.Module]:
    """Yield the modules that are beside an adaptor or beside what holds it, each once."""
    path = _path(model, adaptor)
    on_path = set(map(id, path))
    seen: set[int] = set()
    for holder in path[:-1]:
        for child in holder.children():
            if id(child) not in on_path and id(child) not in seen:
                seen.add(id(child))
                yield child


def _path(model: nn.Module, adaptor: Adaptor) -> list[nn.Module]:
    name = next((name for name, module in model.named_modules() if module is adaptor), "")
    path, inner = [model], model
    for part in name.split(".") if name else ():
        inner = inner.get_submodule(part)
        path.append(inner)
    return path


def _tensors(output: Any) -> list[Tensor] | None:
    """Return the tensors of an output that is made of tensors and nothing that can be changed."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) is not tuple:
        return [] if output is None else None
    parts = [_tensors(part) for part in output]
    if any(part is None for part in parts):
        return None
    return [tensor for part in parts if part is not None for tensor in part]
