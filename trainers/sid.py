"""SiD: score identity distillation in one or a few steps (Zhou et al. 2024, arXiv 2404.04057).

    every step, phase "critic":
        x0 = student(its own chain up to a random one of its times)                      no gradient
        fake_score <- denoising loss on x0 under critic_guidance_scale, t ~ U(2 % ... 98 %), some captions hidden
        with the GAN: discriminator heads on the fake score's features, real images against x0, both noised
    every ``student_every`` steps, phase "student":
        x0 = student(its own chain up to a random one of its times)                      gradient of the last call
        x_t = alpha x0 + sigma eps, t ~ U(2 % ... 98 %)
        real = teacher's x0(x_t) under guidance_scale, fake = fake_score's x0(x_t) under fake_guidance_scale
        student <- <real - fake, (real - x0) - correction (real - fake)> / mean|x0 - real|, per sample
        with the GAN: + weight softplus(-D(noised x0))

The gradient reaches x0 directly and through x_t in both networks, whose weights stay as they are: without the latter
the loss has the same value and is DMD's for every ``correction`` (the papers' alpha). Few steps (arXiv 2505.12674):
one fake score sees the outputs of all steps, and their uniform mixture is what is matched. The three scales are the
papers' kappa 4, 2 (and 3) and 1; an empty one is the one before it. What they make:

    guidance                          guidance_scale  fake_guidance_scale  critic_guidance_scale
    none                              1
    long and short (arXiv 2406.01561) w
    long                              w               1
    short                             1               1                    below 1
    Zero-CFG (arXiv 2505.12674)       1               0
    Anti-CFG (arXiv 2505.12674)       1               below 0              1

With Zero-CFG the fake score, and a discriminator on its features, see no caption at all.

Departures from the reference code (github.com/mingyuanzhou/SiD-LSG): a hidden caption is hidden from the fake score
only, so that unconditionally it models the student's samples for all captions; the loss of a v network is not
weighted by alpha^2; the GAN reads samples of a noise of their own, with heads; a non-finite loss stops the run, where
the reference leaves such samples out and writes zeros. Its student is called from t = 625: ``student.start: 0.625``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import adversary, fake_score, losses, passes, rollout, times
from fastgen.adversary import Adversarial
from fastgen.config import option, section
from fastgen.denoiser import Cond, guided, unconditional
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms, drop_captions
from fastgen.passes import Pass
from fastgen.prediction import Prediction
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models",
    arxiv="2404.04057",
    needs=("prompts", "images (adversarial)"),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``sid``."""

    # 1.0 in SiD-LSG, SiDA and SiD-DiT; 1.2 in SiD on CIFAR-10, ImageNet and FFHQ, but it repels far too wide students
    correction: float = option(1.0, "the papers' alpha; 1.0 is safe, 1.2 is for good starts", low=0, high=2)
    # SiD-LSG's best FID on SD 1.5; 4.5 gives its best CLIP score
    guidance_scale: float = option(1.5, "of the teacher; 1.0 is off", low=1)
    fake_guidance_scale: float | None = option(None, "of the fake score in the student's loss; empty: the teacher's")
    critic_guidance_scale: float | None = option(None, "of the fake score as it is trained; empty: as in the loss")
    caption_dropout: float = option(0.1, "share of captions hidden from a guided fake score", above=0, below=1)
    student_every: int = option(1, "critic updates per student update", low=1)
    t_low: float = option(0.02, "smallest t, as a share of the times", low=0, below=1)
    t_high: float = option(0.98, "largest t, as a share of the times", above=0, high=1)
    # SiD-DiT trains with 0.5 and 0.5 (run_sid_dit.sh)
    adversarial: Adversarial = section(Adversarial(critic_weight=0.5, features="fake_score"), "the GAN; paper: 0.5")


class Method:
    """Score identity distillation with long and short guidance and optional GAN, one to a few steps."""

    exported = "student"
    sampler: Sampler = "renoise"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher twice. num_steps: calls of the student when sampling."""
        if config.t_low >= config.t_high:
            raise ValueError(f"t_low {config.t_low:g} must be below t_high {config.t_high:g}")
        given = config.guidance_scale, config.fake_guidance_scale, config.critic_guidance_scale
        self.fake_scale = given[0] if given[1] is None else given[1]
        self.critic_scale = self.fake_scale if given[2] is None else given[2]
        if self.critic_scale == 0 != self.fake_scale:
            raise ValueError(
                "critic_guidance_scale 0 trains the fake score without captions, and fake_guidance_scale "
                f"{self.fake_scale:g} reads it with them; set both to 0"
            )
        self.config, self.num_steps = config, num_steps
        self.shape, self.times = family.latent_shape, family.student_times(num_steps)
        self.needs_images = config.adversarial.weight > 0
        self.teacher = family.denoiser
        self.student, self.fake_score, self.networks = fake_score.roles(self.teacher, family)
        critic = ["fake_score"]
        self.adversary = adversary.make(config.adversarial, family, self.teacher, self.fake_score)
        if self.adversary:
            self.networks["discriminator"] = self.adversary.heads
            critic.append("discriminator")
        chain = passes.chain("simulate", num_steps)
        fake, own = (passes.rows(scale or 1.0) for scale in (self.fake_scale, self.critic_scale))  # 0: no captions
        follows = (
            Pass("student", count=chain + 1),
            Pass("fake_score", "weights", rows=own),
            *adversary.critic_passes(self.adversary),
        )
        learns = (
            Pass("student", count=chain),
            Pass("student", "weights"),
            Pass("teacher", "inputs", rows=passes.rows(config.guidance_scale)),
            Pass("fake_score", "inputs", rows=fake),
            *adversary.student_passes(self.adversary),
        )
        self.phases = (
            Phase("critic", critic, self.critic_loss, passes=follows),
            Phase("student", ["student"], self.student_loss, every=config.student_every, passes=learns),
        )

    def critic_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"denoising", "gan"}: each [B]."""
        with torch.no_grad():
            x0 = self.generate(batch, rng)
        t, eps = self.draw_times(rng), rng.normal(self.shape)
        cond = batch.cond
        if {self.fake_scale, self.critic_scale} - {1.0} and self.critic_scale:  # the empty caption is to be learnt too
            cond = drop_captions(batch, rng.uniform() < self.config.caption_dropout)
        pred = self.fake(add_noise(self.teacher.schedule, x0, eps, t), t, cond, batch.uncond, self.critic_scale)
        terms = {"denoising": losses.denoising(pred, x0, eps)}
        if self.adversary:
            real = batch.images("the adversarial term")
            terms["gan"] = self.adversary.discriminator(real, x0, self.judged(batch), rng)
        return terms

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"sid", "gan"}: each [B]."""
        x0 = self.generate(batch, rng)
        t = self.draw_times(rng)
        x_t = add_noise(self.teacher.schedule, x0, rng.normal(self.shape), t)
        real = guided(self.teacher, batch.uncond, self.config.guidance_scale)(x_t, t, batch.cond).x0
        fake = self.fake(x_t, t, batch.cond, batch.uncond, self.fake_scale).x0
        terms = {"sid": losses.sid(x0, real, fake, self.config.correction)}
        if self.adversary:
            terms["gan"] = self.adversary.student(x0, self.judged(batch), rng)
        return terms

    def generate(self, batch: Batch, rng: Noise) -> Tensor:
        """The student's x0, [B, ...], at a random one of its times."""
        x_t, t = rollout.backward_simulation(self.student, rng, self.shape, self.times, batch.cond)
        return self.student(x_t, t, batch.cond).x0

    def draw_times(self, rng: Noise) -> Tensor:
        """Of both losses: [B]."""
        return times.uniform(rng, self.teacher.schedule, self.config.t_low, self.config.t_high)

    def fake(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: float) -> Prediction:
        """The fake score under guidance; at scale 0 it is asked without captions only, in one pass."""
        if scale == 0:
            return self.fake_score(x_t, t, unconditional(uncond, cond))
        return guided(self.fake_score, uncond, scale)(x_t, t, cond)

    def judged(self, batch: Batch) -> Cond:
        """What the discriminator's backbone is told."""
        hidden = self.critic_scale == 0 and self.config.adversarial.features == "fake_score"
        return unconditional(batch.uncond, batch.cond) if hidden else batch.cond
