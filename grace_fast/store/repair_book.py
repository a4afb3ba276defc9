"""Repair of a codebook by itself, whose keys, values and codes have files of their own."""

from __future__ import annotations

import secrets

import torch

from grace_fast.codebook.mapped import MappedFile
from grace_fast.store import atomic, files, tensor_files
from grace_fast.store.columns import fill_defaults, unpack_rows
from grace_fast.store.damage import Damaged, list_rows, read_columns, require_rows, without_rows
from grace_fast.store.damaged_rows import DamagedRowFile
from grace_fast.store.large import resident
from grace_fast.store.salvage import CorruptSlots, Untrusted, mend_rows

_HOST = torch.device("cpu")


class BookRepair:
    """A codebook alone: keys, values and codes in files of their own.

    Raises: CodebookCorrupt where there is nothing to stand on.
    """

    def __init__(self, damaged: Damaged) -> None:
        folder, config, report = damaged.folder, damaged.config, damaged.report
        self._folder, self._key, self._report = folder, damaged.hmac_key, report
        found, _ = read_columns(folder, config.get("tensors"), report)
        columns = fill_defaults(found)
        require_rows(columns)
        self._files = {
            name: DamagedRowFile(*tensor_files.described_rows(folder, config, name, columns), name)
            for name in files.MAPPED
        }
        self._corrupt = {name: file.corrupt_rows() for name, file in self._files.items()}
        for name, rows in self._corrupt.items():
            if bool(rows.any()):
                report.made_again.append(f"the {name}, with zeros in the place of what was changed")
        untrusted, live = Untrusted(), columns["rows.live"]
        columns = mend_rows(columns, CorruptSlots(**self._corrupt), damaged.max_radius, untrusted)
        report.dropped += list_rows(untrusted, True, live)
        self._columns = columns | {"rows.live": without_rows(live, untrusted.numbers)}

    def write(self) -> None:
        """Write keys and values anew where they must be, and the codes, and let them be it."""
        token = secrets.token_hex(8)
        places = {name: self._folder / f"{name}-{token}.safetensors" for name in self._files}
        with atomic.removed_on_failure(*places.values()):
            written = {
                name: file.write(places[name], self._corrupt[name])
                for name, file in self._files.items()
            }
            keys, values = (
                MappedFile(each.path, name, each.shape, each.checks)
                for name, each in written.items()
            )
            book = unpack_rows(self._columns, keys, values, _HOST)
            snapshot, coded = resident.with_codes(book)
            resident.publish(self._folder, token, written, snapshot, coded, self._key)
        if coded:
            self._report.made_again.append("the codes")
