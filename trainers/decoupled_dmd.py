"""Decoupled DMD: guidance and distribution matching apart in DMD2's loss (Liu et al. 2025, arXiv 2511.22677).

    every step, phase "critic": as in ``dmd2``
    every ``student_every`` steps, phase "student":
        x0 = student(x_in, t_in) by the rollout
        x_t = alpha x0 + sigma eps, t ~ U(dm)                     real = teacher's x0(x_t), fake = fake_score's x0(x_t)
        x_s = alpha x0 + sigma eps', s ~ U(ca), s <= t_in         gap = (guidance_scale - 1) (cond - uncond) at x_s
        x0 <- x0 - dm.weight (fake - real) / N + ca.weight gap / N,  N = mean|x0 - (real + gap)|, per sample
        with the GAN: + weight softplus(-D(noised x0))

DMD2's direction with guidance on the teacher is the sum of two: DM, the score difference without guidance, which keeps
the student on the data, and CA (CFG augmentation), which makes few steps of many and has no fixed point of its own.
``schedules`` names the paper's pairs of time distributions: "hybrid", above, its best; "full", both at any time;
"constrained", both no noisier than the input; "shared", one draw of t and eps for both. With "shared", equal ranges
and weights 1 this is ``dmd2`` to rounding. Pure noise, the input of the first call, is as noisy as any time is.

Here t = 0 is clean. The paper's clock runs the other way: its "tau > t" is s < t_in.

Departures: the paper does not say how its directions are normalised; one N is what keeps their balance and the
equality with DMD2, and ``normaliser: apart`` is AaronCaoZJ/DMDs', mean|x0 - conditional x0| at each term's own noise.
The fake score learns in its network's own parameterisation and not by the error in x0. As for ``dmd2`` else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen import adversary, fake_score, losses, passes, rollout, times
from fastgen.adversary import Adversarial
from fastgen.config import option, section
from fastgen.denoiser import unconditional
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.rollout import Rollout
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
    arxiv="2511.22677",
    needs=("prompts", "images (adversarial, rollout data)"),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Term:
    """One of the two directions."""

    weight: float = option(1.0, "of the direction", low=0)
    t_low: float = option(0.0, "smallest t, as a share of the times the term may take", low=0, below=1)
    t_high: float = option(1.0, "largest t, as a share of the times the term may take", above=0, high=1)


@dataclass(frozen=True)
class Config:
    """Options of ``decoupled_dmd``."""

    guidance_scale: float = option(8.0, "of the teacher, in CA; 1.0 is off; DMD2's for SDXL", low=1)
    student_every: int = option(5, "critic updates per student update; below 4 they oscillate", low=1)
    rollout: Rollout = option(
        "simulate",
        "what the student is trained on: its own chain, noised real images (data), or pure noise (one step)",
    )
    schedules: Literal["hybrid", "full", "constrained", "shared"] = option(
        "hybrid", "times of DM and CA: CA's, none or both no noisier than the student's input; or one draw for both"
    )
    dm: Term = section(Term(), "distribution matching")
    ca: Term = section(Term(), "CFG augmentation")
    normaliser: Literal["joint", "apart"] = option("joint", "one for both directions, or each its own")
    # weights: DMD2's for SDXL and SD 1.5 (main/train_sd.py)
    adversarial: Adversarial = section(Adversarial(critic_weight=1e-2, features="fake_score"), "the GAN; paper: 1e-3")


class Method:
    """DMD2 with its two directions apart, optional GAN, one to a few steps."""

    exported = "student"
    sampler: Sampler = "renoise"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher twice. num_steps: calls of the student when sampling."""
        dm, ca = config.dm, config.ca
        for name, term in (("dm", dm), ("ca", ca)):
            if term.t_low >= term.t_high:
                raise ValueError(f"{name}.t_low {term.t_low:g} must be below {name}.t_high {term.t_high:g}")
        if dm.weight == 0:
            raise ValueError("dm.weight 0 leaves guidance alone, which has no fixed point; set it above 0")
        if config.schedules == "shared" and (dm.t_low, dm.t_high) != (ca.t_low, ca.t_high):
            raise ValueError(
                f"schedules shared needs equal ranges, got dm {dm.t_low:g} to {dm.t_high:g} and ca {ca.t_low:g} to "
                f"{ca.t_high:g}; set them equal or schedules full"
            )
        self.config, self.num_steps = config, num_steps
        self.shape, self.times = family.latent_shape, family.student_times(num_steps)
        self.shares = [times.share(family.denoiser.schedule, t) for t in self.times]
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
        guides = config.guidance_scale > 1 and ca.weight > 0  # at times of its own CA takes both its passes
        learns = (
            Pass("student", count=chain),
            Pass("student", "weights"),
            Pass("teacher", count=1 + guides + (guides and config.schedules != "shared")),
            Pass("fake_score"),
            *adversary.student_passes(self.adversary),
        )
        self.phases = (
            Phase("critic", critic, self.critic_loss, passes=follows),
            Phase("student", ["student"], self.student_loss, every=config.student_every, passes=learns),
        )

    def critic_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"denoising", "gan"}: each [B]."""
        with torch.no_grad():
            x0 = self.student(*self.inputs(batch, rng), batch.cond).x0
        terms = {"denoising": fake_score.denoising(self.fake_score, x0, batch.cond, rng)}
        if self.adversary:
            real = batch.images("the adversarial term")
            terms["gan"] = self.adversary.discriminator(real, x0, batch.cond, rng)
        return terms

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"dm", "ca", "gan"}: each [B]."""
        x_in, t_in = self.inputs(batch, rng)
        x0 = self.student(x_in, t_in, batch.cond).x0
        real, fake, pos, gap = self.scores(x0, t_in, batch, rng)
        joint = self.config.normaliser == "joint"
        size = losses.dmd_size(x0, real + gap if joint else real)
        terms = {
            "dm": self.config.dm.weight * losses.surrogate(x0, (fake - real) / size),
            "ca": self.config.ca.weight * losses.surrogate(x0, -gap / (size if joint else losses.dmd_size(x0, pos))),
        }
        if self.adversary:
            terms["gan"] = self.adversary.student(x0, batch.cond, rng)
        return terms

    @torch.no_grad()
    def scores(self, x0: Tensor, t_in: Tensor, batch: Batch, rng: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Real and fake at DM's x_t; at CA's x_s the teacher with captions and what guidance adds: [B, ...] each."""
        config = self.config
        x_t, t = self.noised(x0, t_in, config.dm, config.schedules == "constrained", rng)
        real, fake = self.teacher(x_t, t, batch.cond).x0, self.fake_score(x_t, t, batch.cond).x0
        if config.guidance_scale == 1 or config.ca.weight == 0:
            return real, fake, real, torch.zeros_like(real)
        x_s, s, pos = x_t, t, real
        if config.schedules != "shared":
            x_s, s = self.noised(x0, t_in, config.ca, config.schedules != "full", rng)
            pos = self.teacher(x_s, s, batch.cond).x0
        neg = self.teacher(x_s, s, unconditional(batch.uncond, batch.cond)).x0
        return real, fake, pos, (config.guidance_scale - 1) * (pos - neg)

    def noised(self, x0: Tensor, t_in: Tensor, term: Term, below: bool, rng: Noise) -> tuple[Tensor, Tensor]:
        """x_t, t of a term, each sample with its own time and noise. below: no noisier than the student's input."""
        within = torch.ones_like(t_in)  # the first call sees pure noise, whatever its time
        for time, share in zip(self.times[1:], self.shares[1:], strict=True):
            within = torch.where(t_in == time, share if below else 1.0, within)
        t = times.uniform(rng, self.teacher.schedule, term.t_low * within, term.t_high * within)
        return add_noise(self.teacher.schedule, x0, rng.normal(self.shape), t), t

    def inputs(self, batch: Batch, rng: Noise) -> tuple[Tensor, Tensor]:
        """What the student is called on: x_in [B, ...], t_in [B]."""
        student, options = self.student, self.config.rollout
        return rollout.inputs(options, student, rng, self.shape, self.times, batch.cond, batch.x0)
