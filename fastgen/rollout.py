"""What the student is called on during training: (x_t: [B, ...], t: [B]).

``times`` are the student's own, falling; the one trained at this step is shared by the whole batch and by all
processes, since ranks that run different depths would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser
from .rng import Noise
from .sampling import renoise, sample
from .schedule import add_noise

Rollout = Literal["backward_simulation", "from_data", "from_noise"]


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
