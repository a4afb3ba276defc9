"""The certificate of one codebook: its map and codes, kept up to date beside the edits.

A look-up never waits. `view` takes small edits in at once (a few appended keys, changed radii,
moved keys); what takes longer (the first fit, a refit when the codebook has doubled, sorting the
tail into a run, merging runs) happens in a thread and is published by one store. Rows that have no
code yet are read as they are, so every version is answered exactly at every moment.

Everything kept is a bound that stays true when it is too wide: a reach only grows, an isolated bit
is only cleared, a moved key keeps its old code beside the new one, and later rows are skipped by
their number. So one certificate serves all the versions it has seen.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Any

import numpy as np
import torch

from grace_fast import codes, order
from grace_fast.codebook import PAGE_ROWS, Page, Snapshot
from grace_fast.order import Array, Part

SMALLEST = 48  # live keys below which reading them all costs less than projecting a query
INLINE_ROWS = 1024  # rows that a look-up encodes itself: 15 ms at D = 1536
TAIL_ROWS = 16384  # 3 us of linear scan; then they become a run
MERGE_RATIO = 4  # a run is merged with what follows once it is less than this times as long
OUTLIERS = 4096  # keys of large radius whose surroundings are looked at when a run is made
_CHUNK = 2048  # keys encoded at a time: float64 copies stay in the cache
_log = logging.getLogger("grace_fast")
_builders: weakref.WeakSet[Certificate] = weakref.WeakSet()


class PageTable:
    """The addresses of a snapshot's pages, made from those of another snapshot where they agree."""

    def __init__(self, snapshot: Snapshot, other: PageTable | None = None) -> None:
        self.pages = snapshot.pages
        self.addresses = np.zeros((3, len(self.pages)), np.uint64)  # radius, live, key slot
        known = other.pages if other is not None else ()
        shared = min(len(known), len(self.pages))
        if other is not None:
            self.addresses[:, :shared] = other.addresses[:, :shared]
        for number, page in enumerate(self.pages):
            if number < shared and page is known[number]:
                continue
            fields = (page.radius, page.live, page.key_slot)
            self.addresses[:, number] = [field.data_ptr() for field in fields]

    def book(self, cpu: Any, snapshot: Snapshot) -> Any:
        """Return the extension's description of the snapshot's keys."""
        radius, live, key_slot = (int(row.ctypes.data) for row in self.addresses)
        return cpu.Book(
            slots=snapshot.key_slots.data_ptr(),
            slot_pages=key_slot if snapshot.counts.key_moves else 0,
            live_pages=live,
            radius_pages=radius,
            rows=snapshot.rows,
            width=snapshot.key_dim,
            dtype=str(snapshot.dtype).removeprefix("torch."),
        )


class View:
    """One version, ready to be looked up: what the extension reads and what keeps it alive."""

    def __init__(self, cpu: Any, snapshot: Snapshot, other: View | None) -> None:
        self.table: PageTable = PageTable(snapshot, other.table if other is not None else None)
        self.pages = snapshot.pages
        self.keys = snapshot.key_slots
        self.book = self.table.book(cpu, snapshot)
        self.plan: Any = None  # None while the certificate says nothing about this version
        self.made_from: Any = None  # the certificate's state
        self.holds: Any = None  # what the plan points into
        self.rows = snapshot.rows
        self.key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        self.widest = float("inf")
        self.predicted_bytes = float("inf")

    def certified_pays(self, batch: int) -> bool:
        """Tell whether the certificate is predicted to read less than all keys.

        A batch shares what it reads densely: 12 queries at a time keep the arithmetic as busy as
        one keeps the memory (Zen 3, N = 1e5, D = 1536).
        """
        dense_bytes = self.rows * self.key_bytes / min(batch, 12)
        return self.plan is not None and self.predicted_bytes < dense_bytes


class _State:
    """What a build publishes in one store."""

    def __init__(self, phi: codes.Map, fitted_rows: int, floor: float) -> None:
        self.phi = phi
        self.fitted_rows = fitted_rows
        self.floor = floor
        self.runs: tuple[Part, ...] = ()
        self.tail = order.tail(256, floor)
        self.covered = 0  # rows below have a position
        self.oldest = 0  # the first version it is true of
        self.predicted_bytes = float("inf")  # of a look-up


class Certificate:
    """What `Codebook.derived` keeps for the host; `view` is the only thing a look-up calls."""

    def __init__(self, cpu: Any) -> None:
        self._cpu = cpu
        self._lock = threading.RLock()
        self._state: _State | None = None
        self._seen: set[int] = set()
        self._pages: tuple[Page, ...] = ()  # of the version seen last
        self._newest: Snapshot | None = None
        self._widest = -1.0
        self._builder: threading.Thread | None = None
        self._cancelled = False
        self._hopeless_rows = 0  # no map could be fitted at this size
        _builders.add(self)

    def view(self, snapshot: Snapshot, other: View | None = None) -> View:
        """Return a version as the extension reads it; `other` is any earlier view."""
        with self._lock:
            self._take_in(snapshot)
            view = View(self._cpu, snapshot, other)
            view.widest = self._widest
            state = view.made_from = self._state
            if state is not None and snapshot.version >= state.oldest:
                view.plan, view.holds = self._plan(state, snapshot), (state, state.tail)
                view.predicted_bytes = state.predicted_bytes
            return view

    def is_current(self, view: View) -> bool:
        """Tell whether a new view of the same version would say no more."""
        return view.made_from is self._state

    def settle(self) -> None:
        """Wait until nothing is being built."""
        while (builder := self._builder) is not None:
            builder.join()

    @property
    def nbytes(self) -> int:
        """The memory that the codes take."""
        state = self._state
        return sum(part.nbytes for part in (*state.runs, state.tail)) if state else 0

    def _plan(self, state: _State, snapshot: Snapshot) -> Any:
        phi, plan = state.phi, self._cpu.Plan()
        plan.set_map(
            centre=phi.padded_centre.data_ptr(),
            rows=phi.packed_rows.data_ptr(),
            turn=phi.turn.data_ptr(),
            step=phi.step,
            lipschitz=phi.lipschitz,
            row_norm=phi.row_norm,
            eta=phi.eta,
            norm_slot=phi.norm_slot,
            far=phi.far,
        )
        plan.set_bounds(
            covered=min(state.covered, snapshot.rows), floor=state.floor, widest=self._widest
        )
        for part in (*state.runs, state.tail):
            plan.add_part(
                count=part.count,
                row=part.rows.ctypes.data,
                near=part.near.ctypes.data,
                far=part.far.ctypes.data,
                reach=part.reach.ctypes.data,
                near_residual=part.near_error,
                far_residual=part.far_error,
                leaf_boxes=_address(part.leaf_boxes),
                super_boxes=_address(part.super_boxes),
                super_reach=_address(part.super_reach),
                isolated=_address(part.isolated),
            )
        return plan

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
        radii = page.radius.numpy()[:here]
        self._widest = max(self._widest, float(radii.max()))
        if state is None or old is None:
            return
        here = min(here, state.covered - first)
        if here <= 0:
            return
        for offset in np.flatnonzero(radii[:here] > old.radius.numpy()[:here]):
            self._raise_reach(state, first + int(offset), float(radii[offset]))
        moved = np.flatnonzero(page.key_slot.numpy()[:here] != old.key_slot.numpy()[:here])
        if len(moved):
            self._encode_rows(state, snapshot, first + moved.astype(np.int64))

    @staticmethod
    def _raise_reach(state: _State, row: int, radius: float) -> None:
        for part in state.runs:
            if part.first <= row < part.last and part.places is not None:
                part.raise_reach(int(part.places[row - part.first]), radius)
        tail = state.tail
        for position in np.flatnonzero(tail.rows[: tail.count] == row):
            tail.raise_reach(int(position), radius)

    def _encode_rows(self, state: _State, snapshot: Snapshot, rows: Array) -> None:
        """Give rows a position at the end of the tail."""
        slots = torch.from_numpy(rows)
        if snapshot.counts.key_moves:
            slots = snapshot.key_slot[slots]
        made = codes.encode_keys(state.phi, snapshot.key_slots[slots])
        radii = snapshot.radii_of(torch.from_numpy(rows)).numpy()
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
        new = snapshot.rows - state.covered
        first = state.covered
        page = first // PAGE_ROWS  # rows added in place: their page may be the known one
        if new > 0:
            radii = np.concatenate([p.radius.numpy() for p in snapshot.pages[page:]])
            radii = radii[first - page * PAGE_ROWS :][:new]
            self._widest = max(self._widest, float(radii.max()))
        if 0 < new <= INLINE_ROWS:
            self._encode_rows(state, snapshot, np.arange(first, snapshot.rows))
            state.covered = snapshot.rows

    # What happens in a thread.

    def _build_if_needed(self) -> None:
        newest, state = self._newest, self._state
        if newest is None or self._builder is not None or self._cancelled:
            return
        if state is None:
            if len(newest) < SMALLEST or newest.rows < 2 * self._hopeless_rows:
                return
            start = 0
        elif newest.rows >= 2 * state.fitted_rows or newest.version < state.oldest:
            start, state = 0, None
        elif state.tail.count > TAIL_ROWS or newest.rows - state.covered > INLINE_ROWS:
            start = state.runs[-1].last if state.runs else 0
            for part in reversed(state.runs):
                if part.last - part.first >= MERGE_RATIO * (newest.rows - start):
                    break
                start = part.first
        else:
            return
        self._builder = threading.Thread(
            target=self._build, args=(newest, state, start), name="grace_fast-certificate"
        )
        self._builder.daemon = True  # joined at exit, where the interpreter still stands
        self._builder.start()

    def _build(self, snapshot: Snapshot, state: _State | None, start: int) -> None:
        try:
            built = _Build(self._cpu, snapshot, state, start, lambda: self._cancelled)
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

    def _publish(self, snapshot: Snapshot, state: _State | None, built: _Build, made: Part) -> None:
        """Put a run in the place of what it was made from; edits meanwhile are kept."""
        if state is not None and state is not self._state:
            return self._build_if_needed()  # the codes were given up meanwhile
        now = _State(built.phi, built.fitted_rows, built.floor)
        now.runs = (*(p for p in state.runs if p.last <= made.first), made) if state else (made,)
        now.covered, now.oldest = snapshot.rows, snapshot.version
        now.predicted_bytes = built.predicted_bytes
        if state is not None:
            old = state.tail
            keep = np.arange(old.count)
            keep = keep[(keep >= built.tail_count) | (old.rows[: old.count] < made.first)]
            rows = old.rows[keep]
            near, far = order.unpacked(old, keep)
            radii = old.reach[keep // order.LEAF]
            now.tail = order.append_codes(now.tail, near, far, rows, radii, now.floor)
            now.covered = max(state.covered, snapshot.rows)
        self._state = now
        newest = self._newest
        assert newest is not None
        # Bring the new run to the versions that were published while it was made.
        self._pages, self._seen = snapshot.pages, {snapshot.version}
        if newest.version > snapshot.version:
            self._take_in(newest)
        self._build_if_needed()
        return None


class _Build:
    """One run in the making: from a snapshot, in a thread."""

    def __init__(
        self, cpu: Any, snapshot: Snapshot, state: _State | None, start: int, cancelled: Any
    ) -> None:
        self._cpu, self._snapshot, self._cancelled = cpu, snapshot, cancelled
        self._state, self._start = state, start
        self.tail_count = state.tail.count if state else 0
        self.predicted_bytes = state.predicted_bytes if state else float("inf")
        self.fitted_rows = state.fitted_rows if state else snapshot.rows
        self.floor = 0.0
        self.phi: codes.Map

    def run(self) -> Part | None:
        snapshot, state = self._snapshot, self._state
        live = snapshot.live
        radii = snapshot.radii
        if state is None:
            sample = snapshot.keys if snapshot.rows <= 8192 else self._sample()
            positive = radii[live & (radii >= 0)]
            self.floor = float(positive.median()) if len(positive) else 0.0
            phi = codes.fit(sample, codes.scale_of(positive, sample))
            if phi is None:
                return None
            self.phi = phi
        else:
            self.phi, self.floor = state.phi, state.floor
        encoded = order.Encoded.room(snapshot.rows - self._start)
        for at in range(self._start, snapshot.rows, _CHUNK):
            if self._cancelled():
                return None
            made = codes.encode_keys(self.phi, self._keys(at, min(at + _CHUNK, snapshot.rows)))
            encoded.put(at - self._start, made)
        part = order.run(
            encoded, self._start, radii[self._start :].numpy(), self.floor, self._cpu.kd_order
        )
        self._look_around(part, radii)
        if state is None:
            self._predict(part)
        return part

    def _sample(self) -> torch.Tensor:
        rows = torch.arange(0, self._snapshot.rows, max(1, self._snapshot.rows // 4096))
        snapshot = self._snapshot
        slots = snapshot.key_slot[rows] if snapshot.counts.key_moves else rows
        return snapshot.key_slots[slots]

    def _keys(self, first: int, last: int) -> torch.Tensor:
        snapshot = self._snapshot
        if snapshot.counts.key_moves:
            return snapshot.key_slots[snapshot.key_slot[first:last]]
        return snapshot.key_slots[first:last]

    def _alone(self, part: Part) -> Certificate:
        """Return a certificate of this part only, to ask it about itself."""
        alone = Certificate(self._cpu)
        alone._cancelled = True
        alone._state = _State(self.phi, self.fitted_rows, self.floor)
        alone._state.runs = (part,)
        alone._state.covered = self._snapshot.rows
        alone._seen.add(self._snapshot.version)
        alone._widest = float(self._snapshot.radii.max())
        return alone

    def _look_around(self, part: Part, radii: torch.Tensor) -> None:
        """Set the isolated bits of a few keys whose radius is above the floor."""
        assert part.isolated is not None
        large = np.flatnonzero(radii.numpy()[part.first : part.last] > self.floor)
        if not 0 < len(large) <= OUTLIERS:
            return
        assert part.places is not None
        view = self._alone(part).view(self._snapshot)
        positions = part.places[large].astype(np.int64)
        bits = np.zeros_like(part.isolated)
        view.plan.isolated(
            book=view.book,
            part=0,
            positions=positions.ctypes.data,
            count=len(positions),
            bits=bits.ctypes.data,
        )
        part.isolated = bits

    def _predict(self, part: Part) -> None:
        """Calibrate: the bytes a look-up reads, asked of keys themselves."""
        snapshot = self._snapshot
        view = self._alone(part).view(snapshot)
        count = min(64, snapshot.rows)
        rows = torch.linspace(0, snapshot.rows - 1, count).long()
        slots = snapshot.key_slot[rows] if snapshot.counts.key_moves else rows
        queries = snapshot.key_slots[slots].float().contiguous()
        width = snapshot.key_dim
        read = view.plan.effort(view.book, queries.data_ptr(), width, 0, count)
        total = 64 * read["boxes"] + codes.NEAR * read["codes"] + codes.FAR * read["survivors"]
        # A key finds itself; every other recheck misses the cache, so it counts twice.
        others = max(0, read["rechecks"] - count)
        total += 2 * others * view.key_bytes + read["exhaustive"] * view.key_bytes * part.count
        # The projection reads 16 rows from the cache: a tenth of what memory would cost.
        self.predicted_bytes = total / count + codes.NEAR * width * 2 / 10


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


@atexit.register
def _stop_building() -> None:
    for certificate in list(_builders):
        certificate._cancelled = True
        certificate.settle()
