"""Phased DMD: distribution matching within intervals of noise, an expert for each (Fan et al. 2025, arXiv 2510.27684).

    the student's times, cut into ``phases`` equal runs; a phase ends at s, the next one's first time, the last clean
    student: experts, one a phase, called within it; fake score: a network a phase
    x_s of every phase: one chain of DDIM steps from pure noise, whose gradient stops where a phase hands on
    every step, phase "critic", each fake score:
        x_t = ratio x_s + added eps, t ~ U(s, all above)                                          x_s without gradient
        min(1, 10 added^2) |its output - the output for noise (sigma / added) eps at x_t|^2
    every ``student_every`` steps, phase "student", each expert:
        x_t = ratio x_s + added eps, t ~ U(s + 2 %, 98 %)
        real, fake = teacher's guided score and the phase's fake score at x_t                            no gradient
        x_s <- x_s - (fake - real) / mean|x_s - real|, per sample, of their E[x_s | x_t]           weighting: dmd2
        x_s <- x_s - ratio (real's eps - fake's eps) / sigma, the gradient of KL                   weighting: kl

ratio and added are the forward process's from s to t: alpha_t / alpha_s and what is left of sigma_t^2. A fake score
of x_s, which is not clean, may not take eps itself for the noise and x_s for the clean sample: that is biased, near s
even in sign. A time t is drawn from all that are noisier than s and not only from the phase's own, which the paper
found better. Nothing is added in sampling: the experts hand on what they made. With one phase and one step this is
``dmd2`` without its GAN term, up to the fake score's weight and to the noise that DDIM's last step leaves on a table.

Departures. The paper trains one phase after the other, on frozen earlier experts; here, as in the code
(ModelTC/LightX2V), all learn in one run, and at each step, from one chain: no expert's gradient reaches another. The
code trains an expert on one random step of its phase, from which it jumps to s, while the fake score sees samples of
all the steps; here the gradient goes through all steps of a phase, so that both mean the same x_s and no step learns
to do the work of the rest, which is what the paper blames for lost diversity. "kl" is the paper's weight; the code
moves the clean sample that a step predicts by DMD2's direction, "dmd2" x_s itself. The code's last fake score learns
below its boundary alone. The last phase's sample is the pipeline's latent, which is decoded as if it were clean
(DDIM's last step leaves the noise of a table's first entry in it), and so is clean here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import fake_score, losses, passes, times
from fastgen.config import option
from fastgen.denoiser import guided
from fastgen.experts import Experts
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler, ddim, sample
from fastgen.schedule import Level, Schedule, onward

ABOUT = About(
    paper="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
    arxiv="2510.27684",
    needs=("prompts",),
    steps=range(2, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``phased_dmd``."""

    phases: int = option(2, "parts of the student's steps, with an expert each; divides student.steps", low=1)
    # LightX2V's configs: 5 to 6
    guidance_scale: float = option(5.0, "of the teacher; 1.0 is off", low=1)
    student_every: int = option(5, "critic updates per student update; below 4 they oscillate", low=1)
    weighting: Literal["dmd2", "kl"] = option("dmd2", "DMD2's normalised direction, or the gradient of KL itself")
    # LightX2V keeps as far from a phase's end, DMD2 from clean data
    t_low: float = option(0.02, "least t of the student's loss above its phase's end, as a share of all times", low=0)
    t_high: float = option(0.98, "largest t of the student's loss, as a share of the times", above=0, high=1)


@dataclass(frozen=True)
class Interval:
    """A phase: when its expert is called, where its sample is, and from which share of the times on it is noised."""

    times: Sequence[float]
    end: float
    clean: bool
    low: float

    def level(self, schedule: Schedule, t: Tensor) -> Level:
        """Of the sample, once for each of t: [B]."""
        if not self.clean:
            return schedule(torch.full_like(t, self.end))
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return Level(one, zero, zero, zero)


def intervals(schedule: Schedule, student_times: Sequence[float], phases: int) -> list[Interval]:
    """The student's times cut into ``phases`` equal runs. Raises ValueError if they cannot be."""
    count, rest = divmod(len(student_times), phases)
    if rest:
        raise ValueError(
            f"method.phases {phases} does not divide student.steps {len(student_times)}; "
            "set student.steps to a multiple of it, or fewer phases"
        )
    found = []
    for i in range(0, len(student_times), count):
        clean = i + count == len(student_times)
        end = schedule.t_min if clean else student_times[i + count]
        low = 0.0 if clean else times.share(schedule, end)
        found.append(Interval(student_times[i : i + count], end, clean, low))
    return found


class Method:
    """Distribution matching with an expert and a fake score for each phase; from prompts alone."""

    exported = "student"
    needs_images = False
    sampler: Sampler = "ddim"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher twice for each phase. num_steps: calls of the student when sampling."""
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher, self.schedule = family.denoiser, family.denoiser.schedule
        self.intervals = intervals(self.schedule, family.student_times(num_steps), config.phases)
        lowest = self.intervals[0].low + config.t_low
        if lowest >= config.t_high:
            raise ValueError(
                f"t_low {config.t_low:g} above the first phase's end is {lowest:.3g} of the times, which must be "
                f"below t_high {config.t_high:g}; lower t_low"
            )
        experts = [family.student() for _ in self.intervals]
        self.student = self.teacher.with_network(Experts(experts, [part.times[0] for part in self.intervals]))
        self.fake_scores = [fake_score.copied(self.teacher) for _ in self.intervals]
        self.networks: dict[str, nn.Module] = {
            "teacher": self.teacher.network,
            "student": self.student.network,
            "fake_score": nn.ModuleList(fake.network for fake in self.fake_scores),
        }
        follows = (Pass("student", count=num_steps), Pass("fake_score", "weights", config.phases))
        learns = (
            Pass("student", "weights", num_steps),
            Pass("teacher", count=config.phases, rows=passes.rows(config.guidance_scale)),
            Pass("fake_score", count=config.phases),
        )
        self.phases = (
            Phase("critic", ["fake_score"], self.critic_loss, passes=follows),
            Phase("student", ["student"], self.student_loss, every=config.student_every, passes=learns),
        )

    def critic_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"denoising_1", ...}, one a phase: each [B]."""
        with torch.no_grad():
            samples = self.samples(batch, rng)
        terms = {}
        for k, x_s in enumerate(samples):
            t = times.uniform(rng, self.schedule, self.intervals[k].low)
            x_t, eps, _, added = self.noised(x_s, k, t, rng)
            terms[f"denoising_{k + 1}"] = losses.interval_denoising(
                self.fake_scores[k](x_t, t, batch.cond), eps, added
            )
        return terms

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"dmd_1", ...}, one a phase: each [B]."""
        samples = self.samples(batch, rng)
        return {f"dmd_{k + 1}": losses.surrogate(x_s, self.grad(x_s, k, batch, rng)) for k, x_s in enumerate(samples)}

    @torch.no_grad()
    def grad(self, x_s: Tensor, k: int, batch: Batch, rng: Noise) -> Tensor:
        """The direction for samples of phase k, from 0: [B, ...]."""
        config = self.config
        t = times.uniform(rng, self.schedule, self.intervals[k].low + config.t_low, config.t_high)
        x_t, _, ratio, added = self.noised(x_s, k, t, rng)
        real = guided(self.teacher, batch.uncond, config.guidance_scale)(x_t, t, batch.cond)
        fake = self.fake_scores[k](x_t, t, batch.cond)
        if config.weighting == "kl":
            return losses.interval_grad(real, fake, ratio)
        return losses.dmd_grad(x_s, *(losses.interval_mean(score, ratio, added) for score in (real, fake)))

    def samples(self, batch: Batch, rng: Noise) -> list[Tensor]:
        """The student's x_s of each phase, [B, ...], by the chain that sampling runs; no gradient between phases."""
        x, found = rng.normal(self.shape), []
        for part in self.intervals:
            x = sample(self.student, self.schedule, x.detach(), part.times, batch.cond, ddim, end=part.end)
            found.append(x)
        return found

    def noised(self, x_s: Tensor, k: int, t: Tensor, rng: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples of phase k noised on to t: [B] -> (x_t, eps: [B, ...]; ratio, added: [B, 1, ...])."""
        eps, shape = rng.normal(self.shape), (-1,) + (1,) * (x_s.ndim - 1)
        onto = onward(self.intervals[k].level(self.schedule, t), self.schedule(t))
        ratio, added = (value.to(x_s).reshape(shape) for value in onto)
        return ratio * x_s + added * eps, eps, ratio, added
