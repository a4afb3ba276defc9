"""Everything that changes what a look-up may remember, done to a codebook and to its model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import grace_fast as gf
from grace_fast.codebook.diff import back
from life.law import Array, Model

if TYPE_CHECKING:
    from life.living import Life

Change = tuple[Any, ...]
Operation = Callable[["Life"], None]
OPERATIONS: dict[str, Operation] = {}
# What a look-up may remember changes by these alone; a test takes one with appends beside it.
FAMILIES = {
    "append": (
        "append",
        "append wider",
        "append and narrow",
        "append far",
        "append many",
        "append twins",
        "double",
    ),
    "remove": ("remove", "remove nearest", "empty", "begin again"),
    "radius": (
        "append and narrow",
        "widen again",
        "widen",
        "narrow",
        "radius on a question",
        "kill",
        "over a neighbour",
    ),
    "key": ("move", "move back", "swap", "append apart", "beside a neighbour"),
    "value": ("value",),
    "draft": ("one draft", "dropped", "sketch"),
    "back": ("take back", "go back"),
    "old": (
        "behind an old end",
        "behind an old end",
        "look back",
        "unseen between",
        "take back",
        "append",
    ),
    "disk": ("save and open", "save"),
}


class _Dropped(Exception):
    """A draft is left without being published."""


def operation(name: str) -> Callable[[Operation], Operation]:
    """Let a function be an operation of this name."""

    def keep(function: Operation) -> Operation:
        OPERATIONS[name] = function
        return function

    return keep


# How changes are made


def to_model(model: Model, change: Change) -> None:
    """Make one change of a model."""
    kind, *given = change
    if kind == "append":
        model.append(*given)
        return
    row = given[0]
    if kind == "remove":
        model.live[row] = 0
    elif kind == "radius":
        model.radius[row] = given[1]
    elif kind == "key":
        model.columns[:, row] = given[1]
    elif kind == "value":
        model.values[row] = given[1]


def to_draft(draft: Any, change: Change, dtype: torch.dtype) -> None:
    """Make one change of a draft, of a codebook or of shards."""
    kind, *given = change
    if kind == "append":
        keys, values, radii = (torch.from_numpy(np.asarray(each)) for each in given)
        draft.append(keys.to(dtype), values.to(dtype), radii, None)
        return
    row = int(given[0])
    if kind == "remove":
        draft.remove(row)
    elif kind == "radius":
        draft.set_radius(row, float(given[1]))
    elif kind == "key":
        draft.set_key(row, torch.from_numpy(given[1]).to(dtype))
    elif kind == "value":
        draft.set_value(row, torch.from_numpy(given[1]).to(dtype))


def to_book(book: gf.Codebook, change: Change) -> None:
    """Make one change by the codebook's own methods, where it has one for it."""
    kind, *given = change
    if kind == "append":
        keys, values, radii = (torch.from_numpy(np.asarray(each)) for each in given)
        book.append(keys.to(book.dtype), values.to(book.dtype), radii)
    elif kind == "remove":
        book.remove(int(book.ids[int(given[0])]))
    else:
        with book.writing() as draft:
            to_draft(draft, change, book.dtype)


def places_of(life: Life, changes: list[Change]) -> list[Array]:
    """Return points where changes are about to be seen: what is there now, and what will be."""
    model, places = life.model, []
    for kind, *given in changes:
        if kind == "append":
            keys, _, radii = given
            picked = life.rng.permutation(len(keys))[:6]
            places += [keys[picked], life.drawing.on_spheres(keys[picked], radii[picked])]
            continue
        key = model.key(given[0])[None] if given[0] < model.rows else None
        if key is None:
            continue
        radius = model.radius[given[0]][None]
        places += [key, life.drawing.on_spheres(key, radius)]
        if kind == "radius":
            places.append(life.drawing.on_spheres(key, np.asarray([given[1]], np.float32)))
        elif kind == "key":
            moved = given[1][None]
            places += [moved, life.drawing.on_spheres(moved, radius)]
    return places


# Drawn changes


def some_rows(life: Life, most: int) -> Array:
    """Return up to so many live rows, without one of them twice."""
    living = life.model.living()
    count = min(len(living), int(life.rng.integers(1, most + 1)))
    return life.rng.choice(living, count, replace=False) if count else living[:0]


def appended(life: Life, count: int, keys: Array | None = None) -> Change:
    """Return an append of drawn rows."""
    keys = life.drawing.keys(count) if keys is None else keys
    values = life.rng.integers(-99, 99, (count, life.model.values.shape[1])).astype(np.float32)
    return ("append", keys, values, life.drawing.radii(count))


def room(life: Life, count: int) -> int:
    """Return how many of so many rows there is still room for."""
    return max(0, min(count, life.most_rows - life.model.rows))


def append_some(life: Life, count: int) -> list[Change]:
    """Return an append of up to so many rows, as there is room."""
    count = room(life, count)
    return [appended(life, count)] if count else []


@operation("append")
def _append(life: Life) -> None:
    life.write(append_some(life, int(life.rng.choice([1, 1, 1, 2, 3, 17]))))


@operation("append many")
def _append_many(life: Life) -> None:
    life.write(append_some(life, int(life.rng.choice([47, 64, 65, 130, 300, 1025]))))


@operation("double")
def _double(life: Life) -> None:
    life.write(append_some(life, life.model.rows + 1))


def far_off(life: Life, keys: Array, radius: float) -> Array:
    """Return keys that are moved so far that balls of a radius are the nearest to all they hold."""
    away = life.rng.standard_normal(keys.shape)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return life.exact(keys + 5 * min(radius, 1e37) * away)


@operation("append wider")
def _append_wider(life: Life) -> None:
    """A ball wider than every one before it."""
    for change in append_some(life, 1):
        widest = max(life.drawing.spacing, float(life.model.radius.max(initial=0)))
        change[3][:] = min(3e38, widest * float(life.rng.choice([1.001, 1.2, 2.0])))
        if life.rng.random() < 0.5:
            change[1][:] = far_off(life, change[1], widest)
        life.write([change])


@operation("append and narrow")
def _append_and_narrow(life: Life) -> None:
    """Balls that are narrow before anybody sees them: pages of old versions hold them wide."""
    first = life.model.rows
    changes = append_some(life, int(life.rng.choice([1, 2, 5])))
    for change in list(changes):
        widest = max(life.drawing.spacing / 4, float(life.model.radius.max(initial=0)))
        radii = np.full(len(change[3]), min(1e38, 6 * widest), np.float32)
        change[3][:] = radii
        change[1][:] = far_off(life, change[1], float(radii[0]))
        rows = range(first, first + len(radii))
        changes += [("radius", row, radius / 64) for row, radius in zip(rows, radii, strict=True)]
        life.narrowed += zip(rows, radii, strict=True)
    life.write(changes, alone=False)


@operation("widen again")
def _widen_again(life: Life) -> None:
    """Balls that were narrowed get as wide as they were, or nearly."""
    living = set(life.model.living().tolist())
    factor = np.float32(life.rng.choice([1.0, 0.9]))
    picked = life.narrowed[-3:]
    life.write([("radius", row, radius * factor) for row, radius in picked if row in living])


@operation("look back")
def _look_back(life: Life) -> None:
    """An old version is asked between two that came after it."""
    life.write(append_some(life, 1), alone=True)
    life.keep()
    _append_and_narrow(life)
    life.stage()
    life.ask_version("find", life.book.snapshot(), life.model)
    _, snapshot, model = life.kept[-1]
    life.ask_version("old version", snapshot, model)
    _widen_again(life)


@operation("behind an old end")
def _behind_an_old_end(life: Life) -> None:
    """Rows behind an old version's end, in its very page, change and change back.

    That page goes on holding what they were at first, or what a dropped draft left there. The old
    version is asked in between, and nobody has asked it since codes were made of the rows.
    """
    rng = life.rng
    living = set(life.model.living().tolist())
    again = [("radius", row, radius / 64) for row, radius in life.narrowed if row in living]
    life.write(again, alone=False)
    life.narrowed = []
    widest = float(life.model.radius[life.model.living()].max(initial=0))
    wide = np.float32(min(3 * max(life.drawing.spacing, widest), 20 * life.drawing.spacing, 1e37))
    changes = append_some(life, int(rng.choice([1, 2, 5, 12])))
    for change in changes:
        change[3][:] = wide
        change[1][:] = far_off(life, change[1], float(wide))
    if not changes:
        return
    if rng.random() < 0.2:  # in place, and nobody's
        _write_and_drop(life, changes)
        life.keep()
        life.write([("radius", row, wide / 64) for row in some_rows(life, 1)])
        changes[0][3][:] = wide / 64
    else:
        life.keep()
    end = life.kept[-1][1:]
    if rng.random() < 0.3:
        end = (life.earlier() if rng.random() < 0.5 else life.oldest()) or end
    first = life.model.rows
    rows = range(first, first + len(changes[0][1]))
    life.write(changes)
    life.narrowed = [(row, wide) for row in rows]
    slots = [life.book.snapshot().row(row).key_slot for row in rows]
    if rng.random() < 0.2:
        life.ask_version("find", life.book.snapshot(), life.model)
    narrower: list[Change] = [("radius", row, wide / 64) for row in rows]
    moved = [row for row in rows if rng.random() < 0.3]
    keys = far_off(life, life.drawing.keys(len(rows)), float(wide))
    narrower += [("key", row, keys[row - first]) for row in moved]
    life.write(narrower, alone=False)
    if rng.random() < 0.5:
        gf.prepare(life.book)  # waits for the codes
    else:
        life.stage()
    life.ask_version("find", life.book.snapshot(), life.model)
    life.ask_version("old version", *end)
    _change_back(life, changes[0][1], first, moved, slots, wide)


def _write_and_drop(life: Life, changes: list[Change]) -> None:
    with suppress(_Dropped), life.book.writing() as draft:
        for change in changes:
            to_draft(draft, change, life.dtype)
        raise _Dropped


def _change_back(
    life: Life, keys: Array, first: int, moved: list[int], slots: list[int], wide: Any
) -> None:
    """Let new rows be as wide as they were, or nearly, and moved ones be where they were."""
    factors = life.rng.choice([1.0, 0.9, 0.75], len(slots)).astype(np.float32)
    raised = [("radius", first + at, wide * factor) for at, factor in enumerate(factors)]
    with life.book.writing() as draft:
        for at, change in enumerate(raised):
            if life.rng.random() < 0.5 and first + at not in moved:
                to_draft(draft, change, life.dtype)
                to_model(life.model, change)
        for row in moved:
            draft.point_key(row, slots[row - first])
            life.model.columns[:, row] = keys[row - first]
    life.shards_begin_anew()
    between = np.array([0.05, 0.3, 0.6, 0.7], np.float32) * wide
    on_spheres = life.drawing.on_spheres
    life.note([keys, *(on_spheres(keys, np.full(len(keys), radius)) for radius in between)])


@operation("unseen between")
def _unseen_between(life: Life) -> None:
    """A version whose balls are wide is first asked when a later one, narrow again, was."""
    rows = some_rows(life, 2)
    before: list[Change] = [("radius", row, life.model.radius[row]) for row in rows]
    widest = float(life.model.radius[life.model.living()].max(initial=0))
    wide = np.float32(min(1e37, 2 * max(widest, life.drawing.spacing)))
    life.write([("radius", row, wide) for row in rows], alone=False)
    life.keep()
    between = life.kept[-1][1:]
    life.write(before, alone=False)
    keys = life.model.columns[:, rows].T.copy()
    life.note([life.drawing.on_spheres(keys, np.full(len(keys), wide))])
    life.ask_version("find", life.book.snapshot(), life.model)
    life.ask_version("old version", *between)


@operation("append apart")
def _append_apart(life: Life) -> None:
    """Balls that nearly reach half the way to the nearest other key."""
    living = life.model.living()
    for change in append_some(life, 8):
        for at, key in enumerate(change[1].astype(np.float64)):
            squared = ((life.model.columns[:, living].T - key) ** 2).sum(axis=1)
            nearest = float(np.sqrt(squared.min(initial=np.inf)))
            change[3][at] = min(1e37, 0.45 * nearest)
        life.write([change])


@operation("over a neighbour")
def _over_a_neighbour(life: Life) -> None:
    """A ball that had its surroundings for itself grows over the nearest other key."""
    if life.rng.random() < 0.7:  # leaves that reach far hide what was forgotten
        alive = life.model.live
        life.write([("radius", row, radius) for row, radius in life.grown if alive[row]])
        life.grown = []
    changes: list[Change] = []
    for row in some_rows(life, 3):
        nearest, apart = neighbours(life, row)
        if np.isfinite(apart):
            life.grown.append((int(row), life.model.radius[row]))
            radius = min(1e37, apart * float(life.rng.choice([0.6, 0.8, 0.95])))
            changes.append(("radius", row, np.float32(radius)))
            note_between(life, life.model.key(row), life.model.key(nearest[0]))
    life.write(changes)


@operation("beside a neighbour")
def _beside_a_neighbour(life: Life) -> None:
    """A key whose ball had its surroundings for itself moves so that another is within it."""
    for row in some_rows(life, 12):
        nearest, apart = neighbours(life, row)
        radius = float(life.model.radius[row])
        if not (np.isfinite(apart) and 0.5 * apart < 2 * radius < apart):
            continue
        _reach_far(life, nearest[1:], min(1e37, 3 * apart))
        other = life.model.key(nearest[0]).astype(np.float64)
        left = 1.4 * radius / apart
        key = life.exact(life.model.key(row) * left + other * (1 - left))
        note_between(life, key, other)
        life.write([("key", row, key)])
        return


def neighbours(life: Life, row: int) -> tuple[Array, float]:
    """Return the rows of the nearest other keys, and how far the first is."""
    living = life.model.living()
    key = life.model.key(row).astype(np.float64)[:, None]
    squared = ((life.model.columns[:, living] - key) ** 2).sum(axis=0)
    squared[(living == row) | (squared == 0)] = np.inf
    return living[np.argsort(squared)[:6]], float(np.sqrt(squared.min(initial=np.inf)))


def note_between(life: Life, key: Array, other: Array) -> None:
    """Remember to ask between two keys, where the other one is nearer."""
    parts = np.array([0.4, 0.48, 0.52, 0.56, 0.7, 0.9])[:, None]
    life.note([key.astype(np.float64) * (1 - parts) + other.astype(np.float64) * parts])


def _reach_far(life: Life, rows: Array, radius: float) -> None:
    """Let rows be wide while somebody asks: their leaves go on reaching far."""
    before = [("radius", row, life.model.radius[row]) for row in rows]
    life.write([("radius", row, np.float32(radius)) for row in rows], alone=False)
    life.ask_version("find", life.book.snapshot(), life.model)
    life.write(before, alone=False)


@operation("append far")
def _append_far(life: Life) -> None:
    """A key far from all others, which codes may not be able to hold."""
    for change in append_some(life, 1):
        far = change[1].astype(np.float64) * life.rng.choice([1e3, 1e8, 1e-8])
        life.write([appended(life, 1, life.exact(far))])


@operation("append twins")
def _append_twins(life: Life) -> None:
    """Keys that are there already, those of removed rows too, with other radii."""
    count = room(life, int(life.rng.integers(1, 6)))
    if count and life.model.rows:
        rows = life.rng.integers(life.model.rows, size=count)
        life.write([appended(life, count, life.model.columns[:, rows].T.copy())])


@operation("remove")
def _remove(life: Life) -> None:
    life.write([("remove", row) for row in some_rows(life, 5)])


@operation("remove nearest")
def _remove_nearest(life: Life) -> None:
    """What a question found is gone when it is asked again."""
    if life.places and life.model.rows:
        found = np.unique(life.model.ask(life.places[-1]).nearest)
        life.write([("remove", row) for row in found[found >= 0][:3]])


@operation("empty")
def _empty(life: Life) -> None:
    if life.rng.random() < 0.15:
        life.write([("remove", row) for row in life.model.living()], alone=False)


@operation("begin again")
def _begin_again(life: Life) -> None:
    """Another codebook, where this one was."""
    if life.rng.random() < 0.1:
        life.begin()


@operation("widen")
def _widen(life: Life) -> None:
    most = 2.0 if life.drawing.giants else 0.1
    factors = 10.0 ** life.rng.uniform(0, most, 6)
    rows = some_rows(life, 6)
    life.write([_scaled(life, row, f) for row, f in zip(rows, factors, strict=False)])


@operation("narrow")
def _narrow(life: Life) -> None:
    life.write([_scaled(life, row, 10.0 ** life.rng.uniform(-2, 0)) for row in some_rows(life, 6)])


def _scaled(life: Life, row: int, factor: float) -> Change:
    radius = abs(float(life.model.radius[row])) or life.drawing.spacing
    return ("radius", row, np.float32(min(3e38, radius * factor)))


@operation("kill")
def _kill(life: Life) -> None:
    radius = np.float32(life.rng.choice([-1.0, -1e-5, 0.0, -0.0]))
    life.write([("radius", row, radius) for row in some_rows(life, 4)])


@operation("radius on a question")
def _radius_on_a_question(life: Life) -> None:
    """A radius that is the distance of a question, or next to it on either side."""
    asked = life.drawing.questions(6, life.model, life.places)
    asked = life.drawing.cast(asked, life.dtype).double().numpy()
    told = life.model.ask(asked)
    changes: list[Change] = []
    with np.errstate(over="ignore"):
        for row, apart in zip(told.nearest, np.sqrt(told.apart).astype(np.float32), strict=True):
            towards = np.float32(life.rng.choice([-np.inf, np.inf]))
            radius = apart if life.rng.random() < 0.4 else np.nextafter(apart, towards)
            if row >= 0 and np.isfinite(radius):
                changes.append(("radius", int(row), radius))
    life.write(changes)
    life.places.append(asked[np.isfinite(asked).all(axis=1)])


@operation("move")
def _move(life: Life) -> None:
    rows = some_rows(life, 4)
    keys = life.drawing.keys(len(rows))
    half_way = life.exact((keys.astype(np.float64) + life.model.columns[:, rows].T) / 2)
    keys = keys if life.rng.random() < 0.5 else half_way
    life.write([("key", row, key) for row, key in zip(rows, keys, strict=True)])


@operation("swap")
def _swap(life: Life) -> None:
    """Two rows take each other's keys."""
    rows = some_rows(life, 2)
    if len(rows) == 2:
        keys = [life.model.key(row) for row in rows]
        life.write([("key", rows[0], keys[1]), ("key", rows[1], keys[0])], alone=False)


@operation("value")
def _value(life: Life) -> None:
    rows = some_rows(life, 3)
    values = life.rng.integers(-99, 99, (len(rows), life.model.values.shape[1]))
    life.write([("value", row, v.astype(np.float32)) for row, v in zip(rows, values, strict=True)])


# What was before


@operation("take back")
def _take_back(life: Life) -> None:
    """Rows get radii, keys and values that they had, by their slots, as an undo does it."""
    entry = life.earlier()
    if entry is None:
        return
    then, model = entry
    rows = some_rows(life, 4)
    rows = rows[(rows < model.rows)]
    rows = rows[model.live[rows] != 0]
    places = [life.model.columns[:, rows].T.copy(), model.columns[:, rows].T.copy()]
    with life.book.writing() as draft:
        for row in rows.tolist():
            if then.row(row).key_slot != draft.snapshot().row(row).key_slot:
                draft.point_key(row, then.row(row).key_slot)
            draft.set_radius(row, then.row(row).radius)
            draft.point_value(row, then.row(row).value_slot)
    life.model.columns[:, rows] = model.columns[:, rows]
    life.model.radius[rows] = model.radius[rows]
    life.model.values[rows] = model.values[rows]
    life.shards_begin_anew()
    life.note([place for place in places if len(place)])


@operation("move back")
def _move_back(life: Life) -> None:
    _take_back(life)


@operation("go back")
def _go_back(life: Life) -> None:
    """Every row holds what it held in an earlier version; what came since is gone."""
    entry = life.earlier()
    if entry is None or life.rng.random() < 0.3:
        return
    then, model = entry
    changed = life.rng.integers(max(1, life.model.rows), size=8)
    places = [life.model.columns[:, changed].T.copy()]
    with life.book.writing() as draft:
        back(life.book.snapshot(), then).apply(draft)
    life.model.go_back(model)
    life.shards_begin_anew()
    life.note([*places, life.model.columns[:, changed].T.copy()])


# Drafts


@operation("one draft")
def _one_draft(life: Life) -> None:
    """Several kinds of change in one version, looked at before it is published."""
    with life.book.writing() as draft:
        _drafted(life, draft)
    life.shards_begin_anew()


@operation("dropped")
def _dropped(life: Life) -> None:
    """A draft that is looked at and leaves no trace."""
    with life.unchanged():
        try:
            with life.book.writing() as draft:
                _drafted(life, draft)
                raise _Dropped
        except _Dropped:
            pass


@operation("sketch")
def _sketch(life: Life) -> None:
    with life.unchanged(), life.book.sketching() as draft:
        _drafted(life, draft)


def _drafted(life: Life, draft: Any) -> None:
    """Change a draft, and ask it, and maybe the published version beside it."""
    before = life.model.copy()
    for _ in range(int(life.rng.integers(1, 4))):
        changes: list[Change] = []
        if life.rng.random() < 0.6:
            changes += append_some(life, int(life.rng.choice([1, 2, 70])))
        factor = float(life.rng.choice([3.0, 30.0, 0.1]))
        changes += [_scaled(life, row, factor) for row in some_rows(life, 2)]
        if life.rng.random() < 0.4:
            rows = some_rows(life, 2)
            keys = life.drawing.keys(len(rows))
            changes += [("key", row, key) for row, key in zip(rows, keys, strict=True)]
        if life.rng.random() < 0.3:
            changes += [("remove", row) for row in some_rows(life, 1)]
        life.note(places_of(life, changes))
        for change in changes:
            to_draft(draft, change, life.dtype)
            to_model(life.model, change)
        life.stage()
        life.ask_version("draft", draft.snapshot(), life.model)
        if life.rng.random() < 0.3:
            life.ask_version("beside a draft", life.book.snapshot(), before)


# The disk


@contextmanager
def folder() -> Iterator[Path]:
    """Give a folder that is in memory where there is one."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@operation("save")
def _save(life: Life) -> None:
    """Saving waits for the codes, and changes nothing."""
    if life.rng.random() < 0.5:
        with folder() as made:
            life.book.save(made)


@operation("save and open")
def _save_and_open(life: Life) -> None:
    """Go on with what was saved: the rows stay in their files, the codes come with them."""
    if life.rng.random() < 0.5:
        with folder() as made:
            life.book.save(made)
            life.go_on_with(gf.Codebook.open(made))
