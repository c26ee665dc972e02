"""A run killed again and again at random moments ends as an unbroken one does, bit for bit."""

import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastgen import checkpoint, tracking

CHILD = Path(__file__).with_name("kill_child.py")
STEPS, KILLS = 150, 8


def start(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(CHILD), str(run), str(STEPS)], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    with start(tmp_path / "whole") as whole:
        whole.communicate(timeout=120)
        assert whole.returncode == 0

    chance = random.Random(11)
    broken, progress = tmp_path / "broken", []
    for _ in range(KILLS):
        with start(broken) as child:
            assert child.stdout is not None
            # within so many steps that all kills together come before the end of a whole run
            for _ in range(chance.randrange(1, STEPS // KILLS)):
                child.stdout.readline()
            time.sleep(chance.uniform(0, 0.01))
            child.kill()
        found = checkpoint.all_checkpoints(broken)
        progress.append(checkpoint.read_state(found[-1])["steps_done"] if found else 0)
    assert progress == sorted(progress), "a later run began before an earlier one's checkpoint"
    assert len(set(progress)) > 2, "the kills were not spread over the run"
    assert not (broken / "final.safetensors").exists()
    with start(broken) as last:
        last.communicate(timeout=120)
        assert last.returncode == 0

    ours, theirs = load_file(broken / "final.safetensors"), load_file(tmp_path / "whole" / "final.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    # no step is logged twice or left out, and each has the unbroken run's numbers
    assert tracking.read(broken / "metrics.jsonl") == tracking.read(tmp_path / "whole" / "metrics.jsonl")
