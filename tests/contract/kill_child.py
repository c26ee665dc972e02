"""A small real training run for test_kill.py: engine, averaging, checkpoints and metrics as in ``fastgen train``."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import torch
import torch._dynamo  # else imported by the first optimizer step of each process, which takes longer than all else
from safetensors.torch import save_file
from torch import nn

from fastgen import checkpoint, tracking
from fastgen.ema import EMA
from fastgen.engine import Engine
from fastgen.method import Batch, Phase
from fastgen.optimizers import Optim


class Regression:
    """Two networks that learn in turn, the second half as often."""

    exported, num_steps, needs_images = "student", None, False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.networks = {"student": nn.Linear(64, 64), "fake_score": nn.Linear(64, 64)}
        self.phases = (
            Phase("critic", ["fake_score"], lambda batch, rng: self.loss("fake_score", rng)),
            Phase("student", ["student"], lambda batch, rng: self.loss("student", rng), every=2),
        )

    def loss(self, role, rng):
        x = rng.normal((64,))
        return {"fit": (self.networks[role](x) - x.roll(1, dims=1)).square().mean(1)}


class Nothing:
    """Data that hold nothing but sample numbers."""

    def batch(self, samples):
        return Batch(list(samples), {}, {})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(run: Path, steps: int, kill: tuple[int, float] | None = None) -> None:
    """Go on from the newest whole checkpoint and write final.safetensors at the end.

    kill: a SIGKILL so many steps after the start and so many seconds after that. It comes from a thread of this
    process, so that on a loaded machine the run cannot get away from it.
    """
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # what a process has written outlives it without; a disk takes 10 ms each time
    run.mkdir(parents=True, exist_ok=True)
    method = Regression()
    ema = {"student": EMA(method.networks["student"], 0.9)}
    optim = {role: Optim(lr=1e-2) for role in method.networks}
    engine = Engine(method, Nothing(), optim, batch_size=8, steps=steps, seed=3)
    found = checkpoint.all_checkpoints(run)
    start = checkpoint.load(found[-1], engine, ema) if found else 0
    tracker = tracking.JsonLines(run / "metrics.jsonl", start)
    for step, logs in engine.run(range(start, steps)):
        done = step + 1
        if kill and done == start + kill[0]:
            threading.Timer(kill[1], die).start()
        ema["student"].update()
        tracker.log(done, logs)
        if done % 3 == 0 or done == steps:
            checkpoint.save(run, done, engine, ema, keep=2)
    weights = {f"{role}.{n}": p.detach() for role, net in method.networks.items() for n, p in net.named_parameters()}
    save_file({**weights, **{f"ema.{n}": v for n, v in ema["student"].average.items()}}, run / "final.safetensors")
