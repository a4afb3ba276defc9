"""Docstrings of 20 stdlib modules of the running Python, and the modules they are from.

The sources are parsed, never imported. A text counts once, as the model sees it (tokenised and cut
off); one that occurs in two modules is dropped: two edits of the same input with different labels
cannot both be retained.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

Encode = Callable[[Sequence[str]], list[list[int]]]

# Pure Python in every version supported, and rich in docstrings.
MODULES = (
    "asyncio",
    "collections",
    "doctest",
    "email",
    "http",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "pydoc",
    "tarfile",
    "threading",
    "typing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
SHORTEST = 24  # characters; shorter ones ("Return self.") say nothing of a module
PER_MODULE = 160  # so that no module outweighs the others


@dataclass(frozen=True)
class Docstring:
    """One docstring and the module it is from."""

    text: str
    label: int  # index into MODULES


@dataclass(frozen=True)
class Rewording:
    """The same docstring, written again a little differently."""

    of: int  # index of the docstring
    how: str  # the name of the rewording
    text: str


@dataclass(frozen=True)
class Splits:
    """The docstrings by what they are used for; no text is in two of them."""

    train: list[Docstring]  # the head learns from these
    validation: list[Docstring]  # layer and epsilon are chosen on these
    held_out: list[Docstring]  # edits and retention are measured on these


def docstrings(modules: Sequence[str] = MODULES) -> list[Docstring]:
    """Return the docstrings of functions and classes, by module, in the order of the sources.

    Raises: LookupError for a module without Python source.
    """
    return [
        Docstring(text, label)
        for label, module in enumerate(modules)
        for node in definitions(module)
        if len(text := " ".join((ast.get_docstring(node) or "").split())) >= SHORTEST
    ]


def definitions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield the functions and classes of a module, in the order of the sources."""
    for path in sources(module):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node


def sources(module: str) -> list[Path]:
    """Return the source files of a module, without its tests.

    Raises: LookupError for a module without Python source.
    """
    spec = importlib.util.find_spec(module)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is None or origin.suffix != ".py" or not origin.exists():
        raise LookupError(
            f"the demo reads the Python source of {module!r}, and this Python has none; "
            "use an interpreter with an unpacked standard library"
        )
    if origin.name != "__init__.py":
        return [origin]
    return [
        path
        for path in sorted(origin.parent.rglob("*.py"))
        if not {"test", "tests"} & set(path.relative_to(origin.parent).parts)
    ]


def distinct(docs: Sequence[Docstring], encode: Encode) -> list[Docstring]:
    """Return the texts that differ as the model sees them, without those that occur in two modules.

    encode: texts to the token ids that the model gets.
    """
    labels: dict[tuple[int, ...], set[int]] = defaultdict(set)
    seen = [tuple(ids) for ids in encode([doc.text for doc in docs])]
    for ids, doc in zip(seen, docs, strict=True):
        labels[ids].add(doc.label)
    first: dict[tuple[int, ...], Docstring] = {}
    for ids, doc in zip(seen, docs, strict=True):
        first.setdefault(ids, doc)
    return [doc for ids, doc in first.items() if len(labels[ids]) == 1]


def split(docs: Iterable[Docstring], seed: int, per_module: int = PER_MODULE) -> Splits:
    """Deal the docstrings, at most `per_module` of each: half train, .1 validation, .4 held out."""
    by_label: dict[int, list[Docstring]] = defaultdict(list)
    for doc in docs:
        by_label[doc.label].append(doc)
    dealer = random.Random(seed)
    splits = Splits([], [], [])
    for label in sorted(by_label):
        dealt = dealer.sample(by_label[label], min(per_module, len(by_label[label])))
        ends = (len(dealt) // 2, len(dealt) * 6 // 10)
        splits.train.extend(dealt[: ends[0]])
        splits.validation.extend(dealt[ends[0] : ends[1]])
        splits.held_out.extend(dealt[ends[1] :])
    for part in (splits.train, splits.validation, splits.held_out):
        dealer.shuffle(part)
    return splits


# The most frequent first words of docstrings that are commands and take a plain s.
IMPERATIVES = re.compile(
    "^(Add|Append|Call|Close|Convert|Create|Decode|Delete|Encode|Extract|Find|Get|Handle|Load|Make|"
    "Open|Parse|Print|Raise|Read|Remove|Return|Run|Send|Set|Start|Stop|Test|Update|Wait|Write) "
)


# Small edits that leave the meaning: what people change when they write the same thing again.
REWORDINGS: dict[str, Callable[[str], str]] = {
    "without the final stop": lambda text: text.rstrip(" ."),
    "without articles": partial(re.compile(r"\b(?:the|an|a) (?=\w)", re.IGNORECASE).sub, ""),
    "in the third person": partial(IMPERATIVES.sub, r"\1s "),
}


def rewordings(docs: Sequence[Docstring], encode: Encode) -> list[Rewording]:
    """Return one rewording of each text, the kinds in turn, where the model sees a new text."""
    kinds = list(REWORDINGS.items())
    made = []
    for at, doc in enumerate(docs):
        how, reword = kinds[at % len(kinds)]
        made.append(Rewording(at, how, reword(doc.text)))
    known = {tuple(ids) for ids in encode([doc.text for doc in docs])}
    seen = encode([rewording.text for rewording in made])
    return [one for one, ids in zip(made, seen, strict=True) if tuple(ids) not in known]
