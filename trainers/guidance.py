"""Guidance distillation: guidance in one pass, its scale an input (Meng et al. 2022, arXiv 2210.03142, stage 1).

    x_t = alpha x0 + sigma eps, t ~ U(all times);  scale ~ U[low, high], per sample
    target = the teacher's guided output at x_t, uncond + scale (cond - uncond)
    loss = |student(x_t, t, scale) - target|^2

One pass of the student then does what guidance needs two passes for, at any scale of the range; it is sampled as the
teacher is, by the teacher's own scheduler. Few-step methods may start from it: ``student.init``.

Departures: the paper's w is scale - 1. Its error is of x0, weighted by max(SNR, 1); here it is of the network's own
output, as the teacher was trained, which for v is weight SNR + 1. The embedding of the scale is the stock pipelines'
(sinusoids of 1000 w, projected and added to those of t) and its projection starts at zero, so that the student starts
as its teacher. Stage 2, progressive distillation, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastgen import losses, passes, times
from fastgen.config import section
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(paper="On Distillation of Guided Diffusion Models", arxiv="2210.03142", needs=("images",), steps=())


@dataclass(frozen=True)
class Config:
    """Options of ``guidance``."""

    # the paper, on latents: w in [2, 14]
    guidance: Scales = section(Scales(low=3.0, high=15.0), "scales learnt")


class Method:
    """One pass for two, sampled as the teacher is."""

    exported = "student"
    needs_images = True
    num_steps: int | None = None
    sampler: Sampler = "ddim"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """num_steps is a few-step student's and has no meaning here."""
        self.config, self.shape = config, family.latent_shape
        self.teacher = family.denoiser
        self.student = self.teacher.with_network(config.guidance.student(family))
        self.student_guidance = config.guidance.of_student
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        rows = passes.rows(config.guidance.low, config.guidance.high)
        needs = (Pass("teacher", rows=rows), Pass("student", "weights"))
        self.phases = (Phase("student", ["student"], self.loss, passes=needs),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"guidance": [B]}."""
        scales, schedule = self.config.guidance, self.teacher.schedule
        t, scale = times.uniform(rng, schedule), scales.draw(rng)
        x_t = add_noise(schedule, batch.images("guidance"), rng.normal(self.shape), t)
        with torch.no_grad():
            target = scales.guide(self.teacher, batch.uncond, scale)(x_t, t, batch.cond)
        pred = self.student(x_t, t, scales.cond(batch.cond, scale))
        return {"guidance": losses.mse(pred.y, target.y)}
