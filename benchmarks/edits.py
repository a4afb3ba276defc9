"""Measure edits and edited forwards: `python -m benchmarks.edits [--quick]`.

An edit of small GPT-2s through `grace.edit` and the drop-in `grace_fast.GRACE` against the
reference's algorithm, with as many keys and steps; and the forward of a model of MiniLM's size with
the adaptor against the one without. Decisions are compared with the law's before anything is timed;
where ours decides otherwise no speed is reported and the command fails. Results go to
`benchmarks/results/`.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import grace_fast as gf
from benchmarks import runner
from benchmarks.reference_rule import PlainAdaptor, PlainEditor, exact_distances
from benchmarks.timing import Run, ratio
from grace_fast.compat.reference import GRACEAdapter

Call = Callable[[Any], Any]
VOCABULARY = 1000
PROMPT, TARGET = 9, 3
CHECKED = 24  # edits whose decisions are compared before timing


@dataclass(frozen=True)
class Tiny:
    """A GPT-2 from its config, and the layer that is edited."""

    width: int
    layers: int
    layer: str

    def __str__(self) -> str:
        return f"GPT-2 {self.layers} x {self.width}, {self.layer}"


TINY = (
    Tiny(32, 3, "transformer.h.1.mlp.c_fc"),
    Tiny(32, 3, "transformer.h.1.mlp.c_proj"),
    Tiny(64, 2, "transformer.h.1.mlp.c_fc"),
    Tiny(128, 4, "transformer.h.2.mlp.c_fc"),
)
SMALL = Tiny(384, 8, "transformer.h.5.mlp.c_fc")  # six of the eight blocks run below the edit
FEW = 0  # keys at first; the edits that are timed make some tens
OURS = {"grace.edit": "native", "the drop-in": "ours"}


@dataclass(frozen=True)
class Row:
    """One comparison; a ratio is the other's time over ours, or with over without."""

    work: str
    keys: int
    checked: int  # decisions
    wrong: int  # of ours
    cdist_differs: int | None  # edits after which the reference's own arithmetic led elsewhere
    us: float | None = None
    us_other: float | None = None
    ratio: float | None = None
    ratio_least: float | None = None
    ratio_most: float | None = None


def edit_rows(tiny: Tiny, keys: int, steps: int, rounds: int, budget_s: float) -> list[Row]:
    """Compare the edits of one model, of both surfaces with the reference's algorithm."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=tiny.width,
        n_layer=tiny.layers,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"
    queries = _layer_inputs(model, tiny.layer, max(keys, 1000))
    epsilon = _spacing(queries) / 4
    exact, plain, *ours = (
        _editor(kind, copy.deepcopy(model), tiny.layer, epsilon, steps, queries[:keys])
        for kind in ("exact", "cdist", *OURS.values())
    )
    checked, differs, wrong = 0, 0, [0] * len(ours)
    tokens = _tokens(torch.Generator().manual_seed(1))
    for at, batch in enumerate(_repeating(tokens, CHECKED)):
        for editor in (exact, plain, *ours):
            torch.manual_seed(at)
            _edit(editor, batch, 1)
        checked += 1
        wrong = [count + (not _alike(one, exact)) for count, one in zip(wrong, ours, strict=True)]
        differs += not _alike(plain, exact)
    works = [f"{name}, {steps} steps: {tiny}" for name in OURS]
    if any(wrong):
        return [
            Row(work, keys, checked, count, differs)
            for work, count in zip(works, wrong, strict=True)
        ]
    runs = turns(
        [lambda batch, editor=editor: _edit(editor, batch, steps) for editor in (plain, *ours)],
        [next(tokens) for _ in range(64)],
        rounds,
        budget_s,
    )
    return [
        _row(work, keys, checked, differs, run, runs[0])
        for work, run in zip(works, runs[1:], strict=True)
    ]


def forward_rows(keys: int, rounds: int, budget_s: float) -> list[Row]:
    """Compare the forwards of a model of MiniLM's size with the adaptor and without."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6
    )
    model, name = BertModel(config, add_pooling_layer=False).eval(), "encoder.layer.4.output.dense"
    layer = model.get_submodule(name)
    queries = _layer_inputs(model, name, keys)
    epsilon = _spacing(queries) / 4
    adaptor = GRACEAdapter(_config(name, "qa", epsilon, 1), layer, transpose=True)
    _load(adaptor, queries, epsilon)
    parent = model.get_submodule(name.rpartition(".")[0])
    draw = torch.Generator().manual_seed(2)
    rows = []
    for length in (32, 128):
        batches = [
            {"input_ids": torch.randint(0, 30522, (1, length), generator=draw)} for _ in range(32)
        ]

        def run(module: nn.Module, batch: Any) -> Tensor:
            parent.dense = module
            with torch.no_grad():
                return model(**batch).last_hidden_state

        wrong = 0
        for batch in batches:
            same = torch.equal(run(adaptor, batch), run(layer, batch))
            seen, book = adaptor._asked
            wrong += not (same and not gf.find(seen, book, backend="reference").hit.any())
        work = f"forward, {length} tokens that miss: BERT 6 x 384, {name}"
        if wrong:
            rows.append(Row(work, keys, len(batches), wrong, None))
            continue
        without, with_it = turns(
            [lambda batch: run(layer, batch), lambda batch: run(adaptor, batch)],
            batches,
            rounds,
            budget_s,
        )
        rows.append(_row(work, keys, len(batches), None, without, with_it))
    return rows


def turns(calls: list[Call], batches: list[Any], rounds: int, budget_s: float) -> list[Run]:
    """Time calls on the same batches, one right after the other and each first in turn.

    What a busy machine does to one it does to the others; and a time is what the process computed,
    all its threads together, so that waiting for a core does not count.
    """
    first = [cpu_us(call, batches[0]) for call in calls]
    each = sum(cpu_us(call, batches[1]) for call in calls) / 1e6
    count = max(1, round(budget_s / rounds / each))
    stream = cycle(batches)
    taken: list[list[Any]] = [[] for _ in calls]
    for _ in range(rounds):
        times: list[list[float]] = [[] for _ in calls]
        for at, batch in enumerate(islice(stream, count)):
            order = [(which + at) % len(calls) for which in range(len(calls))]
            for which in order if at % 2 else reversed(order):
                times[which].append(cpu_us(calls[which], batch))
        for which, each_time in enumerate(times):
            taken[which].append(np.array(each_time))
    return [Run(tuple(rounds_of), start) for rounds_of, start in zip(taken, first, strict=True)]


def cpu_us(call: Call, batch: Any) -> float:
    """Return what one call took of the processor, in microseconds."""
    start = time.process_time_ns()
    call(batch)
    return (time.process_time_ns() - start) / 1e3


def _row(work: str, keys: int, checked: int, differs: int | None, base: Run, other: Run) -> Row:
    spread = ratio(other, base)
    times = (base.p50, other.p50, spread.median, spread.least, spread.most)
    return Row(work, keys, checked, 0, differs, *times)


def _config(layer: str, task: str, epsilon: float, steps: int) -> dict[str, Any]:
    edits = {"eps": epsilon, "replacement": "replace_all", "val_init": "cold"}
    return {
        "device": "cpu",
        "model": {"inner_params": [layer]},
        "experiment": {"task": task},
        "editor": edits | {"eps_expand": "coverage", "n_iter": steps, "edit_lr": 1.0},
    }


def _editor(kind: str, model: Any, layer: str, epsilon: float, steps: int, queries: Tensor) -> Any:
    if kind == "native":
        return gf.attach(
            model,
            layer,
            epsilon,
            semantics="reference",
            replacement="replace_all",
            expand_margin=0.0,
            iterations=steps,
            codebook=_book(model.get_submodule(layer), queries, epsilon),
        )
    if kind == "ours":
        config = _config(layer, "hallucination", epsilon, steps)
        ours = gf.GRACE(config, SimpleNamespace(model=model, tokenizer=None))
        _load(ours.adaptor, queries, epsilon)
        return ours
    distances = {"distances": exact_distances} if kind == "exact" else {}
    adaptor = PlainAdaptor(model.get_submodule(layer), epsilon, "replace_all", **distances)
    _load(adaptor, queries, epsilon)
    return PlainEditor(model, layer, adaptor, at_labels=True)


def _rows_of(layer: Any, keys: Tensor, epsilon: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return values, radii and labels for keys."""
    width = layer.nf if hasattr(layer, "nf") else layer.out_features
    values = torch.rand(len(keys), width, generator=torch.Generator().manual_seed(3))
    labels = [torch.tensor([[-at]]) for at in range(len(keys))]
    return values, torch.full((len(keys),), epsilon), labels


def _book(layer: Any, keys: Tensor, epsilon: float) -> gf.Codebook:
    values, radii, labels = _rows_of(layer, keys, epsilon)
    book = gf.Codebook(keys.shape[1], values.shape[1])
    if len(keys):
        book.append(keys, values, radii, [label.flatten() for label in labels])
        gf.prepare(book)
    return book


def _load(adaptor: Any, keys: Tensor, epsilon: float) -> None:
    if not len(keys):
        return
    values, radii, labels = _rows_of(adaptor.layer, keys, epsilon)
    adaptor.keys, adaptor.values = keys.clone(), nn.Parameter(values)
    adaptor.epsilons, adaptor.key_labels = radii[:, None], labels
    if isinstance(adaptor, GRACEAdapter):
        adaptor._settle()
        gf.prepare(adaptor._book)  # as it is once the codebook has been there for a while


def _edit(editor: Any, batch: dict[str, Tensor], steps: int) -> None:
    if isinstance(editor, gf.Grace):
        context = editor._context
        context.settings = replace(context.settings, iterations=steps)
        editor.edit(batch)
    elif isinstance(editor, gf.GRACE):
        editor.edit({"editor": {"n_iter": steps, "edit_lr": 1.0}}, batch, None)
    else:
        editor.edit(batch, steps, 1.0)


def _decided(editor: Any) -> tuple[Tensor, Tensor, int]:
    """Return the keys and radii of an editor, and the row nearest to its last edit's query."""
    if isinstance(editor, gf.Grace):
        now, query = editor.codebook.snapshot(), editor.edits()[-1].query
        return now.keys, now.radii, int(gf.nearest(query[None], now).row)
    adaptor = editor.adaptor
    return adaptor.keys, adaptor.epsilons.reshape(-1), int(adaptor.chosen_key)


def _alike(one: Any, other: Any) -> bool:
    (keys, radii, row), (its_keys, its_radii, its_row) = _decided(one), _decided(other)
    return (
        torch.equal(keys, its_keys)
        and torch.allclose(radii, its_radii, rtol=1e-6, atol=1e-7)
        and row == its_row
    )


def _tokens(draw: torch.Generator) -> Iterator[dict[str, Tensor]]:
    while True:
        ids = torch.randint(3, VOCABULARY, (1, PROMPT + TARGET), generator=draw)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        yield {"input_ids": ids, "labels": labels}


def _repeating(tokens: Iterator[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield new prompts, and among them old ones with their own answer and with another."""
    known: list[dict[str, Tensor]] = []
    for at in range(count):
        batch = dict(next(tokens))
        if at % 3 and known:
            old = known[at // 3 % len(known)]
            batch = old if at % 3 == 1 else old | {"labels": old["labels"].clamp(max=5)}
        known.append(batch)
        yield batch


def _layer_inputs(model: Any, layer: str, rows: int) -> Tensor:
    """Return inputs of a layer for random tokens, each once."""
    draw, seen = torch.Generator().manual_seed(4), []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _, given, __: seen.append(given[0].flatten(0, 1))
    )
    with torch.no_grad():
        for _ in range(rows // 512 + 1):
            model(torch.randint(3, VOCABULARY, (16, 32), generator=draw))
    hook.remove()
    return torch.cat(seen)[:rows].clone()


def _spacing(keys: Tensor) -> float:
    """Return the median distance of a key to the one nearest to it."""
    some = keys[:256].double()
    return float(torch.cdist(some, keys.double()).topk(2, largest=False).values[:, 1].median())


def markdown(found: runner.Found) -> str:
    """Return the results as a page."""
    page = (
        f"# Edits and edited forwards\n\n{runner.where(found)}. Load average {found['load']}: "
        "other programs ran beside it, so times are of the processor, not of the clock.\n\n"
        "Before timing, keys, radii and chosen rows are compared with the law's after each of the "
        "edits of a stream with repeats (`wrong`); `cdist` counts the edits after which the "
        "reference's algorithm, with `torch.cdist`, has another codebook. An edit's ratio is the "
        "reference's time over ours; a forward's the time with the adaptor over the one without. "
        "Both are called in pairs, each first in turn; the ratio of the medians in each round, and "
        "of these the median (least to most).\n\n"
    )
    heads = ("", "keys", "wrong", "cdist", "ours or without", "other or with", "ratio")
    return page + runner.table(heads, (_cells(Row(**row)) for row in found["rows"])) + "\n"


def _cells(row: Row) -> list[str]:
    differs = "-" if row.cdist_differs is None else f"{row.cdist_differs} / {row.checked}"
    cells = [row.work, f"{row.keys:,}", f"{row.wrong} / {row.checked}", differs]
    if row.us is None or row.us_other is None:
        return [*cells, "-", "-", "-"]
    spread = f"{row.ratio:.3g}x ({row.ratio_least:.3g} to {row.ratio_most:.3g})"
    return [*cells, f"{row.us / 1e3:.2f} ms", f"{row.us_other / 1e3:.2f} ms", spread]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the first model only")
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100, help="of Adam, in each edit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of calls a contestant")
    parser.add_argument("--threads", type=int, default=1)


def _measure(given: Namespace) -> Iterator[runner.Found]:
    load = f"{os.getloadavg()[0]:.1f}"
    rows = []
    compared = [(tiny, given.keys) for tiny in (TINY[:1] if given.quick else TINY)]
    if not given.quick:
        compared += [(SMALL, keys) for keys in (FEW, 1000, given.keys)]
    for tiny, keys in compared:
        for row in edit_rows(tiny, keys, given.steps, given.rounds, given.budget):
            print(row, flush=True)
            rows.append(asdict(row))
        yield {"load": load, "rows": rows}
    rows += map(asdict, forward_rows(given.keys, given.rounds, given.budget))
    yield {"load": load, "rows": rows}


main = runner.Program(
    "edits",
    __doc__,
    options,
    _measure,
    markdown,
    lambda found: int(any(row["wrong"] for row in found["rows"])),
    runner.RESULTS,
).main


if __name__ == "__main__":
    sys.exit(main())
