"""A layer that is spread over processes: what a hook sees of its input is a part of each query.

`rowwise` tensor parallelism gives each process a slice of the layer's input. A query is put
together from the slices of the group before it is looked up; every process decides the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def whole(hidden: Tensor, layer: nn.Module, width: int | None = None) -> Tensor:
    """Return a layer's input [..., D], gathered where each process of a group has a part of it.

    width: D, by default what the layer declares.

    Raises: ValueError where the input has another width and no group of processes makes it whole.
    """
    if width is None:
        width = declared_widths(layer)[0]
    if width is None or hidden.shape[-1] == width:
        return hidden
    part, group = hidden.shape[-1], _group(layer)
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if part * ranks != width:
        raise ValueError(
            f"the edited layer takes {width} numbers a token and was given {part}: it looks like a "
            f"part of a tensor-parallel layer, and {ranks} process(es) do not make it whole; "
            "attach to a layer that is not split by its input"
        )
    parts = [torch.empty_like(hidden, memory_format=torch.contiguous_format) for _ in range(ranks)]
    torch.distributed.all_gather(parts, hidden.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _group(layer: nn.Module) -> Any:
    """Return the processes that share a layer, or None where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for owner in (getattr(layer, "weight", None), layer):
        mesh = getattr(owner, "device_mesh", None) or getattr(owner, "_hf_device_mesh", None)
        if mesh is not None:
            return mesh.get_group() if mesh.ndim == 1 else mesh["tp"].get_group()
    return torch.distributed.group.WORLD


def declared_widths(layer: nn.Module) -> tuple[int | None, int | None]:
    """Return the widths D and V that a layer declares; never those of its weight, which is packed.

    Both are None where it declares none.
    """
    key_dim = getattr(layer, "in_features", getattr(layer, "nx", None))
    value_dim = getattr(layer, "out_features", getattr(layer, "nf", None))
    if not isinstance(key_dim, int) or not isinstance(value_dim, int):
        return None, None
    return key_dim, value_dim
