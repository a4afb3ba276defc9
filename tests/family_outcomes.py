"""What an edit does in each family of transformers, and the table of it in `docs/families.md`.

`PYTHONPATH=tests python -m family_outcomes` writes the table; with names of model classes it tries
only these anew.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import families
import models
import torch
import transformers
from families import Family
from torch import Tensor, nn

import grace_fast as gf
from grace_fast.editor import batches, heads
from grace_fast.hook.tensor_parallel import declared_widths

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
MODES = ("replace_prompt", "replace_last", "replace_all")
NEW_TOKENS = 3
PROMPT, UNRELATED = [5, 17, 23, 42, 8, 61], [9, 33, 71, 12, 55, 14]
BESIDE = [9, 33, 71, 12, 55, 14, 44, 28, 36]  # of another length: one of the two is padded


class Outcome(NamedTuple):
    """What came of one layer of one family."""

    family: str
    layer: str
    result: str  # "same", "refused", "itself" (the model by itself is not the same) or "not tried"
    why: str = ""


class _WrongError(Exception):
    """What an edit must not do."""


class _ItselfError(Exception):
    """What a model does by itself, so that nothing can be held against it."""


@dataclass(frozen=True)
class Said:
    """What a model generated."""

    tokens: Tensor  # [B, NEW_TOKENS]
    logits: Tensor  # [NEW_TOKENS, B, V]

    def row(self, at: int) -> Said:
        return Said(self.tokens[at : at + 1], self.logits[:, at : at + 1])

    def is_as(self, other: Said, tolerance: float = 1e-3) -> bool:
        """Tell whether another says the same, but for rounding."""
        if not torch.equal(self.tokens, other.tokens):
            return False
        counted = self.logits.isfinite() & other.logits.isfinite()
        scale = float(self.logits[counted].abs().max()) if counted.any() else 0.0
        apart = (self.logits - other.logits)[counted].abs()
        return not apart.numel() or float(apart.max()) <= tolerance * max(scale, 1e-6)

    def is_exactly(self, other: Said) -> bool:
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.logits, other.logits)


def generated(model: Any, batch: dict[str, Any], **settings: Any) -> Said:
    """Let a model go on, greedily."""
    torch.manual_seed(0)
    whole = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return Said(whole.sequences[:, -NEW_TOKENS:], torch.stack(whole.logits))


def outcomes(family: Family) -> list[Outcome]:
    """Return what comes of each stack of a family: a decoder, or an encoder and a decoder."""
    with _quiet():
        try:
            model = family.build()
            alone = _Alone(family, model)
        except Exception as error:
            return [Outcome(family.name, "", "not tried", _shortly(error))]
        return [_of_layer(family, alone, layer) for layer in _layers(alone)]


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


class _Alone:
    """A model without an adaptor, and what it says then."""

    def __init__(self, family: Family, model: Any) -> None:
        self.model, self.kind = model, heads.kind_of(model)
        side = "left" if self.kind == "decoder" else "right"
        self.prompt = family.batch([PROMPT], side)
        self.unrelated = family.batch([UNRELATED], side)
        self.said = generated(model, self.prompt)
        if not generated(model, self.prompt).is_exactly(self.said):
            raise RuntimeError("it says something else each time")
        if not self.said.logits.isfinite().any():
            raise RuntimeError("it computes NaN")
        self.said_of_unrelated = generated(model, self.unrelated)
        self.own = ""  # what the model does otherwise by itself
        self.has_uncached = True
        try:
            uncached = generated(model, self.prompt, use_cache=False)
            if not uncached.is_as(self.said):
                self.own = "by itself it generates otherwise without a cache"
        except Exception:
            self.has_uncached = False
        self.padded = family.batch([PROMPT, BESIDE], side)
        try:
            self.said_padded: Said | None = generated(model, self.padded)
        except Exception:
            self.said_padded = None

    def is_as_before(self) -> bool:
        return generated(self.model, self.prompt).is_exactly(self.said)


def _of_layer(family: Family, alone: _Alone, layer: str) -> Outcome:
    notes: list[str] = [alone.own] if alone.own else []
    for mode in MODES:
        try:
            grace = gf.attach(alone.model, layer, epsilon=0.05, replacement=mode, iterations=0)
        except ValueError as error:
            return Outcome(family.name, layer, "refused", _shortly(error))
        try:
            notes += [note for note in _edited(grace, alone) if note not in notes]
        except _ItselfError as own:
            return Outcome(family.name, layer, "itself", str(own))
        except _WrongError as wrong:
            return Outcome(family.name, layer, "WRONG", f"{mode}: {wrong}")
        except Exception as error:
            if isinstance(error, ValueError) and _is_ours(error):
                return Outcome(family.name, layer, "refused", _shortly(error))
            return Outcome(family.name, layer, "WRONG", f"{mode}: {_shortly(error)}")
        finally:
            grace.unload()
        if not alone.is_as_before():
            return Outcome(family.name, layer, "WRONG", f"{mode}: not as before when taken off")
    return Outcome(family.name, layer, "itself" if alone.own else "same", "; ".join(notes))


def _edited(grace: Any, alone: _Alone) -> list[str]:
    """Put a key at a prompt's query, and hold what the model says against what it must.

    Returns what the model does otherwise by itself. Raises: _WrongError.
    """
    model, notes = alone.model, []
    prompt, query, note = _asked(grace, alone)
    notes += [note] if note else []
    cached, hits = _counted(grace, prompt)
    _require(hits == {0: 1}, f"with a cache it fires {hits}")
    _require(not cached.is_as(alone.said, 1e-5), "an edit that fires changes nothing")
    if alone.has_uncached:
        uncached, hits = _counted(grace, prompt, use_cache=False)
        _require(hits == {0: 1}, f"without a cache it fires {hits}")
        _require(
            bool(alone.own) or uncached.is_as(cached), "without a cache it generates otherwise"
        )
    else:
        notes.append("it always has a cache")
    _require(generated(model, prompt).is_exactly(cached), "it says something else each time")
    grace.hits.clear()
    with torch.no_grad():
        model(**batches.runnable(prompt, alone.kind, model))
    _require(dict(grace.hits) == {0: 1}, f"a forward call fires {dict(grace.hits)}")
    unrelated, hits = _counted(grace, alone.unrelated)
    _require(not hits, f"an unrelated prompt fires {hits}")
    _require(unrelated.is_exactly(alone.said_of_unrelated), "an unrelated prompt is changed")
    if alone.said_padded is None:
        notes.append("it takes no batch of prompts")
    else:
        notes += _padded(grace, alone, query, cached)
    return notes


def _asked(grace: Any, alone: _Alone) -> tuple[dict[str, Any], Tensor, str]:
    """Put a key where a prompt asks in `generate`."""
    prompt = alone.prompt
    query = grace.query_of(prompt)
    _require(len(query) == 1, f"one prompt has {len(query)} queries")
    width = grace.codebook.value_dim
    value = 3 * torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    slot = torch.tensor([0.01])
    grace.codebook.append(query, value.to(query.dtype), slot)
    in_generate = _given_to(grace, prompt)
    if float((in_generate - query).norm(dim=-1).min()) < 0.01:
        return prompt, query, ""
    if alone.kind == "decoder" and "position_ids" in families.parameters(alone.model):
        numbered = prompt | {"position_ids": torch.arange(len(PROMPT))[None]}
        with suppress(RuntimeError):
            query = grace.query_of(numbered)
            if float((in_generate - query).norm(dim=-1).min()) < 0.01:
                with grace.codebook.writing() as draft:
                    draft.set_key(0, query[0])
                why = "generate numbers positions otherwise: edit with its position_ids"
                return numbered, query, why
    raise _ItselfError(
        "generate computes a prompt otherwise than a forward call: what a forward call taught "
        "answers forward calls"
    )


def _given_to(grace: Any, prompt: dict[str, Any]) -> Tensor:
    """Return all that the layer is given in `generate`, [T, D]."""
    given: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        given.append(hidden.detach().flatten(0, -2).clone())

    layer = dict(grace.model.named_modules())[grace.settings.layer]
    handle = layer.register_forward_hook(note, with_kwargs=True)
    with grace.disable_adapter():
        generated(grace.model, prompt)
    handle.remove()
    return torch.cat(given)


def _padded(grace: Any, alone: _Alone, query: Tensor, cached: Said) -> list[str]:
    assert alone.said_padded is not None
    said, hits = _counted(grace, alone.padded)
    _require(said.row(1).is_as(alone.said_padded.row(1)), "the prompt beside is changed")
    if hits != {0: 1}:
        asked = grace.query_of(alone.padded)
        if "position_ids" in families.parameters(alone.model) and "attention_mask" in alone.padded:
            with suppress(RuntimeError):  # Reformer takes none that it has to pad
                asked = grace.query_of(models.with_positions(alone.padded))
        moved = float((asked[:1] - query).norm())
        _require(moved > 0.01 and not hits, f"a padded batch fires {hits}")
        return ["padding changes what it computes for a prompt"]
    if alone.said_padded.row(0).is_as(alone.said):
        _require(said.row(0).is_as(cached, 1e-2), "padded it says something else")
    return []


def _counted(grace: Any, batch: dict[str, Any], **settings: Any) -> tuple[Said, dict[int, int]]:
    """Return what is generated, and how often each key fired in it."""
    grace.hits.clear()
    said = generated(grace.model, batch, **settings)
    hits = dict(grace.hits)
    grace.hits.clear()
    return said, hits


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise _WrongError(otherwise)


def _is_ours(error: BaseException) -> bool:
    """Tell whether an error was raised by the package itself."""
    return "grace_fast" in traceback.extract_tb(error.__traceback__)[-1].filename


def _shortly(error: BaseException) -> str:
    said = " ".join(str(error).split()).split(" Errors:")[0]
    return f"{type(error).__name__}: {said[:160]}".replace("|", "/").rstrip()


# Which layer is edited


class _Ran(NamedTuple):
    """A linear layer that ran, and on what."""

    name: str
    given: tuple[int, ...]
    width: int  # of its output


def _layers(alone: _Alone) -> list[str]:
    """Return the down projection of the middle block of each stack, or what comes nearest."""
    model, ran = alone.model, _ran(alone)
    if alone.kind != "seq2seq":
        return [_middle(ran)]
    encoder, decoder = model.get_encoder(), model.get_decoder()
    within = {name: stack for stack in (encoder, decoder) for name, _ in _named(model, stack)}
    return [
        _middle([one for one in ran if within.get(one.name) is stack])
        for stack in (encoder, decoder)
    ]


def _named(model: nn.Module, stack: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = {id(module) for module in stack.modules()}
    return ((name, module) for name, module in model.named_modules() if id(module) in inside)


def _ran(alone: _Alone) -> list[_Ran]:
    ran: list[_Ran] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if isinstance(output, Tensor) and re.search(r"\.\d+\.", name):
                ran.append(_Ran(name, tuple(given.shape), output.shape[-1]))

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in alone.model.named_modules()
        if declared_widths(module)[0] is not None
    ]
    with torch.no_grad():
        alone.model(**batches.runnable(alone.prompt, alone.kind, alone.model))
    for handle in handles:
        handle.remove()
    return ran


def _middle(ran: list[_Ran]) -> str:
    """Return the last layer of the middle block that leads back to the width of the blocks."""

    def block(one: _Ran) -> tuple[str, int]:
        found = re.match(r"(.*?)\.(\d+)\.", one.name)
        assert found is not None
        return found[1], int(found[2])

    calm = [one for one in ran if "att" not in block(one)[0]] or ran
    stack = Counter(block(one)[0] for one in calm).most_common(1)[0][0]
    places = sorted({block(one)[1] for one in ran if block(one)[0] == stack})
    here = [one for one in ran if block(one) == (stack, places[(len(places) - 1) // 2])]
    often = Counter(one.name for one in here)
    tail = {one.name: one.name.split(".", stack.count(".") + 2)[-1].lower() for one in here}
    here = [one for one in here if often[one.name] == 1] or here
    beside = r"att|gate\.|router"
    here = [one for one in here if not re.search(beside, tail[one.name])] or here
    longest = max(math.prod(one.given[:-1]) for one in here)
    here = [one for one in here if math.prod(one.given[:-1]) == longest]
    width = Counter(one.given[-1] for one in here).most_common(1)[0][0]
    back = [one for one in here if one.width == width]
    down = [one for one in back if one.given[-1] != width]
    inwards = r"(q_proj|k_proj|v_proj|query|key|[qkv]|gate|router)$"
    out = [one for one in back if not re.search(inwards, one.name)]
    return (down or out or here)[-1].name


# The table

INTRODUCTION = """\
# What works where

Every family of transformers {version} that generates, as a tiny model of random weights, with an
edit at the layer named. Written by `PYTHONPATH=tests python -m family_outcomes`; a test holds it.

- **same**: `generate` says the same with and without a cache, in all three modes of replacement;
  the edit fires once for its prompt, alone, in a padded batch and in a forward call; a prompt
  without an edit is answered bit for bit as without the adaptor, and so is everything once it is
  unloaded.
- **itself**: as above, but for what the model does otherwise without an adaptor too.
- **refused**: `grace_fast` says why there can be no edit, and has changed nothing.
- **not tried**: there is no tiny model of it here, and why.

{counts}

| family | layer | | why |
|---|---|---|---|
"""


def written(found: list[Outcome]) -> str:
    """Return the table."""
    count = Counter(one.result for one in found)
    counts = ", ".join(f"{count[result]} {result}" for result in sorted(count))
    head = INTRODUCTION.format(version=transformers.__version__, counts=counts)
    rows = (f"| {one.family} | {_code(one.layer)} | {one.result} | {one.why} |" for one in found)
    return head + "\n".join(rows) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def table() -> dict[str, list[Outcome]]:
    """Return what is written, by family."""
    known: dict[str, list[Outcome]] = {}
    if not TABLE.exists():
        return known
    for line in TABLE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| family"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            name, layer, result, why = cells
            known.setdefault(name, []).append(Outcome(name, layer.strip("`"), result, why))
    return known


def _try(names: list[str]) -> None:
    """Try families, all by default, and write the table; of others it says what it did."""
    known, found = table() if names else {}, []
    for family in families.everyone():
        if names and family.name not in names:
            found += known.get(family.name, [])
            continue
        for outcome in outcomes(family):
            print(*outcome, sep=" | ", flush=True)
            found.append(outcome)
    TABLE.write_text(written(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _try(sys.argv[1:])
