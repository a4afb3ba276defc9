"""Every synchronisation of the GPU look-up is needed, and a host sees it when one is missing.

The table says what sees it first, by a wrong answer unless it says more; `python -m cuda_mutants`
prints what it is today. A line that begins with "nothing" says why no host can, or need not.
"""

import json
import os
import subprocess
import sys

import pytest
from cuda_build import ROOT

SEEN_BY = {}


@pytest.mark.slow
def test_a_host_sees_what_synchronisation_is_missing():
    """Some minutes: each of these runs some hundred look-ups in other orders, or dies."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = (sys.executable, "-m", "cuda_mutants")
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("no mutant") == "survives"
    assert found.keys() == SEEN_BY.keys()
    for name, outcome in found.items():
        assert (outcome == "survives") == SEEN_BY[name].startswith("nothing"), (name, outcome)
