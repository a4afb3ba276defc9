"""Steps that are recorded and run again: bit for bit the model's, or the model is called."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import grace_fast as gf
from grace_fast.editor import steps
from grace_fast.editor.program import Program
from grace_fast.editor.recording import Recording, Unrecordable
from tests import models
from tests.models import FAMILIES

QUICK = {"iterations": 12, "learning_rate": 0.3}
TARGETS = [[10, 20], [30], [40, 50, 60], [70]]


def attached(model, name, is_recorded=True, cuts=False, **more):
    family = FAMILIES[name]
    grace = gf.attach(model, family.layer, **{"epsilon": family.epsilon, **QUICK, **more})
    grace._context.shortcuts.records = is_recorded
    grace._context.shortcuts.cuts = cuts
    return grace


def batch_of(name, rows=4):
    targets = [row[:1] * 2 for row in TARGETS] if name.startswith("t5") else TARGETS
    return models.edit_batch(FAMILIES[name], models.prompts(rows), targets[:rows])


def outcome_of(grace, batches):
    """Return all that edits left: reports and values."""
    reports = [one for batch in batches for one in grace.edit_batch(batch)]
    said = [(one.outcome, one.row, one.steps, one.correct, one.loss) for one in reports]
    return said, grace.codebook.snapshot().values.clone()


@pytest.mark.parametrize("replacement", ["replace_all", "replace_last", "replace_prompt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_edits_by_replays_are_bit_for_bit_those_by_the_model(name, replacement):
    found = []
    for is_recorded in (False, True):
        grace = attached(models.build(name), name, is_recorded, replacement=replacement)
        found.append(outcome_of(grace, [batch_of(name, 1), batch_of(name)]))
        taken = grace._context.shortcuts.taken
        assert (taken["replay"] > 0) == is_recorded
        assert taken["cut"] == 0
    (said, values), (other, its) = found
    assert torch.equal(values, its)
    assert [one[:4] for one in said] == [one[:4] for one in other]
    assert said[0] == other[0]  # of one row, the loss too
    assert [one[4] for one in said] == pytest.approx([one[4] for one in other], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_by_the_reference_s_rules_replays_leave_every_number(name):
    found = []
    for is_recorded in (False, True):
        grace = attached(models.build(name), name, is_recorded, cuts=True, semantics="reference")
        torch.manual_seed(5)
        found.append(outcome_of(grace, [batch_of(name, 1)]))
        assert (grace._context.shortcuts.taken["replay"] > 0) == is_recorded
        assert grace._context.shortcuts.taken["cut"] == 0
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_every_token_s_query_is_replayed():
    found = []
    for is_recorded in (False, True):
        grace = attached(models.build("llama"), "llama", is_recorded, query="every_token")
        found.append(outcome_of(grace, [batch_of("llama")]))
        assert (grace._context.shortcuts.taken["replay"] > 0) == is_recorded
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_schedule_that_asks_for_margins_is_replayed(name):
    found = []
    for is_recorded, cuts in ((False, False), (True, False), (True, True)):
        family = FAMILIES[name]
        grace = gf.attach(models.build(name), family.layer, family.epsilon, schedule="fast")
        grace._context.shortcuts.records, grace._context.shortcuts.cuts = is_recorded, cuts
        assert grace.settings.margin is not None
        found.append(outcome_of(grace, [batch_of(name, 1), batch_of(name)]))
        assert grace._context.shortcuts.taken["cut"] == 0 or cuts
    assert torch.equal(found[0][1], found[1][1])
    told = [[(one[0], one[1], one[3]) for one in said] for said, _ in found]
    assert told[0] == told[1] == told[2]


class Toy(nn.Module):
    """An embedding, the edited layer, and what a test makes of its output."""

    def __init__(self, above=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.edited = nn.Embedding(20, 4), nn.Linear(4, 4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.above, self.count = above, 0
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, input_ids, labels=None, scales=None):
        hidden = self.edited(self.embed(input_ids))
        hidden = hidden if scales is None else hidden * scales[:, None, None]
        hidden = self.inner(hidden) if self.above is None else self.above(self, hidden)
        logits = self.head(torch.tanh(hidden))[:, -1]
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def toy_edits(above=None, is_recorded=True, spoil=None, prepare=None):
    """Return values that edits of a toy leave, and by which ways they were learnt."""
    toy = Toy(above).eval()
    undo = spoil(toy) if spoil else None
    grace = gf.attach(toy, "edited", 0.01, replacement="replace_all", **QUICK)
    grace._context.shortcuts.records = is_recorded
    if prepare:
        prepare(toy)
    torch.manual_seed(3)
    try:
        for at in range(2):
            tokens = torch.tensor([[3, 4, 5, 6 + at]])
            grace.edit({"input_ids": tokens, "labels": torch.tensor([at])})
    finally:
        if undo:
            undo()
    return grace.codebook.snapshot().values.clone(), grace._context.shortcuts


def by_item(toy, hidden):
    return hidden * (1 + hidden[0, 0, 0].item())


def by_list(toy, hidden):
    return hidden * (1 + hidden.detach()[0, 0].tolist()[0])


def by_truth(toy, hidden):
    return hidden * 2 if hidden.sum() > 0 else hidden * 3


def by_numpy(toy, hidden):
    return hidden + torch.from_numpy(hidden.detach().numpy() * 2)


def by_shape(toy, hidden):
    return hidden + hidden[hidden > 0].sum()


def by_draws(toy, hidden):
    return hidden + 0.1 * torch.rand(hidden.shape)


def by_own_draws(toy, hidden):
    return hidden + 0.1 * torch.rand(hidden.shape, generator=GENERATOR)


def by_dropout(toy, hidden):
    return F.dropout(hidden, 0.5, training=True)


def by_writing(toy, hidden):
    toy.seen.add_(0.01 * hidden.detach()[0, -1])
    return hidden + toy.seen


def by_count(toy, hidden):
    toy.count += 1
    return hidden * toy.count


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "above",
    [
        by_item,
        by_list,
        by_truth,
        by_numpy,
        by_shape,
        by_draws,
        by_own_draws,
        by_dropout,
        by_writing,
        by_count,
    ],
)
def test_what_may_be_another_thing_in_the_next_step_is_left_to_the_model(above):
    found = []
    for is_recorded in (False, True):
        GENERATOR.manual_seed(0)
        values, shortcuts = toy_edits(above, is_recorded)
        assert shortcuts.taken["replay"] == 0
        found.append(values)
    assert torch.equal(*found)


def in_place(toy, hidden):
    found = torch.zeros_like(hidden)
    found[:, 1:] = hidden[:, :-1]
    found += hidden
    return found.relu_()


def by_views(toy, hidden):
    whole = hidden.view(-1, 4).view(2, 2, 4).view(1, 4, 4)
    one, two = whole.split(2, dim=-1)
    return torch.cat([two, one * 2], -1).transpose(0, 1).transpose(0, 1)


def by_constants(toy, hidden):
    mask = torch.ones(hidden.shape[:2]).cumsum(1)[..., None]
    return hidden * mask + torch.ones_like(hidden) + toy.inner(hidden)


@pytest.mark.parametrize("above", [None, in_place, by_views, by_constants])
def test_plain_computations_are_replayed(above):
    values, own = toy_edits(above, is_recorded=False)
    other, shortcuts = toy_edits(above)
    assert own.taken["replay"] == 0 < shortcuts.taken["replay"]
    assert torch.equal(values, other)


def hook_of(toy):
    def hook(_, __, output):
        return output * 1.5

    return toy.inner.register_forward_hook(hook).remove


def hook_on_edited(toy):
    return toy.edited.register_forward_hook(lambda _, __, output: output * 1.5).remove


def backward_hook(toy):
    return toy.inner.register_full_backward_hook(lambda _, given, __: (given[0] * 2,)).remove


def every_hook(toy):
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def patched(toy):
    own = toy.inner.forward
    toy.inner.forward = lambda hidden: own(hidden) * 2


def dispatch_mode(toy):
    mode = FlopCounterMode(display=False)
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


@pytest.mark.parametrize(
    "spoil", [hook_of, hook_on_edited, backward_hook, every_hook, patched, dispatch_mode]
)
def test_where_others_take_part_the_model_is_called(spoil):
    values, own = toy_edits(is_recorded=False, spoil=spoil)
    other, shortcuts = toy_edits(spoil=spoil)
    assert own.taken["replay"] == shortcuts.taken["replay"] == 0
    assert torch.equal(values, other)


def test_recordings_that_overlap_in_two_threads_leave_torch_in_no_mode():
    first, second = (Recording(torch.ones(1)) for _ in range(2))
    first.start()
    thread = threading.Thread(target=lambda: (second.start(), ended.wait(), second.stop()))
    ended = threading.Event()
    thread.start()
    try:
        first.stop()
    finally:
        ended.set()
        thread.join()
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_what_no_operation_shows_is_found_by_comparing():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            ctx.set_materialize_grads(True)
            with torch.utils._python_dispatch._disable_current_modes():
                return given.detach() * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    def above(toy, hidden):
        return Hidden.apply(hidden) + hidden

    values, _ = toy_edits(above, is_recorded=False)
    other, shortcuts = toy_edits(above)
    assert shortcuts.taken["replay"] == 0
    assert not shortcuts.records
    assert torch.equal(values, other)


def test_another_kind_of_program_is_compared_anew(monkeypatch):
    toy = Toy(lambda own, hidden: hidden.sin() if own.count else own.inner(hidden)).eval()
    grace = gf.attach(toy, "edited", 0.01, replacement="replace_all", **QUICK)
    for at in range(2):
        toy.count = at
        grace.edit({"input_ids": torch.tensor([[3, 4 + at]]), "labels": torch.tensor([at])})
        assert len(grace._context.shortcuts.proved) == 1 + at


def test_the_model_has_the_last_word_on_what_was_replayed(monkeypatch):
    values, _ = toy_edits(is_recorded=False)
    real = Program.run

    def wrong(program, given):
        losses, right, gradients = real(program, given)
        return [losses * 0, torch.ones_like(right), gradients]

    proving = steps.Steps._proving

    def proved(self, given, program):
        with pytest.MonkeyPatch.context() as own:
            own.setattr(Program, "run", real)
            return proving(self, given, program)

    monkeypatch.setattr(Program, "run", wrong)
    monkeypatch.setattr(steps.Steps, "_proving", proved)
    other, shortcuts = toy_edits()
    assert shortcuts.taken["replay"] > 0
    assert not shortcuts.records
    assert torch.equal(values, other)


@pytest.mark.filterwarnings("ignore")
def test_a_row_without_numbers_leaves_its_batch_mates_alone():
    found = []
    for scale in (1.0, torch.nan):
        grace = gf.attach(Toy().eval(), "edited", 0.01, replacement="replace_all", **QUICK)
        batch = {
            "input_ids": torch.tensor([[3, 4], [7, 8], [9, 10]]),
            "labels": torch.tensor([1, 2, 0]),
            "scales": torch.tensor([1.0, scale, 1.0]),
        }
        reports = grace.edit_batch(batch)
        assert grace._context.shortcuts.taken["replay"] > 0
        assert reports[1].correct == (scale == 1.0)
        values = grace.codebook.snapshot().values.clone()
        found.append([(one.correct, values[one.row]) for one in reports])
    for whole, other in list(zip(*found, strict=True))[::2]:
        assert whole[0]
        assert other[0]
        assert torch.equal(whole[1], other[1])


def test_no_memory_for_a_recording_is_no_end(monkeypatch):
    values, _ = toy_edits(is_recorded=False)

    def full(self, *_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Recording, "_note", full)
    other, shortcuts = toy_edits()
    assert shortcuts.taken["replay"] == 0
    assert torch.equal(values, other)
    monkeypatch.undo()
    monkeypatch.setattr(Program, "run", full)
    monkeypatch.setattr(steps.Steps, "_proving", lambda self, given, _: self._made(given))
    assert torch.equal(values, toy_edits()[0])


def test_nothing_of_a_recording_outlives_its_edit(monkeypatch):
    seen = []
    real = Recording._note

    def note(self, func, args, kwargs, output):
        if isinstance(output, torch.Tensor):
            seen.append(weakref.ref(output))
        real(self, func, args, kwargs, output)

    monkeypatch.setattr(Recording, "_note", note)
    model = models.build("gpt2")
    grace = attached(model, "gpt2")
    gc.disable()
    try:
        grace.edit_batch(batch_of("gpt2"))
        assert grace._context.shortcuts.taken["replay"] > 0
        kept = {id(each) for each in (*model.parameters(), *model.buffers())}
        alive = [one() for one in seen if one() is not None and id(one()) not in kept]
    finally:
        gc.enable()
    assert len(seen) > 50
    assert not alive


def test_a_recording_holds_no_data_that_the_step_lets_go():
    inner = nn.Linear(64, 64).requires_grad_(False)
    leaf = torch.randn(32, 64, requires_grad=True)
    recording = Recording(leaf)
    recording.start()
    try:
        losses = inner(inner(leaf).tanh()).square().sum(1)
        (gradients,) = torch.autograd.grad(losses.sum(), [leaf])
    finally:
        recording.stop()
    program = recording.program([losses, gradients])
    other = torch.randn(32, 64, requires_grad=True)
    own = inner(inner(other).tanh()).square().sum(1)
    (its,) = torch.autograd.grad(own.sum(), [other])
    made = program.run(other.detach())
    assert torch.equal(made[0], own)
    assert torch.equal(made[1], its)
    held = (each.constant for each in recording._made if each.shape == leaf.shape)
    assert all(one is None or one.untyped_storage().nbytes() < 64 for one in held)


def test_what_is_not_made_of_the_values_is_refused():
    leaf = torch.ones(3, requires_grad=True)
    recording = Recording(leaf)
    recording.start()
    losses = leaf * 2
    recording.stop()
    with pytest.raises(Unrecordable, match="not made of the values"):
        recording.program([losses, torch.ones(3)])


WRITTEN = torch.zeros(3)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda x: WRITTEN.add_(x.detach()) + x, "did not make is written to"),
        (lambda x: WRITTEN[:2].mul_(2).sum() + x, "did not make is written to"),
        (lambda x: x * float(x.detach().sum()), "goes by what is in a tensor"),
        (lambda x: x + x[x > 0].sum(), "goes by what is in a tensor"),
        (lambda x: x + x.detach().tolist()[0], "numbers of a tensor are read"),
        (lambda x: x + torch.from_numpy(x.detach().numpy()), "numbers of a tensor are read"),
        (lambda x: x + torch.rand(3, generator=GENERATOR), "draws numbers"),
        (lambda x: x + nn.Parameter(torch.ones(3)).normal_().detach(), "draws numbers"),
    ],
)
def test_what_cannot_be_recorded_says_why(compute, reason):
    leaf = torch.ones(3, requires_grad=True)
    recording = Recording(leaf)
    with torch.no_grad():
        recording.start()
        try:
            made = compute(leaf)
        finally:
            recording.stop()
    with pytest.raises(Unrecordable, match=reason):
        recording.program([made])


def test_other_threads_use_the_model_meanwhile():
    model = models.build("llama")
    plain = attached(models.build("llama"), "llama", is_recorded=False)
    wanted = outcome_of(plain, [batch_of("llama", 1)])
    prompt = models.prompt_batch(models.prompts(1, seed=9))
    with torch.no_grad():
        logits = model(**prompt).logits
    grace = attached(model, "llama", iterations=12)
    seen, over = [], threading.Event()

    def use():
        while not over.is_set():
            with torch.no_grad():
                seen.append(model(**prompt).logits)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        found = outcome_of(grace, [batch_of("llama", 1)])
    finally:
        over.set()
        thread.join()
    assert grace._context.shortcuts.taken["replay"] > 0
    assert torch.equal(found[1], wanted[1])
    assert seen
    assert all(torch.equal(one, logits) for one in seen)
