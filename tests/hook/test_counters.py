"""What look-ups count, beside the codebook; and that one which fails leaves the model's output."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch

import models
import pytest
import torch
from torch import nn

import grace_fast as gf
from grace_fast.edits.history import History
from grace_fast.errors import LookupWarning
from grace_fast.hook.counters import BOUNDS, Tally
from grace_fast.index import maintained
from grace_fast.lookup import dispatch, lookup
from grace_fast.lookup.backends import cpu, graphs
from grace_fast.lookup.match import Match
from grace_fast.lookup.prepared import Prepared

WIDTH, KEYS, RADIUS = 64, 4096, 0.5


class Model(nn.Module):
    """One linear layer that may be edited; its last token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 8)

    def forward(self, inputs_embeds):
        return self.layer(inputs_embeds)


def editor(keys=KEYS, **settings):
    """An editor on a tiny model, with keys that are far apart and balls of .5."""
    torch.manual_seed(0)
    grace = gf.attach(Model().eval(), "layer", replacement="replace_last", **settings)
    drawn = torch.randn(keys, WIDTH)
    grace.codebook.append(drawn, torch.full((keys, 8), 7.0), torch.full((keys,), RADIUS))
    gf.prepare(grace.codebook)  # waits for the codes
    return grace


def ask(grace, queries):
    """Run the model on queries [B, D], each the last of two tokens; return the outputs there."""
    with torch.no_grad():
        return grace.model(torch.stack([torch.zeros_like(queries), queries], dim=1))[:, 1]


def hit_by(grace, rows):
    return grace.codebook.keys[rows] + 0.01


@pytest.fixture(scope="module")
def book():
    made = editor()
    made.unload()
    return made.codebook


@pytest.fixture
def grace(book):
    """An editor of its own on a codebook that no test changes."""
    made = editor(keys=0)
    made._context.take(book, History())
    yield made
    made.unload()


def test_nothing_was_asked_at_first(grace):
    counters = grace.counters
    assert (counters.calls, counters.queries, counters.hits) == (0, 0, 0)
    assert (counters.certified_misses, counters.rechecks, counters.failures) == (0, 0, {})
    assert counters.latency.mean != counters.latency.mean
    assert counters.versions == grace.codebook.version == 1


def test_hits_misses_and_keys_read_are_those_of_the_look_up(grace):
    known, far = hit_by(grace, [3, 9, 3]), 40 + torch.randn(5, WIDTH)
    assert cpu.view_of(grace.codebook.snapshot()).keys_pay  # by codes
    assert (ask(grace, torch.cat([known, far])) == 7).all(dim=1).tolist() == [True] * 3 + [
        False
    ] * 5
    ask(grace, far[:2])
    counters = grace.counters
    assert (counters.calls, counters.queries, counters.hits) == (2, 10, 3)
    assert counters.certified_misses == 7  # so far away that no key is read
    assert 3 <= counters.rechecks < 3 * 64  # each hit was read, and few others
    assert grace.hits == {3: 2, 9: 1}
    assert sum(counters.latency.counts) == 2
    assert len(counters.latency.counts) == len(BOUNDS) + 1
    assert counters.latency.mean == pytest.approx(counters.latency.seconds / 2)


def test_a_miss_that_needed_a_key_is_not_called_proved(grace):
    beside = grace.codebook.keys[:64].clone()
    beside[:, 0] += RADIUS * 1.001  # out of the ball by less than codes can tell
    assert not gf.find(beside, grace.codebook).hits
    ask(grace, beside)
    counters = grace.counters
    assert counters.hits == 0
    assert counters.certified_misses < 64
    assert counters.rechecks >= 64 - counters.certified_misses


def test_the_proof_and_the_reading_add_up_query_by_query(grace):
    """A miss is proved exactly where the look-up of it alone reads no key."""
    generator = torch.Generator().manual_seed(1)
    near = grace.codebook.keys[torch.randint(KEYS, (200,), generator=generator)]
    queries = (
        near + torch.randn(200, WIDTH, generator=generator) * torch.linspace(0, 2, 200)[:, None]
    )
    alone = [gf.find(query[None], grace.codebook) for query in queries]
    together = gf.find(queries, grace.codebook).effort
    assert [sum(each) for each in zip(*(one.effort for one in alone), strict=True)] == [*together]
    for one in alone:
        proved, read = one.effort
        assert proved == (one.hits == 0 and read == 0)
    assert 0 < together[0] < 200


def test_where_every_key_is_read_no_miss_is_proved_by_codes():
    grace = editor(keys=maintained.SMALLEST // 2)
    grace.codebook.remove(5)
    live = len(grace.codebook)
    for batch in (1, 3, 9):  # alone, in a tile, and in several
        before = grace.counters.rechecks
        ask(grace, 40 + torch.randn(batch, WIDTH))
        assert grace.counters.rechecks - before == batch * live
    assert grace.counters.certified_misses == 0


def test_dead_balls_need_no_key():
    grace = editor(keys=0)
    grace.codebook.append(torch.randn(4, WIDTH), torch.ones(4, 8), torch.full((4,), -1.0))
    ask(grace, torch.randn(3, WIDTH))
    assert (grace.counters.certified_misses, grace.counters.rechecks) == (3, 0)


def test_an_empty_codebook_is_not_asked():
    grace = editor(keys=0)
    ask(grace, torch.randn(3, WIDTH))
    assert grace.counters.calls == 0


def test_what_a_back_end_does_not_tell_is_none(grace, monkeypatch):
    ask(grace, hit_by(grace, [0]))
    monkeypatch.setattr(lookup.cpu, "_cpu", None)
    monkeypatch.setattr(lookup.cpu, "ask", lambda queries, snapshot: None)
    monkeypatch.setattr(lookup.cpu, "view_of", lambda snapshot: None)
    context = grace._context
    context.take(grace.codebook, History())  # a prepared call keeps the back end it began with
    dispatch._choose.cache_clear(), dispatch.choose.cache_clear()
    try:
        ask(grace, hit_by(grace, [1, 2]))
    finally:
        dispatch._choose.cache_clear(), dispatch.choose.cache_clear()
    counters = grace.counters
    assert (counters.calls, counters.queries, counters.hits) == (2, 3, 3)
    assert counters.certified_misses is None
    assert counters.rechecks is None


def test_hits_that_only_a_device_knows_are_none():
    tally = Tally()
    tally.add(Match(0, bytearray(17 + 16)), queries=1, hits=0, seconds=1e-5)
    assert tally.read(0, 0).hits == 0
    tally.add(Match(None), queries=1, hits=None, seconds=1e-5)
    assert tally.read(0, 0).hits is None
    assert tally.read(0, 0).queries == 2


def test_an_upper_bound_belongs_to_its_bucket():
    tally = Tally()
    for seconds in (*BOUNDS, 2 * BOUNDS[-1]):
        tally.add(Match(0, bytearray(33)), 1, 0, seconds)
    assert tally.read(0, 0).latency.counts == (1,) * (len(BOUNDS) + 1)


def test_nothing_is_lost_in_threads_that_come_and_go(grace):
    queries = hit_by(grace, [1, 2])

    def asks(_):
        for _ in range(20):
            ask(grace, queries)
        grace.counters  # noqa: B018 - read beside the others

    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(asks, range(6)))
    counters = grace.counters
    assert (counters.calls, counters.queries, counters.hits) == (360, 720, 720)
    assert sum(counters.latency.counts) == 360


def test_a_thread_goes_on_in_the_cell_of_one_that_ended():
    tally, match = Tally(), Match(0, bytearray(33))
    for _ in range(50):
        thread = threading.Thread(target=tally.add, args=(match, 1, 0, 1e-5))
        thread.start()
        thread.join()
    assert tally.read(0, 0).calls == 50
    assert len(tally._cells) == 1


def test_it_is_plain_data(grace):
    ask(grace, hit_by(grace, [1]))
    counters = grace.counters
    said = json.loads(json.dumps(dataclasses.asdict(counters)))
    assert said["hits"] == 1
    assert said["latency"]["seconds"] > 0
    ask(grace, hit_by(grace, [1]))
    assert counters.hits == 1  # what was read does not change
    with pytest.raises(dataclasses.FrozenInstanceError):
        counters.hits = 2


def test_versions_are_those_of_the_codebook():
    grace = editor(keys=8)
    before = grace.counters.versions
    number = grace.codebook.append(torch.randn(1, WIDTH), torch.ones(1, 8), torch.ones(1))[0]
    grace.codebook.remove(number)
    assert grace.counters.versions == before + 2 == grace.codebook.version


# Failing open


@contextmanager
def broken(error):
    """Let every look-up of the compiled back end fail."""

    def fail(*_):
        raise error

    with patch.object(lookup.cpu, "ask", fail), patch.object(Prepared, "__call__", fail):
        yield


ERRORS = [
    RuntimeError("no answer"),
    MemoryError("no room"),
    gf.CodebookCorrupt("block 3 is not what was saved"),
    ValueError("a back end said so"),
    KeyError("missing"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_look_up_that_fails_leaves_the_models_own_output(grace, error):
    queries = hit_by(grace, [1, 2])
    with grace.disable_adapter():
        own = ask(grace, queries)
    kind = type(error).__name__
    with broken(error), pytest.warns(LookupWarning, match=f"layer failed.*{kind}") as told:
        outputs = [ask(grace, queries) for _ in range(3)]
    assert all(torch.equal(output, own) for output in outputs)
    assert len(told) == 1
    counters = grace.counters
    assert counters.failures == {kind: 3}
    assert counters.failed == 3
    assert counters.calls == 0
    assert (ask(grace, queries) == 7).all()  # and the next one answers again
    assert grace.counters.hits == 2


def test_each_kind_is_told_once(grace):
    for error in (RuntimeError("one"), MemoryError("two")):
        with broken(error), pytest.warns(LookupWarning) as told:
            [ask(grace, hit_by(grace, [1])) for _ in range(2)]
        assert len(told) == 1
    assert grace.counters.failures == {"RuntimeError": 2, "MemoryError": 2}


def test_a_block_of_a_mapped_file_that_was_changed_fails_open(book, tmp_path):
    queries = book.keys[KEYS - 1 :] + 0.01
    book.save(tmp_path / "book")
    for name in ("keys", "values"):
        opened = gf.Codebook.open(tmp_path / "book")
        grace = gf.attach(Model().eval(), "layer", replacement="replace_last")
        grace._context.take(opened, History())
        with grace.disable_adapter():
            own = ask(grace, queries)
        file = next(path for path in (tmp_path / "book").iterdir() if path.name.startswith(name))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.warns(LookupWarning, match="is not what was saved"):
            assert torch.equal(ask(grace, queries), own)
        assert grace.counters.failures == {"CodebookCorrupt": 1}
        assert grace.counters.calls == (name == "values")  # the key was found
        content[-1] ^= 1
        file.write_bytes(content)
        grace.unload()


def test_generate_holds_that_nothing_was_found(grace):
    queries = hit_by(grace, [1])
    with grace.prompt():
        with broken(RuntimeError("once")), pytest.warns(LookupWarning):
            first = ask(grace, queries)
        assert torch.equal(ask(grace, queries), first)  # one sequence, one decision


def test_errors_of_the_caller_still_raise(grace):
    named = gf.attach(grace.model, "layer", name="one", replacement="replace_last")
    named.codebook.append(grace.codebook.keys[:2], torch.ones(2, 8), torch.ones(2))
    with gf.using(["one", None]), pytest.raises(ValueError, match="using"):
        ask(named, hit_by(grace, [0, 1, 2]))
    assert named.counters.failures == {}
    grace._context.take(gf.Codebook(WIDTH * 2, 8), History())
    grace.codebook.append(torch.randn(1, 2 * WIDTH), torch.ones(1, 8), torch.ones(1))
    with pytest.raises(ValueError, match="takes 128 numbers a token and was given 64"):
        ask(grace, torch.randn(1, WIDTH))


def test_a_captured_graph_is_refused_rather_than_unedited_for_ever(grace, monkeypatch):
    monkeypatch.setattr(graphs, "is_capturing", lambda snapshot: True)
    with broken(RuntimeError("not prepared")), pytest.raises(RuntimeError, match="not prepared"):
        ask(grace, hit_by(grace, [1]))
    assert grace.counters.failures == {}


def test_edits_and_explain_fail_closed():
    model, family = models.build("bert"), models.FAMILIES["bert"]
    grace = gf.attach(model, family.layer, family.epsilon)
    batch = {"input_ids": torch.tensor([models.prompts(1)[0]]), "labels": torch.tensor([1])}
    before = grace.codebook.version

    def fail(*_, **__):
        raise MemoryError("no room")

    with patch.object(lookup, "nearest", fail), pytest.raises(MemoryError):
        grace.edit(batch)
    assert (grace.codebook.version, grace.edits()) == (before, [])
    grace.edit(batch)
    with broken(MemoryError("no room")), pytest.raises(MemoryError):
        grace.explain(batch)
    assert grace.counters.failures == {}


def test_it_fails_open_in_a_compiled_model(grace):
    queries = hit_by(grace, [1, 2])
    with grace.disable_adapter():
        own = ask(grace, queries)
    compiled = torch.compile(grace.model, backend="aot_eager", fullgraph=True)
    inputs = torch.stack([torch.zeros_like(queries), queries], dim=1)
    with torch.no_grad():
        assert (compiled(inputs)[:, 1] == 7).all()
        with broken(RuntimeError("no answer")), pytest.warns(LookupWarning):
            assert torch.equal(compiled(inputs)[:, 1], own)
    assert grace.counters.failures == {"RuntimeError": 1}
    assert grace.counters.hits == 2


def test_look_ups_say_nothing_where_nothing_fails(grace):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(grace, hit_by(grace, [1]))
