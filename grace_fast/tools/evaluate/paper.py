"""The paper's three tasks, on its models and data: zsRE with NQ, SCOTUS, Hallucination.

Nothing is downloaded here but a model by its name, where a hub is reachable; the data are files in
one folder a task. What is missing is named with the place where it goes.

    zsre           T5: questions in twenty phrasings, ten edited and ten held out; NQ is unrelated
    scotus         BERT: the subject of a decision; the later decisions' labels have shifted
    hallucination  GPT2-XL: biographies with sentences that are not true, edited to the true ones
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grace_fast.tools.evaluate import answering, cache, records
from grace_fast.tools.evaluate.records import Check
from grace_fast.tools.evaluate.task import Case, Sample, Task, layers_like

PHRASINGS = 10  # of a question that are edited, and as many held out
ZSRE_QUESTIONS, ZSRE_SAMPLE = 100, 30
UNRELATED, UNRELATED_SAMPLE = 1000, 200
SCOTUS_TOKENS = 512
SAMPLE_SHARE = 5  # every fifth mistake or passage is for calibration
HEADER = "This is a Wikipedia passage about {}."


@dataclass(frozen=True)
class Source:
    """Where a task's model and files come from."""

    model: str  # its name on the hub
    model_class: str  # of transformers
    layer: str
    layers: str  # the same with {} for the block: what calibration measures
    files: Mapping[str, Mapping[str, Check]]  # by file, the fields of a record
    origin: str  # where the data are published


SOURCES = {
    "zsre": Source(
        "google/t5-small-ssm-nq",
        "AutoModelForSeq2SeqLM",
        "encoder.block.4.layer.1.DenseReluDense.wo",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
        {
            "zsre.jsonl": {
                "input": records.text,
                "output": records.output,
                "filtered_rephrases": records.texts,
            },
            "nq.jsonl": {"question": records.text, "answer": records.answers},
        },
        "zsre.jsonl is MEND's structured_zeroshot file, nq.jsonl the hub's "
        "google-research-datasets/nq_open",
    ),
    "scotus": Source(
        "tomh/scotus-bert",
        "AutoModelForSequenceClassification",
        "bert.encoder.layer.10.output.dense",
        "bert.encoder.layer.{}.output.dense",
        {
            "train.jsonl": {"text": records.text, "label": records.label},
            "test.jsonl": {"text": records.text, "label": records.label},
        },
        "both are splits of the hub's tomh/grace-scotus",
    ),
    "hallucination": Source(
        "openai-community/gpt2-xl",
        "AutoModelForCausalLM",
        "transformer.h.35.mlp.c_fc",
        "transformer.h.{}.mlp.c_fc",
        {
            "passages.jsonl": {
                "concept": records.text,
                "gpt3_sentences": records.texts,
                "annotation": records.verdicts,
                "wiki_bio_text": records.text,
            },
            "openwebtext.jsonl": {"text": records.text},
        },
        "passages.jsonl is the hub's potsawee/wiki_bio_gpt3_hallucination with the name of each "
        "passage as its concept, openwebtext.jsonl the hub's stas/openwebtext-10k",
    ),
}


def load(name: str, folder: Path | None) -> Task:
    """Return a task of the paper.

    folder: with the data files, and the model in `model/` where no hub is reachable; by default
    `data/NAME` in the cache.

    Raises: FileNotFoundError naming what is missing and where it goes; ValueError naming the line
    of a file that is not as it should be, or a layer that the model lacks.
    """
    source = SOURCES[name]
    place = cache.folder() / "data" / name if folder is None else folder
    read = {
        file: records.read(_find(name, source, place, file), fields)
        for file, fields in source.files.items()
    }
    model, tokenizer = _model(name, source, place)
    blocks = layers_like(model, source.layers)
    if not blocks:
        raise ValueError(f"the model has no layer {source.layers}; is it the one of the paper?")
    # The last block is too late: what it makes of the tokens before the query is read by nobody.
    layer = source.layer if source.layer in blocks else blocks[max(0, len(blocks) - 2)]
    bare = Task(
        name=name,
        model=model,
        tokenizer=tokenizer,
        layer=layer,
        layers=blocks,
        batch=16,
    )
    return MAKERS[name](bare, read)


def _find(name: str, source: Source, place: Path, file: str) -> Path:
    for candidate in (place / file, (place / file).with_suffix(".csv")):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(_needs(name, source, place, f"{place / file} is not there"))


def _needs(name: str, source: Source, place: Path, why: str) -> str:
    fields = "; ".join(f"{file} with {', '.join(wanted)}" for file, wanted in source.files.items())
    return (
        f"{name} cannot start: {why}. It needs, in {place}: {fields} (JSON lines, or CSV; "
        f"{source.origin}). The model {source.model} comes from the hub, or from the folder "
        f"{place / 'model'}"
    )


def _model(name: str, source: Source, place: Path) -> tuple[Any, Any]:
    import transformers

    local = place / "model"
    where = str(local) if local.exists() else source.model
    try:
        model = getattr(transformers, source.model_class).from_pretrained(where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except OSError as error:
        why = f"no hub, and no model in {local}" if where == source.model else f"{error}"
        raise FileNotFoundError(_needs(name, source, place, why)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _zsre(bare: Task, read: Mapping[str, Sequence[dict[str, Any]]]) -> Task:
    whole = 2 * PHRASINGS
    asked = []
    for record in read["zsre.jsonl"]:
        phrasings = list(dict.fromkeys([record["input"], *record["filtered_rephrases"]]))
        if len(phrasings) >= whole:
            asked.append((phrasings[:whole], record["output"][0]["answer"]))
    if len(asked) < 2:
        raise ValueError(
            f"zsre.jsonl must have questions in {whole} phrasings (input and filtered_rephrases), "
            f"at least 2, got {len(asked)} among {len(read['zsre.jsonl'])} records"
        )
    apart = min(ZSRE_SAMPLE, len(asked) // 2)
    stream, sample = asked[:-apart][:ZSRE_QUESTIONS], asked[-apart:]
    unrelated = [
        Case(record["question"], records.first(record["answer"]), record["question"])
        for record in read["nq.jsonl"]
    ]
    held_back = min(UNRELATED_SAMPLE, len(unrelated) // 3)
    return replace(
        bare,
        metric="f1",
        longest=24,
        edits=_phrased(stream, 0),
        held_out=_phrased(stream, 1),
        unrelated=unrelated[held_back:][:UNRELATED],
        calibration=Sample(_phrased(sample, 0), _phrased(sample, 1), unrelated[:held_back]),
        facts={"questions": len(stream), "unrelated": "NQ"},
    )


def _phrased(asked: Sequence[tuple[list[str], str]], half: int) -> list[Case]:
    start = half * PHRASINGS
    return [
        Case(phrasing, answer, phrasings[0])
        for phrasings, answer in asked
        for phrasing in phrasings[start : start + PHRASINGS]
    ]


def _scotus(bare: Task, read: Mapping[str, Sequence[dict[str, Any]]]) -> Task:
    task = replace(bare, cut=SCOTUS_TOKENS)
    before, after = (
        [Case(record["text"], int(record["label"]), record["text"]) for record in read[file]]
        for file in ("train.jsonl", "test.jsonl")
    )
    classes = int(task.model.config.num_labels)
    for case in (*before, *after):
        if int(case.answer) >= classes:
            raise ValueError(
                f"a label of scotus must be below {classes}, the model's classes, got {case.answer}"
            )
    said = answering.answers(task, after)
    wrong = [case for case, answer in zip(after, said, strict=True) if answer != case.answer]
    held_back = min(UNRELATED_SAMPLE, len(before) // 3)
    return replace(
        task,
        edits=[case for at, case in enumerate(wrong) if at % SAMPLE_SHARE],
        unrelated=before[held_back:][:UNRELATED],
        calibration=Sample(wrong[::SAMPLE_SHARE], (), before[:held_back]),
        rehearsal=before,
        facts={"decisions": len(after), "wrong": len(wrong)},
    )


def _hallucination(bare: Task, read: Mapping[str, Sequence[dict[str, Any]]]) -> Task:
    edits: list[Case] = []
    sample: list[Case] = []
    accurate: list[Case] = []
    for at, record in enumerate(read["passages.jsonl"]):
        wrong, right = _sentences(record)
        (edits if at % SAMPLE_SHARE else sample).extend(wrong)
        accurate.extend(right)
    texts = []
    for record in read["openwebtext.jsonl"]:
        words = record["text"].split()
        if len(words) > 2:
            half = min(len(words) // 2, 64)
            rest = " ".join(words[half : 2 * half])
            texts.append(Case(" ".join(words[:half]), rest, record["text"]))
    held_back = min(UNRELATED_SAMPLE, len(texts) // 3)
    return replace(
        bare,
        metric="perplexity",
        longest=64,
        edits=edits,
        accurate=accurate,
        unrelated=texts[held_back:][:UNRELATED],
        calibration=Sample(sample, (), texts[:held_back]),
        facts={"passages": len(read["passages.jsonl"])},
    )


def _sentences(record: Mapping[str, Any]) -> tuple[list[Case], list[Case]]:
    """Return a passage's edits and its accurate sentences, each after the true ones before it."""
    true = re.split(r"(?<=[.!?])\s+", str(record["wiki_bio_text"]).strip())
    so_far, concept = HEADER.format(record["concept"]), record["concept"]
    wrong: list[Case] = []
    right: list[Case] = []
    pairs = zip(record["gpt3_sentences"], record["annotation"], true, strict=False)
    for said, verdict, sentence in pairs:
        if verdict == "accurate":
            right.append(Case(so_far, said.strip(), concept))
        else:
            wrong.append(Case(so_far, sentence, f"{concept}, sentence {len(wrong) + len(right)}"))
        so_far = f"{so_far} {sentence}"
    return wrong, right


MAKERS: dict[str, Callable[[Task, Mapping[str, Sequence[dict[str, Any]]]], Task]] = {
    "zsre": _zsre,
    "scotus": _scotus,
    "hallucination": _hallucination,
}
