"""Trainings on the GPU that are stopped, go on, or have no room."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgen import checkpoint
from fastgen.interrupt import CODE
from tests.gpu import world
from tests.gpu.report import note

CHANGES = (*world.QUICK, "run.batch_size=8", "run.log_every=1", "run.sample_every=0", "run.checkpoint_every=1000")


def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastgen",
        "train",
        world.CONFIGS / "dmd2_prompts.yaml",
        f"run.out={run}",
        *CHANGES,
    ]
    child = world.started([*command, "run.steps=100000"])
    try:
        end, rows = time.monotonic() + 90, run / "metrics.jsonl"
        while not (rows.exists() and rows.read_text().count("\n") > 2):
            assert child.poll() is None, world.ended(child, 10).stderr
            assert time.monotonic() < end, "no row of metrics within 90 s"
            time.sleep(0.2)
        began = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        stopped = world.ended(child, 60)
        took = time.monotonic() - began
    finally:
        world.stop(child)
    assert stopped.returncode == CODE, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "this step is finished and a checkpoint saved" in stopped.stderr
    [saved] = checkpoint.all_checkpoints(run)
    done = checkpoint.read_state(saved, thorough=True)["steps_done"]
    note("interrupted", "sigterm", {"steps done": done, "seconds until the process has ended": took})
    on = world.child(*command, f"run.steps={done + 3}")
    assert on.returncode == 0, on.stderr
    log = (run / "train.log").read_text()
    assert f"resuming from {saved}" in log
    assert "on cuda" in log
    assert checkpoint.all_checkpoints(run)[-1].name == f"checkpoint-{done + 3}"
    assert (run / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["dmd2", "lcm"])
def test_a_resumed_training_equals_an_unbroken_one(name: str, tmp_path: Path, ordered: None) -> None:
    """Bit for bit where all sums are made in a fixed order, as the largest difference of two unbroken ones shows."""
    steps, half = 6, 3
    given = ("run.batch_size=8", "model.attention=eager", f"run.steps={steps}")

    def unbroken() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        session = world.built(name, tmp_path, *given)
        return world.turns(session, range(steps)), world.weights(session)

    (logs, weights), (again, control) = unbroken(), unbroken()
    session = world.built(name, tmp_path, *given)
    mine = world.turns(session, range(half))
    saved = checkpoint.save(tmp_path / "saved", half, session.engine, session.ema, 1)
    del session
    session = world.built(name, tmp_path, *given)
    assert checkpoint.load(saved, session.engine, session.ema) == half
    mine += world.turns(session, range(half, steps))
    off, own = world.largest(world.weights(session), weights), world.largest(control, weights)
    note("resumed", name, {"largest difference": off, "of two unbroken": own, "logs equal": mine == logs})
    if own == 0 and again == logs:
        assert off == 0
        assert mine == logs
    else:
        assert off <= 10 * own + 1e-7


def test_a_batch_without_room_is_one_line(tmp_path: Path) -> None:
    """A hundredth of the memory, and a batch that does not fit into it."""
    words = ("train", world.CONFIGS / "dmd2_prompts.yaml", f"run.out={tmp_path / 'run'}", *CHANGES)
    ended = world.child(sys.executable, "-m", "tests.gpu.child", "small", 0.01, *words, "run.batch_size=2048")
    lines = ended.stderr.strip().splitlines()
    note("interrupted", "no room", lines[-1])
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert lines[-1].startswith("fastgen: the GPU has no room left (tried to allocate ")
    assert "run.batch_size" in lines[-1]
