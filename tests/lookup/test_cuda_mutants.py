"""A host sees when a synchronisation of the GPU look-up is missing.

`python -m cuda_mutants` leaves out each in turn and prints what is seen. What is in none of the
tables here has not been judged yet, or takes long: the wait for the kernel before, put after the
reading of queries, never ends.
"""

import json
import os
import subprocess
import sys

import pytest
from cuda_build import ROOT

# What has seen it first, each with a wrong answer or as said.
SEEN_BY = {
    "dense stage_queries: sync_block 1": "a dense look-up, in one order of six",
    "encode join: sync_block 1": "few codes",
    "encode is_last: sync_block 1": "few codes",
    "encode is_last: take_ticket 1 releases nothing": "few codes",
    "encode is_last: sync_block 2": "few codes: every thread waits",
    "indexed read: wait_for_the_kernel_before 1": "few codes",
    "indexed take_queries: sync_block 1": "boxes",
    "indexed collect_exactly: sync_block 1": "an invalid access",
    "indexed scan: sync_block 1": "an invalid access",
    "indexed read_candidates: sync_block 1": "an invalid access",
    "indexed read_candidates: sync_block 2": "few codes: every thread waits",
    "indexed look_again: sync_block 1": "near ties by codes",
    "key_ring wait: wait_for_copies 1": "a dense look-up of near ties",
    "key_ring copy_ahead: copy16_ahead 1": "a dense look-up of near ties",
    "key_ring copy_ahead: end_copies 1": "a dense look-up of near ties",
    "settle is_last_block: sync_block 1": "a dense look-up",
    "settle is_last_block: sync_block 2": "a dense look-up: every thread waits",
    "settle is_last_block: take_ticket 1 releases nothing": "a dense look-up",
    "settle join_warps: sync_block 1": "a dense look-up: an invalid access",
    "settle run: sync_block 1": "a dense look-up: every thread waits",
    "settle run: sync_block 2": "a dense look-up of near ties",
    "settle best_of_block: sync_block 1": "a dense look-up of near ties",
    "settle best_of_block: sync_block 2": "a dense look-up of near ties: an invalid access",
    "write take_parts: sync_block 1": "many tokens written",
    "write take_parts: sync_block 2": "many tokens written: every thread waits",
    "settle write_hits: sync_block 1": "an invalid access",
    "write hand_out: sync_block 1": "many tokens written: an invalid access",
    "write hand_out: fence 1": "many tokens written",
    "write help: sync_block 2": "an invalid access",
}
OUT_OF_REACH = {
    "encode run: let_the_next_kernel_start 1": "takes time only; its place is asserted in SASS",
    "encode is_last: take_ticket 1 acquires nothing": "what follows are fresh loads",
    "encode fresh: load_fresh 1": "what was released before the ticket has been acquired",
    "indexed prefetch_codes: prefetch 1": "takes time only",
    "indexed prefetch_codes: prefetch 2": "takes time only",
    "indexed take_queries: load_fresh 1": "the wait for the kernel before acquires",
    "settle is_last_block: take_ticket 1 acquires nothing": "what follows are fresh loads",
    "settle seen: load_fresh 1": "the ticket before acquires",
    "settle seen: load_fresh 2": "the ticket before acquires",
    "write hand_out: store_fresh 1": "on a host a plain store is one too",
    "write help: load_fresh 1": "on a host a plain load in a loop is one each time",
    "write help: wait_a_moment 1": "takes time only",
    "write help: fence 1": "what follows are fresh loads",
    "write help: load_fresh 2": "the fence before acquires",
    "write take_parts: take_ticket 1 releases nothing": "only its count matters",
    "write take_parts: take_ticket 1 acquires nothing": "only its count matters",
}
# Not seen in 80 orders, and there all the same.
NOT_SEEN = {
    "indexed scan: sync_block 3": "the list is filled again where a block has several rounds",
    "indexed read_candidates: sync_block 3": "the list is filled again by a second look",
    "indexed read_again: sync_block 1": "the list is filled again by a second look",
    "indexed leave_one: sync_block 1": "follows the barrier of `read_candidates`, or of none",
    "indexed leave_one: sync_block 2": "what a thread has joined, other warps read",
    "write help: sync_block 1": "what is written to was read before",
}


@pytest.mark.slow
def test_a_host_sees_what_synchronisation_is_missing():
    """Minutes: what is out of reach is not tried, for it takes some hundred look-ups to say so."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = (sys.executable, "-m", "cuda_mutants", "no mutant", *SEEN_BY)
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["no mutant"] == "survives"
    for name in SEEN_BY:
        assert found[name] != "survives", name
    for name in (*OUT_OF_REACH, *NOT_SEEN):
        assert name in found, "it is not in the sources"
