"""Every optimizer that is installed: it learns on the GPU, its states go through a checkpoint, and what these take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgen import checkpoint, estimate, optimizers
from fastgen.engine import Engine
from fastgen.method import Batch, Phase
from fastgen.optimizers import KINDS, Optim
from fastgen.rng import Noise
from tests.gpu import world
from tests.gpu.report import note

RATES = {"sgd": 0.1, "adagrad": 0.3, "adafactor": 0.3, "lion": 1e-2, "lion8bit": 1e-2, "paged_lion8bit": 1e-2}
"""At which 100 steps go most of the way down a quadratic; of the others 3e-2."""


def made(optim: Optim, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer; the test is left out where its package is not installed or does not work here, which is noted."""
    try:
        return optimizers.make(optim, parameters)
    except ValueError as error:
        note("optimizers", optim.name, {"does not work": str(error)})
        pytest.skip(str(error))


def optim_of(name: str) -> Optim:
    decay = 0.0 if "weight_decay" in KINDS[name].defaults else None
    return Optim(RATES.get(name, 3e-2), name, weight_decay=decay)


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_down_a_quadratic_and_takes_what_the_estimate_says(name: str) -> None:
    """A matrix of 2^20 numbers, and some small tensors, whose states are never quantised."""
    g = torch.Generator().manual_seed(0)
    shapes = [(1024, 1024), (5, 4), (7,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=g).to(world.CUDA)) for shape in shapes]
    aims = [torch.randn(shape, generator=g).to(world.CUDA) for shape in shapes]
    optimizer = made(optim_of(name), parameters)

    def loss() -> Tensor:
        return torch.stack([(p - aim).square().sum() for p, aim in zip(parameters, aims, strict=True)]).sum() / 2

    start = float(loss().detach())
    for _ in range(100):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
    end = float(loss().detach())
    states = optimizers.tensors(optimizer, {str(i): p for i, p in enumerate(parameters)})
    count = sum(p.numel() for p in parameters)
    # a table that all parameters share is counted once, and bytes that page out are where they page from
    bytes_held = sum(t.nbytes for key, t in states.items() if t.numel() > 1 and "qmap" not in key)
    figures = {"loss falls to": end / start, "bytes per weight": bytes_held / count}
    expected = None
    if not KINDS[name].is_torch:
        expected = estimate.fewer_bits(parameters, KINDS[name].moments)
        figures["estimate"] = expected / count
    note("optimizers", name, figures)
    assert end < 0.5 * start, figures
    if expected is not None:
        assert abs(bytes_held - expected) < 0.01 * expected, figures


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad", "muon"])
def test_gradients_are_divided_in_the_step_as_before_it(name: str) -> None:
    """As clipping divides them: within the pass of those that have one."""
    g = torch.Generator().manual_seed(0)
    start, to, divisor = torch.randn(64, 64, generator=g), torch.randn(64, 64, generator=g), torch.tensor(7.0)
    sides = []
    for at_once in (False, True):
        p = nn.Parameter(start.to(world.CUDA))
        optimizer = made(optim_of(name), [p])
        p.grad = to.to(world.CUDA)
        optimizers.divide(optimizer, [p.grad], divisor.to(world.CUDA), at_once=at_once)
        optimizer.step()
        sides.append([p.detach(), *optimizers.tensors(optimizer, {"p": p}).values()])
    for within, before in zip(*sides, strict=True):
        torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-7)


class Points:
    def batch(self, samples: Sequence[int]) -> Batch:
        x0 = torch.tensor([[s % 7 / 7.0, s % 5 / 5.0, 1.0] for s in samples])
        return Batch(samples, {}, {}, x0=x0.to(world.CUDA))


@dataclass(frozen=True)
class Fit:
    """A network with a matrix large enough for states of fewer bits, and some that are not."""

    networks: Mapping[str, nn.Module]

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("only", ["student"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Mapping[str, Tensor]:
        assert batch.x0 is not None
        y = self.networks["student"](batch.x0)[:, 0]
        return {"error": (y - batch.x0.square().sum(1) + 0.1 * rng.normal([])).square()}


def engine(optim: Optim) -> Engine:
    torch.manual_seed(0)
    parts = [nn.Linear(3, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)]
    network = nn.Sequential(*parts).to(world.CUDA)
    return Engine(
        Fit({"student": network}), Points(), {"student": optim}, batch_size=8, steps=8, device=world.CUDA, accumulate=2
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_training_goes_on_as_an_unbroken_one(name: str, tmp_path: Path, ordered: None) -> None:
    """Through a checkpoint's files; bit for bit."""
    optim = Optim(1e-2, name, warmup=2)
    made(optim, [nn.Parameter(torch.zeros(2, 4096, device=world.CUDA))])
    whole = engine(optim)
    errors = [logs for _, logs in whole.run(range(8))]
    half = engine(optim)
    first = [logs for _, logs in half.run(range(3))]
    saved = checkpoint.save(tmp_path, 3, half, {}, keep=1)
    resumed = engine(optim)
    assert checkpoint.load(saved, resumed, {}) == 3
    mine = first + [logs for _, logs in resumed.run(range(3, 8))]
    ours, theirs = (
        {n: p.detach().cpu() for n, p in one.method.networks["student"].named_parameters()} for one in (resumed, whole)
    )
    note("optimizers resumed", name, {"largest difference": world.largest(ours, theirs)})
    assert len({log["only/error"] for log in errors}) == 8
    assert mine == errors
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
