"""A FAISS index of one codebook's keys: built by name, filled, kept up to date, and bounded.

Its vectors are the keys less a centre, in float32, one for each key slot. Slots never change, so an
index only grows: what was removed or moved away is skipped by whoever asks, and once that is most
of it, or the codebook has grown fourfold, it is built anew. A version that needs a slot that is not
there adds it, whichever order versions come in.

FAISS indexes may not be searched while they change, so each has a lock.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grace_fast.codebook import Snapshot

Array = npt.NDArray[Any]

INT32 = 2**31 - 1
ADDED_ROWS = 1 << 16  # in one call
TRAINING_ROWS = 1 << 16  # at most, or 64 for each cell
SLACK_ROWS = 1024  # that may have been removed before anything is built anew
LARGEST_TABLE = 4096  # cells whose distances from each other are kept: 64 MiB
_UNIT = 2.0**-24
_TF32 = 2.0**-11  # what a GPU may round the factors of a product to
_TINY = 2.0**-120  # what underflow may take, with room
EXHAUSTIVE = ("IndexFlat", "IndexFlatL2", "IndexFlatL2Panorama")
CELLS = ("IndexIVFFlat", "IndexIVFFlatPanorama")
FAITHFUL = (*EXHAUSTIVE, *CELLS, "IndexHNSWFlat", "IndexHNSWFlatPanorama")
MISSING = "faiss is not installed (pip install 'grace_fast[faiss]')"


@dataclass(frozen=True)
class FaissIndex:
    """An index to look up with: `find(queries, codebook, backend=FaissIndex("IVF1024,Flat"))`.

    description: as `faiss.index_factory` reads it, over L2 distances.
    nprobe: cells that an IVF index reads; ef_search: what an HNSW index keeps on its way; FAISS's
    own defaults without.
    candidates: how many keys are asked of an index that may lose some; all are rechecked.
    """

    description: str = "Flat"
    nprobe: int | None = None
    ef_search: int | None = None
    candidates: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.description, str) or not self.description:
            raise ValueError(
                'description must be a string as "IVF1024,Flat", that faiss.index_factory reads, '
                f"got {self.description!r}"
            )
        for name in ("nprobe", "ef_search", "candidates"):
            number = getattr(self, name)
            optional = name != "candidates"
            if not (optional and number is None) and not (isinstance(number, int) and number > 0):
                raise ValueError(f"{name} must be a whole number >= 1, got {number!r}")

    def __str__(self) -> str:
        asked = {"nprobe": self.nprobe, "ef_search": self.ef_search}
        words = [f"{name}={number}" for name, number in asked.items() if number is not None]
        return " ".join([self.description, *words])


@cache
def library() -> Any:
    """Return the module `faiss`, None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its SWIG types
            import faiss
    except ImportError:
        return None
    return faiss


class Filled:
    """A trained index with the keys of one codebook in it."""

    def __init__(self, asked: FaissIndex) -> None:
        self.asked = asked
        self.lock = threading.RLock()
        self._index: Any = None
        self._resources: Any = None  # of a GPU, where the index is there
        self._set_to: FaissIndex | None = None  # whose parameters it has
        self._version = -1  # that it was built for
        self._trained_on = 0
        self._inside = np.zeros(0, bool)  # by slot
        self._slots = np.zeros(0, np.int64)  # by vector
        self._selected: tuple[Snapshot, Any, Any, int] | None = None
        self.count = 0
        self.is_exhaustive = False

    # What the rows of a version become.

    def follow(self, snapshot: Snapshot) -> None:
        """Take in the keys of a published version.

        Raises: ValueError with FAISS's own words for an index it does not know or cannot train.
        """
        live = len(snapshot)
        stale, grown = self.count - live > live + SLACK_ROWS, live > 4 * self._trained_on
        newer = snapshot.version > self._version
        used = used_slots(snapshot)
        if self._index is None or (newer and (stale or (grown and self._needs_training))):
            self._build(snapshot, used)
        slots = np.flatnonzero(used & ~self.holds(len(used)))
        for start in range(0, len(slots), ADDED_ROWS):
            self._add(snapshot, slots[start : start + ADDED_ROWS])

    def holds(self, slots: int) -> Array:
        """Tell of the first so many key slots which have a vector, [slots] bool."""
        inside = np.zeros(slots, bool)
        known = min(slots, len(self._inside))
        inside[:known] = self._inside[:known]
        return inside

    def slots_of(self, vectors: Array) -> Array:
        """Return the key slots of vectors by their numbers."""
        return np.asarray(self._slots[vectors])

    @property
    def nbytes(self) -> int:
        """The memory that the index takes, as long as it would be if it were written to a file."""
        faiss = library()
        if self._index is None:
            return 0
        index = self._index if self._resources is None else faiss.index_gpu_to_cpu(self._index)
        written = [0]

        def count(part: Any) -> None:
            written[0] += len(part)

        faiss.write_index(index, faiss.PyCallbackIOWriter(count))
        return written[0]

    def _build(self, snapshot: Snapshot, used: Array) -> None:
        faiss, asked = library(), self.asked
        try:
            index = faiss.index_factory(snapshot.key_dim, asked.description)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS does not know the index {asked.description!r}: {said(error)}"
            ) from None
        self._set_parameters(index)
        self._needs_training = not index.is_trained
        cells = faiss.try_extract_index_ivf(index)
        wanted = max(TRAINING_ROWS, 64 * cells.nlist) if cells is not None else TRAINING_ROWS
        slots = np.flatnonzero(used)
        slots = slots[:: max(1, len(slots) // wanted)]
        sample = _keys(snapshot, slots)
        self.centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        if cells is not None and len(sample) < cells.nlist:
            raise ValueError(
                f"the index {asked.description!r} is not trained: its {cells.nlist} cells need at "
                f"least as many keys, and the codebook has {len(sample)}"
            )
        if self._needs_training:
            try:
                index.train(sample - self.centre)
            except RuntimeError as error:
                raise ValueError(
                    f"the index {asked.description!r} is not trained: FAISS cannot train it on "
                    f"{len(sample)} keys: {said(error)}"
                ) from None
        self._inspect(index)
        place = placed_on(snapshot)
        if place.type == "cuda":
            self._resources = faiss.StandardGpuResources()
            try:
                index = faiss.index_cpu_to_gpu(self._resources, place.index or 0, index)
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot move the index {asked.description!r} to a GPU: {said(error)}"
                ) from None
        self._index, self._set_to = index, asked
        self._version, self._trained_on = snapshot.version, len(snapshot)
        self._inside, self._slots = np.zeros(0, bool), np.zeros(0, np.int64)
        self.count, self.longest = 0, 0.0
        self._selected = None

    def ask_as(self, asked: FaissIndex) -> None:
        """Search as `asked` says from now on, in the same index.

        Raises: ValueError with FAISS's own words for a parameter that the index does not have.
        """
        if self._index is None:
            self.asked = asked
        elif asked != self._set_to:
            self.asked, self._selected, self._set_to = asked, None, None
            self._set_parameters(self._index)
            self._set_to = asked

    def _set_parameters(self, index: Any) -> None:
        faiss, asked = library(), self.asked
        on_gpu = self._resources is not None
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        wanted = (("nprobe", asked.nprobe, 1), ("efSearch", asked.ef_search, 16))
        for name, number, default in wanted:
            try:
                space.set_index_parameter(index, name, default if number is None else number)
            except RuntimeError as error:
                if number is not None:
                    raise ValueError(
                        f"the index {asked.description!r} takes no {name}: {said(error)}"
                    ) from None

    def _add(self, snapshot: Snapshot, slots: Array) -> None:
        moved = _keys(snapshot, slots) - self.centre
        longest = max(self.longest, float(norms(moved).max()))
        try:
            self._index.add(moved)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS cannot add keys to the index {self.asked.description!r}: {said(error)}"
            ) from None
        if slots[-1] >= len(self._inside):
            inside = np.zeros(max(int(slots[-1]) + 1, 2 * len(self._inside)), bool)
            inside[: len(self._inside)] = self._inside
            self._inside = inside
        self._inside[slots] = True
        self._slots = np.concatenate([self._slots, slots])
        self.longest = longest
        self.count += len(slots)

    # What a search proves about the keys that it does not return.

    def _inspect(self, index: Any) -> None:
        """See what can be proved about an index that was just trained."""
        faiss = library()
        self._before: Any = None
        self.stretch, self._spread, self._offset = 1.0, 0.0, 0.0  # of the transform before it
        core = faiss.downcast_index(index)
        readable = True
        if isinstance(core, faiss.IndexPreTransform):
            first = faiss.downcast_VectorTransform(core.chain.at(0))
            readable = core.chain.size() == 1 and isinstance(first, faiss.LinearTransform)
            if readable:
                self._before, core = first, faiss.downcast_index(core.index)
                matrix = faiss.vector_to_array(first.A).reshape(first.d_out, first.d_in)
                matrix = matrix.astype(np.float64)
                self.stretch = float(np.linalg.norm(matrix, 2)) * (1 + 1e-9)
                self._spread = float(np.linalg.norm(matrix))
                if first.have_bias:
                    self._offset = float(np.linalg.norm(faiss.vector_to_array(first.b)))
        kind = type(core).__name__
        self._width = core.d
        self.is_faithful = readable and kind in FAITHFUL
        self.is_exhaustive = readable and kind in EXHAUSTIVE
        self._cells: _Cells | None = None
        if readable and kind in CELLS and core.nlist <= LARGEST_TABLE:
            quantizer = faiss.downcast_index(core.quantizer)
            if type(quantizer).__name__ in EXHAUSTIVE[:2]:
                self._cells = _Cells(quantizer)

    def band(self, lengths: Array, longest: float) -> Array:
        """Return how far FAISS's squared distances can be from those of its own vectors.

        It sums squared differences, or |q|^2 + |k|^2 - 2 q.k; Panorama stops where a bound made of
        such parts says so. Each is within twice the roundings of a dot product of (|q| + |k|)^2.
        """
        scale = (lengths + longest) ** 2
        roundings = 3.03 * (self._width + 16)
        band = roundings * (_UNIT * scale + _TINY * (1 + np.sqrt(scale)))
        return np.asarray(band + (8 * _TF32 * scale if self._resources is not None else 0.0))

    def least_distances(self, squared: Array, lengths: Array) -> Array:
        """Return what no distance from a key is below, [B, k]; `squared` is FAISS's, of queries.

        lengths: [B] of the queries less the centre.
        """
        images, longest = self._image_lengths(lengths), self._image_lengths(self.longest)
        apart = np.maximum(squared - self.band(images, longest)[:, None], 0)
        return self._before_transform(np.sqrt(apart), lengths)

    def _image_lengths(self, lengths: Any) -> Any:
        return self.stretch * lengths + self._offset + self._transform_error(lengths)

    def _transform_error(self, lengths: Any) -> Any:
        if self._before is None:
            return 0.0 * lengths
        reach = self._spread * lengths + self._offset
        return 1.01 * (self._before.d_in + 4) * (_UNIT * reach + _TINY)

    def _before_transform(self, apart: Array, lengths: Array) -> Array:
        """Return least distances of keys from least distances [B, k] of their images."""
        wrong = self._transform_error(lengths) + self._transform_error(self.longest)
        # Taking the centre off rounds each side once.
        shift = 2 * _UNIT * (lengths + self.longest) + _TINY
        least: Array = (apart - wrong[:, None]) / self.stretch - shift[:, None]
        return least

    def is_safe(self, lengths: Array) -> Array:
        """Tell of which queries FAISS's float32 overflows nowhere."""
        images, longest = self._image_lengths(lengths), self._image_lengths(self.longest)
        return np.asarray((images + longest) ** 2 * self._width < 1e37)

    # The search itself.

    def search(self, moved: Array, k: int, snapshot: Snapshot) -> tuple[Array, Array, Array]:
        """Return squared distances [B, k], vectors [B, k] (-1: none) and what is not below [B].

        moved: [B, D] float32, queries less the centre. The last says which distance no key is
        within that was not returned: 0 where nothing is proved.
        """
        lengths = norms(moved)
        k = min(k, self.count)
        parts = []
        step = max(1, INT32 // max(k, moved.shape[1], self._cells.count if self._cells else 1))
        for start in range(0, len(moved), step):
            here = slice(start, start + step)
            parts.append(self._search(moved[here], lengths[here], k, snapshot))
        squared, vectors, unseen = (np.concatenate(column) for column in zip(*parts, strict=True))
        return squared, vectors, unseen

    def _search(
        self, moved: Array, lengths: Array, k: int, snapshot: Snapshot
    ) -> tuple[Array, Array, Array]:
        faiss = library()
        faiss.omp_set_num_threads(torch.get_num_threads())
        selected = None if self.is_exhaustive else self._selection(snapshot)
        elsewhere = np.full(len(moved), math.inf)  # what is not below of keys in other cells
        if self._cells is not None and self._resources is None:
            images = moved if self._before is None else self._before.apply(moved)
            squared, vectors, elsewhere = self._search_cells(images, lengths, k, selected)
        else:
            squared, vectors = self._index.search(moved, k, params=selected)
        if not (self.is_exhaustive or (self._cells is not None and self._resources is None)):
            return squared, vectors, np.zeros(len(moved))
        last = self.least_distances(squared[:, -1:].astype(np.float64), lengths)[:, 0]
        everything = (vectors[:, -1] < 0) | (k >= self.count)
        unseen = np.minimum(np.where(everything, math.inf, last), elsewhere)
        return squared, vectors, unseen

    def _search_cells(
        self, images: Array, lengths: Array, k: int, selected: Any
    ) -> tuple[Array, Array, Array]:
        faiss, cells = library(), self._cells
        assert cells is not None
        ivf = faiss.extract_index_ivf(self._index)
        nprobe = min(ivf.nprobe, cells.count)
        apart, order = cells.quantizer.search(images, cells.count)
        batch = len(images)
        squared = np.empty((batch, k), np.float32)
        vectors = np.empty((batch, k), np.int64)
        near, near_apart = order[:, :nprobe].copy(), apart[:, :nprobe].copy()
        addresses = [faiss.swig_ptr(array) for array in (near, near_apart, squared, vectors)]
        ivf.search_preassigned_c(batch, faiss.swig_ptr(images), k, *addresses, False, selected)
        if nprobe == cells.count:
            return squared, vectors, np.full(batch, math.inf)
        longest = self._image_lengths(self.longest)
        wrong = self.band(self._image_lengths(lengths), cells.longest)
        wrong += self.band(np.asarray(longest), cells.longest)
        least = cells.least_distances(apart, order, nprobe, wrong)
        return squared, vectors, self._before_transform(least[:, None], lengths)[:, 0]

    def _selection(self, snapshot: Snapshot) -> Any:
        """Return parameters that leave out vectors which a version does not use, None if none."""
        if self.count == len(snapshot) and snapshot.counts.keys == snapshot.rows == self.count:
            return None
        known = self._selected
        if known is not None and known[0] is snapshot and known[3] == self.count:
            return known[1]
        faiss = library()
        used = used_slots(snapshot)
        inside = self._slots < len(used)
        inside[inside] = used[self._slots[inside]]
        bits = np.packbits(inside, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        parameters = self._parameters(self._index, selector)
        self._selected = (snapshot, parameters, (selector, bits), self.count)
        return parameters

    def _parameters(self, index: Any, selector: Any) -> Any:
        """Return a selector as a kind of index takes it; None where it takes none."""
        faiss = library()
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform) and self._cells is None:
            inner = self._parameters(index.index, selector)
            return inner and faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexPreTransform):
            return self._parameters(index.index, selector)
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nprobe, index.nlist))
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
        return None


class _Cells:
    """The cells of an IVF index: how far a query is from keys in a cell that was not read.

    A key k is in the cell of the centroid c it is nearest to, to a rounding: |k - c|^2 is at most
    |k - c'|^2 + 2 w for every other c'. With |k - c|^2 - |k - c'|^2 linear in k, that makes

        |q - k| >= (|q - c|^2 - |q - c'|^2 - 2 w) / (2 |c - c'|)

    for every query q. c' is the centroid nearest to q.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self.count = quantizer.ntotal
        centroids = library().vector_to_array(quantizer.codes).view(np.float32)
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


def placed_on(snapshot: Snapshot) -> torch.device:
    """Return where an index of a version belongs: beside its keys."""
    return snapshot.device


def used_slots(snapshot: Snapshot) -> Array:
    """Tell which key slots a live row has, [slots] bool."""
    live = np.asarray(snapshot.live.cpu())
    if not snapshot.counts.key_moves:
        return live
    used = np.zeros(snapshot.counts.keys, bool)
    used[snapshot.key_slot.numpy()[live]] = True
    return used


def norms(rows: Array) -> Array:
    """Return the lengths of rows [M, D] in float64, rounded up."""
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return np.asarray(np.sqrt(squares) * (1 + 1e-9))


def _keys(snapshot: Snapshot, slots: Array) -> Array:
    picked = torch.from_numpy(slots).to(snapshot.device)
    return np.asarray(snapshot.key_slots[picked].float().cpu())


def said(error: BaseException) -> str:
    """Return what FAISS says in an error, without where in its source it says so."""
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error).strip(), flags=re.DOTALL)
