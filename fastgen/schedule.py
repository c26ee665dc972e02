"""Noise schedules: how much signal and how much noise a sample holds at a time.

A schedule answers one question, ``schedule(t) -> Level``. Its clock is its own: noise grows with ``t`` from ``t_min``
to ``t_max``. Everything is computed in float64; callers cast what they multiply with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .transfer import to_device


@dataclass(frozen=True)
class Level:
    """Coefficients of ``x_t = alpha x0 + sigma eps`` and their derivatives with respect to ``t``.

    Every field has the shape of ``t``: [B] out of a schedule, [B, 1, ...] after ``like``.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def like(self, x: Tensor) -> Level:
        """The same level, shaped to broadcast against ``x``: [B, ...] and in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (-1,) + (1,) * (x.ndim - 1)
        fields = (self.alpha, self.sigma, self.d_alpha, self.d_sigma)
        return Level(*(f.to(device=x.device, dtype=dtype).reshape(shape) for f in fields))

    def first(self, n: int) -> Level:
        """The levels of the first ``n`` samples."""
        return Level(self.alpha[:n], self.sigma[:n], self.d_alpha[:n], self.d_sigma[:n])

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2), the shape of ``t``."""
        return 2 * (self.alpha.log() - self.sigma.log())


class Schedule(Protocol):
    """What every schedule offers."""

    @property
    def t_min(self) -> float:
        """The cleanest time."""
        ...

    @property
    def t_max(self) -> float:
        """The noisiest time."""
        ...

    def __call__(self, t: Tensor) -> Level:
        """t: [B] in [t_min, t_max] -> coefficients, each [B] float64."""
        ...

    def draw(self, u: Tensor) -> Tensor:
        """Map ``u``: [B] in [0, 1) to times the networks of this schedule were trained at: [B]."""
        ...


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv 2209.03003).

    shift: s of t = s u / (1 + (s - 1) u), by which large images are trained and sampled at noisier times (Esser et al.
    2024, arXiv 2403.03206, sec. 5.3.2); 1 is off.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    shift: float = 1.0

    def __call__(self, t: Tensor) -> Level:
        """t: [B] in [0, 1] -> Level."""
        t = t.double()
        return Level(1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    def draw(self, u: Tensor) -> Tensor:
        """u: [B] -> t, shifted."""
        u = u.double()
        return self.shift * u / (1 + (self.shift - 1) * u)


class TabulatedVP:
    """A variance-preserving schedule given by a table of ``alphas_cumprod``, as every Diffusers DDPM model has.

    The clock is the table's index, so integer times give the table's own numbers; between them the log-SNR is
    interpolated linearly, which keeps alpha^2 + sigma^2 = 1 and makes the derivatives exact. A table may end in
    exactly 0, pure noise (Lin et al. 2023, arXiv 2305.08891), whose log-SNR is infinite: before that entry the angle
    atan(sigma / alpha) is interpolated, up to pi / 2. There noise names no clean data, so a network must not give eps.
    """

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        """alphas_cumprod: [T], strictly decreasing within (0, 1); the last may be 0."""
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must be a list of at least 2 numbers, got shape {tuple(table.shape)}")
        if not (bool((table >= 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())):
            raise ValueError(
                "alphas_cumprod must fall strictly and stay within (0, 1), but for a last 0, "
                f"got {table[0]:.4g} ... {table[-1]:.4g}"
            )
        self.alphas_cumprod = table
        self.t_min, self.t_max = 0.0, float(len(table) - 1)
        self._log_snr = torch.logit(table)
        self._ends_in_noise = bool(table[-1] == 0)
        if self._ends_in_noise:
            self._log_snr[-1] = self._log_snr[-2]  # any number: the last interval is not interpolated in it
            self._last_angle = math.acos(math.sqrt(float(table[-2])))

    def __call__(self, t: Tensor) -> Level:
        """t: [B] in [0, T - 1] -> Level, on t's device."""
        clock = t.double()
        index = clock.detach().floor().clamp(0, self.t_max - 1).long()
        table = to_device(self._log_snr, t.device)
        low, high = table[index], table[index + 1]
        slope = high - low
        log_snr = low + (clock - index) * slope
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        # d alpha = alpha sigma^2 / 2 d log_snr, d sigma = -sigma alpha^2 / 2 d log_snr
        level = Level(alpha, sigma, 0.5 * alpha * sigma**2 * slope, -0.5 * sigma * alpha**2 * slope)
        return self._turned(level, clock) if self._ends_in_noise else level

    def _turned(self, level: Level, clock: Tensor) -> Level:
        """The level; from the last entry but one on that of an angle that grows evenly to a right one. clock: [B]."""
        left = self.t_max - clock  # 1 ... 0 within the last interval
        rate = math.pi / 2 - self._last_angle
        last = clock >= self.t_max - 1
        alpha, sigma = torch.sin(rate * left), torch.cos(rate * left)  # sin, so that it ends on 0 itself
        return Level(
            torch.where(last, alpha, level.alpha),
            torch.where(last, sigma, level.sigma),
            torch.where(last, -rate * sigma, level.d_alpha),
            torch.where(last, rate * alpha, level.d_sigma),
        )

    def draw(self, u: Tensor) -> Tensor:
        """u: [B] in [0, 1) -> integer times in {0, ..., T - 1}: [B] float64."""
        return (u.double() * len(self.alphas_cumprod)).floor().clamp(0, self.t_max)


def onward(before: Level, after: Level) -> tuple[Tensor, Tensor]:
    """(ratio, added) of the forward process between two levels: x_t = ratio x_r + added eps has the law of x_t."""
    ratio = after.alpha / before.alpha
    return ratio, (after.sigma.square() - (ratio * before.sigma).square()).clamp(min=0).sqrt()


def add_more_noise(schedule: Schedule, x_r: Tensor, eps: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The forward process from r on to t >= r: x_r, eps: [B, ...]; r, t: [B] -> x_t: [B, ...].

    x_t = (alpha_t / alpha_r) x_r + sqrt(sigma_t^2 - (alpha_t sigma_r / alpha_r)^2) eps, whose law given x0 is that of
    ``add_noise`` where x_r's is.
    """
    ratio, added = onward(schedule(r), schedule(t))
    shape = (-1,) + (1,) * (x_r.ndim - 1)
    return ratio.to(x_r).reshape(shape) * x_r + added.to(x_r).reshape(shape) * eps


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x0, eps: [B, ...]; t: [B] -> x_t = alpha x0 + sigma eps: [B, ...]."""
    at = schedule(t).like(x0)
    return at.alpha * x0 + at.sigma * eps
