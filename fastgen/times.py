"""Distributions of t for training. Each returns [B] times on the schedule's clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .rng import Noise
from .sampling import ddim_times
from .schedule import Schedule
from .transfer import to_device


def uniform(rng: Noise, schedule: Schedule, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
    """Uniform over the part [low, high) of the schedule's times, drawn per sample: [B]. low, high: numbers, or [B]."""
    return schedule.draw(low + (high - low) * rng.uniform())


def share(schedule: Schedule, t: float) -> float:
    """The part [0, share) of the schedule's times that is not noisier than t: the inverse of ``schedule.draw``."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = bool(schedule.draw(torch.tensor([middle], dtype=torch.float64)) <= t)
        low, high = (middle, high) if below else (low, middle)
    return high


def logit_normal(
    rng: Noise, schedule: Schedule, mean: float = 0.0, std: float = 1.0, continuous: bool = False
) -> Tensor:
    """sigma / (alpha + sigma) is logit-normal, in other words log(sigma / alpha) ~ N(mean, std^2): [B].

    On rectified flow that share is t itself (Esser et al. 2024, arXiv 2403.03206, sec. 3.1). Any other schedule gets
    its own times of the same noise levels, so that one setting means one law of log-SNR: EDM's log-normal one, too.
    """
    return at_log_snr(schedule, -2 * (mean + std * rng.normal(()).double()), continuous)


def at_log_snr(schedule: Schedule, log_snr: Tensor, continuous: bool = False) -> Tensor:
    """The noisiest trained time whose log-SNR is not below ``log_snr``: [B] -> [B]; the cleanest if there is none.

    continuous: of all the times from t_min to t_max, also between those that the networks were trained at.
    """
    span = schedule.t_max - schedule.t_min

    def time(share: Tensor) -> Tensor:
        return schedule.t_min + span * share if continuous else schedule.draw(share)

    share = torch.zeros_like(log_snr)
    tries = torch.arange(32, dtype=log_snr.dtype, device=log_snr.device)
    for digit in range(1, 9):  # eight digits to base 32 of the share of the times, over which the log-SNR falls
        ahead = share[:, None] + tries / 32**digit
        clean = schedule(time(ahead.flatten())).log_snr.reshape(ahead.shape) >= log_snr[:, None]
        share = share + (clean.sum(1) - 1).clamp(min=0) / 32**digit
    return time(share)


def grid(schedule: Schedule, intervals: int) -> list[float]:
    """``intervals`` uniform steps from t_max to clean data: the falling times they start at.

    The last step ends on clean data itself (alpha 1, sigma 0). On a table this is the grid of Diffusers' LCM and of
    trailing DDIM, and no finer than the table.
    """
    span = schedule.t_max - schedule.t_min
    return ddim_times(schedule, min(intervals, int(span) + 1) if span > 1 else intervals)


SIGNAL_LEFT = 0.01
"""How much larger alpha may be at a student's first time than at the noisiest: a hundredth of a deviation of x0."""


def check_start(schedule: Schedule, student_times: Sequence[float]) -> None:
    """Raise ValueError if a student that learns from noised data is first called where pure noise is out of place.

    Pure noise lacks the alpha x0 of what it learnt from. Also a table's last time leaves some, Stable Diffusion's
    0.068, which is the pipeline's own mismatch; the 998, 995 and 993 at which 3, 6 and 7 steps of its 1000 begin leave
    0.0004, 0.0017 and 0.0025 more, which is nothing beside it, while 399 leaves 0.58 more.
    """
    first, last = student_times[0], schedule.t_max
    left, least = schedule(torch.tensor([first, last], dtype=torch.float64)).alpha.tolist()
    if left > least + SIGNAL_LEFT:
        raise ValueError(
            f"this student meets pure noise at time {last:g}, not {first:g}; set student.start 1, and student.steps "
            "to a number whose times begin near the last, such as 1: "
            f"at {first:g} {left:.0%} of the image is still there"
        )


def solver_grid(schedule: Schedule, student_times: Sequence[float], steps: int) -> list[float]:
    """The falling times of a solver of at least ``steps`` steps, t_min last, the student's own times among them.

    Each of the student's intervals is cut into equally many: on a table that is LCM's grid for one step (T - 1,
    T - 1 - T/n, ..., 0), and for more the same one where ``steps`` is a multiple of them. Raises ValueError if the
    schedule has too few times, or if the student starts where pure noise is not what the solver would be at.
    """
    check_start(schedule, student_times)
    table = schedule.t_max - schedule.t_min > 1  # whose last interval, as Diffusers has it, ends one entry below
    ends = [*student_times[1:], schedule.t_min - (1.0 if table else 0.0)]
    count = -(-steps // len(student_times))
    found = [t + (r - t) * j / count for t, r in zip(student_times, ends, strict=True) for j in range(count)]
    found = [*(float(round(t)) if table else t for t in found), schedule.t_min]
    if any(t <= r for t, r in pairwise(found)):
        raise ValueError(f"solver_steps {steps} is more than the schedule has times for; lower it")
    return found


def on_grid(rng: Noise, grid: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A random step of a falling grid for each sample: its start t and its end r < t, each [B]."""
    ends = to_device(torch.tensor(grid, dtype=torch.float64), rng.device)
    i = (rng.uniform() * (len(grid) - 1)).long()
    return ends[i], ends[i + 1]


def noise_ratio(schedule: Schedule, t: Tensor) -> Tensor:
    """t: [B] -> sigma / alpha: [B], the sigma of schedules that do not scale the data."""
    at = schedule(t)
    return at.sigma / at.alpha


Lognormal = tuple[float, float]
"""Mean and deviation of log(sigma / alpha)."""


def grid_pair(rng: Noise, schedule: Schedule, intervals: int, law: Lognormal | None) -> tuple[Tensor, Tensor, Tensor]:
    """An interval of ``grid``: its ends t and r, and whether r stands for clean data, when it is t_min: [B] each.

    Without a law all are alike; with one, an interval is as likely as that log(sigma / alpha) lies in it, given that
    it lies in one (iCT, Song & Dhariwal 2023, arXiv 2310.14189, sec. 3.5).
    """
    ends = to_device(torch.tensor([*grid(schedule, intervals), schedule.t_min], dtype=torch.float64), rng.device)
    mass = torch.ones_like(ends[1:])
    if law:
        ratio = noise_ratio(schedule, ends)
        ratio[-1] = 0  # clean data
        mass = -torch.special.ndtr((ratio.log() - law[0]) / law[1]).diff()
    below = mass.cumsum(0)
    k = torch.searchsorted(below, rng.uniform() * below[-1], right=True).clamp(max=len(mass) - 1)
    return ends[k], ends[k + 1], k == len(mass) - 1


def ratio_pair(rng: Noise, schedule: Schedule, inverse: int, law: Lognormal | None) -> tuple[Tensor, Tensor, Tensor]:
    """t by the law (None: uniform) and r at 1 - (1 + 8 sigmoid(-ratio)) / inverse of its noise ratio sigma / alpha.

    The third says where that is cleaner than t_min, which r then is: [B] each. ECT's (Geng et al. 2024, arXiv
    2406.14548; training/loss.py, whose q^(stage + 1) is ``inverse``).
    """
    t = logit_normal(rng, schedule, *law) if law else uniform(rng, schedule)
    ratio = noise_ratio(schedule, t)
    ahead = ratio * (1 - (1 + 8 * torch.sigmoid(-ratio)) / inverse)
    clean = ahead <= noise_ratio(schedule, torch.full_like(t, schedule.t_min))
    return t, at_log_snr(schedule, -2 * torch.where(clean, ratio, ahead).log()).where(~clean, schedule.t_min), clean


def root_intervals(step: int, steps: int, start: int, end: int) -> int:
    """CT's curriculum: ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) intervals, N(k) - 1 of the paper's levels.

    s0 = ``start`` levels at first, s1 = ``end`` intervals at last (Song et al. 2023, arXiv 2303.01469, app. C).
    """
    progress = min(step / steps, 1.0)
    return max(1, math.ceil(math.sqrt(progress * ((end + 1) ** 2 - start**2) + start**2) - 1))


def doubling_intervals(step: int, steps: int, start: int, end: int) -> int:
    """iCT's curriculum: min(s0 2^floor(k / K'), s1) intervals, K' = floor(K / (log2 floor(s1 / s0) + 1)).

    (arXiv 2310.14189, sec. 3.4.) With s0 = 2, s1 = 256 it is ECT's q^(stage + 1) for q = 2 (arXiv 2406.14548).
    """
    stage = max(1, math.floor(steps / (math.log2(end // start) + 1)))
    return min(start << min(step // stage, 64), end)
