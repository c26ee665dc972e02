"""Adversarial: latent adversarial diffusion distillation, LADD (Sauer et al. 2024, arXiv 2403.12015).

    every step, phase "discriminator":
        x0 = student(rollout)                                     no gradient
        heads on the frozen teacher's features <- relu(1 - D(noised image)) + relu(1 + D(noised x0)) (+ r1 R1(image))
    every ``student_every`` steps, phase "student":
        x0 = student(rollout)
        student <- - D(noised x0),  log(sigma / alpha) ~ N(1, 1)
        with the distillation term of ADD (Sauer et al. 2023, arXiv 2311.17042):
            + distillation alpha_t |x0 - sg(teacher's guided x0(x_t))|^2,  t ~ U(all times)

The rollout noises real images, at a random one of the student's times. The student takes on the distribution of the
images it is given, whatever made them: LADD's come from the teacher at a constant guidance scale. The distillation
term has no fake score: alone it draws each sample to the teacher's mean, so it only ever accompanies the other.

Departures from the papers: features are those of the blocks the family names, mostly the encoder's, where LADD reads
every attention block; the heads see caption and time through those features and are not conditioned once more; the
student's times are equally probable; ADD's discriminator reads pixels through DINOv2, and here latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen import adversary, losses, passes, rollout, times
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
    paper="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
    arxiv="2403.12015",
    needs=("prompts", "images"),
    steps=range(1, 5),
)


@dataclass(frozen=True)
class Config:
    """Options of ``adversarial``."""

    student_every: int = option(1, "discriminator updates per student update", low=1)
    rollout: Rollout = option(
        "data", "what the student is trained on: noised real images, its own chain (simulate), pure noise (one step)"
    )
    distillation: float = option(0.0, "weight of ADD's distillation term, there 2.5; 0 is LADD", low=0)
    guidance_scale: float = option(1.0, "of the teacher in the distillation term; 1.0 is off", low=1)
    # LADD: hinge, heads on every block of the frozen teacher, levels (1, 1) of those compared the best
    adversarial: Adversarial = section(
        Adversarial(weight=1.0, features="teacher", blocks=["all"], loss="hinge", levels="logit_normal"),
        "the discriminator",
    )


class Method:
    """A discriminator on the frozen teacher's features, one to four steps."""

    exported = "student"
    sampler: Sampler = "renoise"
    needs_images = True

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher. num_steps: calls of the student when sampling."""
        rollout.needs_images(config.rollout, num_steps)  # whether it can train all of the student's calls
        self.config, self.num_steps = config, num_steps
        self.shape, self.times = family.latent_shape, family.student_times(num_steps)
        self.teacher = family.denoiser
        self.student = self.teacher.with_network(family.student())
        made = adversary.make(config.adversarial, family, self.teacher)
        if made is None:
            raise ValueError("adversarial.weight is 0, and this method has no other term to learn from; set it above")
        self.adversary = made
        self.networks: dict[str, nn.Module] = {
            "teacher": self.teacher.network,
            "student": self.student.network,
            "discriminator": made.heads,
        }
        chain = passes.chain(config.rollout, num_steps)
        needs = (
            Pass("student", count=chain),
            Pass("student", "weights"),
            *adversary.student_passes(made),
            Pass("teacher", count=config.distillation > 0, rows=passes.rows(config.guidance_scale)),
        )
        self.phases = (
            made.phase(self.generate, chain + 1),
            Phase("student", ["student"], self.student_loss, every=config.student_every, passes=needs),
        )

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"gan", "distillation"}: each [B]."""
        x0 = self.generate(batch, rng)
        terms = {"gan": self.adversary.student(x0, batch.cond, rng)}
        if self.config.distillation > 0:
            terms["distillation"] = self.distillation_loss(x0, batch, rng)
        return terms

    def distillation_loss(self, x0: Tensor, batch: Batch, rng: Noise) -> Tensor:
        """ADD's term with c(t) = alpha, so that noisier answers count for less: x0 [B, ...] -> [B]."""
        schedule = self.teacher.schedule
        t = times.uniform(rng, schedule)
        with torch.no_grad():
            x_t = add_noise(schedule, x0, rng.normal(self.shape), t)
            real = guided(self.teacher, batch.uncond, self.config.guidance_scale)(x_t, t, batch.cond).x0
        return self.config.distillation * schedule(t).alpha.to(x0) * losses.mse(x0, real)

    def generate(self, batch: Batch, rng: Noise) -> Tensor:
        """The student's x0, [B, ...], at a random one of its times."""
        x_t, t = rollout.inputs(self.config.rollout, self.student, rng, self.shape, self.times, batch.cond, batch.x0)
        return self.student(x_t, t, batch.cond).x0
