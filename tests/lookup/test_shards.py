"""Row shards: ranks as processes, each running `shard_ranks.py`, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grace_fast.lookup.sharded import ShardedCodebook

RANKS = Path(__file__).parents[1] / "shard_ranks.py"


def run(scenario: str, ranks: int, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a scenario on so many ranks; return how each ended."""
    file = folder / "rendezvous"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    started = [
        subprocess.Popen(
            [sys.executable, str(RANKS), scenario, str(rank), str(ranks), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    ended = []
    try:
        for process in started:
            said, _ = process.communicate(timeout=120)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, said))
    finally:
        for process in started:
            process.kill()
    return ended


@pytest.mark.parametrize(
    ("scenario", "ranks"),
    [
        ("agree", 4),
        ("split", 3),
        ("cover", 2),
        ("differ", 2),
        ("attached", 2),
        ("generate", 2),
        ("refuse", 2),
    ],
    ids=lambda x: str(x),
)
def test_ranks_together_are_one_codebook(scenario, ranks, tmp_path):
    for rank, process in enumerate(run(scenario, ranks, tmp_path)):
        assert process.returncode == 0, f"rank {rank}: {process.stdout[-3000:]}"


@pytest.mark.parametrize("scenario", ["die", "hang", "die_attached"])
def test_a_lost_rank_is_told_within_the_time_out(scenario, tmp_path):
    *others, lost = run(scenario, 3, tmp_path)
    assert lost.returncode == (0 if scenario == "hang" else -9)
    for rank, process in enumerate(others):
        assert process.returncode == 0, f"rank {rank}: {process.stdout[-3000:]}"
        assert "reported" in process.stdout


def test_shards_without_a_process_group_are_refused():
    with pytest.raises(RuntimeError, match="start the ranks with torchrun and call"):
        ShardedCodebook(4, 2)
    assert not torch.distributed.is_initialized()
