"""The codebook: keys, values, radii and labels of every edit, one writer, any number of readers.

Keys and values sit in append-only slots at fixed addresses (`slots`). What may change of a row is
in pages of 4 096 rows that are copied when they are written (`pages`). So a `Snapshot` never
changes and readers need no lock. A `Draft` is the writer's; nothing of it is seen until it is
published by one store.

A row's number is its order of creation. It decides ties, and is never given to another row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from grace_fast.codebook import forks, pages, scalars
from grace_fast.codebook.buffers import memory_errors
from grace_fast.codebook.caches import Cached
from grace_fast.codebook.checks import DTYPES, checked_label, checked_radii, checked_rows
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import MappedFile
from grace_fast.codebook.modes import lasting
from grace_fast.codebook.slots import Slots, shape_of
from grace_fast.codebook.snapshot import NotCopied, Snapshot

Block = tuple[Any, Any, Any]  # keys [M, D], values [M, V], radii [M]; tensors or arrays
Blocks = Iterable[Block] | Callable[[int], Iterable[Block]]
Listener = Callable[[Snapshot], None]  # is told of a version before it is published


class Journal(Protocol):
    """What records every version of a codebook where it outlives the process."""

    def record(self, before: Snapshot, after: Snapshot) -> None:
        """Record a version before anybody sees it; what is raised refuses it."""

    def revoke(self, after: Snapshot) -> None:
        """Drop a version that was recorded and refused by somebody else."""


@dataclass(frozen=True)
class Directories:
    """How codebooks are opened, saved and built in directories, which is for the store to say."""

    open: Callable[..., Codebook]
    save: Callable[..., None]
    build: Callable[..., Codebook]


class Codebook(NotCopied):
    """Keys [N, D], values [N, V], radii [N], labels and ids of edits, in one element type.

    `len` counts the live rows; everything indexed by row holds the removed ones too (`live` tells).
    `reserve_rows` is how many keys fit, and as many values; by default 128 GiB of each on the host.

    Raises: ValueError for a width or a reservation below 1, or an element type other than fp32,
    bf16 and fp16.
    """

    directories: ClassVar[Directories]  # put here by `grace_fast.store.large`

    @lasting()
    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reserve_rows: int | None = None,
    ) -> None:
        key_dim = scalars.positive("key_dim", key_dim)
        value_dim = scalars.positive("value_dim", value_dim)
        if reserve_rows is not None:
            reserve_rows = scalars.positive("reserve_rows", reserve_rows)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
        self.key_dim, self.value_dim, self.dtype = key_dim, value_dim, dtype
        self.device = torch.device(device)
        self._slots = Slots(key_dim, value_dim, dtype, self.device, reserve_rows)
        self._writer = threading.RLock()
        self.was_forked_in_writing = False  # while another thread wrote
        forks.guard(self, "_writer", forks.Order.WRITING, _drop_draft_in_child)
        self._draft: Draft | None = None
        self._cached: Cached = {}
        self._listeners: dict[str, Listener] = {}
        self._journal: Journal | None = None
        # The newest version; a plain attribute, for who asks a million times a second.
        self.current = Snapshot(
            0,
            pages.Counts(),
            (),
            self._slots.keys.tensor,
            self._slots.values.tensor,
            self._slots.labels,
            self._slots.ids.tensor,
            self._cached,
        )

    @classmethod
    @lasting()
    def restore(
        cls,
        keys: Tensor | MappedFile,
        values: Tensor | MappedFile,
        labels: Labels,
        columns: Mapping[str, Tensor],
        device: torch.device,
        version: int = 0,
    ) -> Codebook:
        """Return a codebook from checked parts: slots, and a column for each field of a page.

        Slots of a file stay where they are; further ones are in memory.
        """
        rows, width, dtype = shape_of(keys)
        value_rows, value_width, _ = shape_of(values)
        book = cls(width, value_width, dtype, device)
        count, slots = len(columns["id"]), book._slots
        slots.fill(keys, values, labels, columns["id"])
        in_order = torch.arange(count, device="cpu")
        counts = pages.Counts(
            rows=count,
            live=int(columns["live"].sum()),
            keys=rows,
            values=value_rows,
            labels=len(labels),
            key_moves=int(not torch.equal(columns["key_slot"], in_order)),
            value_moves=int(not torch.equal(columns["value_slot"], in_order)),
            widest=float(columns["radius"].max()) if count else -1.0,
        )
        book.current = replace(
            book.current,
            version=version,
            counts=counts,
            pages=pages.filled(columns, book.device),
            key_slots=slots.keys.tensor,
            value_slots=slots.values.tensor,
            label_slots=labels,
            key_file=keys if isinstance(keys, MappedFile) else None,
            value_file=values if isinstance(values, MappedFile) else None,
        )
        return book

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        verify: bool = False,
        hmac_key: bytes | None = None,
        max_radius: float | None = None,
    ) -> Codebook:
        """Open a codebook where it lies: what is resident is read and checked, the rest is mapped.

        It is a codebook like any other. Edits are in memory, the files are not written; `save`
        keeps them. A directory of `save_pretrained` or `attach(path=)` opens too, all of it in
        memory, as its newest version.

        verify: read every block of keys and values too, rather than when it is first fetched.
        hmac_key: the key that the manifest must have been signed with.
        max_radius: no ball may be wider.

        Raises: FileNotFoundError, CodebookCorrupt naming the file or tensor that is not what was
        saved.
        """
        asked = {"verify": verify, "hmac_key": hmac_key, "max_radius": max_radius}
        return cls.directories.open(path, **asked)

    @classmethod
    def build(
        cls,
        path: str | Path,
        blocks: Blocks,
        *,
        rows: int | None = None,
        threads: int | None = None,
        progress: bool | None = None,
    ) -> Codebook:
        """Make a codebook of a stream in a directory, in bounded memory, and open it.

        An interrupted build goes on when it is called again with the same stream: rows that were
        written are compared and passed over. It takes about 100 bytes of memory for each key.

        blocks: (keys [M, D], values [M, V], radii [M]) again and again, of any M; or a function of
            the first row that is wanted, which returns them from there on.
        rows: how many there will be, for the progress bar.
        threads: that encode and sort; by default as many as torch uses.
        progress: show a bar; by default where there is a terminal, if tqdm is installed.

        Raises: ValueError and TypeError as `Codebook.append`, naming the row; ValueError where the
        stream is not the one that was begun with; OSError where it cannot be written,
        FileExistsError where the directory holds a model's edits. What the directory held before
        stays valid.
        """
        asked = {"rows": rows, "threads": threads, "progress": progress}
        return cls.directories.build(path, blocks, **asked)

    def save(self, path: str | Path, *, hmac_key: bytes | None = None) -> None:
        """Save the codebook to a directory, its codes too, so that opening it computes nothing.

        hmac_key: at least 16 random bytes that the manifest is signed with; see `open`.

        Raises: OSError where it cannot be written, and what was there before stays valid then;
        FileExistsError where the directory holds a model's edits or an unfinished build;
        CodebookLocked where another process saves or edits there.
        """
        Codebook.directories.save(self, path, hmac_key=hmac_key)

    def snapshot(self) -> Snapshot:
        """Return the codebook as it is now; what is edited later does not change it."""
        return self.current

    @contextmanager
    def writing(self) -> Iterator[Draft]:
        """Open a draft: published as one new version at the end, dropped if anything is raised.

        Inside another `writing` of the same thread it is the same draft.
        """
        with self._writer, lasting():
            if self._draft is not None:
                yield self._draft
                return
            next_id = self._slots.next_id
            self._draft = draft = Draft(self._slots, self.current)
            try:
                yield draft
                published = replace(draft.snapshot(), cached=self._cached, base=None)
                self._publish(published)
            except BaseException:
                self._slots.next_id = next_id
                raise
            finally:
                self._draft = None

    def _publish(self, published: Snapshot) -> None:
        """Let a version be recorded, then listened to, then seen; whoever raises refuses it."""
        journal = self._journal
        if journal is not None:
            journal.record(self.current, published)
        try:
            for listener in self._listeners.values():
                listener(published)
            self.current = published
        except BaseException:
            if self.current is not published:
                self._go_back_in_listeners()
                if journal is not None:
                    journal.revoke(published)
            raise

    def _go_back_in_listeners(self) -> None:
        """Go back to the version before one that listeners have seen."""
        self.current = replace(self.current, era=self.current.era + 1)
        for listener in self._listeners.values():
            with suppress(Exception):  # it holds an earlier version then, as it would have anyway
                listener(self.current)

    def retain(self, journal: Journal | None) -> None:
        """Let every version be recorded before it is published; None to end that."""
        with self._writer:
            self._journal = journal

    @contextmanager
    def sketching(self) -> Iterator[Draft]:
        """Open a draft that is dropped at the end: to see what a change would come to.

        What it holds may be written over afterwards; take copies. Inside a `writing` of the same
        thread it goes on from what was drafted there, and that stays as it is.
        """
        with self._writer, lasting():
            outer, next_id = self._draft, self._slots.next_id
            draft = Draft(self._slots, self.current) if outer is None else outer.continued()
            self._draft = draft
            try:
                yield draft
            finally:
                self._draft, self._slots.next_id = outer, next_id
                draft.drop_labels()

    @contextmanager
    def locked(self) -> Iterator[Snapshot]:
        """Hold writers off for a moment: to read what they keep beside it, or to replay a graph."""
        with self._writer:
            yield self.current

    held = locked

    def subscribe(self, name: str, on_publish: Listener) -> None:
        """Call `on_publish` with the newest version, and with every later one before it is seen.

        What it raises refuses that version. A listener of the same name is replaced.
        """
        with self._writer:
            on_publish(self.current)
            self._listeners[name] = on_publish

    @memory_errors()
    def append(
        self,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Tensor | None] | Tensor | None = None,
    ) -> Tensor:
        """Add M rows and return their stable ids, [M] int64.

        keys: [M, D], values: [M, V], both finite; radii: [M], finite, negative for a dead key;
        labels: M tensors of label ids, or one tensor [M] or [M, L] of them.

        Raises: ValueError for another width, element type or count, TypeError for no tensor,
        MemoryError where the rows cannot be had. The codebook is as before then.
        """
        keys = checked_rows("keys", keys, self.key_dim, self.dtype).to(self.device)
        values = checked_rows("values", values, self.value_dim, self.dtype).to(self.device)
        radii = checked_radii(radii)
        if not len(keys) == len(values) == len(radii):
            raise ValueError(
                "keys, values and radii must have as many rows, "
                f"got {len(keys)}, {len(values)} and {len(radii)}"
            )
        listed = None if labels is None else [checked_label(label) for label in labels]
        if listed is not None and len(listed) != len(keys):
            raise ValueError(f"labels must be {len(keys)}, one for each key, got {len(listed)}")
        with self.writing() as draft:
            rows = draft.append(keys, values, radii, listed)
            return self._slots.ids.tensor[rows.start : rows.stop, 0].clone()

    def remove(self, key_id: int) -> None:
        """Take the row of an id out; its number and id are not given again.

        Raises: KeyError where no live row has the id.
        """
        with self.writing() as draft:
            draft.remove(draft.snapshot().row_of(int(key_id)))

    def __len__(self) -> int:
        return len(self.current)

    def __repr__(self) -> str:
        return (
            f"Codebook({len(self)} keys, key_dim={self.key_dim}, value_dim={self.value_dim}, "
            f"dtype={self.dtype}, device={str(self.device)!r}, version={self.version})"
        )

    @property
    def version(self) -> int:
        """A number that grows by one with every published change."""
        return self.current.version

    @property
    def keys(self) -> Tensor:
        """[N, D], removed rows included."""
        return self.current.keys

    @property
    def values(self) -> Tensor:
        """[N, V], removed rows included."""
        return self.current.values

    @property
    def radii(self) -> Tensor:
        """[N] float32, removed rows included."""
        return self.current.radii

    @property
    def labels(self) -> list[Tensor | None]:
        """N label tensors, removed rows included."""
        return self.current.labels

    @property
    def ids(self) -> Tensor:
        """[N] int64, ascending, removed rows included."""
        return self.current.ids

    @property
    def live(self) -> Tensor:
        """[N] bool, False for a removed row."""
        return self.current.live


def _drop_draft_in_child(book: Codebook, whole: bool) -> None:
    """Be in a forked child as the published version, without the draft of another thread."""
    book.was_forked_in_writing = not whole
    if whole:
        return
    book._draft = None
    current, slots = book.current, book._slots
    slots.next_id = int(current.ids[-1]) + 1 if current.rows else 0
    slots.labels.cut(current.counts.labels)
    book._go_back_in_listeners()  # they may have seen what is not published here
