"""What attaching and looking up leave behind: nothing, not in the model and not in the codebook."""

from __future__ import annotations

import hashlib

import models
import pytest
import torch
from cases import CASES, drawn
from models import FAMILIES

import grace_fast as gf
from grace_fast import _native
from grace_fast.lookup import lookup
from grace_fast.lookup.backends.workload import Workload

PAGE_FIELDS = ("radius", "live", "key_slot", "value_slot", "label_slot")
HOOKS = [name for name in vars(torch.nn.Linear(1, 1)) if "hooks" in name]


def on_this_host():
    """The back ends that take keys on the host, and of the compiled one every instruction set."""
    for name, backend in lookup.BACKENDS.items():
        if backend.why_not(Workload("cpu", torch.float32, 1, 1, 1)) is not None:
            continue
        if name != "cpu":
            yield name, None
            continue
        yield from (("cpu", kernels) for kernels in ("portable", "avx2", "avx512vnni"))


@pytest.fixture(params=list(on_this_host()), ids=lambda pair: "-".join(filter(None, pair)))
def backend(request):
    name, kernels = request.param
    if kernels is None:
        yield name
        return
    usual = _native.cpu.instruction_set()
    if not _native.cpu.use_instruction_set(kernels):
        pytest.skip(f"this processor has no {kernels}")
    yield name
    _native.cpu.use_instruction_set(usual)


def digest(book):
    """A checksum of every slot in use, every page to its end, and all that is counted."""
    snapshot, found = book.snapshot(), hashlib.sha256()
    used = snapshot.counts
    tensors = [
        snapshot.key_slots[: used.keys],
        snapshot.value_slots[: used.values],
        snapshot.id_slots[: used.rows],
        *(getattr(page, field) for page in snapshot.pages for field in PAGE_FIELDS),
        *(label for label in snapshot.label_slots.between(0, used.labels) if label is not None),
    ]
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    found.update(
        repr((snapshot.version, used, len(book._slots.labels), book._slots.next_id)).encode()
    )
    return found.hexdigest()


BOOKS = {
    "a few": lambda: CASES["fp32"],
    "moved keys": lambda: CASES["moved keys"],
    "removed rows": lambda: CASES["a removed row does not win a tie"],
    "bf16": lambda: CASES["moved keys in bf16"],
    "across pages": lambda: CASES["across pages"],
    "with codes": lambda: drawn(5000, 64, 40),
}


@pytest.mark.parametrize("case", BOOKS.values(), ids=list(BOOKS))
def test_a_look_up_changes_no_byte_of_the_codebook(case, backend):
    case = case()
    book = case.book()
    before, snapshot = digest(book), book.snapshot()
    prepared = gf.prepare(book)  # codes are made beside the codebook
    odd = torch.full_like(case.queries[:1], torch.nan)
    for queries in (case.queries, case.queries[:1], odd, case.queries[:0]):
        gf.find(queries, book, backend=backend)
        if hasattr(lookup.BACKENDS[backend], "nearest"):
            gf.nearest(queries, book, backend=backend)
        output = torch.ones(len(queries), 3, 2, dtype=case.keys.dtype)
        gf.replace(output, queries, book, mode="replace_all", backend=backend)
        prepared(queries)
    assert book.snapshot() is snapshot
    assert digest(book) == before


def test_the_checksum_sees_every_single_change():
    case, seen = CASES["fp32"], set()
    for change in (
        lambda book, draft: None,
        lambda book, draft: draft.set_radius(3, 0.125),
        lambda book, draft: draft.point_value(3, 4),
        lambda book, draft: draft.point_key(3, 4),
        lambda book, draft: draft.remove(3),
        lambda book, draft: draft.set_label(3, torch.tensor([1])),
    ):
        book = case.book()
        with book.writing() as draft:
            change(book, draft)
        seen.add(digest(book))
    assert len(seen) == 6


@pytest.fixture(params=list(FAMILIES), ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def modules_of(model):
    """Everything of a model's modules that an adaptor could leave something in."""
    return {
        name: (
            type(module),
            module.training,
            sorted(vars(module)),
            {hooks: list(getattr(module, hooks).items()) for hooks in HOOKS},
            [(one, id(parameter)) for one, parameter in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def state_of(model):
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def answers_of(model, family):
    batch = models.edit_batch(family, models.prompts(3)[:1], [[10]])
    with torch.no_grad():
        answers = [model(**batch).logits]
        if family.labels != "class":
            prompt = models.prompt_batch(models.prompts(1))
            answers.append(model.generate(**prompt, max_new_tokens=4, do_sample=False))
    return answers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attach_edit_and_unload_leave_state_hooks_and_outputs_as_they_were(family, training):
    model = models.build(family.name)
    answers = answers_of(model, family)
    model.train(training)
    before, hooks = state_of(model), modules_of(model)
    replacement = "replace_prompt" if family.name == "bert" else "replace_all"
    settings = {"epsilon": family.epsilon, "replacement": replacement, "iterations": 3}
    grace = gf.attach(model, family.layer, **settings)
    other = gf.attach(model, family.layer, name="tenant", **settings)
    assert state_of(model) == before
    for each in (grace, other):
        each.edit(models.edit_batch(family, models.prompts(3)[:1], [[10]]))
    assert state_of(model) == before
    if family.labels != "class":
        model.eval()
        answers_of(model, family)
        model.train(training)
    grace.unload()
    other.unload()
    assert state_of(model) == before
    assert modules_of(model) == hooks
    model.eval()
    after = answers_of(model, family)
    assert all(torch.equal(a, b) for a, b in zip(answers, after, strict=True))


@pytest.mark.parametrize("query", ["prompt_end", "every_step", "every_token"])
def test_forward_calls_and_generate_change_no_byte_of_an_editors_codebook(query):
    family, model = FAMILIES["gpt2"], models.build("gpt2")
    grace = gf.attach(model, family.layer, epsilon=0.05, replacement="replace_last", query=query)
    models.remember(grace, models.prompts(60))
    before, snapshot = digest(grace.codebook), grace.codebook.snapshot()
    answers_of(model, family)
    batch = models.prompt_batch(models.prompts(5), "left")
    with torch.no_grad():
        model(**batch)
    grace.explain(batch)
    grace.verify()
    assert grace.codebook.snapshot() is snapshot
    assert digest(grace.codebook) == before
