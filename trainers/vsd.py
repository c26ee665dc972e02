"""VSD: variational score distillation, SwiftBrush's (Nguyen & Tran 2023, arXiv 2312.05239).

    every step, one phase:
        x0 = student(its own chain up to a random one of its times; one step: pure noise)
        x_t = alpha x0 + sigma eps, t ~ U(2 % ... 98 %)
        real, fake = teacher's and fake_score's noise at x_t, both under guidance_scale                no gradient
        x0 <- x0 - sigma^2 (real - fake)
        fake_score <- alpha^2 |its noise - eps'|^2 on x0 noised afresh, t' ~ U(all times), some captions hidden

The fake score is the teacher with a low-rank adapter: one network, called with the adapter or without. Guidance is on
both scores, so that the student ends at the teacher's own distribution for the caption and not at a sharper one; its
scale weighs the caption against its absence on the way there. SNOOPI (arXiv 2412.02687) draws the scale for each
sample: ``guidance_range``; the mean gradient is that of the mean scale.

Departures from the reference code (github.com/VinAIResearch/SwiftBrush): student and fake score learn from one
backward pass, which is the same since neither loss reaches the other network and the fake score that is read is the
one before its update; few steps, as DMD2 simulates them; a non-finite gradient stops the run, where the reference
writes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen import fake_score, lora, losses, passes, rollout, times
from fastgen.config import option, section
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.lora import Lora
from fastgen.method import About, Batch, Phase, Terms, drop_captions
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
    arxiv="2312.05239",
    needs=("prompts",),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``vsd``."""

    guidance_scale: float = option(4.5, "of both scores; 1.0 is off", low=1)  # sec. 4.1; the code's default is 7.5
    # SNOOPI: 0.5 to 4 for SD 1.5 and 2.1, 0.5 to 3 for PixArt
    guidance_range: tuple[float, float] | None = option(
        None, "draw the scale of both scores for each sample from this range instead, as SNOOPI does: [0.5, 4]", low=0
    )
    fake_score: Literal["lora", "copy"] = option(
        "lora", "an adapter on the teacher, or a copy of it that learns whole"
    )
    lora: Lora = section(Lora(rank=64, alpha=108), "the fake score's adapter")  # train_swiftbrush.py
    caption_dropout: float = option(0.1, "share of captions hidden from the fake score as it learns", low=0, high=1)
    t_low: float = option(0.02, "smallest t of the student's loss, as a share of the times", low=0, below=1)
    t_high: float = option(0.98, "largest t of the student's loss, as a share of the times", above=0, high=1)


class Method:
    """Variational score distillation: teacher and fake score on one network."""

    exported = "student"
    sampler: Sampler = "renoise"
    needs_images = False

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher once. num_steps: calls of the student when sampling."""
        if config.t_low >= config.t_high:
            raise ValueError(f"t_low {config.t_low:g} must be below t_high {config.t_high:g}")
        if config.guidance_range and config.guidance_range[0] > config.guidance_range[1]:
            raise ValueError("guidance_range {:g}, {:g} must not fall".format(*config.guidance_range))
        self.config, self.num_steps = config, num_steps
        self.shape, self.times = family.latent_shape, family.student_times(num_steps)
        self.teacher = family.denoiser
        if config.fake_score == "lora":
            self.teacher = self.teacher.with_network(lora.view(self.teacher.network, config.lora))
        self.student, self.fake_score, self.networks = fake_score.roles(self.teacher, family)
        rows = 2 if config.guidance_range else passes.rows(config.guidance_scale)
        needs = (
            Pass("student", count=passes.chain("simulate", num_steps)),
            Pass("student", "weights"),
            Pass("teacher", rows=rows),
            Pass("fake_score", rows=rows),
            Pass("fake_score", "weights"),
        )
        self.phases = (Phase("update", ["student", "fake_score"], self.loss, passes=needs),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"vsd", "denoising"}: each [B]; the student learns from the first, the fake score from the second."""
        x_t, t = rollout.backward_simulation(self.student, rng, self.shape, self.times, batch.cond)
        x0 = self.student(x_t, t, batch.cond).x0
        return {"vsd": self.student_loss(x0, batch, rng), "denoising": self.fake_loss(x0.detach(), batch, rng)}

    @torch.no_grad()
    def grad(self, x0: Tensor, batch: Batch, rng: Noise) -> Tensor:
        """The direction in x0 space, sigma^2 (real - fake) = alpha sigma (fake's x0 - real's x0): [B, ...]."""
        t = times.uniform(rng, self.teacher.schedule, self.config.t_low, self.config.t_high)
        x_t = add_noise(self.teacher.schedule, x0, rng.normal(self.shape), t)
        scale: float | Tensor = self.config.guidance_scale
        if self.config.guidance_range:
            low, high = self.config.guidance_range
            scale = low + (high - low) * rng.uniform()
        real = guided(self.teacher, batch.uncond, scale)(x_t, t, batch.cond)
        fake = guided(self.fake_score, batch.uncond, scale)(x_t, t, batch.cond)
        return real.at.sigma.square() * (real.eps - fake.eps)

    def student_loss(self, x0: Tensor, batch: Batch, rng: Noise) -> Tensor:
        """Moves x0: [B, ...] against ``grad``: [B]."""
        return losses.surrogate(x0, self.grad(x0, batch, rng))

    def fake_loss(self, x0: Tensor, batch: Batch, rng: Noise) -> Tensor:
        """Denoising of x0: [B, ...] in eps, weighted by alpha^2: [B]."""
        t, eps = times.uniform(rng, self.teacher.schedule), rng.normal(self.shape)
        cond = drop_captions(batch, rng.uniform() < self.config.caption_dropout)
        pred = self.fake_score(add_noise(self.teacher.schedule, x0, eps, t), t, cond)
        return losses.mse(pred.at.alpha * pred.eps, pred.at.alpha * eps)
