"""A host sees when a synchronisation of the GPU look-up is missing.

`python -m cuda_mutants` leaves out each in turn and prints what is seen. What is in neither of the
tables here has not been judged yet.
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
    "write hand_out: sync_block 1": "many tokens written: an invalid access",
}
OUT_OF_REACH = {
    "encode run: let_the_next_kernel_start 1": "takes time only; its place is asserted in SASS",
    "encode is_last: take_ticket 1 acquires nothing": "what follows are fresh loads",
    "encode fresh: load_fresh 1": "what was released before the ticket has been acquired",
    "indexed prefetch_codes: prefetch 1": "takes time only",
    "indexed prefetch_codes: prefetch 2": "takes time only",
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
    for name in OUT_OF_REACH:
        assert name in found, "it is not in the sources"
