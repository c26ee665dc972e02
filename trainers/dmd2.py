"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

    every step, phase "critic":
        x0 = student(rollout)                                     no gradient
        fake_score <- denoising loss on x0, t ~ U(all times)
        with the GAN: discriminator heads on the fake score's features, real images against x0, both noised
    every ``student_every`` steps, phase "student":
        x0 = student(rollout)
        x_t = alpha x0 + sigma eps, t ~ U(2 % ... 98 %)
        real = teacher's guided x0(x_t), fake = fake_score's x0(x_t)
        x0 <- x0 - (fake - real) / mean|x0 - real|, per sample
        with the GAN: + weight softplus(-D(noised x0))

Departures from the reference code: the critic's student samples are drawn anew and not shared with the student
phase (one more student pass a cycle, and either phase can be read alone), unless ``reuse`` is set: then, at a step in
which both take a turn, the student's comes first and the critic takes its samples, as they were before the update; the
normaliser is clamped at 1e-5 and a non-finite gradient stops the run, where the reference writes zeros; the weights
can be averaged (EMA). Features are taken from the blocks the family names, each with a head of its own. With the
teacher's features (NVlabs/FastGen) only the heads learn from the discriminator's loss. The one-step SDXL student is
called at t = 399: ``student.start: 0.4``; it was warmed up on teacher pairs first, as method ``kd`` does before
``student.init``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import adversary, fake_score, losses, passes, rollout, times
from fastgen.adversary import Adversarial
from fastgen.config import option, section
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.rollout import Rollout
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Improved Distribution Matching Distillation for Fast Image Synthesis",
    arxiv="2405.14867",
    needs=("prompts", "images (adversarial, rollout data)"),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``dmd2``."""

    guidance_scale: float = option(7.5, "of the teacher; 1.0 is off", low=1)
    student_every: int = option(5, "critic updates per student update; below 4 they oscillate", low=1)
    rollout: Rollout = option(
        "simulate",
        "what the student is trained on: its own chain, noised real images (data), or pure noise (one step)",
    )
    t_low: float = option(0.02, "smallest t of the student's loss, as a share of the times", low=0, below=1)
    t_high: float = option(0.98, "largest t of the student's loss, as a share of the times", above=0, high=1)
    reuse: bool = option(
        False, "at a step in which the student learns, too, let it go first, and the critic take its samples"
    )
    # weights: DMD2's for SDXL and SD 1.5 (main/train_sd.py)
    adversarial: Adversarial = section(Adversarial(critic_weight=1e-2, features="fake_score"), "the GAN; paper: 1e-3")


class Method:
    """Distribution matching with two time scales, optional GAN, one to a few steps."""

    exported = "student"
    sampler: Sampler = "renoise"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher twice. num_steps: calls of the student when sampling."""
        if config.t_low >= config.t_high:
            raise ValueError(f"t_low {config.t_low:g} must be below t_high {config.t_high:g}")
        self.config, self.num_steps = config, num_steps
        self.shape, self.times = family.latent_shape, family.student_times(num_steps)
        self.needs_images = rollout.needs_images(config.rollout, num_steps) or config.adversarial.weight > 0
        self.teacher = family.denoiser
        self.student, self.fake_score, self.networks = fake_score.roles(self.teacher, family)
        critic = ["fake_score"]
        self.adversary = adversary.make(config.adversarial, family, self.teacher, self.fake_score)
        if self.adversary:
            self.networks["discriminator"] = self.adversary.heads
            critic.append("discriminator")
        chain = passes.chain(config.rollout, num_steps)
        follows = (
            Pass("student", count=chain + 1),
            Pass("fake_score", "weights"),
            *adversary.critic_passes(self.adversary),
        )
        learns = (
            Pass("student", count=chain),
            Pass("student", "weights"),
            Pass("teacher", rows=passes.rows(config.guidance_scale)),
            Pass("fake_score"),
            *adversary.student_passes(self.adversary),
        )
        self.made: dict[tuple[int, ...], Tensor] = {}  # x0 that the critic is to take, by its samples, within a step
        follow = Phase("critic", critic, self.critic_loss, after=self.made.clear, passes=follows)
        learn = Phase("student", ["student"], self.student_loss, every=config.student_every, passes=learns)
        self.phases = (learn, follow) if config.reuse else (follow, learn)

    def critic_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"denoising", "gan"}: each [B]."""
        x0 = self.made.get(tuple(batch.samples))
        if x0 is None:
            with torch.no_grad():
                x0 = self.generate(batch, rng)
        terms = {"denoising": fake_score.denoising(self.fake_score, x0, batch.cond, rng)}
        if self.adversary:
            real = batch.images("the adversarial term")
            terms["gan"] = self.adversary.discriminator(real, x0, batch.cond, rng)
        return terms

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"dmd", "gan"}: each [B]."""
        x0 = self.generate(batch, rng)
        if self.config.reuse:
            self.made[tuple(batch.samples)] = x0.detach()
        t = times.uniform(rng, self.teacher.schedule, self.config.t_low, self.config.t_high)
        with torch.no_grad():
            x_t = add_noise(self.teacher.schedule, x0, rng.normal(self.shape), t)
            real = guided(self.teacher, batch.uncond, self.config.guidance_scale)(x_t, t, batch.cond).x0
            fake = self.fake_score(x_t, t, batch.cond).x0
        terms = {"dmd": losses.surrogate(x0, losses.dmd_grad(x0, real, fake))}
        if self.adversary:
            terms["gan"] = self.adversary.student(x0, batch.cond, rng)
        return terms

    def generate(self, batch: Batch, rng: Noise) -> Tensor:
        """The student's x0, [B, ...], at a random one of its times."""
        x_t, t = rollout.inputs(self.config.rollout, self.student, rng, self.shape, self.times, batch.cond, batch.x0)
        return self.student(x_t, t, batch.cond).x0
