"""Every way to ask a codebook; each answer is compared with the law's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import grace_fast as gf
from grace_fast.lookup.backends import faiss_index
from grace_fast.lookup.faiss import FaissIndex
from life.law import Answers, Array

if TYPE_CHECKING:
    from life.living import Life

Way = Callable[["Life", torch.Tensor, Answers], None]
WAYS: dict[str, Way] = {}
OFTEN: dict[str, float] = {}  # in which part of the rounds a way is taken


def way(name: str, often: float) -> Callable[[Way], Way]:
    """Let a function be a way to ask, taken in a part of all rounds."""

    def keep(function: Way) -> Way:
        WAYS[name], OFTEN[name] = function, often
        return function

    return keep


def fields(match: Any) -> tuple[Array, Array, Array]:
    """Return row, S and hit of a match."""
    return match.row.numpy(), match.squared_distance.numpy(), match.hit.numpy()


def wrong_finds(told: Answers, row: Array, squared: Array, hit: Array) -> Array:
    """Tell which answers [B] are not the law's, S by its bits."""
    other = (hit != told.hit) | (row != told.row)
    return np.asarray(other | (squared.view(np.int64) != told.squared.view(np.int64)))


def wrong_nearest(told: Answers, within: float, near: Any) -> Array:
    """Tell which rows and S [B] of `nearest` are not the law's."""
    row, squared = told.within(within)
    other = near.row.numpy() != row
    return np.asarray(
        other | (near.squared_distance.numpy().view(np.int64) != squared.view(np.int64))
    )


@way("find", 0.9)
def _find(life: Life, queries: torch.Tensor, told: Answers) -> None:
    life.check("find", queries, told, wrong_finds(told, *fields(gf.find(queries, life.book))))


@way("find one", 0.5)
def _find_one(life: Life, queries: torch.Tensor, told: Answers) -> None:
    for at in range(min(4, len(queries))):
        one, here = queries[at : at + 1], told.some(slice(at, at + 1))
        life.check("find one", one, here, wrong_finds(here, *fields(gf.find(one, life.book))))


@way("find, strided", 0.1)
def _find_strided(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """Rows that do not follow each other, and elements that do not."""
    wide = torch.cat([queries, queries], dim=1)[:, : queries.shape[1]]
    for asked in (wide, queries.T.contiguous().T):
        found = gf.find(asked, life.book)
        life.check("find, strided", queries, told, wrong_finds(told, *fields(found)))


@way("prepared before", 0.6)
def _prepared_before(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """A call that was prepared before the edits."""
    if life.prepared is None:
        life.prepared = gf.prepare(life.book, build_index=False)
    found = life.prepared(queries)
    life.check("prepared before", queries, told, wrong_finds(told, *fields(found)))


@way("prepared now", 0.25)
def _prepared_now(life: Life, queries: torch.Tensor, told: Answers) -> None:
    prepared = gf.prepare(life.book, build_index=bool(life.rng.random() < 0.1))
    life.check("prepared now", queries, told, wrong_finds(told, *fields(prepared(queries))))
    if life.rng.random() < 0.3:
        life.prepared = prepared


@way("compiled op", 0.12)
def _compiled_op(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """What a compiled graph calls: the codebook by its number."""
    if life.prepared is None:
        life.prepared = gf.prepare(life.book, build_index=False)
    hit, row, squared = torch.ops.grace_fast.find(queries, life.prepared._handle)
    found = (row.numpy(), squared.numpy(), hit.numpy())
    life.check("compiled op", queries, told, wrong_finds(told, *found))


@way("nearest", 0.35)
def _nearest(life: Life, queries: torch.Tensor, told: Answers) -> None:
    near = gf.nearest(queries, life.book)
    life.check("nearest", queries, told, wrong_nearest(told, np.inf, near))


def some_distance(life: Life, told: Answers) -> float:
    """Return a distance to ask within: often exactly that of a question, or next to it."""
    known = told.apart[np.isfinite(told.apart)]
    with np.errstate(over="ignore"):
        picked = float(np.sqrt(life.rng.choice(known))) if len(known) else 1.0
        widest = float(life.model.radius[: life.model.rows].max(initial=0)) * (1 + 1e-6)
        chosen = [picked, np.nextafter(picked, 0), np.nextafter(picked, np.inf), 3 * picked, widest]
    return float(min(life.rng.choice(chosen), 1e150))


@way("nearest within", 0.4)
def _within(life: Life, queries: torch.Tensor, told: Answers) -> None:
    within = some_distance(life, told)
    near = gf.nearest(queries, life.book, within=within)
    life.check("nearest within", queries, told, wrong_nearest(told, within, near))


@way("replace", 0.25)
def _replace(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """The values that are written, in a new tensor and in place."""
    batch, width = len(queries), life.model.values.shape[1]
    output = torch.full((batch, 3, width), 7.5, dtype=life.dtype)
    mode = life.rng.choice(["replace_all", "replace_last", "replace_prompt"])
    positions = torch.from_numpy(life.rng.integers(0, 3, batch))
    wanted = output.clone()
    for at in np.flatnonzero(told.hit):
        here = {
            "replace_all": slice(0, 3),
            "replace_last": slice(int(positions[at]), int(positions[at]) + 1),
            "replace_prompt": slice(0, int(positions[at])),
        }[str(mode)]
        wanted[at, here] = torch.from_numpy(life.model.values[told.nearest[at]]).to(life.dtype)
    found = gf.replace(output, queries, life.book, positions, str(mode))
    other = (found != wanted).flatten(1).any(dim=1).numpy()
    life.check("replace", queries, told, other)
    if life.prepared is not None:
        written = life.prepared.replace_(output.clone(), queries, positions, str(mode))
        other = (written != wanted).flatten(1).any(dim=1).numpy()
        life.check("replace", queries, told, other)


@way("old version", 0.35)
def _old_version(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """A version that was kept while the codebook went on."""
    if life.kept:
        _, snapshot, model = life.kept[int(life.rng.integers(len(life.kept)))]
        life.ask_version("old version", snapshot, model, queries)


@way("reference", 0.03)
def _reference(life: Life, queries: torch.Tensor, told: Answers) -> None:
    queries, told = queries[:12], told.some(slice(0, 12))
    found = gf.find(queries, life.book, backend="reference")
    life.check("reference", queries, told, wrong_finds(told, *fields(found)))


@way("faiss", 0.1)
def _faiss(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """FAISS's own indexes; what they mark as certified has to be right."""
    few = slice(0, 12)  # it reads every key where its own float32 proves nothing
    queries, told = queries[few], told.some(few)
    if faiss_index.library() is None:
        return
    cells = life.model.rows >= 200 and life.rng.random() < 0.5
    index = FaissIndex("IVF4,Flat", nprobe=2) if cells else "faiss"
    try:
        match = gf.find(queries, life.book, backend=index)
    except ValueError as error:
        if "train" not in str(error):  # of too few keys, or of keys that float32 cannot hold
            raise
        return
    sure = match.certified.numpy()
    if not cells:
        assert sure.all(), "a flat index proves every answer"
    found = wrong_finds(told, *fields(match))
    life.check("faiss", queries[torch.from_numpy(sure)], told.some(sure), found[sure])
    within = some_distance(life, told)
    near = gf.nearest(queries, life.book, backend=index, within=within)
    sure = near.certified.numpy()
    found = wrong_nearest(told, within, near)
    life.check("faiss", queries[torch.from_numpy(sure)], told.some(sure), found[sure])


def ask_snapshot(
    life: Life, name: str, snapshot: Any, queries: torch.Tensor, told: Answers
) -> None:
    """Ask a version that need not be the newest, or published."""
    life.check(name, queries, told, wrong_finds(told, *fields(gf.find(queries, snapshot))))
    if life.rng.random() < 0.5:
        within = some_distance(life, told)
        near = gf.nearest(queries, snapshot, within=within)
        life.check(f"{name}, within", queries, told, wrong_nearest(told, within, near))
    if life.rng.random() < 0.15:
        near = gf.nearest(queries, snapshot)
        life.check(f"{name}, nearest", queries, told, wrong_nearest(told, np.inf, near))
