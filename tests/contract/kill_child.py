"""A small real training run for test_kill.py: engine, averaging, checkpoints and metrics as in ``fastgen train``.

Usage: kill_child.py RUN STEPS. It goes on from the newest whole checkpoint and writes final.safetensors at the end.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fastgen import checkpoint, tracking
from fastgen.ema import EMA
from fastgen.engine import Engine, Optim
from fastgen.method import Batch, Phase


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


def main(run: Path, steps: int) -> None:
    method = Regression()
    ema = {"student": EMA(method.networks["student"], 0.9)}
    optim = {role: Optim(lr=1e-2) for role in method.networks}
    engine = Engine(method, Nothing(), optim, batch_size=8, steps=steps, seed=3)
    found = checkpoint.all_checkpoints(run)
    done = checkpoint.load(found[-1], engine, ema) if found else 0
    tracker = tracking.JsonLines(run / "metrics.jsonl", done)
    for step, logs in engine.run(range(done, steps)):
        ema["student"].update()
        tracker.log(step + 1, logs)
        if (step + 1) % 3 == 0 or step + 1 == steps:
            checkpoint.save(run, step + 1, engine, ema, keep=2)
        print(step + 1, flush=True)
    weights = {f"{role}.{n}": p.detach() for role, net in method.networks.items() for n, p in net.named_parameters()}
    save_file({**weights, **{f"ema.{n}": v for n, v in ema["student"].average.items()}}, run / "final.safetensors")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, int(sys.argv[2]))
