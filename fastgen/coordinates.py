"""A noised sample on another schedule, at the same signal-to-noise ratio.

A loss may be stated on a schedule that is not the network's own. There the sample is the same but for a factor,
``scale x_t``, and so the clean data and the noise that a prediction names are the same too: nothing is retrained and
no network is wrapped. Every function takes the network's own ``Level`` and is exact, derivatives included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prediction import combine
from .schedule import Level


@dataclass(frozen=True)
class Coordinates:
    """Where another schedule stands at a given level; every field has the level's shape.

    Attributes:
        clock: the time there.
        level: alpha, sigma and their derivatives there, with respect to ``clock``.
        scale: the sample there over ``x_t``.
        rate: d clock / dt.
    """

    clock: Tensor
    level: Level
    scale: Tensor
    rate: Tensor

    def velocity(self, x0: Tensor, eps: Tensor) -> Tensor:
        """d(scale x_t) / d clock where clean data and noise are x0 and eps: [B, ...]."""
        return combine("flow", x0, eps, self.level)


def trigflow(at: Level, sigma_data: float = 1.0) -> Coordinates:
    """TrigFlow: cos(tau) x0 + sin(tau) sigma_data eps, tau in [0, pi/2] (Lu & Song 2024, arXiv 2410.11081)."""
    size = (at.sigma.square() + (sigma_data * at.alpha).square()).sqrt()
    cos, sin = sigma_data * at.alpha / size, at.sigma / size
    scale = sigma_data / size
    return Coordinates(
        clock=torch.atan2(at.sigma, sigma_data * at.alpha),
        level=Level(cos, sigma_data * sin, -sin, sigma_data * cos),
        scale=scale,
        rate=scale.square() * (at.alpha * at.d_sigma - at.sigma * at.d_alpha) / sigma_data,
    )


def rectified(at: Level) -> Coordinates:
    """Rectified flow: (1 - s) x0 + s eps, s in [0, 1] (Liu et al. 2022, arXiv 2209.03003)."""
    scale = 1 / (at.alpha + at.sigma)
    s, one = scale * at.sigma, torch.ones_like(at.alpha)
    return Coordinates(
        clock=s,
        level=Level(scale * at.alpha, s, -one, one),
        scale=scale,
        rate=scale.square() * (at.alpha * at.d_sigma - at.sigma * at.d_alpha),
    )
