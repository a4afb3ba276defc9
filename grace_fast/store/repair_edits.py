"""Repair of a model's edits: of the base, and of the versions that came after it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.mapped import open_regular
from grace_fast.edits.history import History
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import atomic, files, history_columns, saved, side_files, tensor_files
from grace_fast.store.checks import check_radii
from grace_fast.store.columns import pack_codebook, unpack_codebook
from grace_fast.store.journal import Entry, JournalFile
from grace_fast.store.records import redo
from grace_fast.store.salvage import (
    CorruptSlots,
    Dropped,
    Repaired,
    SalvagedHistory,
    Untrusted,
    mend_rows,
    read_columns,
    require_rows,
    without_corrupt_slots,
    without_rows,
)
from grace_fast.store.versions import journal_place

_HOST = torch.device("cpu")
_MOST_LISTED = 100_000  # versions; who makes a journal can say that it had any number


class EditsRepair:
    """A codebook and its edits, and perhaps a journal of what came after.

    Raises: CodebookCorrupt where there is nothing to stand on.
    """

    def __init__(
        self,
        folder: Path,
        hmac_key: bytes | None,
        max_radius: float | None,
        keep_rows: bool,
        report: Repaired,
    ) -> None:
        self._folder, self._key = folder, hmac_key
        self._saved = saved.read_saved(folder, hmac_key, max_radius)
        self._config = config = self._saved.config
        self._max_radius = self._saved.settings.max_radius
        self._keep_rows, self._report = keep_rows, report
        self._untrusted = Untrusted()
        columns, is_readable = read_columns(folder, config.get("tensors"), report)
        has_journal = config.get("journal") is not None
        fits = not report.dropped and is_readable and self._fits(columns)
        if not fits:
            columns = self._mended(columns, is_readable, drops=not has_journal)
        self._entries: list[Entry] = []
        self._is_folded = not fits or not has_journal
        if has_journal:
            self._take_versions(columns)
            self._finish()
        else:
            self._book, self._history = self._saved.unpack(columns)

    def _fits(self, columns: Mapping[str, Tensor]) -> bool:
        try:
            check_radii(columns, self._max_radius)
            self._saved.unpack(columns)
        except CodebookCorrupt:
            return False
        return True

    def _mended(
        self, columns: dict[str, Tensor], is_readable: bool, drops: bool
    ) -> dict[str, Tensor]:
        """Return columns that can be read, without the rows and edits that cannot be trusted.

        drops: else rows whose numbers cannot be are noted, and stay with their edits for a journal
        that may take these back.
        """
        require_rows(columns)
        found = {}
        for name in files.MAPPED:
            slots = columns.get(name)
            if slots is None or slots.ndim != 2 or slots.dtype not in tensor_files.DTYPES.values():
                raise CodebookCorrupt(f"{name} must be a matrix of numbers", field=name)
            columns[name], found[name] = without_corrupt_slots(slots)
        corrupt = CorruptSlots(**found)
        untrusted, live = self._untrusted, columns["rows.live"]
        mended = mend_rows(columns, corrupt, self._max_radius, untrusted)
        snapshot = unpack_codebook(mended, _HOST).snapshot()
        empty = history_columns.pack_history(History(), snapshot)
        try:
            if not is_readable:
                raise CodebookCorrupt("its edits are not what was saved (checksum)")
            history = SalvagedHistory(mended, corrupt, self._max_radius, untrusted)
        except CodebookCorrupt as error:
            why = f"nothing tells what it is owed to: {error}"
            untrusted.unexplained |= dict.fromkeys(live.nonzero()[:, 0].tolist(), why)
            self._report.dropped.append(Dropped("edit", None, f"all of them: {error}"))
            history = SalvagedHistory(mended | empty, corrupt, self._max_radius, untrusted)
        out = untrusted.unexplained | (untrusted.numbers if drops else {})
        mended, edits = history.without(out.keys())
        gone = untrusted.gone(self._keep_rows)
        self._report.dropped += untrusted.dropped(self._keep_rows, live) if drops else []
        self._report.dropped += [Dropped("edit", edit, why) for edit, why in edits]
        silent = {row: why for row, why in gone.items() if drops or row in untrusted.unexplained}
        numbers = mended["edits.id"].tolist() + mended["events.edit"].tolist()
        next_id = 1 + max(numbers, default=-1)
        self._config["next_id"] = max(int(self._config["next_id"]), next_id)
        return mended | {"rows.live": without_rows(live, silent)}

    def _take_versions(self, columns: Mapping[str, Tensor]) -> None:
        """Go through the versions one after the other as far as that can be, list the others."""
        entries, newest, why = _readable_versions(
            self._folder, self._config, self._key, self._report
        )
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
        book, history = self._saved.unpack(columns)
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
            columns = pack_codebook(snapshot) | history_columns.pack_history(
                self._history, snapshot
            )
            texts = {str(e.id): list(e.text) for e in self._history.edits.values() if e.text}
            self._config.update(texts=texts, next_id=self._history.next_id)
            self._book, self._history = self._saved.unpack(self._mended(columns, True, drops=True))
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
        with atomic.removed_on_failure(path):
            with closing(JournalFile.create(path, name, self._saved.base, self._key)) as journal:
                for each in self._entries:
                    journal.append(each.version, each.kind, each.content, each.time)
            files.change_journal(self._folder, {"file": path.name, "name": name}, self._key)


def _readable_versions(
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
            foreign = side_files.foreign(path, side_files.page_bytes_of(copied))
            report.dropped += [
                Dropped("file", None, f"{each} {why}") for each, why in foreign.items()
            ]
            rollback = side_files.rollback_of(path)
            if rollback not in foreign and rollback.exists():
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
