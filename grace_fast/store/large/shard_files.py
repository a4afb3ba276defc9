"""Keys, values and radii from safetensors files, a few thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grace_fast.errors import CodebookCorrupt
from grace_fast.store import headers

_BLOCK_BYTES = 1 << 25
_SHAPES = {"keys": ("[M, D]", 2), "values": ("[M, V]", 2), "radii": ("[M]", 1)}


class FilesOfRows:
    """Files that each hold `keys` [M, D], `values` [M, V] and, without a radius, `radii` [M].

    Raises: OSError where one cannot be read, ValueError where it holds something else.
    """

    def __init__(self, paths: Sequence[Path], radius: float | None = None) -> None:
        # Read when they are asked for, wherever the process is by then.
        self._paths, self._radius = [path.absolute() for path in paths], radius
        self._counts = [self._rows_of(path) for path in self._paths]

    @property
    def rows(self) -> int:
        """The number of rows in all files."""
        return sum(self._counts)

    def blocks(self, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (keys, values, radii) from a row on, as `build` asks for them."""
        for path, count in zip(self._paths, self._counts, strict=True):
            if first < count:
                yield from self._blocks_of(path, first, count)
            first = max(0, first - count)

    def _blocks_of(
        self, path: Path, first: int, count: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with safe_open(path, framework="pt") as opened:
            keys, values = opened.get_slice("keys"), opened.get_slice("values")
            radii = opened.get_slice("radii") if "radii" in set(opened.keys()) else None
            step = max(1, _BLOCK_BYTES // (4 * keys.get_shape()[1]))
            for at in range(first, count, step):
                some = slice(at, min(at + step, count))
                default = torch.full(
                    (some.stop - at,), self._radius or 0.0, dtype=torch.float32, device="cpu"
                )
                yield keys[some], values[some], default if radii is None else radii[some]

    def _rows_of(self, path: Path) -> int:
        try:
            headers.check(path.resolve())
            with safe_open(path, framework="pt") as opened:
                wanted = ["keys", "values"] + ["radii"] * (self._radius is None)
                missing = sorted(set(wanted) - set(opened.keys()))
                if missing:
                    raise ValueError(f"{path} must hold {wanted}, and has no {missing}")
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, CodebookCorrupt) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        for name, (wanted_shape, rank) in _SHAPES.items():
            shape = shapes.get(name, [1] * rank)
            if len(shape) != rank or 0 in shape[1:]:
                raise ValueError(f"{path}: {name} must be {wanted_shape}, got {shape}")
        return int(shapes["keys"][0])
