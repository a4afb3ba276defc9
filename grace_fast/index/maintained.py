"""The index of one codebook, maintained beside edits: its projection, segments and delta buffer.

A look-up never waits. `view` takes small edits in at once (a few appended keys, changed radii,
moved keys); what takes longer (the first fit, a refit when the codebook has doubled, sorting the
delta buffer into a segment, merging segments) happens in the background and is published by one
store. Rows that have no code yet are read as they are, so every version is answered exactly at
every moment.

What is remembered, and why it stays true (docs/lookups.md):

    widest radius   not here: it is a count of the version itself
    radii, codes    of a version and every row that is covered, a position holds the row's key and
                    its leaf has at least its radius. That only grows, a moved key keeps its old
                    code beside the new one, later rows are skipped by their number: what was true
                    of a version stays true of it, so one state serves all that it was told of.
    isolated bits   only ever cleared
    told of         the newest version that was asked, and older ones; what another version has
                    otherwise is found by comparing it with the newest, and only in rows that both
                    have: behind the rows of a version its pages hold anything

A version that was shown and then refused (`Snapshot.era`) leaves keys behind that were never in the
codebook; the index starts anew then.

A merge keeps the projection but encodes the keys again. The order and its boxes are made of points
of 16 bits a slot, of which a code has the low byte; what a leaf's box tells of the rest is too
little where radii are small (at a tenth of the keys' spacing three leaves in ten are narrow enough,
MiniLM at 1e5 keys), and keeping the points would take 32 bytes a key more than the 75 there are.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from grace_fast import _native
from grace_fast.codebook import forks
from grace_fast.codebook.buffers import memory_errors
from grace_fast.codebook.caches import Cache
from grace_fast.codebook.pages import PAGE_ROWS, Page
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import quantizer, segments
from grace_fast.index.builder import Build
from grace_fast.index.native_view import IndexState, NativeView, plan_of
from grace_fast.index.segments import Array, Segment

SMALLEST = 48  # live keys below which reading them all costs less than projecting a query
INLINE_ROWS = 1024  # rows that a look-up encodes itself: 15 ms at D = 1536
DELTA_ROWS = 16384  # 3 us of linear scan; then they become a segment
MERGE_RATIO = 4  # a segment is merged with what follows once it is less than this times as long
_log = logging.getLogger("grace_fast")
_builders: weakref.WeakSet[Index] = weakref.WeakSet()


def of(snapshot: Snapshot) -> Index | None:
    """Return the index of a published version's codebook, None without the extension."""
    if _native.cpu is None:
        return None
    return _indexes.of(snapshot, lambda _, previous: previous or Index(_native.cpu))


def restore(snapshot: Snapshot, state: IndexState) -> None:
    """Let a codebook that nobody has asked yet begin with codes that are known of a version."""
    if _native.cpu is not None:
        _indexes.put(snapshot, Index(_native.cpu, snapshot, state))


# Takes seconds of a million keys, and no lock of a library's: a fork need not wait for it.
_MEANWHILE = ("sort",)


def in_a_thread(steps: Iterator[str]) -> Callable[[], None]:
    """Go through the steps of a build in a thread; return what waits for their end.

    Raises: RuntimeError where there is no memory for a thread.
    """

    # Joined at exit, where the interpreter still stands.
    builder = threading.Thread(
        target=forks.do, args=(steps, _MEANWHILE), name="grace_fast-index", daemon=True
    )
    builder.start()
    return builder.join


# What goes through the steps of a build, and returns before it has done any. Each is named before
# it is done: "fit", "encode" (some keys), "sort", "look around", "predict", "publish". A test puts
# another in its place, to do one step at a time between edits and look-ups.
background: Callable[[Iterator[str]], Callable[[], None]] = in_a_thread


class Index:
    """The quantized keys of one codebook, on the host; look-ups call only `view` and `held`.

    snapshot, state: a version, and codes that are known of it.
    """

    def __init__(
        self, cpu: Any, snapshot: Snapshot | None = None, state: IndexState | None = None
    ) -> None:
        self._cpu = cpu
        self._lock = threading.RLock()
        self.current = state  # what was published last, of the newest version seen
        self._newest = snapshot  # that was asked; the state was told of it
        self._older: weakref.WeakSet[Snapshot] = weakref.WeakSet()  # that it was told of, too
        self._wait: Callable[[], None] | None = None  # for what is being built
        self._cancelled = False
        self._hopeless_rows = 0  # no projection could be fitted at this size
        self.failure: Exception | None = None  # that nobody expects, of the build that ended last
        self._was_forked = False  # while something was made, by a thread that is not here
        self._handed: weakref.ref[NativeView] | None = None  # the view that was made last
        _builders.add(self)
        forks.guard(self, "_lock", forks.Order.CODES, _go_on_in_child)

    def view(self, snapshot: Snapshot, other: NativeView | None = None) -> NativeView:
        """Return a version as the extension reads it; `other` is any earlier view."""
        with self._lock:
            self._take_in(snapshot)
            view = NativeView(self._cpu, snapshot, other)
            view.widest = snapshot.counts.widest
            state = view.made_from = self.current
            if state is not None and self._is_told_of(snapshot):
                view.plan = plan_of(self._cpu, state, snapshot.rows, view.widest)
                view.holds = (state, state.delta)
                view.predicted_bytes = state.predicted_bytes
            self._handed = weakref.ref(view)
            return view

    @contextmanager
    def held(self, snapshot: Snapshot) -> Iterator[IndexState | None]:
        """Give what is known of a version's keys by now, unchanged meanwhile; None if nothing."""
        with self._lock:
            self._take_in(snapshot)
            yield self.current if self._is_told_of(snapshot) else None

    def build(self, snapshot: Snapshot) -> None:
        """Have all codes of a version that can be had, before returning."""
        with self.held(snapshot):  # starts what has to be made
            pass
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is being built."""
        while True:
            with self._lock:
                wait = self._wait
            if wait is None:
                return
            wait()

    @property
    def nbytes(self) -> int:
        """The memory that the codes take."""
        state = self.current
        return sum(segment.nbytes for segment in (*state.segments, state.delta)) if state else 0

    # What a look-up takes in itself.

    def _take_in(self, snapshot: Snapshot) -> None:
        """Let the state, where there is one, be true of a version; begin what has to be made."""
        if self._was_forked:
            self._was_forked = False
            self._build_if_needed()
        newest = self._newest
        if snapshot is newest or snapshot in self._older:
            return
        if newest is None or _order(snapshot) > _order(newest):
            if newest is not None and snapshot.era != newest.era:
                self.current = None
            self._take_changes_in(snapshot)
            if newest is not None:
                self._older.add(newest)
            self._newest = snapshot
        elif self._can_be_told_of(snapshot):
            self._take_changes_in(snapshot)
            self._older.add(snapshot)
        self._build_if_needed()

    def _can_be_told_of(self, snapshot: Snapshot) -> bool:
        """Tell whether a version is not from before the state."""
        state, newest = self.current, self._newest
        assert newest is not None
        return state is None or (snapshot.version >= state.oldest and snapshot.era == newest.era)

    def _is_told_of(self, snapshot: Snapshot) -> bool:
        return snapshot is self._newest or (
            snapshot in self._older and self._can_be_told_of(snapshot)
        )

    def _take_changes_in(self, snapshot: Snapshot) -> None:
        """Tell the state what a version has otherwise than the newest that it was told of."""
        state, newest = self.current, self._newest
        if state is None:
            return
        assert newest is not None, "a state is of some version"
        both = min(snapshot.rows, newest.rows, state.covered)
        for number in range(-(-both // PAGE_ROWS)):
            page, known = snapshot.pages[number], newest.pages[number]
            if page is not known:  # rows that a version has are not changed in a page
                first = number * PAGE_ROWS
                self._take_page_in(
                    state, snapshot, first, page, known, min(PAGE_ROWS, both - first)
                )
        self._take_rows_in(state, snapshot)

    def _take_page_in(
        self, state: IndexState, snapshot: Snapshot, first: int, page: Page, known: Page, rows: int
    ) -> None:
        radii, known_radii = (each.radius[:rows].cpu().numpy() for each in (page, known))
        for offset in np.flatnonzero(radii > known_radii):
            self._raise_max_radius(state, first + int(offset), float(radii[offset]))
        slots, known_slots = (each.key_slot[:rows].numpy() for each in (page, known))
        moved = np.flatnonzero(slots != known_slots)
        if len(moved):
            self._encode_rows(state, snapshot, first + moved.astype(np.int64))

    @staticmethod
    def _raise_max_radius(state: IndexState, row: int, radius: float) -> None:
        for segment in state.segments:
            if segment.first <= row < segment.last and segment.places is not None:
                segment.raise_max_radius(int(segment.places[row - segment.first]), radius)
        delta = state.delta
        for position in np.flatnonzero(delta.rows[: delta.count] == row):
            delta.raise_max_radius(int(position), radius)

    def _encode_rows(self, state: IndexState, snapshot: Snapshot, rows: Array) -> None:
        """Give rows a position at the end of the delta buffer."""
        made = quantizer.encode_keys(state.projection, snapshot.keys_at(torch.from_numpy(rows)))
        radii = snapshot.radii_of(torch.from_numpy(rows)).cpu().numpy()
        added = segments.append(state.delta, made, rows, radii, state.min_radius)
        if added is None:  # a key the codes cannot hold: start anew, without them until then
            self.current = None
        else:
            state.delta = added
        for segment in state.segments:
            for row in rows[(rows >= segment.first) & (rows < segment.last)]:
                assert segment.places is not None
                segment.clear_isolated(int(segment.places[row - segment.first]))

    def _take_rows_in(self, state: IndexState, snapshot: Snapshot) -> None:
        """Encode the rows that are new, if they are few."""
        last = min(snapshot.rows, segments.MOST_ROWS)
        if 0 < last - state.covered <= INLINE_ROWS:
            self._encode_rows(state, snapshot, np.arange(state.covered, last))
            state.covered = last

    # What happens in the background.

    def _build_if_needed(self) -> None:
        newest, state = self._newest, self.current
        if newest is None or self._wait is not None or self._cancelled:
            return
        rows = min(newest.rows, segments.MOST_ROWS)
        if state is None:
            if len(newest) < SMALLEST or newest.rows < 2 * self._hopeless_rows:
                return
            start = 0
        elif rows >= 2 * state.fitted_rows:
            start, state = 0, None
        elif state.delta.count > DELTA_ROWS or rows - state.covered > INLINE_ROWS:
            start = self._where_to_merge_from(state, rows)
        else:
            return
        # Made here, under the lock: it notes how long the delta is at this version.
        build = Build(self._cpu, newest, state, start)
        try:
            self._wait = background(self._steps(build))
        except RuntimeError as error:  # no memory for a thread: the look-up goes on without it
            if self._hopeless_rows != newest.rows:
                _log.warning("the index was not built: %s; look-ups read all keys", error)
            self._hopeless_rows = newest.rows

    @staticmethod
    def _where_to_merge_from(state: IndexState, rows: int) -> int:
        """Return the first row of the next segment: what is long enough before it stays as it is.

        The delta keeps the positions of rows before it, which are keys that moved. More than
        half of what it may hold must not stay, or the next look-up would begin to build again.
        """
        start = state.segments[-1].last if state.segments else 0
        coded = state.delta.rows[: state.delta.count]
        for segment in reversed(state.segments):
            long_enough = segment.last - segment.first >= MERGE_RATIO * (rows - start)
            if long_enough and np.count_nonzero(coded < start) <= DELTA_ROWS // 2:
                break
            start = segment.first
        return start

    def _steps(self, build: Build) -> Iterator[str]:
        """Make a segment and publish it; give the name of each step before it is done."""
        made, self.failure = None, None
        try:
            with memory_errors():
                steps = build.steps()
                while not self._cancelled:
                    yield next(steps)
        except StopIteration as done:
            made = done.value
        except MemoryError as error:
            _log.warning("the index was not built: %s; look-ups read all keys", error)
        except Exception as error:  # a fault of the package: look-ups serve, who prepares is told
            _log.exception("the index was not built; look-ups read all keys")
            self.failure = error
        yield "publish"
        with self._lock:  # whoever began this holds it until there is something to wait for
            self._wait = None
            if made is None:
                self._hopeless_rows = build.snapshot.rows
            else:
                self._publish(build, made)

    def _publish(self, build: Build, made: Segment) -> None:
        """Put a segment in the place of what it was made from; edits meanwhile are kept."""
        state, snapshot, newest = build.state, build.snapshot, self._newest
        assert newest is not None
        given_up = state is not None and state is not self.current
        if given_up or snapshot.era != newest.era:
            return self._build_if_needed()
        now = IndexState(build.projection, build.fitted_rows, build.min_radius)
        now.segments = (
            (*(p for p in state.segments if p.last <= made.first), made) if state else (made,)
        )
        now.covered, now.oldest = build.rows, snapshot.version
        now.predicted_bytes = build.predicted_bytes
        if state is not None:
            old = state.delta
            keep = np.arange(old.count)
            keep = keep[(keep >= build.delta_count) | (old.rows[: old.count] < made.first)]
            rows = old.rows[keep]
            near, far = segments.unpacked(old, keep)
            radii = old.leaf_max_radius[keep // segments.LEAF]
            now.delta = segments.append_codes(now.delta, near, far, rows, radii, now.min_radius)
            now.covered = max(state.covered, build.rows)
        # It knows the version it was made from; the newest is taken in, others when they are asked.
        self.current, self._newest = now, snapshot
        self._older = weakref.WeakSet()
        self._take_in(newest)
        self._build_if_needed()
        return None


def _order(snapshot: Snapshot) -> tuple[int, int]:
    return snapshot.era, snapshot.version


@atexit.register
def _stop_building() -> None:
    for index in list(_builders):
        index._cancelled = True
        index.settle()


def _go_on_in_child(index: Index, whole: bool) -> None:
    """Let a forked child make for itself what a thread was making that it has not.

    It begins when it first asks, not before. whole: else what is known may be half taken in, and is
    given up; views that were handed out before stay true.
    """
    was_making, index._wait = index._wait is not None, None
    if not whole:
        index.current, index._older = None, weakref.WeakSet()
    if was_making or not whole:
        index._was_forked = True
        view = None if index._handed is None else index._handed()
        if view is not None:
            view.made_from = _FORKED  # no state is this: the next look-up asks for a new view


_indexes: Cache[Index] = Cache("index")
_FORKED: Any = object()
