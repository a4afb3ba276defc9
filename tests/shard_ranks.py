"""One rank of a test of row shards: `python shard_ranks.py SCENARIO RANK RANKS FILE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults import workload

import grace_fast as gf
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.apply import apply
from grace_fast.edits.history import History
from grace_fast.errors import RankLost, ShardsDiffer
from grace_fast.lookup.sharded import ShardedCodebook, ShardedSnapshot
from grace_fast.semantics import Rules

WIDTH, VALUE = 12, 3


def lattice(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return vectors on a coarse grid, far from the origin in one coordinate: ties abound."""
    return torch.randint(-1, 2, (count, WIDTH), generator=generator) * 0.5 + 8.0


def book_of(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> gf.Codebook:
    generator = torch.Generator().manual_seed(seed)
    book = gf.Codebook(WIDTH, VALUE, dtype)
    values = torch.randn(rows, VALUE, generator=generator)
    values[::2] = -0.0  # a sum of floats would lose the sign
    radii = torch.randint(-1, 4, (rows,), generator=generator) * 0.5
    labels = [torch.tensor([row % 3]) for row in range(rows)]
    keys = lattice(rows, generator).to(dtype)
    book.append(
        keys, values.to(dtype), radii, [None if r % 7 == 0 else labels[r] for r in range(rows)]
    )
    for row in range(0, rows, 11):
        book.remove(row)
    return book


def assert_same(shards: ShardedCodebook, alone: gf.Codebook, queries: torch.Tensor) -> int:
    """Compare every answer with those of one process, bit for bit; return how many hit."""
    expected, found = gf.find(queries, alone), shards.find(queries)
    assert torch.equal(found.hit, expected.hit)
    assert torch.equal(found.row, expected.row)
    assert torch.equal(found.squared_distance, expected.squared_distance)
    assert found.certified.all()
    within = float(torch.linspace(0, 4, 7)[len(alone) % 7])
    near, close = gf.nearest(queries, alone, within=within), shards.nearest(queries, within)
    assert torch.equal(close.row, near.row)
    assert torch.equal(close.squared_distance, near.squared_distance)
    return int(found.hit.sum())


def assert_same_output(shards: ShardedCodebook, alone: gf.Codebook, queries: torch.Tensor) -> None:
    output = torch.ones(len(queries), 3, VALUE, dtype=alone.dtype)
    expected = gf.replace(output, queries, alone)
    replaced = shards.replace(output, queries)
    assert torch.equal(replaced.view(torch.uint8), expected.view(torch.uint8))


def agree() -> None:
    """10 000 look-ups and 500 edits on all ranks and on one process beside them."""
    shards, alone = ShardedCodebook(WIDTH, VALUE), gf.Codebook(WIDTH, VALUE)
    generator, history = torch.Generator().manual_seed(7), History()
    hits = asked = 0
    outcomes = set()
    for step in range(500):
        kind = int(torch.randint(10, (1,), generator=generator))
        value = torch.randn(VALUE, generator=generator)
        row = int(torch.randint(max(1, shards.rows), (1,), generator=generator))
        if kind < 7 or not shards.rows:
            expand = "coverage" if step % 2 else "moving_average"
            rules = Rules(0.6 + 0.3 * (step % 3), expand, 0.01 * (step % 2))
            query = lattice(1, generator)[0]
            if step % 3 == 0:
                query = query + 0.1 * torch.randn(WIDTH, generator=generator)
            label = torch.tensor([step % 4])
            with alone.writing() as draft:
                done = history.apply(draft, rules, query, label, value, step)
            with shards.writing() as draft:
                made = apply(draft, rules, query, label, value)
            outcomes.add(done.outcome)
            assert (made.row, made.outcome) == (done.row, done.outcome)
            assert (made.distance, made.radius) == (done.distance, done.radius)
        elif kind == 7 and alone.live[row]:
            shards.remove(row)
            with alone.writing() as draft:
                draft.remove(row)
        elif kind == 8:
            with shards.writing() as shared, alone.writing() as draft:
                for one in (shared, draft):
                    one.set_radius(row, -1.0 + step % 4)
                    one.set_value(row, value)
        else:
            key = lattice(1, generator)[0]
            with shards.writing() as shared, alone.writing() as draft:
                for one in (shared, draft):
                    one.set_key(row, key)
                    one.set_label(row, None if step % 2 else torch.tensor([1, 2]))
        if step % 12 == 11:
            queries = lattice(256, generator)
            queries[::3] += 0.2 * torch.randn(len(queries[::3]), WIDTH, generator=generator)
            queries[5, 2] = torch.nan
            hits += assert_same(shards, alone, queries)
            assert_same_output(shards, alone, queries[:20])
            asked += len(queries)
    assert asked >= 10_000
    assert asked // 20 < hits < asked - asked // 20
    assert outcomes == {"added", "split", "expanded", "reused", "replaced"}
    assert shards.rows == alone.snapshot().rows
    assert 300 < shards.version <= 500
    for row in range(0, shards.rows, 17):
        label = shards.snapshot().row(row).label
        assert shards.snapshot().row(row).radius == alone.snapshot().row(row).radius
        known = alone.snapshot().row(row).label
        assert (label is None) == (known is None)
        assert label is None or torch.equal(label, known)
    with pytest.raises(IndexError, match=r"row must be in \[0, "):
        shards.snapshot().row(shards.rows)


def split() -> None:
    """A codebook that every rank has opened, in parts."""
    for rows, dtype in ((0, torch.float32), (3, torch.float32), (500, torch.bfloat16)):
        alone = book_of(rows, 1, dtype)
        if rows > 9:
            with alone.writing() as draft:
                draft.set_key(5, alone.keys[9])
                draft.set_value(6, alone.values[7])
                draft.set_radius(8, 40.0)  # another rank's key is nearer, and its ball too small
        shards = ShardedCodebook.split(alone)
        assert len(shards.codebook.ids) == len(range(shards.rank, rows, shards.ranks))
        queries = lattice(300, torch.Generator().manual_seed(2)).to(dtype)
        assert_same(shards, alone, queries)
        assert_same_output(shards, alone, queries[:40])
        assert_same(shards, alone, queries[:0])
        added = (queries[:6], torch.ones(6, VALUE, dtype=dtype), torch.ones(6))
        alone.append(*added)
        assert shards.append(*added) == range(rows, rows + 6)
        assert_same(shards, alone, queries)
        if dist.get_rank() == 0:
            assert f"{rows + 6} rows on {shards.ranks} ranks, rank 0 with" in repr(shards)


def cover() -> None:
    """What a rank would decide on its own is not what all decide together."""
    at = {0: 0.0, 1: 3.0, 2: 20.0, 3: 20.0, 4: 40.0, 5: 44.0}  # even rows on rank 0, odd on rank 1
    radii = torch.tensor([0.1, 10.0, -1.0, 9.0, 0.5, 9.0])
    keys = torch.zeros(6, WIDTH)
    keys[:, 3] = torch.tensor(list(at.values()))
    alone = gf.Codebook(WIDTH, VALUE)
    alone.append(keys, torch.arange(6.0)[:, None].expand(6, VALUE), radii)
    shards = ShardedCodebook.split(alone)
    queries = torch.zeros(5, WIDTH)
    # Nearest to row 0, in the ball of row 1 only; on dead row 2, whose twin lives; a tie of rows
    # 4 and 5, in the ball of 5 only; beyond it; at row 1.
    queries[:, 3] = torch.tensor([1.0, 20.0, 42.0, 42.1, 2.9])
    assert shards.find(queries).row.tolist() == [-1, -1, -1, 5, 1]
    assert shards.nearest(queries).row.tolist() == [0, 2, 4, 5, 1]
    assert_same(shards, alone, queries)


def differ() -> None:
    """Whatever ranks can disagree about is told to all of them."""
    rank = dist.get_rank()
    with pytest.raises(ShardsDiffer, match="keys, values, radii or labels of rank 1 are not those"):
        ShardedCodebook.split(book_of(40, seed=rank))
    with pytest.raises(ShardsDiffer, match="rows is 40 on rank 0 and 41 on rank 1"):
        ShardedCodebook.split(book_of(40 + rank))
    with pytest.raises(ShardsDiffer, match="key_dim is 4 on rank 0 and 5 on rank 1"):
        ShardedCodebook(4 + rank, 2)
    told = "dtype is torch.float32 on rank 0 and torch.bfloat16 on rank 1"
    with pytest.raises(ShardsDiffer, match=told):
        ShardedCodebook(4, 2, (torch.float32, torch.bfloat16)[rank > 0])

    shards = ShardedCodebook.split(book_of(40))
    queries = lattice(5, torch.Generator().manual_seed(3))
    before = shards.find(queries)
    with pytest.raises(ShardsDiffer, match="ranks ask with different queries; gather them first"):
        shards.find(queries + rank)
    with pytest.raises(ShardsDiffer, match="ranks were given different edits; every rank makes"):
        shards.append(queries + rank, torch.zeros(5, VALUE), torch.ones(5))
    # Only the rank that owns row 41 sees what is wrong with its key.
    keys = queries[:2].clone()
    keys[1, 0] = torch.inf
    refused = (ValueError, "keys must be finite") if rank == 1 else (RuntimeError, "rank 1 refused")
    with pytest.raises(refused[0], match=refused[1]):
        shards.append(keys, torch.zeros(2, VALUE), torch.ones(2))
    with pytest.raises(ZeroDivisionError), shards.writing() as draft:
        draft.set_radius(0, 1 / 0)
    assert (shards.version, shards.rows) == (0, 40)
    assert torch.equal(shards.find(queries).row, before.row)  # nothing was changed

    if rank == 1:
        with shards.codebook.writing() as draft:
            draft.set_radius(0, 3.0)
    told = r"at different versions of the codebook \(rank 0 at 0, rank 1 at 0\), or a rank's part"
    with pytest.raises(ShardsDiffer, match=told):
        shards.find(queries)
    with pytest.raises(ShardsDiffer, match="different edits"):
        shards.remove(1)


def attached() -> None:
    """A model that answers from shards is edited as one that answers from a codebook."""
    for rows, settings in (
        (0, {"replacement": "replace_all", "iterations": 4}),
        (30, {"replacement": "replace_all", "iterations": 0, "expand": "moving_average"}),
        (30, {"query": "every_token", "iterations": 2, "semantics": "easyedit"}),
    ):
        _edit_alike(*_attached_alike(rows, settings))


def _attached_alike(rows: int, settings: dict[str, Any]) -> tuple[gf.Grace, gf.Grace]:
    """Return an editor of a codebook, and one of its shards."""
    book, whole = (gf.Codebook(workload.WIDTH, workload.CLASSES) for _ in range(2))
    if rows:
        generator = torch.Generator().manual_seed(4)
        keys = 4 * torch.randn(rows, workload.WIDTH, generator=generator)
        values = torch.randn(rows, workload.CLASSES, generator=generator)
        labels = [None if row % 5 == 0 else torch.tensor([row % 3]) for row in range(rows)]
        for each in (book, whole):
            each.append(keys, values, torch.full((rows,), 0.8), labels)
    shards = ShardedCodebook.split(whole)
    alone = gf.attach(workload.Tiny(), "layer", codebook=book, **settings)
    return alone, gf.attach(workload.Tiny(), "layer", codebook=shards, **settings)


def _edit_alike(alone: gf.Grace, shared: gf.Grace) -> None:
    outcomes, undone = set(), 0
    asked = torch.randn(8, 1, workload.WIDTH, generator=torch.Generator().manual_seed(5))
    for step, operation in enumerate(workload.operations(60, seed=2)):
        if operation[0] == "undo":
            if operation[1] not in {edit.id for edit in alone.edits()}:
                continue
            _assert_same_edit(alone.undo(operation[1]), shared.undo(operation[1]))
            undone += 1
        else:
            query, label = torch.tensor(operation[1])[None, None], torch.tensor([operation[2]])
            batch = {"inputs_embeds": query, "labels": label}
            if step % 7 == 0:
                batch = {
                    "inputs_embeds": torch.cat([query, query + 0.2, query + 9]),
                    "labels": torch.tensor([0, 1, 1]),
                }
            made = []
            for grace in (alone, shared):
                torch.manual_seed(step)  # the values of the references start from what is drawn
                made.append(grace.edit_batch(batch))
            for one, other in zip(*made, strict=True):
                _assert_same_edit(one, other)
                outcomes.add(one.outcome)
            asked[step % 8] = query[0] + 0.1 * (step % 3)
        answers = [grace.model(inputs_embeds=asked).logits for grace in (alone, shared)]
        assert torch.equal(answers[0].view(torch.uint8), answers[1].view(torch.uint8))
        assert alone.hits == shared.hits
        told = [repr(grace.explain({"inputs_embeds": asked})) for grace in (alone, shared)]
        assert told[0] == told[1]
    _assert_same_rows(shared.codebook.snapshot(), alone.codebook.snapshot())
    assert repr(alone.verify()) == repr(shared.verify())
    assert alone.verify().replays == shared.verify().replays
    assert alone.counters.keys == shared.counters.keys == len(shared.codebook)
    assert outcomes >= {"added", "split", "reused", "expanded"}
    assert undone > 5
    assert ("replaced" in outcomes) == (alone.settings.semantics == "paper")


def _assert_same_edit(one: gf.Edit, other: gf.Edit) -> None:
    """Compare all but slots, which each rank numbers for itself."""
    for name in ("id", "outcome", "row", "distance", "radius", "steps", "correct", "prompt"):
        assert getattr(one, name) == getattr(other, name), name
    assert str(one.loss) == str(other.loss)  # NaN where nothing was trained
    assert torch.equal(one.query, other.query)
    assert torch.equal(one.label, other.label)


def _assert_same_rows(shared: ShardedSnapshot, alone: Snapshot) -> None:
    assert torch.equal(shared.live, alone.live)
    assert (shared.rows, len(shared)) == (alone.rows, len(alone))
    for row in range(alone.rows):
        assert shared.row(row).radius == alone.row(row).radius
        assert torch.equal(shared.row(row).key, alone.row(row).key)
        assert torch.equal(shared.row(row).value, alone.row(row).value)
        labels = shared.row(row).label, alone.row(row).label
        assert str(labels[0]) == str(labels[1])


def generate() -> None:
    """A decoder whose edits are on two ranks generates what it does with one codebook."""
    import models  # transformers takes long to import

    family = models.FAMILIES["gpt2"]
    settings = {"iterations": 60, "replacement": "replace_last"}
    graces = []
    for sharded in (False, True):
        book = ShardedCodebook(128, 32) if sharded else None
        model = models.build("gpt2")
        graces.append(gf.attach(model, family.layer, family.epsilon, codebook=book, **settings))
    prompts = models.prompts(4)
    for at, prompt in enumerate(prompts):
        batch = models.edit_batch(family, [prompt], [[41 + at]])
        one, other = (grace.edit(batch) for grace in graces)
        _assert_same_edit(one, other)
        assert one.correct
    batch = models.prompt_batch(prompts)
    texts = [
        grace.model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for grace in graces
    ]
    assert torch.equal(*texts)
    assert graces[0].hits == graces[1].hits != {}
    beams = [
        grace.model.generate(**batch, max_new_tokens=3, num_beams=2, pad_token_id=0)
        for grace in graces
    ]
    assert torch.equal(*beams)
    assert torch.equal(*(grace.model(**batch).logits for grace in graces))
    assert graces[1].verify().ok


def refuse() -> None:
    """What cannot be done with shards says what to do instead."""
    alone, shared = _attached_alike(3, {"iterations": 0, "replacement": "replace_all"})
    book = shared.codebook
    with pytest.raises(ValueError, match=r"save_pretrained is for the codebook of one process.*sp"):
        shared.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="path= is for the codebook of one process"):
        gf.attach(workload.Tiny(), "layer", codebook=book, path="nowhere")
    assert not os.path.exists("nowhere")
    for graphs in (False, True):
        with pytest.raises(TypeError, match="row shards cannot be prepared, nor kept for CUDA gra"):
            gf.prepare(book, graphs=graphs)
    queries = torch.zeros(1, workload.WIDTH)
    with pytest.raises(ValueError, match="row shards take no backend, got 'reference'"):
        gf.find(queries, book, "reference")
    with pytest.raises(gf.CodebookMismatch, match="the codebook has keys and values of the widths"):
        gf.attach(workload.Tiny(), "layer", codebook=ShardedCodebook(3, 2))
    with pytest.raises(AttributeError, match="keys of row shards is not in one process"):
        _ = book.keys
    # Ranks that ask with different inputs are told so by the model's own call, too.
    with pytest.raises(ShardsDiffer, match="ranks ask with different queries"):
        shared.model(inputs_embeds=torch.full((1, 1, workload.WIDTH), float(dist.get_rank())))
    with pytest.raises(ShardsDiffer, match="ranks ask with different queries"):
        shared.edit(
            {
                "inputs_embeds": torch.full((1, 1, workload.WIDTH), float(dist.get_rank())),
                "labels": torch.tensor([0]),
            }
        )
    _assert_same_rows(book.snapshot(), alone.codebook.snapshot())
    assert not shared.edits()
    inputs = {"inputs_embeds": torch.zeros(1, 1, workload.WIDTH)}
    assert torch.equal(alone.model(**inputs).logits, shared.model(**inputs).logits)


def die_attached() -> None:
    """The last rank is killed; the model's next call on the others does not answer without it."""
    _, shared = _attached_alike(30, {"iterations": 0, "replacement": "replace_all"})
    inputs = {"inputs_embeds": torch.zeros(1, 1, workload.WIDTH)}
    shared.model(**inputs)
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    edit = inputs | {"labels": torch.tensor([1])}
    for call in (lambda: shared.model(**inputs), lambda: shared.edit(edit), shared.verify):
        with pytest.raises(RankLost, match=r"was lost while looking up .* start all ranks again"):
            call()
    assert not shared.edits()
    assert not shared.counters.failed
    print("reported")


def die() -> None:
    """The last rank is killed; the others say so within the time-out, and again at once."""
    _lose(lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang() -> None:
    """The last rank stops answering."""
    _lose(lambda: time.sleep(8))


def _lose(fate) -> None:
    shards = ShardedCodebook.split(book_of(40), timeout=3.0)
    queries = lattice(5, torch.Generator().manual_seed(3))
    shards.find(queries)
    if shards.rank == shards.ranks - 1:
        fate()
        return
    start = time.monotonic()
    with pytest.raises(RankLost, match=r"was lost while looking up .* start all ranks again"):
        shards.find(queries)
    assert time.monotonic() - start < 5
    start = time.monotonic()
    for call in (lambda: shards.find(queries), lambda: shards.remove(1)):
        with pytest.raises(RankLost, match="a rank was lost while looking up"):
            call()
    assert time.monotonic() - start < 0.5
    print("reported")


if __name__ == "__main__":
    scenario, rank, ranks, file = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=60),
    )
    globals()[scenario]()
    if scenario not in ("die", "hang", "die_attached"):  # nobody is left to say goodbye to then
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's end (pytorch/pytorch#179291)
