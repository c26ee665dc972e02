"""One network output, readable as x0, eps, v or flow.

Every parameterisation in use is linear in the clean data and the noise, ``y = p x0 + q eps``, and so is the noised
sample, ``x_t = alpha x0 + sigma eps``. Two equations, two unknowns: all conversions are that one solve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import Level

Kind = Literal["x0", "eps", "v", "flow"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def coefficients(kind: Kind, at: Level) -> tuple[Tensor, Tensor]:
    """(p, q) of ``y = p x0 + q eps``; each broadcasts like ``at``. Raises ValueError on an unknown kind."""
    one, zero = torch.ones_like(at.alpha), torch.zeros_like(at.alpha)
    table = {
        "x0": (one, zero),
        "eps": (zero, one),
        "v": (-at.sigma, at.alpha),  # Salimans & Ho 2022, arXiv 2202.00512
        "flow": (at.d_alpha, at.d_sigma),  # Lipman et al. 2022, arXiv 2210.02747
    }
    if kind not in table:
        raise ValueError(f"unknown prediction kind {kind!r}; choose one of {', '.join(KINDS)}")
    return table[kind]


def combine(kind: Kind, x0: Tensor, eps: Tensor, at: Level) -> Tensor:
    """The training target of a network of this kind: p x0 + q eps. x0, eps: [B, ...] -> [B, ...]."""
    p, q = coefficients(kind, at)
    return p * x0 + q * eps


@dataclass(frozen=True)
class Prediction:
    """A network's output ``y`` of the given kind, at ``x_t`` and level ``at``: each [B, ...]."""

    y: Tensor
    kind: Kind
    x_t: Tensor
    at: Level

    def as_kind(self, kind: Kind) -> Tensor:
        """The same prediction in another parameterisation: [B, ...]; ``y`` itself if the kind is its own."""
        if kind == self.kind:
            return self.y
        (p, q), alpha, sigma = coefficients(self.kind, self.at), self.at.alpha, self.at.sigma
        determinant = alpha * q - sigma * p
        x0 = (q * self.x_t - sigma * self.y) / determinant
        if kind == "x0":
            return x0
        eps = (alpha * self.y - p * self.x_t) / determinant
        return combine(kind, x0, eps, self.at)

    @property
    def x0(self) -> Tensor:
        """Posterior mean of the clean data: [B, ...]."""
        return self.as_kind("x0")

    @property
    def eps(self) -> Tensor:
        """Posterior mean of the noise: [B, ...]."""
        return self.as_kind("eps")

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0: [B, ...]."""
        return self.as_kind("v")

    @property
    def flow(self) -> Tensor:
        """d_alpha x0 + d_sigma eps, the probability-flow velocity: [B, ...]."""
        return self.as_kind("flow")
