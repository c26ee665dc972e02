"""DMD: distribution matching with regression on teacher pairs, one step (Yin et al. 2023, arXiv 2311.18828).

    before: eps' -> x0' by the teacher's guided DDIM: ``fastgen pairs``
    every step, phase "both", student and fake score one update each:
        x0 = student(eps), eps fresh, with the captions of the pairs
        x_t = alpha x0 + sigma eps, t ~ U(2 % ... 98 %)
        real = teacher's guided x0(x_t), fake = fake_score's x0(x_t)
        x0 <- x0 - (fake - real) / mean|x0 - real|, per sample
        student <- + regression_weight |student(eps') - x0'|^2    or LPIPS of the decoded images, as in the paper
        fake_score <- denoising loss on the same x0, detached, t ~ U(all times)

The student's gradient comes through the two terms it makes, the fake score's through its own alone, so one backward
pass serves both as the paper's two in turn do: the fake score's x0 is from before the student's update there, too.

Departures from the paper: the distance is L2 of latents unless ``distance`` is lpips, the paper's, which needs weights
of its own; the student is called at the pipeline's first time; the normaliser is clamped at 1e-5 and a non-finite
gradient stops the run. On CIFAR-10 the paper also matches the distribution of the regression's own images; here as on
its other data sets it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen import distance, fake_score, losses, passes, times
from fastgen.config import option, section
from fastgen.denoiser import Cond, guided
from fastgen.family import Family
from fastgen.lpips import Perceptual
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="One-step Diffusion with Distribution Matching Distillation",
    arxiv="2311.18828",
    needs=("pairs",),
    steps=(1,),
)


@dataclass(frozen=True)
class Config:
    """Options of ``dmd``."""

    # the paper's for SD 1.5: 3 for FID, 8 for looks
    guidance_scale: float = option(8.0, "of the teacher; 1.0 is off; that of the pairs, too", low=1)
    regression_weight: float = option(0.25, "of the distance to the pairs; paper: 0.25, of LPIPS", above=0)
    distance: Literal["l2", "lpips"] = option(
        "l2", "to the pairs: mean square of the latents, or lpips of the decoded images"
    )
    lpips: Perceptual = section(Perceptual(), "where distance is lpips")
    t_low: float = option(0.02, "smallest t of the gradient, as a share of the times", low=0, below=1)
    t_high: float = option(0.98, "largest t of the gradient, as a share of the times", above=0, high=1)


class Method:
    """Distribution matching held in place by pairs."""

    exported, num_steps, needs_images = "student", 1, False
    sampler: Sampler = "renoise"
    path_times: Sequence[float] = ()

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher twice. Raises ValueError for a student of several steps."""
        if num_steps != 1:
            raise ValueError(f"dmd makes one-step students, not {num_steps}: set student.steps 1, or use method dmd2")
        if config.t_low >= config.t_high:
            raise ValueError(f"t_low {config.t_low:g} must be below t_high {config.t_high:g}")
        self.config, self.shape, self.times = config, family.latent_shape, family.student_times(1)
        self.distance = distance.make(config.distance, family, config.lpips)
        self.pairs_guidance_scale: float | None = config.guidance_scale
        self.teacher = family.denoiser
        self.student, self.fake_score, self.networks = fake_score.roles(self.teacher, family)
        needs = (
            Pass("student", "weights", 2),
            Pass("teacher", rows=passes.rows(config.guidance_scale)),
            Pass("fake_score"),
            Pass("fake_score", "weights"),
        )
        self.phases = (Phase("both", ["student", "fake_score"], self.loss, passes=needs),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"dmd", "regression", "denoising"}: each [B]."""
        config, schedule = self.config, self.teacher.schedule
        x0 = self.generate(rng.normal(self.shape), batch.cond)
        t = times.uniform(rng, schedule, config.t_low, config.t_high)
        with torch.no_grad():
            x_t = add_noise(schedule, x0, rng.normal(self.shape), t)
            real = guided(self.teacher, batch.uncond, config.guidance_scale)(x_t, t, batch.cond).x0
            fake = self.fake_score(x_t, t, batch.cond).x0
        terms = {"dmd": losses.surrogate(x0, losses.dmd_grad(x0, real, fake))}

        paired, eps, _ = batch.pairs()
        terms["regression"] = config.regression_weight * self.distance(self.generate(eps, batch.cond), paired)

        terms["denoising"] = fake_score.denoising(self.fake_score, x0, batch.cond, rng)
        return terms

    def generate(self, eps: Tensor, cond: Cond) -> Tensor:
        """The student's x0 of pure noise: [B, ...]."""
        t = torch.full((len(eps),), self.times[0], dtype=torch.float64, device=eps.device)
        return self.student(eps, t, cond).x0
