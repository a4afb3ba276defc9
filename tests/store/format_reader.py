"""A reader of directories that follows docs/format.md and uses nothing of grace_fast."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import struct
import zlib
from pathlib import Path

import numpy as np

KINDS = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}
KINDS |= {"BOOL": "?", "F16": "<f2"}
BLOCK_BYTES = 1 << 22
EDIT = ("id", "outcome", "row", "value_before", "value_after", "label_slot")
EDIT += ("steps", "correct", "prompt")
FRACTIONS = ("distance", "radius", "loss")
OUTCOMES = ("added", "split", "expanded", "reused", "replaced")


def tensors_of(content):
    """Return the tensors of a safetensors file, and its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, each in header.items():
        begin, end = (8 + length + offset for offset in each["data_offsets"])
        tensors[name] = np.frombuffer(content[begin:end], KINDS[each["dtype"]])
        tensors[name] = tensors[name].reshape(each["shape"])
    return tensors, metadata


def manifest_of(folder, key=b""):
    """Return the manifest, held against its checksum where it has one, and a key if given."""
    manifest = json.loads((folder / "grace_config.json").read_text("utf-8"))
    assert ("checksum" in manifest) == (manifest["format"] == 3)
    sealed = hashlib.sha256(canonical(manifest, "checksum")).hexdigest()
    assert manifest.get("checksum") in (None, sealed)
    if key:
        signed = b"grace_config.json\0" + canonical(manifest, "checksum", "hmac")
        assert manifest["hmac"] == hmac.new(key, signed, "sha256").hexdigest()
    return manifest


def canonical(manifest, *left_out):
    """Return canonical JSON of a manifest without some fields."""
    without = {name: each for name, each in manifest.items() if name not in left_out}
    return json.dumps(without, sort_keys=True, separators=(",", ":")).encode()


def listed(folder, entry):
    """Return the tensors that the manifest lists, held against their checksums."""
    tensors, _ = tensors_of((folder / entry["file"]).read_bytes())
    assert tensors.keys() == entry["sha256"].keys()
    for name, tensor in tensors.items():
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == entry["sha256"][name]
    return tensors


def add_mapped(folder, manifest, base):
    """Add keys and values of a large codebook, block by block, and what was left out."""
    for name, entry in manifest["mapped"].items():
        content = (folder / entry["file"]).read_bytes()
        blocks = [content[at : at + BLOCK_BYTES] for at in range(4096, len(content), BLOCK_BYTES)]
        for block, check in zip(blocks, base[f"{name}.blocks"], strict=True):
            if manifest["format"] == 2:
                assert zlib.crc32(block) == check
            else:
                assert hashlib.sha256(block).digest() == check.tobytes()
        base[name] = tensors_of(content)[0][name]
        assert base[name].shape == (entry["rows"], entry["width"])
        assert content.index(base[name].tobytes()) == 4096
    rows = np.arange(len(base["rows.radius"]))
    left_out = dict.fromkeys(("rows.id", "rows.key_slot", "rows.value_slot"), rows)
    left_out |= {"rows.live": np.ones(len(rows), bool), "rows.label_slot": np.zeros_like(rows)}
    left_out |= {"labels.length": np.array([-1]), "labels.ids": np.zeros(0, np.int64)}
    return left_out | base


def labels_of(tensors):
    """Return labels by slot: a list of ids, or None."""
    ends = np.cumsum(np.maximum(tensors["labels.length"], 0))
    return [
        None if length < 0 else tensors["labels.ids"][end - length : end].tolist()
        for length, end in zip(tensors["labels.length"], ends, strict=True)
    ]


def edit_of(numbers, query, text):
    """Return one edit as a dict."""
    outcome, before = OUTCOMES[numbers["outcome"]], numbers["value_before"]
    before = None if before < 0 else before
    changed = {"outcome": outcome, "value_before": before, "correct": bool(numbers["correct"])}
    return numbers | changed | {"query": query.tolist(), "text": text}


class Directory:
    """A directory as it was read, at its newest version.

    rows: of each one its id, radius, live, key, value and label; edits: by id.
    """

    def __init__(self, folder: Path, key: bytes = b"") -> None:
        self.manifest = manifest = manifest_of(folder, key)
        base = listed(folder, manifest["tensors"])
        if "mapped" in manifest:
            base = add_mapped(folder, manifest, base)
        self.columns = {name: base[f"rows.{name}"].tolist() for name in ROWS}
        self.ids, self.labels = base["rows.id"].tolist(), labels_of(base)
        self.keys, self.values = base["keys"].tolist(), base["values"].tolist()
        self.edits, self.bases, self.events = {}, {}, []
        texts = manifest.get("texts", {})
        for at in range(len(base.get("edits.id", ()))):
            numbers = {name: base[f"edits.{name}"][at].item() for name in EDIT + FRACTIONS}
            text = texts.get(str(numbers["id"]))
            self.edits[numbers["id"]] = edit_of(numbers, base["edits.query"][at], text)
        for at in range(len(base.get("events.edit", ()))):
            self.events.append({name: base[f"events.{name}"][at].item() for name in EVENT})
        for row, *slots in base["bases"].tolist() if "bases" in base else ():
            self.bases[row] = slots
        self.version = manifest.get("version", 0)
        self.kinds = []
        if manifest.get("journal") is not None:
            self._follow(folder, manifest["journal"], key)

    def _follow(self, folder, entry, key):
        file = sqlite3.connect(f"file:{folder / entry['file']}?mode=ro", uri=True)
        assert file.execute("PRAGMA application_id").fetchone()[0] == 0x47524143
        assert file.execute("PRAGMA user_version").fetchone()[0] == 1
        start = f"{entry['name']} after {self.version}".encode()
        before = hmac.digest(key, start, "sha256")
        for version, when, kind, content, checksum in file.execute(
            "SELECT version, time, kind, content, checksum FROM versions ORDER BY version"
        ):
            assert version == self.version + 1
            covered = before + struct.pack("<qd", version, when) + kind.encode() + b"\n" + content
            before = hmac.digest(key, covered, "sha256")
            assert checksum == before
            self._change(content)
            self.version = version
            self.kinds.append(kind)
        assert file.execute("SELECT * FROM head").fetchall() == [(self.version, before)]
        file.close()

    def _change(self, content):
        tensors, metadata = tensors_of(content)
        self.keys += tensors["keys"].tolist() if "keys" in tensors else []
        self.values += tensors["values"].tolist() if "values" in tensors else []
        if "labels.length" in tensors:
            ids = {"labels.ids": np.zeros(0, np.int64)}
            self.labels += labels_of(ids | tensors)
        fresh = tensors["ids"].tolist() if "ids" in tensors else []
        self.ids += fresh
        for name, column in self.columns.items():
            column += [None] * len(fresh)
            for at, row in enumerate(tensors["rows"].tolist() if "rows" in tensors else ()):
                column[row] = tensors[f"rows.{name}"][at].item()
        texts, taken = json.loads(metadata.get("texts", "{}")), dict.fromkeys(range(5), 0)
        for kind in tensors["order"].tolist() if "order" in tensors else ():
            self._step(kind, taken[kind], tensors, texts)
            taken[kind] += 1

    def _step(self, kind, at, tensors, texts):
        if kind == 0:
            numbers = dict(zip(EDIT, tensors["edits"][at].tolist(), strict=True))
            numbers |= zip(FRACTIONS, tensors["edits.number"][at].tolist(), strict=True)
            text = texts.get(str(numbers["id"]))
            self.edits[numbers["id"]] = edit_of(numbers, tensors["edits.query"][at], text)
        elif kind == 1:
            event = dict(zip(EVENT_NUMBERS, tensors["events"][at].tolist(), strict=True))
            self.events.append(event | {"radius": tensors["events.radius"][at].item()})
        elif kind == 2:
            row, *slots = tensors["bases"][at].tolist()
            self.bases[row] = slots
        elif kind == 3:
            self._forget(tensors["forgotten"][at].item())
        else:
            self.edits, self.bases, self.events = {}, {}, []

    def _forget(self, number):
        row = self.edits.pop(number)["row"]
        if row in self.bases or any(edit["row"] == row for edit in self.edits.values()):
            gone = [e for e in self.events if (e["edit"], e["lasts_with"]) == (number, -1)]
        else:
            gone = [e for e in self.events if row in (e["row"], e["lasts_with"])]
        self.events = [event for event in self.events if event not in gone]

    @property
    def rows(self):
        """Every row as what it holds."""
        made = []
        for number, row in enumerate(zip(*self.columns.values(), strict=True)):
            each = dict(zip(self.columns, row, strict=True))
            made.append(
                {
                    "id": self.ids[number],
                    "radius": each["radius"],
                    "live": bool(each["live"]),
                    "key": self.keys[each["key_slot"]],
                    "value": self.values[each["value_slot"]],
                    "label": self.labels[each["label_slot"]],
                }
            )
        return made


ROWS = ("radius", "live", "key_slot", "value_slot", "label_slot")
EVENT_NUMBERS = ("edit", "row", "key_slot", "lasts_with")
EVENT = (*EVENT_NUMBERS, "radius")
