"""A run killed again and again at random moments ends as an unbroken one does, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen import checkpoint, tracking
from tests.contract import kill_child

STEPS, KILLS = 120, 10


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported torch and done nothing else, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_child.__name__])
    return context


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    processes: multiprocessing.context.ForkServerContext, tmp_path: Path
) -> None:
    def run(folder: Path, kill: tuple[int, float] | None = None) -> int | None:
        child = processes.Process(target=kill_child.main, args=(folder, STEPS, kill))
        child.start()
        child.join(120)
        return child.exitcode

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole) == 0

    chance, progress = random.Random(11), []
    for _ in range(KILLS):
        # up to 8 steps and the time of about one more, so that all kills together come before the end of a whole run
        assert run(broken, (chance.randrange(1, 9), chance.uniform(0, 0.01))) == -signal.SIGKILL
        found = checkpoint.all_checkpoints(broken)
        progress.append(checkpoint.read_state(found[-1])["steps_done"] if found else 0)
    assert progress == sorted(progress), "a later run began before an earlier one's checkpoint"
    assert len(set(progress)) > 2, "the kills were not spread over the run"
    assert not (broken / "final.safetensors").exists()
    assert run(broken) == 0

    ours, theirs = load_file(broken / "final.safetensors"), load_file(whole / "final.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    # no step is logged twice or left out, and each has the unbroken run's numbers
    assert tracking.read(broken / "metrics.jsonl") == tracking.read(whole / "metrics.jsonl")
