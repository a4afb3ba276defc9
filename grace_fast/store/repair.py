"""A sound directory of one that is damaged or was made to harm, without what cannot be trusted.

Everything that is dropped is listed with its reason. The directory as it was is kept beside, under
`NAME.damaged-1` and so on, before a byte of it is replaced; then one rename of the manifest goes
from the old codebook to the new one, with the lock held. A row answers on as it did, or not at all.

Where there is nothing to stand on, it is refused: a manifest that is not what was sealed, a tensor
file that cannot be read, keys or values or columns of rows in which any row may be wrong.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.mapped import CodebookCorrupt, MappedFile, open_regular
from grace_fast.edits.edits import History
from grace_fast.store import atomic, files, history_columns, saved, side_files, tensor_files
from grace_fast.store import columns as layout
from grace_fast.store.checks import check_radii
from grace_fast.store.damaged_rows import DamagedRowFile
from grace_fast.store.journal import Entry, JournalFile
from grace_fast.store.large import resident
from grace_fast.store.locks import LOCK, Lock
from grace_fast.store.records import redo
from grace_fast.store.salvage import (
    HISTORY,
    CorruptSlots,
    Dropped,
    SalvagedHistory,
    Untrusted,
    mend_rows,
    without_corrupt_slots,
)
from grace_fast.store.versions import journal_place

_HOST = torch.device("cpu")
_MOST_LISTED = 100_000  # versions; who makes a journal can say that it had any number


@dataclass
class Repaired:
    """What became of a directory; where it was sound, nothing was changed."""

    path: Path
    kept: Path | None = None  # where the directory lies as it was; None where it was sound
    dropped: list[Dropped] = field(default_factory=list)
    made_again: list[str] = field(default_factory=list)  # what was damaged, and nothing is lost by

    @property
    def was_sound(self) -> bool:
        """Whether there was nothing to repair."""
        return self.kept is None


def repair(
    path: str | Path,
    *,
    hmac_key: bytes | None = None,
    max_radius: float | None = None,
    keep_rows: bool = False,
) -> Repaired:
    """Make a directory sound, dropping and listing what cannot be trusted.

    hmac_key: what the directory is signed with, and will be again.
    max_radius: rows with a wider ball go; by default what the directory's own settings say.
    keep_rows: rows stay whose key, value and ball are as they were saved and whose edits are lost,
        as keys that no edit explains; without it they go with their edits.

    Raises: FileNotFoundError, CodebookCorrupt where there is nothing to stand on, CodebookLocked
    where it is edited, ValueError for a signed one without its key, OSError where it cannot be
    written. It is as before then.
    """
    folder = atomic.absolute(path)
    files.read_config(folder)  # nothing is made where nothing is
    with closing(Lock(folder)):
        config = files.read_config(folder, hmac_key)
        if hmac_key is None and "hmac" in config:
            raise ValueError(f"{folder} is signed: give its hmac_key")
        report = Repaired(folder)
        if not _is_sound(folder, config, hmac_key, max_radius):
            damaged = _Damaged(folder, config, hmac_key, max_radius, keep_rows, report)
            _replace(_Bare(damaged) if files.is_mapped(config) else _Edited(damaged), report)
        return report


@dataclass(frozen=True)
class _Damaged:
    """A directory that is not sound, and what is asked of its repair; as in `repair`."""

    folder: Path
    config: dict[str, Any]
    hmac_key: bytes | None
    max_radius: float | None
    keep_rows: bool
    report: Repaired


def _is_sound(
    folder: Path, config: Mapping[str, Any], key: bytes | None, max_radius: float | None
) -> bool:
    try:
        if files.is_mapped(config):
            resident.open(folder, verify=True, hmac_key=key, max_radius=max_radius)
        else:
            saved.read_saved(folder, key, max_radius).codebook()
    except CodebookCorrupt:
        return False
    except OSError:  # an edit that was interrupted, in a journal that needs a writer
        if config.get("journal") is None:
            raise
        return False
    return True


def _replace(work: _Bare | _Edited, report: Repaired) -> None:
    """Let a directory be what was made of it, once it lies beside as it was."""
    kept = _keep(report.path)
    try:
        work.write()
    except BaseException:
        shutil.rmtree(kept)
        raise
    report.kept = kept


def _keep(folder: Path) -> Path:
    """Return a directory that holds the files of another one, by links where that can be."""
    place = folder.absolute()
    for number in count(1):
        kept = place.with_name(f"{place.name}.damaged-{number}")
        if not os.path.lexists(kept):
            break
    kept.mkdir()
    try:
        for each in sorted(place.iterdir()):
            if each.name != LOCK and each.is_file() and not each.is_symlink():
                try:
                    os.link(each, kept / each.name)
                except OSError:  # no links here
                    shutil.copy2(each, kept / each.name)
                    atomic.synchronise(kept / each.name)
        atomic.synchronise(kept)
        atomic.synchronise(kept.parent)
    except BaseException:
        shutil.rmtree(kept)
        raise
    return kept


def _read_columns(folder: Path, described: Any, report: Repaired) -> tuple[dict[str, Tensor], bool]:
    """Return the columns of a directory that are what was saved, and whether its history is.

    Raises: CodebookCorrupt where rows cannot be told without one that is not.
    """
    wrong: set[str] = set()
    columns = tensor_files.read_file(folder, described, wrong)
    history = {name for name in wrong if name.startswith(HISTORY)}
    labels = wrong & {"labels.length", "labels.ids"}
    needed = sorted(wrong - history - labels)
    if needed:
        raise CodebookCorrupt(
            f"{folder}: {needed} of {described['file']} are not what was saved (checksum), and "
            "nothing tells which rows are meant; take the directory from a backup",
            field=needed[0],
        )
    if labels and "labels.length" in columns:
        columns["labels.length"] = torch.full_like(columns["labels.length"], -1)
        columns["labels.ids"] = torch.zeros(0, dtype=torch.int64, device="cpu")
        report.dropped.append(Dropped("label", None, "the labels are not what was saved"))
    return columns, not history


def _list_rows(untrusted: Untrusted, keep_rows: bool, live: Tensor) -> list[Dropped]:
    gone = untrusted.gone(keep_rows)
    return [Dropped("row", row, why) for row, why in sorted(gone.items()) if bool(live[row])]


def _without(live: Tensor, rows: Mapping[int, str]) -> Tensor:
    left = live.clone()
    left[list(rows)] = False
    return left


def _require_like(columns: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CodebookCorrupt unless columns have the names, types and widths of some others.

    Those of one stem, as `rows` of `rows.id`, must be of one length.
    """
    lengths: dict[str, int] = {}
    for name, each in wanted.items():
        found = columns.get(name)
        kind = (each.ndim, each.dtype, each.shape[1:])
        if found is None or (found.ndim, found.dtype, found.shape[1:]) != kind:
            raise CodebookCorrupt(f"{name} must be {each.dtype}, one for each row", field=name)
        stem = name if name.startswith("labels") else name.split(".")[0]
        if len(found) != lengths.setdefault(stem, len(found)):
            raise CodebookCorrupt(f"{name} is not as long as its neighbours", field=name)


def _row_columns() -> dict[str, Tensor]:
    return layout.pack_rows(Codebook(1, 1).snapshot())


class _Bare:
    """A codebook alone: keys, values and codes in files of their own.

    Raises: CodebookCorrupt where there is nothing to stand on.
    """

    def __init__(self, damaged: _Damaged) -> None:
        folder, config, report = damaged.folder, damaged.config, damaged.report
        self._folder, self._key, self._report = folder, damaged.hmac_key, report
        found, _ = _read_columns(folder, config.get("tensors"), report)
        columns = layout.fill_defaults(found)
        _require_like(columns, _row_columns())
        self._given = {
            name: DamagedRowFile(*tensor_files.described_rows(folder, config, name, columns), name)
            for name in files.MAPPED
        }
        self._odd = {name: given.odd_rows() for name, given in self._given.items()}
        for name, rows in self._odd.items():
            if bool(rows.any()):
                report.made_again.append(f"the {name}, with zeros in the place of what was changed")
        untrusted, live = Untrusted(), columns["rows.live"]
        columns = mend_rows(columns, CorruptSlots(**self._odd), damaged.max_radius, untrusted)
        report.dropped += _list_rows(untrusted, True, live)
        self._columns = columns | {"rows.live": _without(live, untrusted.numbers)}

    def write(self) -> None:
        """Write keys and values anew where they must be, and the codes, and let them be it."""
        token = secrets.token_hex(8)
        places = {name: self._folder / f"{name}-{token}.safetensors" for name in self._given}
        try:
            written = {
                name: given.write(places[name], self._odd[name])
                for name, given in self._given.items()
            }
            keys, values = (
                MappedFile(each.path, name, each.shape, each.checks)
                for name, each in written.items()
            )
            book = layout.unpack_rows(self._columns, keys, values, _HOST)
            snapshot, coded = resident.with_codes(book)
            resident.publish(self._folder, token, written, snapshot, coded, self._key)
        except BaseException:
            for place in places.values():
                place.unlink(missing_ok=True)
            raise
        if coded:
            self._report.made_again.append("the codes")


class _Edited:
    """A codebook and its edits, and perhaps a journal of what came after.

    Raises: CodebookCorrupt where there is nothing to stand on.
    """

    def __init__(self, damaged: _Damaged) -> None:
        folder, config, report = damaged.folder, damaged.config, damaged.report
        self._folder, self._config, self._key = folder, config, damaged.hmac_key
        self._saved = saved.read_saved(folder, self._key, damaged.max_radius)
        self._max_radius = self._saved.settings.max_radius
        self._keep_rows, self._report = damaged.keep_rows, report
        self._untrusted = Untrusted()
        columns, is_told = _read_columns(folder, config.get("tensors"), report)
        has_journal = config.get("journal") is not None
        fits = not report.dropped and is_told and self._fits(columns)
        if not fits:
            columns = self._mended(columns, is_told, drops=not has_journal)
        self._entries: list[Entry] = []
        if has_journal:
            self._take_versions(columns)
        else:
            self._book, self._history = self._unpacked(columns)
        self._is_folded = not fits or not has_journal
        if has_journal:
            self._finish()

    def _fits(self, columns: Mapping[str, Tensor]) -> bool:
        try:
            check_radii(columns, self._max_radius)
            self._unpacked(columns)
        except CodebookCorrupt:
            return False
        return True

    def _unpacked(self, columns: Mapping[str, Tensor]) -> tuple[Codebook, History]:
        book = layout.unpack_codebook(columns, _HOST, self._saved.base)
        texts, next_id = self._config["texts"], int(self._config["next_id"])
        return book, history_columns.unpack_history(columns, book.snapshot(), texts, next_id)

    def _mended(self, columns: dict[str, Tensor], is_told: bool, drops: bool) -> dict[str, Tensor]:
        """Return columns that can be read, without the rows and edits that cannot be trusted.

        drops: else rows whose numbers cannot be are noted, and stay with their edits for a journal
        that may take these back.
        """
        _require_like(columns, _row_columns())
        found = {}
        for name in files.MAPPED:
            slots = columns.get(name)
            if slots is None or slots.ndim != 2 or slots.dtype not in tensor_files.DTYPES.values():
                raise CodebookCorrupt(f"{name} must be a matrix of numbers", field=name)
            columns[name], found[name] = without_corrupt_slots(slots)
        corrupt = CorruptSlots(**found)
        untrusted, live = self._untrusted, columns["rows.live"]
        mended = mend_rows(columns, corrupt, self._max_radius, untrusted)
        snapshot = layout.unpack_codebook(mended, _HOST).snapshot()
        empty = history_columns.pack_history(History(), snapshot)
        try:
            if not is_told:
                raise CodebookCorrupt("its edits are not what was saved (checksum)")
            _require_like(mended, empty)
        except CodebookCorrupt as error:
            mended |= empty
            why = f"nothing tells what it is owed to: {error}"
            untrusted.unexplained |= dict.fromkeys(live.nonzero()[:, 0].tolist(), why)
            self._report.dropped.append(Dropped("edit", None, f"all of them: {error}"))
        history = SalvagedHistory(mended, corrupt, self._max_radius, untrusted)
        out = untrusted.unexplained | (untrusted.numbers if drops else {})
        mended, edits = history.without(out.keys())
        gone = untrusted.gone(self._keep_rows)
        self._report.dropped += _list_rows(untrusted, self._keep_rows, live) if drops else []
        self._report.dropped += [Dropped("edit", edit, why) for edit, why in edits]
        silent = {row: why for row, why in gone.items() if drops or row in untrusted.unexplained}
        numbers = mended["edits.id"].tolist() + mended["events.edit"].tolist()
        next_id = 1 + max(numbers, default=-1)
        self._config["next_id"] = max(int(self._config["next_id"]), next_id)
        return mended | {"rows.live": _without(live, silent)}

    def _take_versions(self, columns: Mapping[str, Tensor]) -> None:
        """Go through the versions one after the other as far as that can be, list the others."""
        entries, newest, why = _salvaged(self._folder, self._config, self._key, self._report)
        self._book, self._history, done, stop = self._replayed(columns, entries)
        self._entries = entries[:done]
        if stop:
            why = stop
            self._book, self._history, *_ = self._replayed(columns, self._entries)
        last = self._saved.base + done
        newest = max([newest or 0] + [entry.version for entry in entries])
        lost = range(last + 1, newest + 1)
        if why and not 0 < len(lost) <= _MOST_LISTED:
            why, lost = f"{why}; how many followed is not known", range(last + 1, last + 2)
        self._report.dropped += [Dropped("version", each, why) for each in lost if why]

    def _replayed(
        self, columns: Mapping[str, Tensor], entries: Sequence[Entry]
    ) -> tuple[Codebook, History, int, str]:
        """Return what a base and versions come to; how many did, and why the next one does not.

        Where one does not, the codebook and its history are not to be used.
        """
        book, history = self._unpacked(columns)
        done = 0
        with book.writing() as draft:
            for entry in entries:
                try:
                    redo(entry.content, draft, history)
                except CodebookCorrupt as error:
                    return book, history, done, f"version {entry.version}: {error}"
                draft.version = entry.version
                done += 1
            draft.version = self._saved.base + done
        return book, history, done, ""

    def _finish(self) -> None:
        """Drop from the newest version, once it is reached, what cannot be trusted."""
        snapshot = self._book.snapshot()
        try:
            if self._untrusted.numbers:
                raise CodebookCorrupt("rows of its base cannot be trusted")
            history_columns.check_replayed(snapshot, self._history, self._max_radius)
        except CodebookCorrupt:
            version = snapshot.version
            columns = layout.pack_codebook(snapshot) | history_columns.pack_history(
                self._history, snapshot
            )
            texts = {str(e.id): list(e.text) for e in self._history.edits.values() if e.text}
            self._config = self._config | {"texts": texts, "next_id": self._history.next_id}
            self._book, self._history = self._unpacked(self._mended(columns, True, drops=True))
            with self._book.writing() as draft:
                draft.version = version
            self._is_folded = True
        if self._is_folded and self._entries:
            self._report.made_again.append(
                f"the base, of version {self._book.version}: earlier ones cannot be gone back to"
            )

    def write(self) -> None:
        """Write a base with no journal, or a journal of the base there is."""
        if not self._is_folded:
            self._write_journal()
            return
        gone = self._untrusted.gone(self._keep_rows)
        hits = {str(row): n for row, n in self._saved.hits.items() if row not in gone}
        snapshot = self._book.snapshot()
        described = self._saved.described | {"hits": hits, "version": snapshot.version}
        saved.write(self._folder, described, snapshot, self._history, self._key)

    def _write_journal(self) -> None:
        name = secrets.token_hex(8)
        path = self._folder / f"{files.JOURNALS}-{name}.sqlite"
        try:
            with closing(JournalFile.create(path, name, self._saved.base, self._key)) as journal:
                for each in self._entries:
                    journal.append(each.version, each.kind, each.content, each.time)
            files.change_journal(self._folder, {"file": path.name, "name": name}, self._key)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _salvaged(
    folder: Path, config: Mapping[str, Any], key: bytes | None, report: Repaired
) -> tuple[list[Entry], int | None, str]:
    """Return the versions of a journal that are what was written, and its last one if it says.

    And why there is no further one, where there may have been. It is read from a copy: a version
    that was interrupted is rolled back there. What lies beside it and is none of its own is listed
    as dropped, and not read.

    Raises: OSError where it cannot be read.
    """
    entries: list[Entry] = []
    newest = None
    try:
        path, name, base = journal_place(folder, config)
        with atomic.temporary_folder(folder.absolute().parent) as room:
            copied = room / path.name
            _copy(path, copied)
            odd = side_files.foreign(path, side_files.page_bytes_of(copied))
            report.dropped += [Dropped("file", None, f"{each} {why}") for each, why in odd.items()]
            rollback = side_files.rollback_of(path)
            if rollback not in odd and rollback.exists():
                _copy(rollback, side_files.rollback_of(copied))
            with closing(JournalFile(copied, name, base, key, salvage=True)) as journal:
                with suppress(CodebookCorrupt):
                    newest = journal.newest()
                entries.extend(journal.sound_entries())
    except FileNotFoundError:
        return entries, newest, f"{path} is missing: the codebook is not complete"
    except CodebookCorrupt as error:
        return entries, newest, str(error)
    return entries, newest, ""


def _copy(file: Path, target: Path) -> None:
    """Copy a regular file.

    Raises: CodebookCorrupt where something else has its name, OSError where it cannot be copied.
    """
    with os.fdopen(open_regular(file), "rb") as source, target.open("xb") as made:
        shutil.copyfileobj(source, made)
