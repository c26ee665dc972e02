"""AGD: adapter guidance distillation (Jensen & Sadat 2025, arXiv 2503.07274).

    every step:
        scale ~ U[low, high], per sample
        x_t = noise, and from there the teacher's guided DDIM by this scale through ``states`` times
              (t_max, then one from each of as many equal parts of the times, another grid for each sample)
        loss = |student(x_t, t, scale) - teacher's guided output at x_t|^2 over all states of the way
    the student is the frozen teacher with low-rank adapters

What ``guidance`` does to all weights at noised images, at 2 % of them and at the states the guided teacher meets: with
guidance these are not noised images. No image is needed. The student is sampled as the teacher is, in one pass for
two; its adapters go to another checkpoint of the same base (``fastgen.lora.loaded``, or with a fixed scale any LoRA
loader).

Departures from the reference code (github.com/cristianpjensen/agd): low-rank adapters in the place of attention over
scale, time and prompt, which no stock pipeline loads; the scale comes in by the embedding that stock pipelines have
(``guidance.embed``), and its projection learns by an adapter, too; ways of a few states are made as they are needed
and not stored in 1000 steps beforehand (65 MB each at 64 x 64 latents), with the passes that give the targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen import losses, passes
from fastgen.config import option, section
from fastgen.denoiser import Cond
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.lora import Lora, adapted
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import Schedule, add_noise

ABOUT = About(
    paper="Efficient Distillation of Classifier-Free Guidance using Adapters",
    arxiv="2503.07274",
    needs=("prompts",),
    steps=(),
)


@dataclass(frozen=True)
class Config:
    """Options of ``agd``."""

    guidance: Scales = section(Scales(low=1.0, high=12.0), "scales learnt")  # Stable Diffusion's; DiT's: 1 to 6
    states: int = option(8, "states of each way; the student sees so many times batch_size at once", low=2)
    lora: Lora = section(Lora(rank=16), "the adapters, unless student.lora says what they are")  # 2 % of SD 1.5


class Method:
    """Guidance in one pass by adapters, learnt on the guided teacher's own way."""

    exported = "student"
    needs_images = False
    num_steps: int | None = None
    sampler: Sampler = "ddim"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """num_steps is a few-step student's and has no meaning here."""
        self.config, self.shape = config, family.latent_shape
        self.teacher = family.denoiser
        self.student = self.teacher.with_network(config.guidance.student(adapted(family, config.lora)))
        self.student_guidance = config.guidance.of_student
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        rows = passes.rows(config.guidance.low, config.guidance.high)
        needs = (Pass("teacher", count=config.states, rows=rows), Pass("student", "weights", rows=config.states))
        self.phases = (Phase("student", ["student"], self.loss, passes=needs),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"guidance": [B]}, the mean over the states of a sample's way."""
        n, scale = self.config.states, self.config.guidance.draw(rng)
        x_t, t, target = self.way(batch, scale, rng)
        cond: Cond = {name: value.repeat(n, *(1,) * (value.ndim - 1)) for name, value in batch.cond.items()}
        pred = self.student(x_t, t, self.config.guidance.cond(cond, scale.repeat(n)))
        return {"guidance": losses.mse(pred.y, target).reshape(n, -1).mean(0)}

    @torch.no_grad()
    def way(self, batch: Batch, scale: Tensor, rng: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """The guided teacher's states x_t, their times and its output there, the first states of all samples first.

        scale: [B] -> [states * B, ...], [states * B], [states * B, ...].
        """
        schedule = self.teacher.schedule
        teacher = self.config.guidance.guide(self.teacher, batch.uncond, scale)
        x_t, grid = rng.normal(self.shape), self.times(schedule, rng.uniform())
        found = []
        for i, t in enumerate(grid):
            pred = teacher(x_t, t, batch.cond)
            found.append((x_t, t, pred.y))
            if i + 1 < len(grid):
                x_t = add_noise(schedule, pred.x0, pred.eps, grid[i + 1])  # DDIM's step
        states, moments, targets = zip(*found, strict=True)
        return torch.cat(states), torch.cat(moments), torch.cat(targets)

    def times(self, schedule: Schedule, u: Tensor) -> list[Tensor]:
        """A falling grid for each sample, u: [B] in [0, 1) its offset: t_max, then one time a part: [B] each."""
        parts = self.config.states - 1
        return [torch.full_like(u, schedule.t_max), *(schedule.draw(1 - (i + 1 - u) / parts) for i in range(parts))]
