"""What the student is called on during training: (x_t: [B, ...], t: [B]).

``times`` are the student's own, falling; the one trained at this step is shared by the whole batch and by all
processes, since ranks that run different depths would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Cond, Denoise, Denoiser
from .rng import Noise
from .sampling import renoise, sample
from .schedule import Schedule, add_noise

Rollout = Literal["simulate", "data", "noise"]
"""What a student is trained on: its own chain, noised real images, or pure noise at its first time."""


def _at(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


def from_noise(rng: Noise, shape: Sequence[int], times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Pure noise at the first time. shape: of one sample."""
    x_t = rng.normal(shape)
    return x_t, _at(x_t, times[0])


def from_data(student: Denoiser, rng: Noise, x0: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Noised real data at a random one of the times; pure noise at the first."""
    k = rng.shared_integer(len(times))
    eps = rng.normal(x0.shape[1:])
    t = _at(x0, times[k])
    return (eps if k == 0 else add_noise(student.schedule, x0, eps, t)), t


def backward_simulation(
    student: Denoiser, rng: Noise, shape: Sequence[int], times: Sequence[float], cond: Cond
) -> tuple[Tensor, Tensor]:
    """What the student itself would see at a random one of its times (DMD2, arXiv 2405.14867, sec. 4.5).

    The chain runs without gradients and is the inference sampler's own, re-noising included.
    """
    k = rng.shared_integer(len(times))
    x_t = rng.normal(shape)
    if k == 0:
        return x_t, _at(x_t, times[0])
    with torch.no_grad():
        x0 = sample(student, student.schedule, x_t, times[:k], cond, renoise, lambda: rng.normal(shape))
        t = _at(x_t, times[k])
        return add_noise(student.schedule, x0, rng.normal(shape), t), t


def needs_images(rollout: Rollout, num_steps: int) -> bool:
    """Whether the inputs of a student of ``num_steps`` are made of images. Raises ValueError if some call has none."""
    if rollout == "noise" and num_steps > 1:
        raise ValueError(
            f"rollout noise trains only the first of {num_steps} calls; choose simulate or data, or student.steps 1"
        )
    return rollout == "data" and num_steps > 1


def inputs(
    rollout: Rollout,
    student: Denoiser,
    rng: Noise,
    shape: Sequence[int],
    times: Sequence[float],
    cond: Cond,
    x0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the student is called on. x0: real images, for those that ``needs_images``; a single call needs none."""
    if rollout == "noise":
        return from_noise(rng, shape, times)
    if rollout == "data" and x0 is not None:
        return from_data(student, rng, x0, times)
    return backward_simulation(student, rng, shape, times, cond)


@torch.no_grad()
def along_ode(
    teacher: Denoise,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Cond,
    solver: Literal["euler", "heun"],
) -> tuple[Tensor, Tensor]:
    """One step from t to r < t, each [B], along the teacher's probability-flow ODE -> (x_r, its noise): [B, ...] both.

    "euler" is DDIM, one call: Euler's rule in sigma / alpha. "heun" is two: the trapezoid rule in the angle
    atan2(sigma, alpha), along which x / sqrt(alpha^2 + sigma^2) moves by v. EDM's rule (Karras et al. 2022, arXiv
    2206.00364, alg. 1) takes sigma / alpha, which is infinite at pure noise; on its own grid this errs half as much.
    The noise is as last predicted: (x_r - sigma eps) / alpha is where a last step to clean data would go.
    """
    pred = teacher(x_t, t, cond)
    x_r, eps = add_noise(schedule, pred.x0, pred.eps, r), pred.eps
    if solver == "euler":
        return x_r, eps
    ahead = teacher(x_r, r, cond)
    at, to = schedule(t), schedule(r)
    turn = torch.atan2(to.sigma, to.alpha) - torch.atan2(at.sigma, at.alpha)
    before, after = (torch.hypot(level.alpha, level.sigma) for level in (pred.at, ahead.at))
    mean = 0.5 * (pred.v / before + ahead.v / after)
    return after * (pred.x_t / before + turn.to(mean).reshape(before.shape) * mean), ahead.eps
