"""Sampling: one loop, and samplers that differ only in how they step from a prediction to the next time.

A step is ``step(pred, r, schedule, eps) -> x_r``; the last one of every loop lands on x0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Cond, Denoise
from .prediction import Prediction
from .schedule import Schedule, add_noise

Step = Callable[[Prediction, Tensor, Schedule, Callable[[], Tensor]], Tensor]
"""(prediction at t, r: [B], schedule, fresh eps) -> x_r: [B, ...]."""


def ddim(pred: Prediction, r: Tensor, schedule: Schedule, eps: Callable[[], Tensor]) -> Tensor:
    """Deterministic: keep the predicted noise (Song et al. 2020, arXiv 2010.02502); on Flow, the Euler step."""
    return add_noise(schedule, pred.x0, pred.eps, r)


def renoise(pred: Prediction, r: Tensor, schedule: Schedule, eps: Callable[[], Tensor]) -> Tensor:
    """Stochastic: noise the predicted x0 afresh, as consistency models and DMD2 do (arXiv 2303.01469, alg. 1)."""
    return add_noise(schedule, pred.x0, eps(), r)


def ddim_x0(x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, schedule: Schedule) -> Tensor:
    """The x0 with which ``ddim`` goes from x_t at t to x_r at r < t: [B, ...] (arXiv 2202.00512, app. G)."""
    at, to = schedule(t), schedule(r)
    shape, ratio = (-1,) + (1,) * (x_t.ndim - 1), to.sigma / at.sigma
    scale = to.alpha - ratio * at.alpha
    return (x_r - ratio.to(x_t).reshape(shape) * x_t) / scale.to(x_t).reshape(shape)


Sampler = Literal["renoise", "ddim"]
STEPS: Mapping[Sampler, Step] = {"renoise": renoise, "ddim": ddim}
"""How a student goes on from one of its times to the next, by name."""


def sample(
    denoiser: Denoise,
    schedule: Schedule,
    x_t: Tensor,
    times: Sequence[float],
    cond: Cond,
    step: Step = renoise,
    eps: Callable[[], Tensor] | None = None,
    end: float | None = None,
) -> Tensor:
    """Call the denoiser at each of ``times`` and return the last x0, or x at time ``end``: [B, ...].

    x_t: [B, ...], noise at times[0]; times: falling strictly, on the schedule's clock; eps: gives fresh standard noise
    shaped like x_t (default: the global generator). Raises ValueError if times are empty or do not fall.
    """
    if not times or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"times must be a falling list with at least one entry, got {list(times)}")
    fresh = eps or (lambda: torch.randn_like(x_t))
    for t, r in zip(times, [*times[1:], end], strict=True):
        pred = denoiser(x_t, x_t.new_full((len(x_t),), t, dtype=torch.float64), cond)
        if r is None:
            return pred.x0
        x_t = step(pred, x_t.new_full((len(x_t),), r, dtype=torch.float64), schedule, fresh)
    return x_t


def sample_student(
    denoiser: Denoise,
    schedule: Schedule,
    x_t: Tensor,
    times: Sequence[float],
    cond: Cond,
    sampler: Sampler,
    eps: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Sample as an exported student does: [B, ...].

    Renoising ends on x0. DDIM ends on the schedule's cleanest time, as ``TCDScheduler`` does: a table's first entry
    still holds a little noise (3 % of a standard deviation for Stable Diffusion's).
    """
    end = schedule.t_min if sampler == "ddim" else None
    return sample(denoiser, schedule, x_t, times, cond, STEPS[sampler], eps, end)


def ddim_times(schedule: Schedule, num_steps: int, start: float = 1.0) -> list[float]:
    """The "trailing" grid of Diffusers' DDIM on the schedule's clock, the last time first: num_steps floats.

    On a table of T entries these are T - 1, T - 1 - T/n, ... (Lin et al. 2023, arXiv 2305.08891), on rectified flow
    even steps, shifted as its times are drawn. start: the share of the times that is used, from the cleanest on.
    """
    span = schedule.t_max - schedule.t_min
    if span <= 1:
        shares = [start - i * start / num_steps for i in range(num_steps)]
        return [float(t) for t in schedule.draw(torch.tensor(shares, dtype=torch.float64))]
    return [schedule.t_min + round((span + 1) * start * (1 - i / num_steps)) - 1.0 for i in range(num_steps)]
