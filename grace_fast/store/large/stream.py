"""Building a codebook from a stream, in bounded memory, and going on where it was interrupted.

    write the rows of the stream -> fit the map on a sample of them -> encode -> sort

What was written is in `building/` of the directory, with a small state file that is replaced in
one step once what it says is on the disk. The directory's codebook, if it has one, stays as it is
until the new one is whole.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast import _native
from grace_fast.codebook.checks import DTYPES, checked_radii, checked_rows
from grace_fast.codebook.codebook import Block, Blocks, Codebook
from grace_fast.codebook.mapped import HEADER_BYTES, MappedFile
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import CodebookCorrupt
from grace_fast.index.builder import Build
from grace_fast.index.native_view import IndexState
from grace_fast.store import atomic, columns, files, locks, tensor_files
from grace_fast.store.large import resident
from grace_fast.store.large.build_state import STREAMED, BuildState
from grace_fast.store.large.encoded_file import EncodedOnDisk
from grace_fast.store.large.index_file import pack_map, pack_state, unpack_map
from grace_fast.store.row_file import RowWriter, Written
from grace_fast.store.write_behind import WriteBehind

CHECKPOINT_BYTES = 1 << 29  # of keys and values, between two states: a second of writing
SMALLEST_CODED = 4096  # rows; fewer are encoded when they are opened, in the time of a few look-ups


def build(
    path: str | Path,
    blocks: Blocks,
    *,
    rows: int | None = None,
    threads: int | None = None,
    progress: bool | None = None,
) -> Codebook:
    """Make a codebook of a stream in a directory; see `Codebook.build`."""
    folder = atomic.absolute(path)
    folder.mkdir(parents=True, exist_ok=True)
    resident.refuse_taken(folder)
    with _locked(folder / resident.BUILDING) as work:
        try:
            unfinished = _Unfinished(folder, work)
            with _bar(progress, "rows", rows) as bar:
                written = unfinished.write(blocks, bar)
            with _bar(progress, "codes", written["keys"].shape.rows) as bar:
                threads = threads or torch.get_num_threads()
                snapshot, coded = unfinished.encode(written, threads, bar)
            unfinished.publish(written, snapshot, coded)
        except OSError as error:
            raise OSError(
                error.errno,
                f"building {folder} stopped: {error}. What it held is as before; "
                f"build again to go on from here, or remove {work}",
            ) from error
        shutil.rmtree(work)
    return resident.open(folder)


class _Unfinished:
    """A build that is not finished: its files, and the state that says how much of them counts."""

    def __init__(self, folder: Path, work: Path) -> None:
        self._folder, self._work = folder, work
        self._state = BuildState(work)

    def _place(self, name: str) -> Path:
        """Return where a file of rows is: it may have been moved before the last interruption."""
        moved = self._folder / f"{name}-{self._state['token']}.safetensors"
        return moved if moved.exists() else self._work / moved.name

    # The rows of the stream.

    def write(self, blocks: Blocks, bar: Any) -> dict[str, Written]:
        """Have all rows in their files."""
        given: Iterable[Block] = ()
        if not self._state.get("written"):
            given = iter(blocks(self._state.rows) if callable(blocks) else blocks)
            if not self._state:
                given = self._begin(iter(given))
        writers = self._writers()
        try:
            if not self._state.get("written"):
                self._take(given, skip=not callable(blocks), writers=writers, bar=bar)
                self._checkpoint(writers, written=True)
            return {name: writers[name].finish() for name in files.MAPPED}
        finally:
            for writer in writers.values():
                writer.close()

    def _begin(self, given: Iterator[Block]) -> Iterator[Block]:
        """Learn from the first block what the codebook is like, and note it down."""
        first = next(given, None)
        if first is None:
            raise ValueError("blocks must give at least one (keys, values, radii), got none")
        keys, values, _ = _tensors(first)
        if keys.dtype not in DTYPES:
            raise ValueError(f"keys must be one of {DTYPES}, got {keys.dtype}")
        if keys.ndim != 2 or values.ndim != 2 or not keys.shape[1] or not values.shape[1]:
            shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
            raise ValueError(f"keys and values must be [M, D] and [M, V], got {shapes}")
        self._state.begin(keys.dtype, keys.shape[1], values.shape[1])
        for name in STREAMED:
            self._place(name).touch()
        return itertools.chain([first], given)

    def _writers(self) -> dict[str, RowWriter]:
        state, made = self._state, {}
        kinds = dict.fromkeys(files.MAPPED, state.dtype) | {"radii": torch.float32}
        for name, dtype in kinds.items():
            width = state["widths"].get(name, 1)
            made[name] = RowWriter(self._place(name), name, width, dtype, state[name])
        return made

    def _checkpoint(self, writers: Mapping[str, RowWriter], **changes: Any) -> None:
        self._state.save(**{n: writer.checkpoint() for n, writer in writers.items()}, **changes)

    def _take(
        self, given: Iterable[Block], skip: bool, writers: dict[str, RowWriter], bar: Any
    ) -> None:
        """Write the rows of the stream; another thread writes while this one waits for the next."""
        known = self._state.rows
        bar.update(known)
        written_bytes = 0

        def write(block: tuple[Tensor, ...]) -> None:
            nonlocal written_bytes
            for name, part in zip(STREAMED, block, strict=True):
                writers[name].append(part)
                written_bytes += part.nbytes
            if written_bytes >= CHECKPOINT_BYTES:
                self._checkpoint(writers)
                written_bytes = 0
            bar.update(len(block[0]))

        row = 0 if skip else known
        with WriteBehind(write) as put:
            try:
                for block in given:
                    checked = self._checked(block, row)
                    again = min(max(known - row, 0), len(checked[0]))
                    if again:
                        self._compare(writers, row, [part[:again] for part in checked])
                    row += len(checked[0])
                    if again < len(checked[0]):
                        put(tuple(part[again:] for part in checked))
            except BaseException:
                if put.is_here:  # else a worker of the stream ends, in a fork
                    put.finish()
                    self._checkpoint(writers)
                raise
        if row < known:
            raise ValueError(
                f"the stream has {row} rows, {known} were written before; give the same stream, "
                f"or remove {self._work} to start anew"
            )

    def _checked(self, block: Block, row: int) -> tuple[Tensor, Tensor, Tensor]:
        widths, dtype = self._state["widths"], self._state.dtype
        try:
            keys, values, radii = _tensors(block)
            keys = checked_rows("keys", keys, widths["keys"], dtype)
            values = checked_rows("values", values, widths["values"], dtype)
            radii = checked_radii(radii)
            if not len(keys) == len(values) == len(radii):
                raise ValueError(
                    "keys, values and radii must have as many rows, "
                    f"got {len(keys)}, {len(values)} and {len(radii)}"
                )
        except (ValueError, TypeError) as error:
            raise type(error)(f"the block that begins with row {row}: {error}") from error
        return keys, values, radii[:, None]

    def _compare(self, writers: Mapping[str, RowWriter], first: int, parts: list[Tensor]) -> None:
        for name, part in zip(STREAMED, parts, strict=True):
            content = part.contiguous().view(torch.uint8).numpy().tobytes()
            if writers[name].read(first, first + len(part)) != content:
                raise ValueError(
                    f"the stream has other {name} after row {first} than were written before; "
                    f"give the same stream, or remove {self._work} to start anew"
                )

    # Their codes.

    def encode(
        self, written: Mapping[str, Written], threads: int, bar: Any
    ) -> tuple[Snapshot, dict[str, Tensor] | None]:
        """Return the codebook that was written, and its codes; none where it has too few keys."""
        keys, values = (
            MappedFile(each.path, name, each.shape, each.checks)
            for name, each in ((name, written[name]) for name in files.MAPPED)
        )
        radii = torch.from_numpy(np.fromfile(self._place("radii"), np.float32, offset=HEADER_BYTES))
        tensors = columns.fill_defaults({"rows.radius": radii})
        snapshot = columns.unpack_rows(tensors, keys, values, torch.device("cpu")).snapshot()
        if _native.cpu is None or snapshot.rows < SMALLEST_CODED:
            return snapshot, None
        made = Build(_native.cpu, snapshot, None, 0)
        if not self._fit(made):
            return snapshot, None
        encoded = EncodedOnDisk(
            self._work,
            made.rows,
            self._state.get("encoded"),
            lambda encoded: self._state.save(encoded=encoded),
            bar,
        )
        made.encode(encoded, threads)
        part = made.sort(encoded, threads)
        state = IndexState(made.projection, made.fitted_rows, made.min_radius)
        state.segments, state.covered = (part,), made.rows
        state.predicted_bytes = made.predicted_bytes
        return snapshot, pack_state(state, snapshot.rows)

    def _fit(self, made: Build) -> bool:
        """Have the map that was fitted before the interruption, or fit it; False without any."""
        if "map" in self._state:
            tensors = tensor_files.read_file(self._work, self._state["map"])
            if "floor" not in tensors:
                raise CodebookCorrupt(f"{self._work}: the map has no floor; remove {self._work}")
            made.projection = unpack_map(tensors, self._state["widths"]["keys"])
            made.min_radius = float(tensors["floor"])
            return True
        if not made.fit():
            return False
        floor = torch.tensor(made.min_radius, dtype=torch.float64, device="cpu")
        stored = tensor_files.write_new(
            self._work, "map", pack_map(made.projection) | {"floor": floor}
        )
        self._state.save(map=stored)
        return True

    def publish(
        self, written: Mapping[str, Written], snapshot: Snapshot, coded: dict[str, Tensor] | None
    ) -> None:
        """Put the files where the directory's codebook is, and make them that."""
        locks.require_claim(self._work)
        placed = {}
        for name in files.MAPPED:
            place = self._folder / written[name].path.name
            written[name].path.replace(place)
            placed[name] = replace(written[name], path=place)
        resident.publish(self._folder, self._state["token"], placed, snapshot, coded)


def _tensors(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(block, (tuple, list)) or len(block) != 3:
        raise ValueError("blocks must be (keys [M, D], values [M, V], radii [M])")
    parts = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in block]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"blocks must be of tensors or arrays, got {type(part).__name__}")
    return parts[0], parts[1], parts[2]


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """Have a folder for oneself.

    Raises: BlockingIOError where another process has it.
    """
    if work.is_symlink():
        raise CodebookCorrupt(f"{work} is a link; remove it")
    work.mkdir(exist_ok=True)
    try:
        claim = locks.Claim(work / "lock")
    except BlockingIOError:
        raise BlockingIOError(
            f"another process builds in {work}; wait for it, or choose another directory"
        ) from None
    try:
        yield work
    finally:
        claim.close()


class _NoBar:
    def update(self, count: int) -> None:
        """Show nothing."""


def _bar(progress: bool | None, what: str, total: int | None) -> AbstractContextManager[Any]:
    if progress is False or find_spec("tqdm") is None:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    hidden = None if progress is None else False
    bar: AbstractContextManager[Any] = tqdm(
        total=total, desc=what, unit="row", unit_scale=True, disable=hidden
    )
    return bar
