"""Names of grace_fast's own from before the rooms: for one version, with a DeprecationWarning.

Nothing imports this; the package asks it for a name or a module that is not there.
"""

from __future__ import annotations

from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType
from typing import Any

from grace_fast.errors import warn_of_old_name

# By the old public name: where it is now, and how it is written now.
PUBLIC = {
    "open": ("grace_fast.store.large.resident:open", "Codebook.open"),
    "save": ("grace_fast.store.large.resident:save", "Codebook.save"),
    "build": ("grace_fast.store.large.stream:build", "Codebook.build"),
    **{
        name: (f"grace_fast.{module}:{name}", f"{module}.{name}")
        for module, names in (
            ("lookup.faiss", "FaissIndex build_index drop_index IndexErrors measure_indexes"),
            ("lookup.sharded", "ShardedCodebook"),
            ("errors", "RankLost ShardsDiffer LookupWarning SelectionWarning"),
            ("editor.calibrate", "CalibrationEdit"),
        )
        for name in names.split()
    },
}

# By the old module's name within grace_fast: the new one.
MODULES = {
    "adapter": "hook.adapter",
    "advice": "editor.checks",
    "answers": "hook.answers",
    "attachment": "editor.attach",
    "backends": "lookup.backends",
    "batches": "editor.batches",
    "calibrate": "editor.calibrate",
    "certificate": "index.maintained",
    "cli": "tools.cli",
    "codes": "index.quantizer",
    "compat.handover": "compat.takeover",
    "counters": "hook.counters",
    "demo": "tools.demo",
    "evaluate": "tools.evaluate",
    "exporter": "tools.prometheus",
    "extras": "errors",
    "fingerprint": "editor.fingerprint",
    "generation": "hook.generation",
    "heads": "editor.heads",
    "hosts": "hook.wrappers",
    "joining": "editor.joining",
    "mapped": "codebook.mapped",
    "memory": "codebook.buffers",
    "native": "_native",
    "positions": "hook.positions",
    "prepared": "lookup.prepared",
    "prompts": "editor.prompts",
    "quickbench": "tools.bench.quick",
    "report": "tools.report",
    "selection": "hook.selection",
    "settings": "edits.settings",
    "shards": "lookup.sharded",
    "shown": "codebook.printable",
    "store.coded": "store.large.index_file",
    "store.layout": "store.columns",
    "store.past": "store.history_columns",
    "store.portable": "store.archive",
    "store.resident": "store.large.resident",
    "store.source": "store.large.shard_files",
    "store.stream": "store.large.stream",
    "tensor_parallel": "hook.tensor_parallel",
    "terminal": "tools.terminal",
    "textfiles": "tools.textfiles",
    "training": "editor.training",
}

PACKAGES = {"backends", "cli", "demo", "evaluate", "report"}


def public(name: str) -> Any:
    """Return what a name of `grace_fast` stands for that it had before.

    Raises: AttributeError where it never had it.
    """
    if name in PUBLIC:
        where, now = PUBLIC[name]
        warn_of_old_name(f"grace_fast.{name}", f"grace_fast.{now}", 4)
        module, _, attribute = where.partition(":")
        return getattr(import_module(module), attribute)
    if name in MODULES:
        return import_module(f"grace_fast.{name}")
    raise AttributeError(f"module 'grace_fast' has no attribute {name!r}")


def spec_of(module: str) -> ModuleSpec | None:
    """Return how a module is found by its old name, None for a name that none had."""
    within = module.removeprefix("grace_fast.")
    head, _, rest = within.partition(".")
    new = MODULES.get(within) or (rest and head in MODULES and f"{MODULES[head]}.{rest}")
    if not new:
        return None
    there = find_spec(f"grace_fast.{new}")
    return spec_from_file_location(
        module,
        None if there is None else there.origin,
        loader=_Alias(f"grace_fast.{new}"),
        submodule_search_locations=[] if within in PACKAGES else None,
    )


class _Alias(Loader):
    """Loads a module by its old name: the module of the new name itself."""

    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return the module; a package as what looks its parts up by their old names, too."""
        warn_of_old_name(spec.name, self._new)
        module = import_module(self._new)
        if spec.submodule_search_locations is None:
            self._spec = module.__spec__
            return module
        package = ModuleType(spec.name, module.__doc__)
        package.__path__ = []  # its parts are found here, and are none of their own
        package.__dict__["__getattr__"] = lambda name: getattr(module, name)
        return package

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it was executed under its new name, whose spec it keeps."""
        if module.__name__ == self._new:
            module.__spec__ = self._spec

    def get_code(self, _: str) -> Any:
        """Return what `python -m` runs."""
        spec = find_spec(self._new)
        return spec.loader.get_code(self._new)  # type: ignore[union-attr]
