"""Saved codebooks: the manifest of one, then the codebook and its edits, for no model yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.buffers import memory_errors
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.store import atomic, columns, files, history_columns
from grace_fast.store.checks import check_radii
from grace_fast.store.durable import EditableDirectory
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import Lock
from grace_fast.store.versions import go_back, journal_of, replay


@dataclass(frozen=True)
class Saved:
    """A saved codebook that no model is needed for: to list, verify or attach."""

    path: Path
    config: dict[str, Any]
    settings: Settings
    fingerprint: dict[str, Any]
    hits: dict[int, int]  # by row
    hmac_key: bytes | None = None

    @property
    def base(self) -> int:
        """The version that the files hold; what came after is in the journal."""
        return int(self.config.get("version", 0))

    @property
    def described(self) -> dict[str, Any]:
        """The fields of the manifest that are written again with the codebook and its edits."""
        return {name: self.config[name] for name in ("settings", "fingerprint", "hits")}

    def codebook(
        self, device: torch.device | str = "cpu", version: int | None = None
    ) -> tuple[Codebook, History]:
        """Return the codebook and its edits, by default of the newest version.

        Raises: CodebookCorrupt; ValueError for a version that is not there; MemoryError where there
        is no room for them.
        """
        book, history, journal = self.open(device, version)
        if journal is not None:
            journal.close()
        return book, history

    def unpack(
        self, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> tuple[Codebook, History]:
        """Return the codebook and its edits of the tensors of the base.

        Raises: CodebookCorrupt naming the column that does not fit.
        """
        book = columns.unpack_codebook(tensors, torch.device(device), self.base)
        texts, next_id = self.config["texts"], int(self.config["next_id"])
        return book, history_columns.unpack_history(tensors, book.snapshot(), texts, next_id)

    @memory_errors()
    def open(
        self,
        device: torch.device | str = "cpu",
        version: int | None = None,
        read_only: bool = True,
    ) -> tuple[Codebook, History, JournalFile | None]:
        """Return the same and the journal, to go on from there; None where there is none."""
        tensors = files.read_tensors(self.path, self.config)
        check_radii(tensors, self.settings.max_radius)
        book, history = self.unpack(tensors, device)
        journal = journal_of(self.path, self.config, self.hmac_key, read_only)
        if journal is not None:
            replay(journal, book, history, version)
            history_columns.check_replayed(book.snapshot(), history, self.settings.max_radius)
        if version not in (None, book.version):
            last = self.base if journal is None else journal.version
            raise ValueError(
                f"{self.path} holds the versions {self.base} to {last}, wanted {version}"
            )
        return book, history, journal


@memory_errors()
def write(
    path: Path,
    described: Mapping[str, Any],
    snapshot: Snapshot,
    history: History,
    hmac_key: bytes | None = None,
) -> None:
    """Save a codebook and its edits as the files of a directory.

    described: what the manifest says of them beside what these two hold.

    Raises: ValueError for a codebook that lies in files of its own, which hold no edits; OSError
    where it cannot be written, MemoryError where there is no room to prepare it;
    what was there before stays valid then.
    """
    if snapshot.key_file is not None:
        raise ValueError(
            f"the codebook lies in {snapshot.key_file.path.parent}, whose files hold no edits: "
            "gf.Codebook.save writes its keys and values, to be opened by gf.Codebook.open"
        )
    texts = history_columns.texts_of(history)
    config = {
        "grace_fast": metadata.version("grace_fast"),
        "next_id": history.next_id,
        "texts": texts,
        **described,
    }
    tensors = columns.pack_codebook(snapshot) | history_columns.pack_history(history, snapshot)
    files.write(path, config, tensors, hmac_key)


class Offline:
    """A directory that is edited without its model: compacted, or taken back to a version.

    Raises: as `read_saved`; CodebookLocked where somebody else edits it.
    """

    def __init__(self, path: str | Path, hmac_key: bytes | None = None) -> None:
        self.path = path = atomic.absolute(path)
        files.read_config(path)  # nothing is made where nothing is
        lock = Lock(self.path)
        try:
            self._saved = read_saved(path, hmac_key)
            if hmac_key is None and "hmac" in self._saved.config:
                raise ValueError(f"{path} is signed: give its hmac_key")
            self.book, self.history, journal = self._saved.open(read_only=False)
            self._store = EditableDirectory(self.path, lock, lambda: self.history, hmac_key)
            if journal is not None:
                self._store.resume(journal, self.book)
            else:
                self.compact()
        except BaseException:
            lock.close()
            raise

    def compact(self) -> None:
        """Make the newest version the base; see `Grace.compact`."""
        self._store.begin(self.book, self._write)

    def checkout(self, version: int) -> None:
        """Go back to an earlier version, in a new one; see `Grace.checkout`."""
        earlier, history = self._saved.codebook(version=version)
        go_back(self.book, self.history, earlier.snapshot(), history)

    def _write(self, fields: Mapping[str, Any]) -> None:
        described = {**self._saved.described, **fields}
        write(self.path, described, self.book.snapshot(), self.history, self._saved.hmac_key)

    def close(self) -> None:
        """Give the directory back."""
        self._store.close()


def read_saved(
    path: str | Path, hmac_key: bytes | None = None, max_radius: float | None = None
) -> Saved:
    """Return what a directory says of its codebook, before its tensors are read.

    hmac_key, max_radius: as in `attach`.

    Raises: FileNotFoundError, CodebookCorrupt.
    """
    path = atomic.absolute(path)
    config = files.read_config(path, hmac_key)
    if "settings" not in config:
        raise files.CodebookCorrupt(
            f"{path} holds a codebook alone (gf.Codebook.save), without the settings of a model; "
            "open it with gf.Codebook.open, and give that to attach(codebook=)"
        )
    try:
        settings = Settings(**config["settings"])
        if max_radius is not None:
            settings = replace(settings, max_radius=max_radius)
        settings.rules(torch.float32)
        hits = {int(row): int(count) for row, count in config["hits"].items()}
        if not isinstance(config["texts"], dict):
            raise TypeError("texts must be an object")
        int(config["next_id"])
        return Saved(path, config, settings, config["fingerprint"], hits, hmac_key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise files.CodebookCorrupt(f"{path / files.CONFIG} is not complete: {error!r}") from error


def read_newest(path: str | Path, hmac_key: bytes | None = None) -> tuple[Saved, Codebook, History]:
    """Return what a directory says of its codebook, the codebook and its edits, all of one moment.

    Others may edit and compact it meanwhile.

    Raises: as `read_saved` and `Saved.codebook`.
    """

    def read() -> tuple[Saved, Codebook, History]:
        saved = read_saved(path, hmac_key)
        return saved, *saved.codebook()

    return files.steadily(atomic.absolute(path), read)
