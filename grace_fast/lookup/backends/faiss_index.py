"""A FAISS index of one codebook's keys: built by name, filled, kept up to date, searched.

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
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from grace_fast.codebook import forks, scalars
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.lookup.backends.faiss_bounds import LARGEST_SQUARES, Array, Bounds, norms

INT32 = 2**31 - 1
ADDED_ROWS = 1 << 16  # in one call
TRAINING_ROWS = 1 << 16  # at most, or 64 for each cell
SLACK_ROWS = 1024  # that may have been removed before anything is built anew
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
            number = scalars.plain(getattr(self, name))
            object.__setattr__(self, name, number)
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
        forks.guard(self, "lock", forks.Order.INDEX, Filled._begin_anew_in_child)
        self._index: Any = None
        self._resources: Any = None  # of a GPU, where the index is there
        self._set_to: FaissIndex | None = None  # whose parameters it has
        self._version = -1  # that it was built for
        self._trained_on = 0
        self._inside = np.zeros(0, bool)  # by slot
        self._slots = np.zeros(0, np.int64)  # by vector
        self._selected: tuple[Snapshot, Any, Any, int] | None = None
        self.count = 0
        self.centre: Array
        self.bounds: Bounds

    def _begin_anew_in_child(self, whole: bool) -> None:
        """Give up in a forked child what a thread was changing that it has not."""
        if not whole:
            self._index = self._resources = self._set_to = self._selected = None

    # What the rows of a version become.

    def follow(self, snapshot: Snapshot) -> None:
        """Take in the keys of a published version.

        Raises: ValueError with FAISS's own words for an index it does not know or cannot train.
        """
        live = len(snapshot)
        stale, grown = self.count - live > live + SLACK_ROWS, live > 4 * self._trained_on
        newer = snapshot.version > self._version
        used = used_slots(snapshot)
        if self._index is None:
            self._build(snapshot, used)
        elif newer and (stale or (grown and self._needs_training)):
            with suppress(ValueError):  # of too few keys that are left: the old one still serves
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
        centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        if cells is not None and len(sample) < cells.nlist:
            raise ValueError(
                f"the index {asked.description!r} is not trained: its {cells.nlist} cells need at "
                f"least as many keys, and the codebook has {len(sample)}"
            )
        if self._needs_training:
            moved = _less(sample, centre)
            squares = float(norms(moved).max()) ** 2 * 4 * snapshot.key_dim
            # FAISS ends the process where a squared distance overflows as it looks for centroids.
            if _has_centroids(faiss, index) and not squares < LARGEST_SQUARES:
                raise ValueError(
                    f"the index {asked.description!r} is not trained: squared distances of the "
                    "codebook's keys overflow float32; use the index 'Flat', or none"
                )
            try:
                index.train(moved)
            except RuntimeError as error:
                raise ValueError(
                    f"the index {asked.description!r} is not trained: FAISS cannot train it on "
                    f"{len(sample)} keys: {said(error)}"
                ) from None
        place = placed_on(snapshot)
        bounds = Bounds(faiss, index, place.type == "cuda")
        if place.type == "cuda":
            self._resources = faiss.StandardGpuResources()
            try:
                index = faiss.index_cpu_to_gpu(self._resources, place.index or 0, index)
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot move the index {asked.description!r} to a GPU: {said(error)}"
                ) from None
        self._index, self._set_to = index, asked
        self.centre, self.bounds = centre, bounds
        self._version, self._trained_on = snapshot.version, len(snapshot)
        self._inside, self._slots = np.zeros(0, bool), np.zeros(0, np.int64)
        self.count = 0
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
        moved = _less(_keys(snapshot, slots), self.centre)
        longest = max(self.bounds.longest, float(norms(moved).max()))
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
        self.bounds.longest = longest
        self.count += len(slots)

    # The search itself.

    def search(self, moved: Array, k: int, snapshot: Snapshot) -> tuple[Array, Array, Array]:
        """Return squared distances [B, k], vectors [B, k] (-1: none) and what is not below [B].

        moved: [B, D] float32, queries less the centre. The last says which distance no key is
        within that was not returned: 0 where nothing is proved.
        """
        lengths, cells = norms(moved), self.bounds.cells
        k = min(k, self.count)
        parts = []
        step = max(1, INT32 // max(k, moved.shape[1], cells.count if cells else 1))
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
        bounds = self.bounds
        selected = None if bounds.is_exhaustive else self._selection(snapshot)
        elsewhere = np.full(len(moved), math.inf)  # what is not below of keys in other cells
        if bounds.cells is not None:
            images = moved if bounds.transform is None else bounds.transform.apply(moved)
            squared, vectors, elsewhere = self._search_cells(images, lengths, k, selected)
        else:
            squared, vectors = self._index.search(moved, k, params=selected)
        if not bounds.proves:
            return squared, vectors, np.zeros(len(moved))
        last = bounds.least_distances(squared[:, -1:].astype(np.float64), lengths)[:, 0]
        everything = (vectors[:, -1] < 0) | (k >= self.count)
        return squared, vectors, np.minimum(np.where(everything, math.inf, last), elsewhere)

    def _search_cells(
        self, images: Array, lengths: Array, k: int, selected: Any
    ) -> tuple[Array, Array, Array]:
        """Search the nearest cells, as FAISS does, and say what is not below in the others."""
        faiss, cells = library(), self.bounds.cells
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
        return squared, vectors, self.bounds.in_other_cells(apart, order, nprobe, lengths)

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
        if isinstance(index, faiss.IndexPreTransform) and self.bounds.cells is None:
            inner = self._parameters(index.index, selector)
            return inner and faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexPreTransform):
            return self._parameters(index.index, selector)
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(sel=selector, nprobe=min(index.nprobe, index.nlist))
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
        return None


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


def _keys(snapshot: Snapshot, slots: Array) -> Array:
    if snapshot.key_file is not None:
        snapshot.key_file.test_slots(torch.from_numpy(slots))
    picked = torch.from_numpy(slots).to(snapshot.device)
    return np.asarray(snapshot.key_slots[picked].float().cpu())


def _has_centroids(faiss: Any, index: Any) -> bool:
    """Tell whether more of an untrained index is trained than a linear map before it."""
    core = faiss.downcast_index(index)
    if isinstance(core, faiss.IndexPreTransform):
        core = faiss.downcast_index(core.index)
    return not core.is_trained


def _less(keys: Array, centre: Array) -> Array:
    """Return keys less a centre; infinite where float32 cannot hold that, which `is_safe` sees."""
    with np.errstate(over="ignore"):
        return np.asarray(keys - centre)


def said(error: BaseException) -> str:
    """Return what FAISS says in an error, without where in its source it says so."""
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error).strip(), flags=re.DOTALL)
