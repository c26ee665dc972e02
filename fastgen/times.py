"""Distributions of t for training. Each returns [B] times on the schedule's clock."""

from __future__ import annotations

from torch import Tensor

from .rng import Noise
from .schedule import Schedule


def uniform(rng: Noise, schedule: Schedule, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform over the part [low, high) of the schedule's times, drawn per sample: [B]."""
    return schedule.draw(low + (high - low) * rng.uniform())
