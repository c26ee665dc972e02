"""A two-dimensional mixture for each caption, and small networks that can learn to draw from it.

``Mixture`` states the answers: samples, and E[x0 | x_t]. ``Exact`` is the network that gives them. ``MLP`` learns; its
layers are named blocks, so that discriminators can read them and adapters go on them. ``family`` puts either behind
``Family``, as one-pixel latents of two channels, so that every method and the engine run on them unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.family import Block, Family
from fastgen.method import Batch
from fastgen.prediction import Kind, combine
from fastgen.rng import Noise, seed_of
from fastgen.schedule import Level, Schedule
from tests.oracle import CAPTIONS, call, labels, toy_family

SHAPE = (2, 1, 1)
WIDTH, DEPTH = 96, 3
CLOCK = (0.5, 1.0, 2.0, 4.0)
"""Half turns over all times of the sinusoids of t: slow, so that derivatives in t are tame."""
STOCK_GUIDANCE = 2.0


@dataclass(frozen=True)
class Mixture:
    """sum_k weight_k N(mean_k, R_k diag(std_k^2) R_k^T) in the plane.

    weights: [K]; means, stds: [K, 2]; turns: [K], the angles of the axes R_k.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    turns: Tensor

    @property
    def axes(self) -> Tensor:
        """The principal axes of each component, in columns: [K, 2, 2]."""
        cos, sin = self.turns.cos(), self.turns.sin()
        return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 2]."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, 2, generator=generator, dtype=self.means.dtype) * self.stds[k]
        return self.means[k] + torch.einsum("nij,nj->ni", self.axes[k], z)

    def standardised(self, x_t: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        """On each component's own axes: the distance to its noised mean, and its noised variance, [B, K, 2] each."""
        alpha, sigma = at.alpha.reshape(-1, 1, 1), at.sigma.reshape(-1, 1, 1)
        apart = torch.einsum("bki,kij->bkj", x_t[:, None] - alpha * self.means, self.axes)
        return apart, (alpha * self.stds).square() + sigma.square()

    def log_densities(self, x_t: Tensor, at: Level, weights: Tensor | None = None) -> Tensor:
        """Of each component, weighted: x_t [B, 2] -> [B, K]. weights: [K], or [B, K] for each sample."""
        apart, variance = self.standardised(x_t, at)
        exponent = (apart.square() / variance + variance.log() + math.log(2 * math.pi)).sum(2)
        return (self.weights if weights is None else weights).log() - 0.5 * exponent

    def posterior(self, x_t: Tensor, at: Level, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t]: [B, 2] -> [B, 2] each."""
        apart, variance = self.standardised(x_t, at)
        share = self.log_densities(x_t, at, weights).softmax(1)
        pull = torch.einsum("bkj,kij->bki", apart / variance, self.axes)
        moved = torch.einsum("bkj,kij->bki", self.stds.square() * apart / variance, self.axes)
        x0 = torch.einsum("bk,bki->bi", share, self.means + at.alpha.reshape(-1, 1, 1) * moved)
        return x0, at.sigma * torch.einsum("bk,bki->bi", share, pull)


MODES = Mixture(  # of no caption: as likely "left" as "right"
    weights=torch.tensor([0.40, 0.25, 0.20, 0.15, 0.45, 0.35, 0.20]) / 2,
    means=torch.tensor([[-1.3, 0.7], [-0.8, -1.3], [-0.1, -0.2], [0.1, 1.3], [1.4, 0.6], [1.5, -1.2], [0.4, -1.7]]),
    stds=torch.tensor(
        [[0.35, 0.14], [0.22, 0.22], [0.14, 0.14], [0.30, 0.10], [0.38, 0.16], [0.14, 0.30], [0.16, 0.16]]
    ),
    turns=torch.tensor([0.9, 0.0, 0.0, -0.3, -0.8, 0.4, 0.0]),
)
"""Seven components: weights, sizes and shapes all different, the whole neither centred nor of deviation 1."""
OF_CAPTION = {"": range(7), "left": range(4), "right": range(4, 7)}
"""Which of them a caption means."""


def weights_of(caption: str) -> Tensor:
    """[K], with zeros."""
    kept = torch.zeros_like(MODES.weights)
    kept[list(OF_CAPTION[caption])] = 1
    return MODES.weights * kept / (MODES.weights * kept).sum()


def mixture_of(caption: str) -> Mixture:
    """The distribution that a caption means."""
    k = list(OF_CAPTION[caption])
    return Mixture(weights_of(caption)[k], MODES.means[k], MODES.stds[k], MODES.turns[k])


CLEAN = Level(*torch.tensor([1.0, 0.0, 0.0, 0.0]))
"""Of x0 itself."""


class Exact(nn.Module):
    """The network that answers with the mixture's posterior mean."""

    def __init__(self, schedule: Schedule, kind: Kind) -> None:
        super().__init__()
        self.register_buffer("weights", torch.stack([weights_of(caption) for caption in CAPTIONS]))
        self.schedule, self.kind = schedule, kind

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = x_t.flatten(1)
        at = self.schedule(t).like(x)
        x0, eps = MODES.posterior(x, at, label @ self.weights)
        return combine(self.kind, x0, eps, at).reshape(x_t.shape)


class Layer(nn.Module):
    """A residual layer whose output is shaped as a map, [B, width, 1, 1], since that is what discriminators read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(F.silu(h[:, :, 0, 0]))[:, :, None, None]


class MLP(nn.Module):
    """A small network with named blocks, told the time and the caption."""

    def __init__(self, schedule: Schedule, embed_guidance: bool = False) -> None:
        super().__init__()
        self.enter = nn.Linear(2, WIDTH)
        self.label = nn.Linear(len(CAPTIONS) * (1 + embed_guidance), WIDTH, bias=False)
        self.time = nn.Linear(2 * len(CLOCK), WIDTH)
        self.blocks = nn.ModuleList(Layer(WIDTH) for _ in range(DEPTH))
        self.leave = nn.Linear(WIDTH, 2)
        self.t_min, self.span = schedule.t_min, schedule.t_max - schedule.t_min

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        turns = math.pi * ((t - self.t_min) / self.span)[:, None] * torch.tensor(CLOCK, dtype=t.dtype)
        clock = torch.cat([turns.sin(), turns.cos()], 1).to(x_t.dtype)
        h = (self.enter(x_t.flatten(1)) + self.label(label) + self.time(clock))[:, :, None, None]
        for block in self.blocks:
            h = block(h)
        return self.leave(F.silu(h.flatten(1))).reshape(x_t.shape)


def family(network: nn.Module, schedule: Schedule, kind: Kind = "flow") -> Family:
    """A teacher of this network; students of it can be had where it is an ``MLP``."""

    def student(embed_guidance: bool = False) -> nn.Module:
        copy, state = MLP(schedule, embed_guidance), network.state_dict()
        if embed_guidance:
            state["label.weight"] = F.pad(state["label.weight"], (0, len(CAPTIONS)))
        copy.load_state_dict(state)
        return copy

    blocks = [Block(f"blocks.{i}", WIDTH, 1) for i in range(DEPTH)]
    made = toy_family(Denoiser(network, schedule, kind, call), SHAPE, student, blocks)
    return replace(made, stock_guidance=STOCK_GUIDANCE)


class Points:
    """Samples of the mixture, addressed by number: captions in turn."""

    def __init__(self, size: int = 1 << 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed_of("points", seed))
        halves = [mixture_of(caption).sample(size // 2, generator) for caption in CAPTIONS[1:]]
        self.x0 = torch.stack(halves, 1).reshape(-1, *SHAPE)
        self.label = labels(CAPTIONS[1:])["label"].repeat(size // 2, 1)
        self.uncond = labels([""])

    def batch(self, samples: Sequence[int]) -> Batch:
        rows = torch.tensor(samples) % len(self.x0)
        return Batch(samples, {"label": self.label[rows]}, self.uncond, self.x0[rows])


class Drawn(Noise):
    """The engine's noise, drawn for a whole batch at once.

    Drawn sample by sample, so that no result depends on how samples are batched, it costs more than these networks.
    """

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(len(self), *shape, generator=self._next())

    def uniform(self) -> Tensor:
        return torch.rand(len(self), generator=self._next(), dtype=torch.float64)

    def _next(self) -> torch.Generator:
        self._draws += 1
        return self._generator.manual_seed(seed_of(*self.key, self.samples[0], self._draws))
