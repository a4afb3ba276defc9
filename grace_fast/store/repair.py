"""Repair of a directory that is damaged or was made to harm: a sound one of what can be trusted.

Everything that is dropped is listed with its reason. The directory as it was is kept beside, under
`NAME.damaged-1` and so on, before a byte of it is replaced; then one rename of the manifest goes
from the old codebook to the new one, with the lock held. A row answers on as it did, or not at all.

Where there is nothing to stand on, it is refused: a manifest that is not what was sealed, a tensor
file that cannot be read, keys or values or columns of rows in which any row may be wrong.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from grace_fast.errors import CodebookCorrupt
from grace_fast.store import atomic, files, saved
from grace_fast.store.large import resident
from grace_fast.store.locks import LOCK, Lock
from grace_fast.store.repair_book import BookRepair
from grace_fast.store.repair_edits import EditsRepair
from grace_fast.store.salvage import Repaired


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
            work = (
                BookRepair(folder, config, hmac_key, max_radius, report)
                if files.is_mapped(config)
                else EditsRepair(folder, hmac_key, max_radius, keep_rows, report)
            )
            with _backed_up(folder) as backup:
                work.write()
            report.kept = backup
        return report


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


@contextmanager
def _backed_up(folder: Path) -> Iterator[Path]:
    """Have the files of a directory in another one, by links where that can be.

    That goes again where what is done meanwhile fails.
    """
    names = (folder.with_name(f"{folder.name}.damaged-{number}") for number in count(1))
    backup = next(name for name in names if not os.path.lexists(name))
    backup.mkdir()
    try:
        for each in sorted(folder.iterdir()):
            if each.name != LOCK and each.is_file() and not each.is_symlink():
                try:
                    os.link(each, backup / each.name)
                except OSError:  # no links here
                    shutil.copy2(each, backup / each.name)
                    atomic.synchronise(backup / each.name)
        atomic.synchronise(backup)
        atomic.synchronise(backup.parent)
        yield backup
    except BaseException:
        shutil.rmtree(backup)
        raise
