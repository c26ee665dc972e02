"""A world with closed forms: in each coordinate x0 ~ N(mean, std^2), one Gaussian for each caption.

``Gaussian`` states the answers. ``Gaussians`` is a network that gives them, so it is an exact teacher and, where its
parameters learn, a fake score; ``Affine`` is a student that can become exact. ``gaussian_family`` and ``conv_family``
put them (or a small convolutional network) behind ``Family``, so that a method and the engine run on them unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.engine import Engine
from fastgen.family import Block, Family
from fastgen.method import Batch, Phase, Terms, Trainable, nothing
from fastgen.optimizers import Optim
from fastgen.prediction import Kind, combine
from fastgen.rng import Noise, seed_of
from fastgen.sampling import Sampler, ddim_times
from fastgen.schedule import Flow, Level, Schedule, TabulatedVP

PATH = (749.0, 499.0, 249.0)
"""Times at which the toy's data have states between noise and x0."""
CAPTIONS = ("", "left", "right")
"""What the toy families can be asked for; the first is the empty caption."""


def scaled_linear(num: int = 1000) -> Tensor:
    """Stable Diffusion's alphas_cumprod: [num] float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, num, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def sd_schedule() -> TabulatedVP:
    return TabulatedVP(scaled_linear())


def schedules() -> list[Schedule]:
    return [sd_schedule(), Flow()]


def hermite(nodes: int = 12) -> tuple[Tensor, Tensor]:
    """z, weights: [nodes]; sum(weights f(z)) is E f(z) for z ~ N(0, 1), exact for polynomials below degree 2 nodes."""
    jacobi = torch.diag(torch.arange(1, nodes, dtype=torch.float64).sqrt(), 1)  # Golub & Welsch 1969
    z, vectors = torch.linalg.eigh(jacobi + jacobi.T)
    return z, vectors[0].square()


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, std^2) in each coordinate, seen through x_t = alpha x0 + sigma eps."""

    mean: float
    std: float

    def variance(self, at: Level) -> Tensor:
        return (at.alpha * self.std).square() + at.sigma.square()

    def x0(self, x_t: Tensor, at: Level) -> Tensor:
        """E[x0 | x_t]."""
        return self.mean + at.alpha * self.std**2 / self.variance(at) * (x_t - at.alpha * self.mean)

    def eps(self, x_t: Tensor, at: Level) -> Tensor:
        """E[eps | x_t]."""
        return at.sigma / self.variance(at) * (x_t - at.alpha * self.mean)

    def score(self, x_t: Tensor, at: Level) -> Tensor:
        """d log p_t / d x_t."""
        return -(x_t - at.alpha * self.mean) / self.variance(at)

    def flow(self, x_t: Tensor, at: Level) -> Tensor:
        """dx_t/dt along the probability-flow ODE."""
        return at.d_alpha * self.x0(x_t, at) + at.d_sigma * self.eps(x_t, at)

    def flow_map(self, x_t: Tensor, at: Level, to: Level) -> Tensor:
        """Where the probability-flow ODE takes x_t from level ``at`` to level ``to``."""
        return to.alpha * self.mean + (self.variance(to) / self.variance(at)).sqrt() * (x_t - at.alpha * self.mean)

    def consistency(self, x_t: Tensor, at: Level) -> Tensor:
        """The flow map to clean data (alpha 1, sigma 0)."""
        return self.mean + self.std / self.variance(at).sqrt() * (x_t - at.alpha * self.mean)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    label = cond["label"]
    if "guidance" in cond:  # as many columns again, which are 0 at scale 1
        label = torch.cat([label, label * (cond["guidance"].to(label)[:, None] - 1)], 1)
    return network(x_t, t, label)


def labels(captions: Sequence[str], dtype: torch.dtype = torch.float32) -> Cond:
    """One-hot rows: {"label": [B, len(CAPTIONS)]}."""
    return {"label": F.one_hot(torch.tensor([CAPTIONS.index(c) for c in captions]), len(CAPTIONS)).to(dtype)}


class Gaussians(nn.Module):
    """The exact denoiser of one Gaussian a caption; as a fake score, its parameters learn."""

    def __init__(self, means: Sequence[float], stds: Sequence[float], schedule: Schedule, kind: Kind) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(means))
        self.log_std = nn.Parameter(torch.tensor(stds).log())
        self.schedule, self.kind = schedule, kind

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        at = self.schedule(t).like(x_t)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        mean, std = (label @ self.mean).reshape(shape), (label @ self.log_std).exp().reshape(shape)
        variance = (at.alpha * std).square() + at.sigma.square()
        centred = x_t - at.alpha * mean
        return combine(
            self.kind, mean + at.alpha * std.square() / variance * centred, at.sigma / variance * centred, at
        )


class Map(nn.Module):
    """The consistency map of one Gaussian a caption: a student that is affine in x_t and tied across times.

    Where ``Affine`` is free at each time, a Gaussian fake score sees only the mixture over times, so that the errors
    of two times could cancel in it; here they cannot.
    """

    def __init__(self, means: Sequence[float], stds: Sequence[float], schedule: Schedule, kind: Kind) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(means))
        self.log_std = nn.Parameter(torch.tensor(stds).log())
        self.schedule, self.kind = schedule, kind

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        at = self.schedule(t).like(x_t)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        mean, std = (label @ self.mean).reshape(shape), (label @ self.log_std).exp().reshape(shape)
        variance = (at.alpha * std).square() + at.sigma.square()
        x0 = mean + std / variance.sqrt() * (x_t - at.alpha * mean)
        return combine(self.kind, x0, (x_t - at.alpha * x0) / at.sigma, at)


class Affine(nn.Module):
    """x0 = shift + scale x_t for each caption and each quarter of the clock, given as a prediction of any kind."""

    def __init__(
        self, schedule: Schedule, kind: Kind, shift: float = 0.0, scale: float = 1.0, embed_guidance: bool = False
    ) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((4, len(CAPTIONS)), shift))
        self.scale = nn.Parameter(torch.full((4, len(CAPTIONS)), scale))
        if embed_guidance:
            wide = [nn.Parameter(F.pad(p.data, (0, len(CAPTIONS)))) for p in (self.shift, self.scale)]
            self.shift, self.scale = wide
        self.schedule, self.kind = schedule, kind

    def quarter(self, t: Tensor) -> Tensor:
        span = self.schedule.t_max - self.schedule.t_min
        return ((t - self.schedule.t_min) / span * 4).ceil().long().clamp(1, 4) - 1

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        at, rows = self.schedule(t).like(x_t), self.quarter(t)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        shift, scale = (self.shift[rows] * label).sum(1), (self.scale[rows] * label).sum(1)
        x0 = shift.reshape(shape) + scale.reshape(shape) * x_t
        return combine(self.kind, x0, (x_t - at.alpha * x0) / at.sigma, at)


class Conv(nn.Module):
    """A small network with named blocks, for what a Gaussian has no features for."""

    def __init__(self, channels: int = 2, width: int = 16, embed_guidance: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, 1, 1)
        self.label = nn.Linear(len(CAPTIONS) * (1 + embed_guidance), width)
        self.time = nn.Linear(2, width)
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.SiLU())
        self.mid = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.SiLU())
        self.leave = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        clock = torch.stack([(t / 159).sin(), (t / 159).cos()], 1).to(x_t.dtype)
        h = self.enter(x_t) + (self.label(label) + self.time(clock))[:, :, None, None]
        low = self.down(F.silu(h))
        return self.leave(F.silu(h + F.interpolate(self.mid(low) + low, scale_factor=2.0)))


def gaussian_family(
    means: Sequence[float] = (0.3, 1.0, -0.5),
    stds: Sequence[float] = (0.5, 0.5, 0.5),
    schedule: Schedule | None = None,
    kind: Kind = "v",
    shape: Sequence[int] = (2, 2, 2),
    student: Callable[[], nn.Module] | None = None,
    start: float = 1.0,
) -> Family:
    """A family whose teacher is exact and whose student is affine. start: share of the times it is called from."""
    schedule = schedule or sd_schedule()
    teacher = Gaussians(means, stds, schedule, kind).requires_grad_(False)
    student = student or (lambda embed_guidance=False: Affine(schedule, kind, embed_guidance=embed_guidance))
    return toy_family(Denoiser(teacher, schedule, kind, call), shape, student, [], start)


def conv_family(seed: int = 0, kind: Kind = "v") -> Family:
    """A family of untrained networks with blocks, two channels of 8 x 8."""
    schedule = sd_schedule()
    torch.manual_seed(seed)
    network = Conv().requires_grad_(False)

    def student(embed_guidance: bool = False) -> nn.Module:
        copy, state = Conv(embed_guidance=embed_guidance), network.state_dict()
        if embed_guidance:
            state["label.weight"] = F.pad(state["label.weight"], (0, len(CAPTIONS)))
        copy.load_state_dict(state)
        return copy

    blocks = [Block("down", 16, 4), Block("mid", 16, 4)]
    return toy_family(Denoiser(network, schedule, kind, call), (2, 8, 8), student, blocks)


@dataclass
class Pipeline:
    """What the toy families put in a stock pipeline's place."""

    network: nn.Module
    num_steps: int | None
    sampler: Sampler = "renoise"

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(tensors, Path(folder) / "toy.safetensors")


def not_called(*args: object, **named: object) -> Tensor:
    raise AssertionError("a toy has no stock pipeline to call")


def toy_family(
    teacher: Denoiser,
    shape: Sequence[int],
    student: Callable[[], nn.Module],
    blocks: list[Block],
    start: float = 1.0,
) -> Family:
    size = (8, 8)
    return Family(
        denoiser=teacher,
        latent_shape=tuple(shape),
        encode_prompts=labels,
        uncond=lambda: labels([""]),
        encode=lambda pixels: pixels.flatten(1)[:, : math.prod(shape)].reshape(-1, *shape),
        decode=lambda latents: latents.flatten(1).mean(1).clamp(-1, 1)[:, None, None, None].expand(-1, 3, *size),
        student=student,
        student_times=lambda n: ddim_times(teacher.schedule, n, start),
        blocks=blocks,
        pipeline=Pipeline,
        image_size=size,
        run=not_called,
        stock_guidance=7.5,
    )


class Samples:
    """The toy's data, addressed by number: captions in turn, x0 from each caption's Gaussian, and its pair's noise."""

    def __init__(
        self,
        shape: Sequence[int],
        means: Sequence[float] = (0.3, 1.0, -0.5),
        stds: Sequence[float] = (0.5, 0.5, 0.5),
        images: bool = True,
        captions: Sequence[str] = CAPTIONS[1:],
    ) -> None:
        self.shape, self.means, self.stds, self.images, self.captions = tuple(shape), means, stds, images, captions

    def batch(self, samples: Sequence[int]) -> Batch:
        names = [self.captions[s % len(self.captions)] for s in samples]
        if not self.images:
            return Batch(list(samples), labels(names), labels([""]))
        eps = torch.stack(
            [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed_of("data", s))) for s in samples]
        )
        shape = (-1,) + (1,) * len(self.shape)
        rows = [CAPTIONS.index(name) for name in names]
        mean, std = (torch.tensor([values[i] for i in rows]).reshape(shape) for values in (self.means, self.stds))
        path = {}
        for t in PATH:  # where the probability flow from eps, taken for all noise, is at t
            at = sd_schedule()(torch.full((len(rows),), t)).like(eps)
            path[t] = at.alpha * mean + ((at.alpha * std).square() + at.sigma.square()).sqrt() * eps
        return Batch(list(samples), labels(names), labels([""]), mean + std * eps, eps, path)


@dataclass
class Toy:
    """A method written out: networks, and a loss for each phase."""

    networks: Mapping[str, nn.Module]
    phases: Sequence[Phase]


def linear_method(every: int = 1, after: Callable[[], None] = nothing) -> Toy:
    """Two little networks, "a" and "b", and two phases; both losses read both networks."""
    torch.manual_seed(0)
    networks = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "frozen": nn.Linear(4, 4)})

    def error(batch: Batch, rng: Noise) -> Tensor:
        x = rng.normal((4,))
        y = networks["b"](networks["a"](x).tanh()) - networks["frozen"](x) - batch.cond["label"].sum(1, keepdim=True)
        return y.square().mean(1)

    def first(batch: Batch, rng: Noise) -> Terms:
        return {"error": error(batch, rng)}

    def second(batch: Batch, rng: Noise) -> Terms:
        return {"error": 0.5 * error(batch, rng), "size": 0.01 * networks["b"](rng.normal((4,))).square().mean(1)}

    return Toy(dict(networks.items()), (Phase("first", ["a"], first), Phase("second", ["b"], second, every, after)))


def optims(method: Trainable, **settings: object) -> dict[str, Optim]:
    """The same optimizer for each role that some phase trains."""
    return {role: Optim(**settings) for role in trained(method)}  # type: ignore[arg-type]


def trained(method: Trainable) -> list[str]:
    return sorted({role for phase in method.phases for role in phase.trains})


def states(method: Trainable) -> dict[str, dict[str, Tensor]]:
    """A copy of each network's parameters and buffers, by role."""
    return {
        role: {name: value.detach().clone() for name, value in network.state_dict().items()}
        for role, network in method.networks.items()
    }


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether the tensors agree bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The names whose tensors differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(engine: Engine, steps: Iterable[int]) -> list[dict[str, float]]:
    """Run the engine and return each step's logs."""
    return [logs for _, logs in engine.run(steps)]


def gradients_by_phase(method: Toy) -> dict[str, set[str]]:
    """Which parameters, as "role.name", get a gradient in which phase; filled while an engine runs the method."""
    found: dict[str, set[str]] = {phase.name: set() for phase in method.phases}
    current = [""]

    def entering(phase: Phase) -> Phase:
        def loss(batch: Batch, rng: Noise) -> Terms:
            current[0] = phase.name
            return phase.loss(batch, rng)

        return replace(phase, loss=loss)

    method.phases = tuple(entering(phase) for phase in method.phases)
    for role, network in method.networks.items():
        for name, p in network.named_parameters():
            if p.requires_grad:  # the frozen cannot have one
                p.register_post_accumulate_grad_hook(lambda _, key=f"{role}.{name}": found[current[0]].add(key))
    return found
