"""The certificate of one codebook: its map and codes, kept up to date beside the edits.

A look-up never waits. `view` takes small edits in at once (a few appended keys, changed radii,
moved keys); what takes longer (the first fit, a refit when the codebook has doubled, sorting the
tail into a run, merging runs) happens in a thread and is published by one store. Rows that have no
code yet are read as they are, so every version is answered exactly at every moment.

Everything kept is a bound that stays true when it is too wide: a reach only grows, an isolated bit
is only cleared, a moved key keeps its old code beside the new one, and later rows are skipped by
their number. So one certificate serves all the versions it has seen.

A merge keeps the map but encodes the keys again. The order and its boxes are made of points of 16
bits a slot, of which a code has the low byte; what a leaf's box tells of the rest is too little
where radii are small (at a tenth of the keys' spacing three leaves in ten are narrow enough, MiniLM
at 1e5 keys), and keeping the points would take 32 bytes a key more than the 75 there are.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from grace_fast import codes, forks, native, order
from grace_fast.building import Build
from grace_fast.codebook import PAGE_ROWS, Page, Snapshot
from grace_fast.order import Array, Part
from grace_fast.views import State, View, plan_of

SMALLEST = 48  # live keys below which reading them all costs less than projecting a query
INLINE_ROWS = 1024  # rows that a look-up encodes itself: 15 ms at D = 1536
TAIL_ROWS = 16384  # 3 us of linear scan; then they become a run
MERGE_RATIO = 4  # a run is merged with what follows once it is less than this times as long
_log = logging.getLogger("grace_fast")
_builders: weakref.WeakSet[Certificate] = weakref.WeakSet()


def of(snapshot: Snapshot) -> Certificate | None:
    """Return the certificate of a published version's codebook, None without the extension."""
    if native.cpu is None:
        return None
    return snapshot.derived(  # type: ignore[no-any-return]
        "certificate", lambda _, previous: previous or Certificate(native.cpu)
    )


def restore(snapshot: Snapshot, state: State) -> None:
    """Let a codebook that nobody has asked yet begin with codes that are known."""
    if native.cpu is not None:
        snapshot.derived("certificate", lambda *_: Certificate(native.cpu, state))


class Certificate:
    """The codes of one codebook's keys, on the host; look-ups call only `view` and `held`."""

    def __init__(self, cpu: Any, state: State | None = None) -> None:
        self._cpu = cpu
        self._lock = threading.RLock()
        self._state = state
        self._seen: set[int] = set()
        self._pages: tuple[Page, ...] = ()  # of the version seen last
        self._newest: Snapshot | None = None
        self._widest = -1.0
        self._builder: threading.Thread | None = None
        self._cancelled = False
        self._hopeless_rows = 0  # no map could be fitted at this size
        self._handed: weakref.ref[View] | None = None  # the view that was made last
        _builders.add(self)
        forks.guard(self, "_lock", forks.Order.CODES, _go_on_in_child)

    def view(self, snapshot: Snapshot, other: View | None = None) -> View:
        """Return a version as the extension reads it; `other` is any earlier view."""
        with self._lock:
            self._take_in(snapshot)
            view = View(self._cpu, snapshot, other)
            view.widest = self._widest
            state = view.made_from = self._state
            if state is not None and snapshot.version >= state.oldest:
                view.plan = plan_of(self._cpu, state, snapshot.rows, self._widest)
                view.holds = (state, state.tail)
                view.predicted_bytes = state.predicted_bytes
            self._handed = weakref.ref(view)
            return view

    @contextmanager
    def held(self, snapshot: Snapshot) -> Iterator[State | None]:
        """Give what is known of a version's keys by now, unchanged meanwhile; None if nothing."""
        with self._lock:
            self._take_in(snapshot)
            state = self._state
            yield state if state is not None and snapshot.version >= state.oldest else None

    @property
    def current(self) -> State | None:
        """What was published last, of the newest version seen."""
        return self._state

    def is_current(self, view: View) -> bool:
        """Tell whether a new view of the same version would say no more."""
        return view.made_from is self._state

    def build(self, snapshot: Snapshot) -> None:
        """Have all codes of a version that can be had, before returning."""
        with self.held(snapshot):  # starts what has to be made
            pass
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is being built."""
        while True:
            with self._lock:
                builder = self._builder
            if builder is None:
                return
            builder.join()

    @property
    def nbytes(self) -> int:
        """The memory that the codes take."""
        state = self._state
        return sum(part.nbytes for part in (*state.runs, state.tail)) if state else 0

    # What a look-up takes in itself.

    def _take_in(self, snapshot: Snapshot) -> None:
        if snapshot.version in self._seen:
            return
        self._seen.add(snapshot.version)
        if self._newest is None or snapshot.version > self._newest.version:
            self._newest = snapshot
        known = self._pages
        for number, page in enumerate(snapshot.pages):
            same = number < len(known) and known[number] is page
            if not same:
                old = known[number] if number < len(known) else None
                self._take_in_page(snapshot, number, page, old)
        self._take_in_rows(snapshot)
        self._pages = snapshot.pages
        self._build_if_needed()

    def _take_in_page(self, snapshot: Snapshot, number: int, page: Page, old: Page | None) -> None:
        first = number * PAGE_ROWS
        state = self._state
        here = min(PAGE_ROWS, snapshot.rows - first)
        radii = page.radius.cpu().numpy()[:here]
        self._widest = max(self._widest, float(radii.max()))
        if state is None or old is None:
            return
        here = min(here, state.covered - first)
        if here <= 0:
            return
        for offset in np.flatnonzero(radii[:here] > old.radius.cpu().numpy()[:here]):
            self._raise_reach(state, first + int(offset), float(radii[offset]))
        moved = np.flatnonzero(page.key_slot.numpy()[:here] != old.key_slot.numpy()[:here])
        if len(moved):
            self._encode_rows(state, snapshot, first + moved.astype(np.int64))

    @staticmethod
    def _raise_reach(state: State, row: int, radius: float) -> None:
        for part in state.runs:
            if part.first <= row < part.last and part.places is not None:
                part.raise_reach(int(part.places[row - part.first]), radius)
        tail = state.tail
        for position in np.flatnonzero(tail.rows[: tail.count] == row):
            tail.raise_reach(int(position), radius)

    def _encode_rows(self, state: State, snapshot: Snapshot, rows: Array) -> None:
        """Give rows a position at the end of the tail."""
        made = codes.encode_keys(state.phi, snapshot.keys_at(torch.from_numpy(rows)))
        radii = snapshot.radii_of(torch.from_numpy(rows)).cpu().numpy()
        added = order.append(state.tail, made, rows, radii, state.floor)
        if added is None:  # a key the codes cannot hold: start anew, without them until then
            self._state = None
        else:
            state.tail = added
        for part in state.runs:
            for row in rows[(rows >= part.first) & (rows < part.last)]:
                assert part.places is not None
                part.clear_isolated(int(part.places[row - part.first]))

    def _take_in_rows(self, snapshot: Snapshot) -> None:
        """Encode the rows that are new, if they are few."""
        state = self._state
        if state is None:
            return
        last = min(snapshot.rows, order.MOST_ROWS)
        new = last - state.covered
        first = state.covered
        page = first // PAGE_ROWS  # rows added in place: their page may be the known one
        if new > 0:
            radii = np.concatenate([p.radius.cpu().numpy() for p in snapshot.pages[page:]])
            radii = radii[first - page * PAGE_ROWS :][:new]
            self._widest = max(self._widest, float(radii.max()))
        if 0 < new <= INLINE_ROWS:
            self._encode_rows(state, snapshot, np.arange(first, last))
            state.covered = last

    # What happens in a thread.

    def _build_if_needed(self) -> None:
        newest, state = self._newest, self._state
        if newest is None or self._builder is not None or self._cancelled:
            return
        rows = min(newest.rows, order.MOST_ROWS)
        if state is None:
            if len(newest) < SMALLEST or newest.rows < 2 * self._hopeless_rows:
                return
            start = 0
        elif rows >= 2 * state.fitted_rows or newest.version < state.oldest:
            start, state = 0, None
        elif state.tail.count > TAIL_ROWS or rows - state.covered > INLINE_ROWS:
            start = state.runs[-1].last if state.runs else 0
            for part in reversed(state.runs):
                if part.last - part.first >= MERGE_RATIO * (rows - start):
                    break
                start = part.first
        else:
            return
        builder = threading.Thread(
            target=self._build, args=(newest, state, start), name="grace_fast-certificate"
        )
        builder.daemon = True  # joined at exit, where the interpreter still stands
        try:
            builder.start()
        except RuntimeError as error:  # no memory for a thread: the look-up goes on without it
            if self._hopeless_rows != newest.rows:
                _log.warning("the certificate was not built: %s; look-ups read all keys", error)
            self._hopeless_rows = newest.rows
            return
        self._builder = builder  # the thread takes the lock before it says that it is done

    def _build(self, snapshot: Snapshot, state: State | None, start: int) -> None:
        try:
            built = Build(self._cpu, snapshot, state, start, lambda: self._cancelled)
            made = built.run()
        except Exception:
            _log.exception("the certificate was not built; look-ups read all keys")
            made = None
        with self._lock:
            self._builder = None
            if made is None:
                self._hopeless_rows = snapshot.rows
                return
            self._publish(snapshot, state, built, made)

    def _publish(self, snapshot: Snapshot, state: State | None, built: Build, made: Part) -> None:
        """Put a run in the place of what it was made from; edits meanwhile are kept."""
        if state is not None and state is not self._state:
            return self._build_if_needed()  # the codes were given up meanwhile
        now = State(built.phi, built.fitted_rows, built.floor)
        now.runs = (*(p for p in state.runs if p.last <= made.first), made) if state else (made,)
        now.covered, now.oldest = built.rows, snapshot.version
        now.predicted_bytes = built.predicted_bytes
        if state is not None:
            old = state.tail
            keep = np.arange(old.count)
            keep = keep[(keep >= built.tail_count) | (old.rows[: old.count] < made.first)]
            rows = old.rows[keep]
            near, far = order.unpacked(old, keep)
            radii = old.reach[keep // order.LEAF]
            now.tail = order.append_codes(now.tail, near, far, rows, radii, now.floor)
            now.covered = max(state.covered, built.rows)
        self._state = now
        newest = self._newest
        assert newest is not None
        # Bring the new run to the versions that were published while it was made.
        self._pages, self._seen = snapshot.pages, {snapshot.version}
        if newest.version > snapshot.version:
            self._take_in(newest)
        self._build_if_needed()
        return None


@atexit.register
def _stop_building() -> None:
    for certificate in list(_builders):
        certificate._cancelled = True
        certificate.settle()


def _go_on_in_child(certificate: Certificate, whole: bool) -> None:
    """Let a forked child make for itself what a thread was making that it has not.

    It begins when it first asks, not before. whole: else what is known may be half taken in, and is
    given up; views that were handed out before stay true.
    """
    was_making, certificate._builder = certificate._builder is not None, None
    if not whole:
        certificate._state, certificate._pages = None, ()
    if was_making or not whole:
        certificate._seen.clear()
        view = None if certificate._handed is None else certificate._handed()
        if view is not None:
            view.made_from = _FORKED  # no state is this: the next look-up asks for a new view


_FORKED: Any = object()
