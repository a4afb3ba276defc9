"""Disks that are full or fail: what a run of edits answers then, and what is found afterwards.

The shim fails the k-th file call of a run that makes a directory, edits it, compacts it, edits on
and leaves it. What was acknowledged has to be there when the directory is opened anew, and a step
that was refused has to have changed nothing, unless the disk was left in doubt: the store is
read-only then, and that one step may be found.
"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from faults import shim, workload
from faults.recording import Disk, lay_out, read_log
from faults.server import Server
from faults.workload import reopened

import grace_fast as gf

RUN = workload.operations(25, every=16)  # 20 edits, 5 undos, a compaction after 16 steps
RUN.append(("ask", RUN[0][1]))
READ_ONLY = "CodebookReadOnly"
FULL, BROKEN = {"code": errno.ENOSPC}, {"code": errno.EIO}
FAULTS = {
    "one call finds no room": {"how": shim.FAIL, **FULL},
    "one call fails": {"how": shim.FAIL, **BROKEN},
    "a write is short and then there is no room": {
        "how": shim.SHORTEN,
        "after": True,
        "kinds": shim.GROWING,
        **FULL,
    },
    "there is no room from then on": {
        "how": shim.FAIL,
        "after": True,
        "kinds": shim.GROWING,
        **FULL,
    },
    "every call fails from then on": {"how": shim.FAIL, "after": True, **BROKEN},
}
SYNCHRONISING = {"how": shim.FAIL, "kinds": shim.SYNCHRONISING, **BROKEN}


class Oracle:
    """The state after some steps of a run, made in memory where nothing fails."""

    def __init__(self, run):
        self.run, self._known = run, {}

    def after(self, steps):
        """Return the state after steps of these numbers, counted from 1."""
        if steps not in self._known:
            grace = workload.attach(None)
            self._known[()] = workload.state(grace)
            for at, step in enumerate(steps, start=1):
                if self.run[step - 1][0] != "compact":
                    workload.do(grace, self.run[step - 1])
                if steps[:at] not in self._known:
                    self._known[steps[:at]] = workload.state(grace)
            grace.unload()
        return self._known[steps]


def changing(run):
    """Return the numbers of the steps that change something."""
    return [step for step, (kind, *_) in enumerate(run, start=1) if kind != "ask"]


def allowed(outcome, oracle, before=()):
    """Check what a run said of each step; return the states that may be found after it.

    before: the steps that were there when it began.
    """
    assert (outcome.raised, outcome.changed, outcome.status) == ("", [], 0), outcome
    kept, doubt, is_read_only = before, None, False
    said = dict(outcome.states) | {
        step: name for step, (name, _) in outcome.refused.items() if step != "attach"
    }
    assert len(said) == len(oracle.run) - len(before)
    for step, told in sorted(said.items()):
        if oracle.run[step - 1][0] == "ask":  # which changes nothing
            assert step in outcome.states
        elif step in outcome.states:
            assert not is_read_only, (step, outcome)
            kept = (*kept, step)
            assert told == oracle.after(kept)
            doubt = None
        elif told == READ_ONLY:
            is_read_only = True
        elif told != "KeyError":  # which an undo of what was refused is answered by
            assert not is_read_only
            doubt = step
    if doubt is not None and (is_read_only or doubt == max(changing(oracle.run))):
        return [oracle.after(kept), oracle.after((*kept, doubt))]
    return [oracle.after(kept)]


def calls_of(server, room, kinds=shim.EVERY_KIND, run=RUN):
    """Return how many calls of some kinds the run makes where nothing fails."""
    fault = {**workload.NOTHING, "kinds": kinds}
    outcome = server.ask(folder=str(room / "counted"), run=run, fault=fault)
    assert not outcome.raised
    assert not outcome.refused
    assert outcome.last
    shutil.rmtree(room / "counted")
    return outcome.calls


def tally(outcome):
    """Say in a word how a run went on."""
    if READ_ONLY in {name for name, _ in outcome.refused.values()}:
        return "read-only"
    refused = [name for name, _ in outcome.refused.values()]
    return "went on after a refusal" if refused else "nothing refused"


def fail_at_calls(server, room, fault, step, first=1):
    """Fail every `step`-th call of the run; return what came of it, by its kind."""
    oracle, folder, came = Oracle(RUN), room / "failed", Counter()
    calls = calls_of(server, room, fault.get("kinds", shim.EVERY_KIND))
    for at in range(first, calls + 1, step):
        outcome = server.ask(folder=str(folder), run=RUN, fault={**fault, "at": at})
        states = allowed(outcome, oracle)
        assert reopened(folder) in states, (at, outcome)
        came[tally(outcome)] += 1
        shutil.rmtree(folder)
    print(f"D3: {came.total()} of {calls} calls: {dict(came)}")
    return came, calls


@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_refuses_a_call_loses_nothing_and_publishes_nothing(server, room, name):
    first = 1 + list(FAULTS).index(name)
    came, calls = fail_at_calls(server, room, FAULTS[name], step=29, first=first)
    assert came.total() == len(range(first, calls + 1, 29)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_refuses_any_call_loses_nothing_and_publishes_nothing(server, room, name):
    came, calls = fail_at_calls(server, room, FAULTS[name], step=1)
    assert came.total() == calls > 300
    assert came["read-only"] > 0


def after_losses_of_power(disk):
    """Yield directories that a loss of power leaves: names lost one by one, and drawn parts."""
    for names in range(disk.uncertain_names + 1):
        yield disk.after_power_loss(names)
    chance = random.Random(0)
    for _ in range(2):
        kept = iter(lambda: chance.random() < 0.5, None)
        yield disk.after_power_loss(chance.randint(0, disk.uncertain_names), kept)


def fail_to_synchronise(server, room, step):
    """Fail every `step`-th fsync; return what came of it, and how many directories were opened."""
    oracle, folder, log = Oracle(RUN), room / "failed", room / "log"
    calls = calls_of(server, room, shim.SYNCHRONISING)
    came, opened = Counter(), 0
    for at in range(1, calls + 1, step):
        fault = {**SYNCHRONISING, "at": at}
        outcome = server.ask(folder=str(folder), run=RUN, fault=fault, log=str(log))
        states = allowed(outcome, oracle)
        refused = [step for step in outcome.refused if step != "attach"]
        if refused and RUN[refused[0] - 1][0] != "compact":  # in the journal, which is in doubt
            assert all(step < refused[0] or RUN[step - 1][0] == "ask" for step in outcome.states)
            told = {outcome.refused[step][0] for step in refused[1:]}
            assert told <= {READ_ONLY, "KeyError"}  # of an edit there never was
        came[tally(outcome)] += 1
        calls_made = read_log(log, folder)
        assert reopened(folder) in states, (at, outcome)
        shutil.rmtree(folder)
        disk = Disk()
        for call in calls_made:
            disk.replay(call)
        for content in after_losses_of_power(disk):
            lay_out(content, folder)
            assert reopened(folder) in states, (at, outcome)
            shutil.rmtree(folder)
            opened += 1
    print(f"D4: {came.total()} of {calls} fsyncs: {dict(came)}; {opened} losses of power")
    return came, calls


def test_an_fsync_that_fails_is_never_acknowledged_even_if_power_is_lost(server, room):
    came, calls = fail_to_synchronise(server, room, step=9)
    assert came.total() == -(-calls // 9) > 8
    assert came["read-only"] > 3


@pytest.mark.slow
def test_no_fsync_that_fails_is_acknowledged_even_if_power_is_lost(server, room):
    came, calls = fail_to_synchronise(server, room, step=1)
    assert came.total() == calls > 80


# Opening what is there, also after an edit that was interrupted

HALF = 9


def begun(server, room, is_interrupted):
    """Return a directory that holds the first steps of the run, and which ones."""
    folder, fault = room / "begun", {}
    if is_interrupted:
        counted = server.ask(folder=str(folder), run=RUN[:HALF], fault=workload.NOTHING)
        shutil.rmtree(folder)
        # Half of the last writes: some of the database's pages are new, and its journal is hot.
        fault = {"fault": {"how": shim.EXIT, "at": counted.calls - 5}}
    outcome = server.ask(folder=str(folder), run=RUN[:HALF], **fault)
    return folder, tuple(outcome.states)


def fail_to_open(server, room, is_interrupted, code, step):
    """Fail every `step`-th call of opening a directory, of two edits and of leaving it."""
    begin, before = begun(server, room, is_interrupted)
    run = [*RUN[: len(before)], RUN[0], RUN[2]]
    oracle, folder, refused = Oracle(run), room / "opened", 0
    for at in itertools.count(1, step):
        shutil.copytree(begin, folder)
        fault = {"how": shim.FAIL, "code": code, "at": at}
        asked = {"run": run[len(before) :], "first": len(before) + 1}
        outcome = server.ask(folder=str(folder), fault=fault, **asked)
        states = allowed(outcome, oracle, before)
        assert reopened(folder) in states, (at, outcome)
        refused += "attach" in outcome.refused
        shutil.rmtree(folder)
        if outcome.last and "attach" not in outcome.refused and outcome.calls < at:
            break
    print(f"D3: {(at - 1) // step} of {outcome.calls} calls, {refused} refused while opening")
    return refused


LEFT = pytest.mark.parametrize("is_interrupted", [False, True], ids=["left", "interrupted"])
CODES = pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])


@LEFT
def test_a_directory_that_cannot_be_opened_loses_nothing(server, room, is_interrupted):
    assert fail_to_open(server, room, is_interrupted, errno.EIO, step=5) > 0


@pytest.mark.slow
@LEFT
@CODES
def test_a_directory_of_which_any_call_fails_loses_nothing(server, room, is_interrupted, code):
    assert fail_to_open(server, room, is_interrupted, code, step=1) > 5


# Limits that are not the shim's


def test_files_that_may_not_grow_are_written_in_part_and_lose_nothing(server, room):
    oracle, folder, came = Oracle(RUN), room / "limited", Counter()
    for file_bytes in range(0, 60_000, 3_111):
        outcome = server.ask(folder=str(folder), run=RUN, file_bytes=file_bytes)
        states = allowed(outcome, oracle)
        assert reopened(folder) in states, (file_bytes, outcome)
        came[tally(outcome)] += 1
        shutil.rmtree(folder)
    print(f"D3: RLIMIT_FSIZE {came.total()} times: {dict(came)}")
    assert came["nothing refused"] > 0
    assert came["nothing refused"] < came.total() - 6


def test_a_journal_of_so_many_pages_refuses_what_is_too_much_and_goes_on(server, room):
    oracle, folder, came = Oracle(RUN), room / "limited", Counter()
    for pages in range(1, 17):
        outcome = server.ask(folder=str(folder), run=RUN, pages=pages)
        states = allowed(outcome, oracle)
        assert reopened(folder) == states[0]
        assert tally(outcome) != "read-only"
        came[tally(outcome)] += 1
        shutil.rmtree(folder)
    print(f"D3: max_page_count {came.total()} times: {dict(came)}")
    assert came["went on after a refusal"] > 4


# How a file is put in place


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_call_returns(tmp_path):
    server = Server("faults.replacing")
    outcome = server.ask(folder=str(tmp_path), log=str(tmp_path.with_suffix(".log")))
    server.close()
    assert outcome.lines == [f"package {Path(gf.__file__).resolve()}"]  # the one that is tested
    calls = read_log(tmp_path.with_suffix(".log"), tmp_path)
    opened = {call.file: call.path for call in calls if call.kind == shim.OPEN}
    done = [
        (call.kind, call.path or opened[call.file], call.other)
        for call in calls
        if call.kind != shim.OPEN
    ]
    assert done == [
        (shim.WRITE, "file.partial", ""),
        (shim.SYNC, "file.partial", ""),
        (shim.RENAME, "file.partial", "file"),
        (shim.SYNC, ".", ""),
    ]
    assert (tmp_path / "file").read_bytes() == b"content"
