"""Plain calls, answered by the extension alone, are answered as Python answers them.

Every call is made both ways: outputs are equal bit for bit and lie in memory alike, and the same is
counted. Which way was gone is asserted, for a way that is never gone proves nothing.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import threading
import weakref

import models
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

import grace_fast as gf
from grace_fast import _native
from grace_fast.codebook.codebook import Codebook
from grace_fast.hook import calls
from grace_fast.hook.adapter import Adapter
from grace_fast.hook.attachment import Site
from grace_fast.hook.generation import Generation

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="the extension was not built")

WIDTH, VALUE, WORDS, PAD = 24, 10, 14, 0
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("replace_all", "replace_last", "replace_prompt")
ASKED = ("prompt_end", "every_step", "every_token")
LAYOUTS = ("contiguous", "sliced", "rows second in memory", "elements apart", "flat")


class Model(nn.Module):
    """A table of vectors and one linear layer, whose tensors may lie in memory in several ways."""

    def __init__(self, dtype):
        super().__init__()
        table = torch.randn(WORDS, WIDTH).to(dtype)
        table[WORDS - 1, 3] = torch.nan
        self.register_buffer("table", table)
        self.layer = nn.Linear(WIDTH, VALUE, dtype=dtype)
        self.layout, self.shift = "contiguous", 0

    def forward(self, input_ids=None, attention_mask=None, labels=None, position_ids=None):
        return self.layer(laid_out(self.table[input_ids + self.shift], self.layout))


def laid_out(hidden, layout):
    batch, length, width = hidden.shape
    if layout == "sliced":
        wide = torch.full((batch, length + 2, width + 3), 9.0, dtype=hidden.dtype)
        wide[:, 1:-1, 2:-1] = hidden
        return wide[:, 1:-1, 2:-1]
    if layout == "rows second in memory":
        return hidden.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "elements apart":
        return hidden.transpose(1, 2).contiguous().transpose(1, 2)
    return hidden.flatten(0, 1) if layout == "flat" else hidden


def made(dtype=torch.float32, query="prompt_end", replacement="replace_all", keys=6, **site):
    """A model, and an adaptor on it whose keys are some of its vectors."""
    model = Model(dtype).eval()
    chosen = {"decoder_only": False, "layer_name": "layer", "seat_name": "layer", **site}
    place = Site(model, model.layer, model, replacement, query, **chosen)
    adaptor = Adapter(place, Codebook(WIDTH, VALUE, dtype))
    adaptor.install()
    if keys:
        grow(adaptor, range(keys))
    return model, adaptor


def grow(adaptor, words):
    words = list(words)
    values = torch.randn(len(words), VALUE).to(adaptor.book.dtype)
    radii = torch.full((len(words),), 0.25)
    adaptor.book.append(adaptor.model.table[words], values, radii)


def drawn(batch, length):
    return torch.randint(1, WORDS, (batch, length))


def padded(batch, length, kind=torch.int64, rng=random):
    mask = torch.ones(batch, length)
    for row in mask:
        if (cut := rng.randrange(length)) and rng.random() < 0.5:
            row[:cut] = 0
        elif cut:
            row[-cut:] = 0
    return mask.to(kind)


@contextlib.contextmanager
def by_python(adaptor):
    """Let Python do all that is plain, too."""
    before = adaptor._respond_plainly, calls.notes_plainly
    adaptor._respond_plainly, calls.notes_plainly = None, False
    try:
        yield
    finally:
        adaptor._respond_plainly, calls.notes_plainly = before


def bits(tensor):
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().contiguous().view(width)


def assert_same(one, other):
    if not isinstance(one, torch.Tensor):
        assert one == other
        return
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(bits(one), bits(other))
    assert one.stride() == other.stride()
    assert one.requires_grad == other.requires_grad
    assert one.is_inference() == other.is_inference()


def both(model, adaptor, *args, **kwargs):
    """Make a call both ways; return the output, and how many queries were answered plainly."""
    plainly_before = adaptor.tally.plain.queries
    with by_python(adaptor):
        outcome(model, args, kwargs)  # which prepares the version
        before = figures(adaptor)
        expected = outcome(model, args, kwargs)
        slowly = figures(adaptor)
    before_plainly = adaptor.tally.plain.queries
    assert before_plainly == plainly_before
    said = outcome(model, args, kwargs)
    quickly, plainly = figures(adaptor), adaptor.tally.plain.queries - before_plainly
    assert [b - a for a, b in zip(before, slowly, strict=True)] == [
        b - a for a, b in zip(slowly, quickly, strict=True)
    ]
    assert_same(said, expected)
    return said, plainly


def outcome(model, args, kwargs):
    try:
        return model(*args, **kwargs)
    except (ValueError, RuntimeError, TypeError) as error:
        return type(error), str(error)


def figures(adaptor):
    now = adaptor.tally.read(0, 0)
    rows = [adaptor.hits[row] for row in range(64)]
    asked = [now.calls, now.queries, now.hits, now.certified_misses, now.rechecks, now.failed]
    return [*asked, sum(now.latency.counts), *rows]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("query", ASKED)
@pytest.mark.parametrize("replacement", MODES)
def test_plain_calls_are_answered_as_python_answers_them(dtype, query, replacement):
    torch.manual_seed(1)
    rng, plainly, hits = random.Random(2), 0, 0
    model, adaptor = made(dtype, query, replacement)
    for _ in range(60):
        batch, length = rng.randint(1, 5), rng.randint(1, 7)
        model.layout = rng.choice(LAYOUTS if query == "every_token" else LAYOUTS[:-1])
        ids = drawn(batch, length)
        mask = rng.choice((torch.int64, torch.bool, torch.float32, torch.int32, torch.float64))
        given = {"attention_mask": padded(batch, length, mask, rng)} if rng.random() < 0.7 else {}
        if rng.random() < 0.2:
            given["labels"] = None
        mode = rng.choice((torch.no_grad, torch.inference_mode, torch.enable_grad))
        before = sum(adaptor.hits.values())
        with mode():
            said, now = both(model, adaptor, ids, **given)
        plainly += now > 0
        hits += sum(adaptor.hits.values()) > before
        assert isinstance(said, torch.Tensor)
    assert plainly >= 15
    assert 15 <= hits <= 60 - 5 * (query != "every_token")


@pytest.mark.parametrize("query", ASKED)
def test_a_codebook_that_grows_and_changes_is_asked_as_it_is(query):
    torch.manual_seed(3)
    rng = random.Random(4)
    model, adaptor = made(query=query, keys=0)
    ids, plainly = drawn(3, 4), 0
    with torch.no_grad():
        said, _ = both(model, adaptor, ids)
        assert torch.equal(bits(said), bits(model.layer(model.table[ids])))
        assert sum(adaptor.tally.read(0, 0).latency.counts) == 0  # nobody asks an empty one
        for turn in range(30):
            if turn % 5 == 0:
                grow(adaptor, [rng.randrange(WORDS - 1)])
            else:
                row = rng.randrange(adaptor.book.snapshot().rows)
                with adaptor.book.writing() as draft:
                    if turn % 5 == 1:
                        draft.set_value(row, torch.randn(VALUE))
                    elif turn % 5 == 2:
                        draft.set_radius(row, rng.choice((-1.0, 0.0, 0.3, 3.0)))
                    elif turn % 5 == 3:
                        draft.set_key(row, model.table[rng.randrange(WORDS - 1)])
            plainly += both(model, adaptor, drawn(3, 4), attention_mask=padded(3, 4, rng=rng))[1]
    assert plainly == 30 * 3 * (4 if query == "every_token" else 1)


def test_a_new_version_is_seen_by_the_next_call():
    model, adaptor = made(keys=2)
    ids = torch.tensor([[5, 5, 7]])
    with torch.no_grad():
        plain = model(ids)
        assert torch.equal(model(ids), plain)
        grow(adaptor, [7])
        value = adaptor.book.values[2]
        assert torch.equal(model(ids), value.expand(1, 3, VALUE))
        with adaptor.book.writing() as draft:
            draft.set_radius(2, -1.0)
        assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("padding", [None, PAD])
@pytest.mark.parametrize("given", ["without a mask", "with a mask"])
@pytest.mark.parametrize("query", ["prompt_end", "every_step"])
def test_a_decoder_without_a_mask_is_plain_unless_its_rows_end_in_padding(query, given, padding):
    model, adaptor = made(query=query, decoder_only=True)
    ids = drawn(2, 4)
    mask = {} if given == "without a mask" else {"attention_mask": torch.ones(2, 4)}
    with torch.no_grad():
        assert both(model, adaptor, ids, **mask)[1] == 2
        for at in (3, 2, 1):
            model_ids = ids.clone()
            model_ids[1, at:] = PAD
            both(model, adaptor, model_ids, **mask)


def test_a_decoder_whose_padding_is_known_refuses_it_in_words():
    model = models.build("llama")
    grace = gf.attach(model, models.FAMILIES["llama"].layer, epsilon=0.1, iterations=0)
    prompt = models.prompts(1, shortest=6, longest=6)[0]
    models.remember(grace, [prompt])
    padding = grace._adapter._reader.padding.token
    with torch.no_grad():
        for _ in range(2):
            model(torch.tensor([prompt]))
        assert grace._adapter.tally.plain.queries
        if padding is not None:
            both(model, grace._adapter, torch.tensor([[*prompt, padding, padding]]))


NOT_PLAIN = {
    "labels": lambda ids: {"labels": ids},
    "position ids": lambda ids: {"position_ids": torch.arange(ids.shape[1])[None]},
    "a mask of another shape": lambda ids: {"attention_mask": torch.ones(len(ids), 9)},
    "a mask of four dimensions": lambda ids: {"attention_mask": torch.ones(len(ids), 1, 4, 4)},
    "names that are not kept once": lambda ids: {"".join(["attention", "_mask"]): padded(3, 4)},
}


@pytest.mark.parametrize("what", list(NOT_PLAIN))
def test_what_says_more_than_ids_and_a_mask_goes_to_python(what):
    model, adaptor = made(decoder_only=True)
    ids = drawn(3, 4)
    with torch.no_grad():
        assert both(model, adaptor, ids, **NOT_PLAIN[what](ids))[1] == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what forward mode imports
@pytest.mark.parametrize("mode", ["grad", "training", "disabled", "transform", "forward mode"])
def test_what_needs_more_than_numbers_goes_to_python(mode):
    model, adaptor = made()
    ids, hit = torch.tensor([[1, 2]]), contextlib.nullcontext()
    with torch.no_grad():
        assert both(model, adaptor, ids)[1] == 1
    if mode == "training":
        model.train()
    if mode == "disabled":
        hit = adaptor.disabled()
    if mode == "transform":
        said = torch.func.vmap(lambda one: outcome(model, (one[None],), {}), randomness="same")
        before = adaptor.tally.plain.queries
        with pytest.raises((RuntimeError, ValueError)):
            said(ids)
        assert adaptor.tally.plain.queries == before
        return
    if mode == "forward mode":
        with forward_ad.dual_level(), torch.no_grad():
            assert both(model, adaptor, ids)[1] == 0
        return
    with hit, torch.set_grad_enabled(mode == "grad"):
        said, plainly = both(model, adaptor, ids)
    assert plainly == 0
    assert said.requires_grad == (mode == "grad")


def test_a_miss_with_gradients_is_plain_and_keeps_them():
    model, adaptor = made()
    ids = torch.tensor([[1, 12]])
    said, plainly = both(model, adaptor, ids)
    assert plainly == 1
    said.sum().backward()
    assert model.layer.weight.grad is not None


def test_the_output_of_the_layer_is_not_written_to():
    model, adaptor = made()
    kept = []
    model.layer.register_forward_hook(lambda *given: kept.append(given[-1]), prepend=True)
    ids = torch.tensor([[12, 1]])
    with torch.no_grad():
        for _ in range(3):
            said = model(ids)
    assert adaptor.tally.plain.hits == 2
    own = torch.nn.functional.linear(model.table[ids], model.layer.weight, model.layer.bias)
    assert all(torch.equal(one, own) for one in kept)
    assert not torch.equal(said, own)


@pytest.mark.parametrize("name", ["mine", "yours"])
def test_a_named_codebook_is_plain_where_it_answers_every_row(name):
    model, adaptor = made(name="mine")
    ids = drawn(2, 3)
    with torch.no_grad():
        for chosen in (name, [name, None], None):
            with gf.using(chosen):
                _, plainly = both(model, adaptor, ids)
            assert plainly == (2 if chosen == "mine" else 0)


def test_every_token_of_a_generate_is_plain():
    model, adaptor = made(query="every_token")
    ids = drawn(2, 3)
    with torch.no_grad(), adaptor.holding(Generation()):
        assert both(model, adaptor, ids)[1] == 6
    with torch.no_grad(), adaptor.asking_at(torch.tensor([0, 1])):
        assert both(model, adaptor, ids)[1] == 0


def test_calls_of_one_model_within_another_keep_apart():
    torch.manual_seed(5)
    outer, first = made()
    inner, second = made()
    other = drawn(2, 5)

    def ask(*_):
        inner(other)

    outer.layer.register_forward_pre_hook(ask)
    with torch.no_grad():
        for _ in range(4):
            both(outer, first, drawn(2, 3))
            both(inner, second, drawn(1, 4))
    assert first.tally.plain.queries
    assert second.tally.plain.queries
    assert not calls.in_progress.stack


def test_an_error_of_the_model_ends_the_call_that_was_noted():
    model, adaptor = made()
    ids = drawn(1, 3)

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        both(model, adaptor, ids)
        with model.layer.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            model(ids)
        assert not calls.in_progress.stack
        assert both(model, adaptor, ids)[1] == 1


def test_several_threads_count_each_look_up_once():
    torch.manual_seed(6)
    model, adaptor = made(keys=8)
    asked = [drawn(2, 4) for _ in range(16)]
    with torch.no_grad():
        expected = [model(ids) for ids in asked]
        before, wrong = figures(adaptor), []

        def ask(first):
            for turn in range(200):
                at = (first + turn) % len(asked)
                with torch.no_grad():
                    if not torch.equal(bits(model(asked[at])), bits(expected[at])):
                        wrong.append(at)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):  # beside edits that change no answer
            far = torch.full((1, WIDTH), 1e3)
            adaptor.book.append(far, torch.zeros(1, VALUE), torch.tensor([0.1]))
        for thread in threads:
            thread.join()
    assert not wrong
    after = figures(adaptor)
    assert [after[at] - before[at] for at in (0, 1)] == [800, 1600]
    assert after[2] - before[2] == sum(after[7:]) - sum(before[7:])
    assert adaptor.tally.plain.queries > 800


def test_a_shallow_copy_and_a_replica_run_their_own_modules():
    for make in (copy.copy, lambda module: module._replicate_for_data_parallel()):
        model, adaptor = made()
        ids = torch.tensor([[12, 1]])
        with torch.no_grad():
            both(model, adaptor, ids)
            other = make(model)
            other.shift = 1
            assert torch.equal(other(ids - 1), model(ids))
            again = make(other)
            again.shift = 2
            assert torch.equal(
                again(ids - 2 + torch.tensor([[0, 1]])), model(ids + torch.tensor([[0, 1]]))
            )
            adaptor.remove()
        assert not {"forward", "__getstate__", "_replicate_for_data_parallel"} & set(vars(model))


def test_a_model_that_is_forgotten_is_collected_with_its_codebook():
    model, adaptor = made()
    with torch.no_grad():
        for _ in range(3):
            model(drawn(1, 3))
    assert adaptor.tally.plain.queries
    gone = [weakref.ref(each) for each in (model, adaptor, adaptor.book.snapshot())]
    del model, adaptor
    for _ in range(2):  # the extension's own part is seen once it is gone
        gc.collect()
    assert [one() for one in gone] == [None] * 3


def test_another_codebook_of_the_adaptor_answers_from_then_on():
    model, adaptor = made()
    ids = torch.tensor([[12, 1]])
    with torch.no_grad():
        first = model(ids)
        first = model(ids)
        other = Codebook(WIDTH, VALUE)
        other.append(model.table[1:2], torch.full((1, VALUE), 7.0), torch.ones(1))
        adaptor.book = other
        gc.collect()
        for _ in range(2):
            assert torch.equal(model(ids), torch.full((1, 2, VALUE), 7.0))
    assert not torch.equal(first, torch.full((1, 2, VALUE), 7.0))


@contextlib.contextmanager
def in_another_thread(mode):
    """Another thread is in a mode meanwhile."""
    inside, done = threading.Event(), threading.Event()

    def watch():
        with mode:
            inside.set()
            done.wait()

    thread = threading.Thread(target=watch)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_mode_of_another_thread_leaves_this_ones_calls_alone():
    model, adaptor = made()
    ids = torch.tensor([[12, 1]])
    with torch.no_grad():
        both(model, adaptor, ids)
        with in_another_thread(adaptor.observing()):
            assert both(model, adaptor, ids)[1] == 1


def test_a_mode_of_torchs_in_another_thread_leaves_this_ones_calls_alone():
    """Torch's own flag is of the process; it may stay set where two threads were in modes."""
    model, adaptor = made()
    ids = torch.tensor([[12, 1]])
    with torch.no_grad():
        both(model, adaptor, ids)
        with in_another_thread(TorchDispatchMode()):
            assert is_in_torch_dispatch_mode()
            assert both(model, adaptor, ids)[1] == 1


@pytest.mark.parametrize("name", list(models.FAMILIES))
def test_every_family_answers_alike(name):
    family, model = models.FAMILIES[name], models.build(name)
    grace = gf.attach(model, family.layer, epsilon=0.1, replacement="replace_all", iterations=0)
    prompts = models.prompts(3, shortest=4, longest=6)
    models.remember(grace, prompts[:1])
    batch = models.prompt_batch(prompts)
    if family.labels == "target":
        batch["decoder_input_ids"] = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        with by_python(grace._adapter):
            model(**batch)
            expected = model(**batch).logits
        for _ in range(2):
            assert torch.equal(model(**batch).logits, expected)
    counts = grace.counters
    assert counts.queries % 4 == counts.hits % 4 == counts.failed == 0
