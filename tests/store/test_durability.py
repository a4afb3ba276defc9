"""The promise: after any crash a codebook is as after some of its edits, all acknowledged ones.

A run of edits and undos is recorded call by call and replayed up to every call, torn and without
what the disk had not been told to keep; and its process is killed at drawn moments.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import sqlite3
from collections import Counter

import pytest
from faults import shim, workload
from faults.recording import Disk, lay_out, read_log
from faults.workload import reopened

RUN = workload.operations(25)  # 20 edits, 5 undos
COMPACTED = workload.operations(6, every=2)


def states(run, room):
    folder = room / "undisturbed"
    found = workload.states(run, folder)
    shutil.rmtree(folder)
    return found


class Promise:
    """Directories that a crash left, each opened as a new process would."""

    def __init__(self, known, room):
        self.known, self.folder = known, room / "crashed"
        self.cases = Counter()
        self._seen = {}
        self._recovered = {}

    def holds(self, kind, content, acknowledged):
        """Check one directory; acknowledged: how many steps have to be in it."""
        self.cases[kind] += 1
        key = fingerprint(content)
        if key not in self._seen:
            self._seen[key] = self._opened(content)
        found, allowed = self._seen[key], self.known[acknowledged : acknowledged + 2]
        assert found in allowed, (kind, acknowledged, self.known.index(found))

    @property
    def different(self):
        return len(self._seen)

    def _opened(self, content):
        if self.folder.exists():
            shutil.rmtree(self.folder)
        lay_out(content, self.folder)
        # What SQLite recovers decides the rest: the same rows beside the same files were opened.
        before = self._rows()
        if before not in self._recovered:
            self._recovered[before] = reopened(self.folder)
        return self._recovered[before]

    def _rows(self):
        found = []
        for path in sorted(self.folder.glob("journal-*.sqlite")):
            try:
                file = sqlite3.connect(path, isolation_level=None)
                try:
                    found += [
                        repr(file.execute(f"SELECT * FROM {table}").fetchall())
                        for table in ("sqlite_master", "versions", "head")
                    ]
                finally:
                    file.close()
            except sqlite3.Error as error:
                found.append(str(error))
        others = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not path.name.startswith(("journal-", "lock"))
        }
        return fingerprint(others), tuple(found)


def fingerprint(content):
    digest = hashlib.sha256()
    for name, data in sorted(content.items()):
        if name != "lock":
            whole = "folder" if data is None else hashlib.sha256(data).hexdigest()
            digest.update(f"{name} {whole}\n".encode())
    return digest.hexdigest()


def record(server, run, room):
    """Have a run recorded; return its calls, once replaying them gives what is on the disk."""
    folder = room / "recorded"
    folder.mkdir()
    outcome = server.ask(folder=str(folder), log=str(room / "log"), run=run)
    assert (outcome.raised, outcome.refused) == ("", {})
    calls = read_log(room / "log", folder)
    disk = Disk()
    for call in calls:
        disk.replay(call)
    lasting = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert disk.as_seen() == lasting
    assert disk.marked == len(run)
    shutil.rmtree(folder)
    return calls


def cuts(length, step):
    """Return where a write is torn: after every `step` bytes, or at a few places."""
    if step:
        return range(1, length, step)
    return sorted({1, length // 3, length // 2, length - 1} - {0, length})


def crash_everywhere(calls, promise, step=0, orders=2):
    """Replay every prefix: as it was seen, with a torn write, and after a loss of power."""
    disk, chance = Disk(), random.Random(0)
    for call in calls:
        if call.kind == shim.WRITE:
            for length in cuts(len(call.data), step):
                promise.holds("torn writes", disk.torn(call, length), disk.marked)
        disk.replay(call)
        promise.holds("prefixes", disk.as_seen(), disk.marked)
        for names in range(disk.uncertain_names + 1):
            promise.holds("losses of power", disk.after_power_loss(names), disk.marked)
        for _ in range(orders):
            kept = iter(lambda: chance.random() < 0.5, None)
            names = chance.randint(0, disk.uncertain_names)
            promise.holds("partial losses", disk.after_power_loss(names, kept), disk.marked)


def test_after_every_prefix_of_its_file_calls_a_run_is_as_after_some_of_its_edits(server, room):
    promise = Promise(states(RUN, room), room)
    calls = record(server, RUN, room)
    crash_everywhere(calls, promise)
    print(f"D1: {dict(promise.cases)}, {promise.different} different directories")
    assert promise.cases["prefixes"] == len(calls) > 400
    assert promise.cases["torn writes"] > 600
    assert promise.cases["losses of power"] >= len(calls)


@pytest.mark.slow
def test_writes_that_are_torn_after_every_61_bytes_lose_nothing(server, room):
    promise = Promise(states(RUN, room), room)
    calls = record(server, RUN, room)
    crash_everywhere(calls, promise, step=61, orders=6)
    print(f"D1: {dict(promise.cases)}, {promise.different} different directories")
    assert promise.cases["torn writes"] > 2000


def test_compaction_leaves_one_whole_codebook_wherever_it_stops(server, room):
    promise = Promise(states(COMPACTED, room), room)
    calls = record(server, COMPACTED, room)
    crash_everywhere(calls, promise, orders=3)
    print(f"D5: {dict(promise.cases)}, {promise.different} different directories")
    assert promise.cases["prefixes"] > 200


def assert_kept(outcome, folder, known):
    """Open what a dead process left: nothing acknowledged is lost, and its lock is no lock."""
    lock = folder / "lock"
    if lock.exists() and lock.stat().st_size:
        assert str(outcome.process).startswith(lock.read_text().strip())  # it may be torn
    assert not outcome.raised
    assert reopened(folder) in known[outcome.acknowledged : outcome.acknowledged + 2]
    shutil.rmtree(folder, ignore_errors=True)


def kill(server, room, times, seed):
    """Kill an editing process at random moments; return how many of its steps were acknowledged."""
    known, chance = states(RUN, room), random.Random(seed)
    acknowledged = []
    for number in range(times):
        folder = room / f"killed-{number}"
        after, delay_s = chance.randint(0, len(RUN) - 1), 0.006 * chance.random()
        outcome = server.ask_and_kill(after, delay_s, folder=str(folder), run=RUN)
        assert outcome.status in (signal.SIGKILL, 0)  # 0: it was faster
        assert_kept(outcome, folder, known)
        acknowledged.append((outcome.status, outcome.acknowledged))
    killed = [steps for status, steps in acknowledged if status]
    print(f"D2: {len(killed)} kills of {times} after {dict(sorted(Counter(killed).items()))} steps")
    assert len(killed) >= 0.9 * times
    return killed


def test_a_killed_process_keeps_what_it_acknowledged(server, room):
    assert len(set(kill(server, room, 20, seed=0))) > 5


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_that_was_acknowledged(server, room):
    assert len(set(kill(server, room, 200, seed=1))) > 15


def end_at_calls(server, room, how, step):
    """End the process at every `step`-th file call, or in the middle of that write; count them."""
    run, folder = workload.operations(25, every=16), room / "ended"
    known, kinds = states(run, room), shim.WRITING if how == shim.TEAR else shim.EVERY_KIND
    ended = 0
    for ended, at in enumerate(range(1, 5000, step)):
        fault = {"how": how, "at": at, "kinds": kinds}
        outcome = server.ask(folder=str(folder), run=run, fault=fault)
        if outcome.last:  # there are not so many calls
            return ended, outcome.calls
        assert outcome.status == shim.EXIT_STATUS << 8
        assert_kept(outcome, folder, known)
    raise AssertionError("the run does not end")


ENDS = {"before it": shim.EXIT, "half-way": shim.TEAR}


@pytest.mark.parametrize("moment", ENDS)
def test_a_process_that_ends_at_a_file_call_keeps_what_it_acknowledged(server, room, moment):
    ended, calls = end_at_calls(server, room, ENDS[moment], step=13)
    print(f"D2: ended {moment} at {ended} of {calls} calls")
    assert ended == -(-calls // 13) > 10


@pytest.mark.slow
@pytest.mark.parametrize("moment", ENDS)
def test_a_process_that_ends_at_any_file_call_keeps_what_it_acknowledged(server, room, moment):
    ended, calls = end_at_calls(server, room, ENDS[moment], step=1)
    print(f"D2: ended {moment} at {ended} of {calls} calls")
    assert ended == calls > 200
