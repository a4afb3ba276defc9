"""Other ways to ask the same question, each set up so that it does not lose by our hand.

A peer is built once (resident, norms precomputed) and then called with one batch. Its call ends
with the decision: nearest key, that key's own radius, row. `faiss flat, search only` answers less
and is the baseline of every ratio. Whoever decides wrongly is timed all the same and shown with its
count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from benchmarks.workloads import Problem

Decision = tuple[np.ndarray, np.ndarray]  # hit [B] bool, row [B] int64 (-1 where missed)


@dataclass
class Contestant:
    """A built peer: `call` is timed, on what `take` makes of a batch; `decision` reads it."""

    call: Callable[[Any], Any]
    decision: Callable[[Any], Decision]
    take: Callable[[Tensor], Any] = lambda batch: batch


@dataclass(frozen=True)
class Peer:
    """A way to answer; `build` does everything that is not a look-up."""

    name: str
    build: Callable[[Problem], Contestant]
    module: str | None = None  # what has to be installed
    kind: str = "peer"  # "ours", "baseline" or "peer"
    slow: bool = False  # to build or to ask: only with --full
    largest: int | None = None  # N above which nobody would ask it

    def absent(self) -> str | None:
        """Return why it cannot run here, or None."""
        if self.module is not None and find_spec(self.module) is None:
            return f"{self.module} is not installed (pip install 'grace_fast[bench]')"
        if self.name == "grace_fast prepared" and not hasattr(gf, "prepare"):
            return "this version has no prepared call"
        return None


def _read_match(match: gf.Match) -> Decision:
    return match.hit.numpy(), match.row.numpy()


def _find(problem: Problem) -> Contestant:
    book = problem.book
    settle(book)

    def call(batch: Tensor) -> gf.Match:
        match = gf.find(batch, book)
        _ = match.hit  # a lazy answer is made inside the timing
        return match

    return Contestant(call, _read_match)


def _prepared(problem: Problem) -> Contestant:
    return Contestant(gf.prepare(problem.book), _read_match)


def settle(book: gf.Codebook) -> None:
    """Wait for what look-ups compute beside themselves, so that it is not timed."""
    if hasattr(gf, "prepare"):
        gf.prepare(book)


def _numpy(batch: Tensor) -> np.ndarray:
    return batch.float().numpy()


def _wide_keys(problem: Problem) -> np.ndarray:
    return problem.keys.float().numpy()  # a view of the codebook where it is float32


def _squared_radii(problem: Problem) -> np.ndarray:
    """Return radius^2 in float32, -1 for a dead key."""
    radii = problem.radii.numpy()
    return np.where(radii >= 0, radii * radii, np.float32(-1))


def _in_own_ball(squared: np.ndarray, row: np.ndarray, limits: np.ndarray) -> Decision:
    hit = squared <= limits[row]
    return hit, np.where(hit, row, -1)


def _same(answer: Decision) -> Decision:
    return answer


def _faiss_flat(problem: Problem, decides: bool) -> Contestant:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(problem.book.key_dim)
    keys = _wide_keys(problem)
    for start in range(0, len(keys), 1 << 16):
        index.add(keys[start : start + (1 << 16)])
    return _faiss_search(index, problem, decides)


def _faiss_search(index: Any, problem: Problem, decides: bool = True) -> Contestant:
    limits = _squared_radii(problem)
    largest = len(problem.queries)
    squared = np.empty((largest, 1), np.float32)
    rows = np.empty((largest, 1), np.int64)

    def search(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(batch)
        return index.search(batch, 1, D=squared[:count], I=rows[:count])

    def decide(answer: tuple[np.ndarray, np.ndarray]) -> Decision:
        return _in_own_ball(answer[0][:, 0], answer[1][:, 0], limits)

    if decides:
        return Contestant(lambda batch: decide(search(batch)), _same, _numpy)
    return Contestant(search, decide, _numpy)


def _faiss_range(problem: Problem) -> Contestant:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(problem.book.key_dim)
    keys = _wide_keys(problem)
    for start in range(0, len(keys), 1 << 16):
        index.add(keys[start : start + (1 << 16)])
    limits = _squared_radii(problem)
    # Its test is strict, ours inclusive: ask for one float32 more.
    widest = float(np.nextafter(limits.max(), np.float32(np.inf)))

    def call(batch: np.ndarray) -> Decision:
        starts, squared, rows = index.range_search(batch, widest)
        hit = np.zeros(len(batch), bool)
        row = np.full(len(batch), -1)
        for at in np.flatnonzero(np.diff(starts)):
            some = slice(int(starts[at]), int(starts[at + 1]))
            best = np.lexsort((rows[some], squared[some]))[0]
            nearest = rows[some][best]
            if squared[some][best] <= limits[nearest]:
                hit[at], row[at] = True, nearest
        return hit, row

    return Contestant(call, _same, _numpy)


def _panorama(problem: Problem) -> Contestant:
    """Take the fastest of three forms here: without a rotation, and with PCA in 8 or 32 levels."""
    import faiss

    from benchmarks.timing import median_us

    faiss.omp_set_num_threads(torch.get_num_threads())
    keys, width = _wide_keys(problem), problem.book.key_dim
    best: tuple[float, Any] | None = None
    probe = _numpy(problem.queries[:1])
    forms = ["FlatL2Panorama8"]
    if len(keys) > width:  # a PCA of fewer keys than dimensions cannot be trained
        forms += [f"PCA{width},FlatL2Panorama8", f"PCA{width},FlatL2Panorama32"]
    for form in forms:
        index = faiss.index_factory(width, form)
        index.train(keys[: 1 << 15])
        for start in range(0, len(keys), 1 << 16):
            index.add(keys[start : start + (1 << 16)])
        took = median_us(lambda index=index: index.search(probe, 1), calls=5)
        if best is None or took < best[0]:
            best = (took, index)
    assert best is not None
    return _faiss_search(best[1], problem)


def _usearch(problem: Problem) -> Contestant:
    from usearch.index import MetricKind, search

    keys, limits = _wide_keys(problem), _squared_radii(problem)
    threads = torch.get_num_threads()

    def call(batch: np.ndarray) -> Decision:
        found = search(keys, batch, 1, MetricKind.L2sq, exact=True, threads=threads)
        squared, row = np.ravel(found.distances), np.ravel(found.keys).astype(np.int64)
        return _in_own_ball(squared, row, limits)

    return Contestant(call, _same, _numpy)


def _scikit(problem: Problem, algorithm: str) -> Contestant:
    from sklearn import set_config
    from sklearn.neighbors import NearestNeighbors

    set_config(assume_finite=True, skip_parameter_validation=True)
    index = NearestNeighbors(n_neighbors=1, algorithm=algorithm).fit(_wide_keys(problem))
    limits = _squared_radii(problem)

    def call(batch: np.ndarray) -> Decision:
        distance, row = index.kneighbors(batch)
        return _in_own_ball(distance[:, 0] ** 2, row[:, 0], limits)

    return Contestant(call, _same, _numpy)


def _snn(problem: Problem) -> Contestant:
    from snnpy import build_snn_model

    model = build_snn_model(_wide_keys(problem), verbose=0)
    limits = _squared_radii(problem)
    widest = float(np.sqrt(limits.max()))

    def ask(query: np.ndarray) -> tuple[bool, int]:
        rows, distance = model.query_radius(query, widest, return_distance=True)
        if not len(rows):
            return False, -1
        best = np.lexsort((rows, distance))[0]
        row = int(rows[best])
        hit = bool(distance[best] ** 2 <= limits[row])
        return hit, row if hit else -1

    def call(batch: np.ndarray) -> Decision:
        answers = [ask(query) for query in batch]
        return np.array([hit for hit, _ in answers]), np.array([row for _, row in answers])

    return Contestant(call, _same, _numpy)


def _hnsw(problem: Problem) -> Contestant:
    import hnswlib

    keys = _wide_keys(problem)
    index = hnswlib.Index(space="l2", dim=keys.shape[1])
    index.init_index(max_elements=len(keys), M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(keys)
    index.set_ef(64)
    limits = _squared_radii(problem)

    def call(batch: np.ndarray) -> Decision:
        row, squared = index.knn_query(batch, k=1)
        return _in_own_ball(squared[:, 0], row[:, 0].astype(np.int64), limits)

    return Contestant(call, _same, _numpy)


def _read_tensors(answer: tuple[Tensor, Tensor]) -> Decision:
    return answer[0].numpy(), answer[1].numpy()


def _cdist(problem: Problem, compiled: bool) -> Contestant:
    """The reference's rule: distances to all keys, the least, its own radius."""
    keys, radii = problem.keys.float(), problem.radii

    def rule(batch: Tensor) -> tuple[Tensor, Tensor]:
        distance, row = torch.cdist(keys, batch.float()).min(dim=0)
        hit = distance <= radii[row]
        return hit, row.masked_fill(~hit, -1)

    call = torch.compile(rule, dynamic=False) if compiled else rule
    return Contestant(torch.inference_mode()(call), _read_tensors)


def _addmm(problem: Problem) -> Contestant:
    """|k|^2 - 2 q.k with the norms kept, the least, its own radius."""
    keys, radii = problem.keys.float(), problem.radii
    squares = torch.cat([part.double().square().sum(dim=1) for part in keys.split(1 << 14)]).float()
    limits = torch.where(radii >= 0, radii * radii, -1)

    def call(batch: Tensor) -> tuple[Tensor, Tensor]:
        batch = batch.float()
        least, row = torch.addmm(squares, batch, keys.T, alpha=-2).min(dim=1)
        hit = least + batch.square().sum(dim=1) <= limits[row]
        return hit, row.masked_fill(~hit, -1)

    return Contestant(torch.inference_mode()(call), _read_tensors)


PREPARED = Peer("grace_fast prepared", _prepared, kind="ours")
FIND = Peer("grace_fast find", _find, kind="ours")
BASELINE = Peer(
    "faiss flat, search only", lambda problem: _faiss_flat(problem, False), "faiss", "baseline"
)
ADDMM = Peer("torch addmm, cached norms", _addmm)
FAISS_FLAT = Peer("faiss flat", lambda problem: _faiss_flat(problem, True), "faiss")
PEERS = (
    FAISS_FLAT,
    Peer("faiss flat, range_search", _faiss_range, "faiss"),
    Peer("faiss Panorama", _panorama, "faiss"),
    Peer("usearch exact", _usearch, "usearch"),
    Peer("scikit-learn brute", lambda problem: _scikit(problem, "brute"), "sklearn"),
    Peer(
        "scikit-learn ball_tree",
        lambda problem: _scikit(problem, "ball_tree"),
        "sklearn",
        slow=True,
        largest=100_000,
    ),
    Peer("snnpy", _snn, "snnpy", largest=100_000),
    Peer("hnswlib M=16 ef=64", _hnsw, "hnswlib", slow=True, largest=100_000),
    Peer("torch cdist (reference rule)", lambda problem: _cdist(problem, False)),
    Peer("torch cdist, compiled", lambda problem: _cdist(problem, True), slow=True),
    ADDMM,
)
DENSE = (ADDMM,)


def with_write(contestant: Contestant, problem: Problem, output: Tensor) -> Contestant:
    """Return the contestant ending with the masked write: a hit's value before the query token."""
    values = problem.book.values

    def call(batch: Any) -> tuple[Decision, Tensor]:
        hit, row = contestant.decision(contestant.call(batch))
        if not hit.any():
            return (hit, row), output
        written = output.clone()
        at = np.flatnonzero(hit)
        written[at, :-1] = values[row[at]][:, None, :]
        return (hit, row), written

    return Contestant(call, lambda answer: answer[0], contestant.take)


def replacing(problem: Problem, output: Tensor) -> Contestant:
    """Return `gf.replace` on an output [B, T, V]; its decision is read from what it wrote."""
    settle(problem.book)
    values = problem.book.values

    def call(batch: Tensor) -> Tensor:
        return gf.replace(output[: len(batch)], batch, problem.book)

    def decision(written: Tensor) -> Decision:
        if not torch.equal(written[:, -1], output[: len(written), -1]):
            raise AssertionError("the query token itself was written to")
        hit = (written != output[: len(written)]).any(dim=(1, 2))
        row = torch.full((len(written),), -1)
        for at in hit.nonzero()[:, 0].tolist():
            same = (values == written[at, 0]).all(dim=1).nonzero()[:, 0]
            if len(same) and (written[at, :-1] == written[at, 0]).all():
                row[at] = same[0]
        return hit.numpy(), row.numpy()

    return Contestant(call, decision)
