"""Bounds on the keys that a search in a FAISS index does not return.

FAISS works in float32 on the keys less a centre, perhaps behind a linear map; each step rounds. A
bound is turned back step by step: what FAISS says, less what its sums can be off, before the map
and before the centre was taken off. What is left no true distance is below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

LARGEST_TABLE = 4096  # cells whose distances from each other are kept: 64 MiB
EXHAUSTIVE = ("IndexFlat", "IndexFlatL2", "IndexFlatL2Panorama")
CELLS = ("IndexIVFFlat", "IndexIVFFlatPanorama")
FAITHFUL = (*EXHAUSTIVE, *CELLS, "IndexHNSWFlat", "IndexHNSWFlatPanorama")
LARGEST_SQUARES = 1e37  # sums of squares that FAISS's float32 still holds, with room
_UNIT = 2.0**-24
_TF32 = 2.0**-11  # what a GPU may round the factors of a product to
_TINY = 2.0**-120  # what underflow may take, with room


class Bounds:
    """What can be proved of one trained index, by what kind it is."""

    def __init__(self, faiss: Any, index: Any, on_gpu: bool) -> None:
        core = faiss.downcast_index(index)
        self.transform: Any = None  # the linear map before the index, where there is one
        self._stretch, self._spread, self._offset = 1.0, 0.0, 0.0  # of that
        readable = True
        if isinstance(core, faiss.IndexPreTransform):
            first = faiss.downcast_VectorTransform(core.chain.at(0))
            readable = core.chain.size() == 1 and isinstance(first, faiss.LinearTransform)
            if readable:
                self.transform, core = first, faiss.downcast_index(core.index)
                matrix = faiss.vector_to_array(first.A).reshape(first.d_out, first.d_in)
                matrix = matrix.astype(np.float64)
                self._stretch = float(np.linalg.norm(matrix, 2)) * (1 + 1e-9)
                self._spread = float(np.linalg.norm(matrix))
                if first.have_bias:
                    self._offset = float(np.linalg.norm(faiss.vector_to_array(first.b)))
        kind = type(core).__name__
        self._width, self._on_gpu = core.d, on_gpu
        self.is_faithful = readable and kind in FAITHFUL  # its distances are those of whole vectors
        self.is_exhaustive = readable and kind in EXHAUSTIVE
        self.cells: Cells | None = None
        self.longest = 0.0  # of the index's vectors, before the map
        # Which cells a GPU reads is not known.
        if readable and kind in CELLS and core.nlist <= LARGEST_TABLE and not on_gpu:
            quantizer = faiss.downcast_index(core.quantizer)
            if type(quantizer).__name__ in EXHAUSTIVE[:2]:
                self.cells = Cells(faiss, quantizer)

    @property
    def proves(self) -> bool:
        """Whether a search says anything about keys that it does not return."""
        return self.is_exhaustive or self.cells is not None

    def in_other_cells(self, apart: Array, order: Array, nprobe: int, lengths: Array) -> Array:
        """Return what no distance is below, [B], of keys in cells after the first `nprobe`.

        apart, order: [B, cells], squared distances to the centroids in order, and which they are.
        """
        assert self.cells is not None
        wrong = self.band(self._image_lengths(lengths), self.cells.longest)
        wrong += self.band(np.asarray(self._image_lengths(self.longest)), self.cells.longest)
        least = self.cells.least_distances(apart, order, nprobe, wrong)
        return np.asarray(self._before_transform(least[:, None], lengths)[:, 0])

    def band(self, lengths: Array, longest: float) -> Array:
        """Return how far FAISS's squared distances can be from those of its own vectors.

        It sums squared differences, or |q|^2 + |k|^2 - 2 q.k; Panorama stops where a bound made of
        such parts says so. Each is within twice the roundings of a dot product of (|q| + |k|)^2.
        """
        scale = (lengths + longest) ** 2
        roundings = 3.03 * (self._width + 16)
        band = roundings * (_UNIT * scale + _TINY * (1 + np.sqrt(scale)))
        return np.asarray(band + (8 * _TF32 * scale if self._on_gpu else 0.0))

    def least_distances(self, squared: Array, lengths: Array) -> Array:
        """Return what no distance from a key is below, [B, k]; `squared` is FAISS's, of queries.

        lengths: [B] of the queries less the centre.
        """
        images, longest = self._image_lengths(lengths), self._image_lengths(self.longest)
        apart = np.maximum(squared - self.band(images, longest)[:, None], 0)
        return self._before_transform(np.sqrt(apart), lengths)

    def _image_lengths(self, lengths: Any) -> Any:
        return self._stretch * lengths + self._offset + self._transform_error(lengths)

    def _transform_error(self, lengths: Any) -> Any:
        if self.transform is None:
            return 0.0 * lengths
        reach = self._spread * lengths + self._offset
        return 1.01 * (self.transform.d_in + 4) * (_UNIT * reach + _TINY)

    def _before_transform(self, apart: Array, lengths: Array) -> Array:
        """Return least distances of keys from least distances [B, k] of their images."""
        wrong = self._transform_error(lengths) + self._transform_error(self.longest)
        # Taking the centre off rounds each side once.
        shift = 2 * _UNIT * (lengths + self.longest) + _TINY
        least: Array = (apart - wrong[:, None]) / self._stretch - shift[:, None]
        return least

    def is_safe(self, lengths: Array) -> Array:
        """Tell of which queries FAISS's float32 overflows nowhere."""
        images, longest = self._image_lengths(lengths), self._image_lengths(self.longest)
        return np.asarray((images + longest) ** 2 * self._width < LARGEST_SQUARES)


class Cells:
    """The cells of an IVF index: how far a query is from keys in a cell that was not read.

    A key k is in the cell of the centroid c it is nearest to, to a rounding: |k - c|^2 is at most
    |k - c'|^2 + 2 w for every other c'. With |k - c|^2 - |k - c'|^2 linear in k, that makes

        |q - k| >= (|q - c|^2 - |q - c'|^2 - 2 w) / (2 |c - c'|)

    for every query q. c' is the centroid nearest to q.
    """

    def __init__(self, faiss: Any, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.count = quantizer.ntotal
        centroids = faiss.vector_to_array(quantizer.codes).view(np.float32)
        wide = torch.from_numpy(centroids.reshape(self.count, -1)).double()
        self.longest = float(wide.norm(dim=1).max())
        exactly = "donot_use_mm_for_euclid_dist"
        apart = torch.cdist(wide, wide, compute_mode=exactly) * (1 + 1e-9)
        self._apart = (apart.float() * (1 + 1e-6)).numpy()

    def least_distances(self, apart: Array, order: Array, nprobe: int, wrong: Array) -> Array:
        """Return what keys of the cells after the first `nprobe` are not nearer than, [B].

        apart, order: [B, cells], squared distances to the centroids in order, and which they are.
        wrong: [B], what FAISS's squared distances to centroids can be off, of query and of key.
        """
        wide = apart.astype(np.float64)
        gain = wide[:, nprobe:] - wide[:, :1] - 2 * wrong[:, None]
        between = self._apart[order[:, :1], order[:, nprobe:]].astype(np.float64)
        least = np.divide(gain, 2 * between, out=np.zeros_like(gain), where=between > 0)
        return np.asarray(np.maximum(least.min(axis=1), 0))


def norms(rows: Array) -> Array:
    """Return the lengths of rows [M, D] in float64, rounded up."""
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return np.asarray(np.sqrt(squares) * (1 + 1e-9))
