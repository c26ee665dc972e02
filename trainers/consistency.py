"""Consistency: any noised image to the clean end of its ODE (Song et al. 2023, arXiv 2303.01469; CD and CT).

    every step, phase "student":
        t > r two times of a grid, or of a ratio;  x_t = alpha x0 + sigma eps, x0 a real image
        x_r = one guided Euler or Heun step of the teacher from x_t      (distillation)
            | x0 noised to r by the same eps                             (training: solver "data")
        y = student's x0(x_t, t);  y' = target's x0(x_r, r), no gradient;  y' = x_r itself where r is clean data
        loss = w distance(y, y');  with the adversarial term: + weight GAN(noised y)
        target <- decay target + (1 - decay) student;  or the target is the student itself

``variant`` chooses the paper, and each option that is left out takes that paper's value:

    cd    Heun steps, EMA target, uniform times on a fixed grid
    ct    no teacher, EMA target, a grid that grows as a square root
    ict   no teacher, the student as target, lognormal times on a grid that doubles, weight 1 / (kappa_t - kappa_r)
          (Song & Dhariwal 2023, arXiv 2310.14189)
    ect   as ict, but with r a share of t that closes on 1 - 1 / 256 (Geng et al. 2024, arXiv 2406.14548)

kappa = sigma / alpha is the papers' sigma. The student's function is its network's x0 and nothing else, so that the
stock pipeline, which renoises x0, samples what was trained, at any number of steps. The papers' c_skip has no place:
the boundary condition is in the target, which at clean data is the datum (as ECT's is at r = 0).

Departures: times and grids are those of the teacher's own schedule and not Karras's, so a table of 1000 times caps the
grid at 1000. Heun turns in the angle (``rollout.along_ode``). cd's and ct's distance in the paper is LPIPS, of decoded
images; since it needs weights of its own, pseudo-Huber of the latents, iCT's, stands in its place unless ``distance``
is lpips. That is LPIPS as published, with maxima where the paper's code pools by means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen import adversary, distance, passes, rollout, times
from fastgen.adversary import Adversarial
from fastgen.config import option, section
from fastgen.denoiser import guided
from fastgen.ema import Target
from fastgen.family import Family
from fastgen.lpips import Perceptual
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Consistency Models",
    arxiv="2303.01469",
    needs=("prompts", "images"),
    steps=range(1, 9),
)

_OWN: dict[str, Any] = {"solver": "data", "pairs": "grid", "times": "uniform", "weight": "uniform", "huber": 0.00054}
_BETTER: dict[str, Any] = {**_OWN, "target": "student", "times": "lognormal", "weight": "inverse"}
VARIANTS: dict[str, dict[str, Any]] = {
    # ImageNet 64 in cm/scripts/launch.sh
    "cd": {**_OWN, "solver": "heun", "target": "ema", "curriculum": "fixed", "start": 40, "intervals": 40},
    "ct": {**_OWN, "target": "ema", "curriculum": "root", "start": 2, "intervals": 200},
    "ict": {**_BETTER, "curriculum": "doubling", "start": 10, "intervals": 1280},
    # CIFAR-10 in run_ecm.sh: q = 2 over 8 stages, c = 0
    "ect": {**_BETTER, "pairs": "ratio", "curriculum": "doubling", "start": 2, "intervals": 256, "huber": 0.0},
}


@dataclass(frozen=True)
class Config:
    """Options of ``consistency``."""

    variant: Literal["cd", "ct", "ict", "ect"] = option("cd", "whose values the options take that are left out")
    solver: Literal["heun", "euler", "data"] = option(None, "what makes x_r: the teacher, or the image (no teacher)")
    guidance_scale: float = option(1.0, "of the teacher's steps; 1.0 is off, as in the paper", low=1)
    target: Literal["ema", "student"] = option(None, "an average of the student, or the student itself")
    ema: float = option(0.95, "decay of the target at first; its power start / number of levels later", low=0, below=1)
    pairs: Literal["grid", "ratio"] = option(None, "r: the next time of a grid, or a share of t")
    times: Literal["uniform", "lognormal"] = option(None, "law of t: over the schedule's times, or of kappa")
    # EDM's and iCT's, for data of deviation 0.5; those of deviation 1 have -0.4 at the same signal-to-noise ratio
    log_mean: float = option(-1.1, "of log kappa, where lognormal")
    log_std: float = option(2.0, "of log kappa, where lognormal", above=0)
    curriculum: Literal["fixed", "root", "doubling"] = option(None, "how the number of intervals grows")
    start: int = option(None, "intervals at first (root: levels, one more)", low=1)
    intervals: int = option(None, "intervals at last; for ratio, t / (t - r) at large t", low=1)
    curriculum_steps: int = option(0, "training steps over which the number grows; run.steps in the papers", low=0)
    distance: Literal["pseudo_huber", "l2", "lpips"] = option(
        "pseudo_huber",
        "between x0s; l2 is the mean square, lpips that of the decoded images, the paper's for cd and ct",
    )
    huber: float = option(None, "c of pseudo-Huber, per element; 0 is the norm", low=0)
    lpips: Perceptual = section(Perceptual(), "where distance is lpips")
    weight: Literal["uniform", "inverse"] = option(None, "1, or 1 / (kappa_t - kappa_r)")
    adversarial: Adversarial = section(Adversarial(), "the GAN, with the teacher's features")

    def __post_init__(self) -> None:
        """Take the variant's values. Raises ValueError where options contradict each other."""
        for name, value in VARIANTS[self.variant].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.solver == "data" and self.guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale {self.guidance_scale:g} guides a teacher's step, but solver is data; "
                "set solver heun or euler, or guidance_scale 1"
            )
        if self.curriculum != "fixed" and not self.curriculum_steps:
            raise ValueError(f"curriculum {self.curriculum} needs curriculum_steps; set it to run.steps")
        if self.curriculum != "fixed" and self.start > self.intervals:
            raise ValueError(f"start {self.start} must not be above intervals {self.intervals}")


class Method:
    """One network that is consistent along the teacher's paths, or along those of the data."""

    exported = "student"
    needs_images = True
    sampler: Sampler = "renoise"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher, and once more for an averaged target. num_steps: when sampling; training has none."""
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher = family.denoiser
        self.schedule = self.teacher.schedule
        times.check_start(self.schedule, family.student_times(num_steps))
        self.distance = distance.make(config.distance, family, config.lpips, config.huber)
        pure = not self.schedule(torch.tensor([self.schedule.t_max])).alpha.all()
        if pure and config.weight == "inverse" and config.pairs == "grid":
            raise ValueError("weight inverse is 0 at this schedule's pure noise; set weight uniform, or pairs ratio")
        self.student = self.teacher.with_network(family.student())
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        self.target = Target(self.student, config.ema if config.target == "ema" else 0)
        self.networks |= self.target.networks
        self.adversary = adversary.make(config.adversarial, family, self.teacher)
        calls = {"data": 0, "euler": 1, "heun": 2}[config.solver]
        needs = (
            Pass("teacher", count=calls, rows=passes.rows(config.guidance_scale)),
            Pass(self.target.role),
            Pass("student", "weights"),
            *adversary.student_passes(self.adversary),
        )
        student = Phase(
            "student",
            ["student"],
            self.student_loss,
            after=self.target.follow,
            moves=[*self.target.networks],
            passes=needs,
        )
        self.phases: tuple[Phase, ...] = (student,)
        if self.adversary:
            self.networks["discriminator"] = self.adversary.heads
            self.phases = (self.adversary.phase(self.generate), *self.phases)

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"consistency", "gan"}: each [B]."""
        x0 = batch.images("consistency")
        t, r, clean = self.pair(rng)
        eps = rng.normal(self.shape)
        x_t = add_noise(self.schedule, x0, eps, t)
        y = self.student(x_t, t, batch.cond).x0
        with torch.no_grad():
            if self.config.solver == "data":
                x_r = add_noise(self.schedule, x0, eps, r)
            else:
                teacher = guided(self.teacher, batch.uncond, self.config.guidance_scale)
                x_r, eps = rollout.along_ode(teacher, self.schedule, x_t, t, r, batch.cond, self.config.solver)
            at = self.schedule(r).like(x_r)
            end = clean.reshape(at.alpha.shape)
            target = torch.where(end, (x_r - at.sigma * eps) / at.alpha, self.target.denoiser(x_r, r, batch.cond).x0)
        self.target.decay = self.config.ema ** ((self.count(0) + 1) / (self.count(rng.step) + 1))  # CT's mu(k)
        terms = {"consistency": self.weight(t, r, clean).to(y) * self.distance(y, target)}
        if self.adversary:
            terms["gan"] = self.adversary.student(y, batch.cond, rng)
        return terms

    def generate(self, batch: Batch, rng: Noise) -> Tensor:
        """The student's x0 at a t of its own: [B, ...]."""
        t, _, _ = self.pair(rng)
        x_t = add_noise(self.schedule, batch.images("consistency"), rng.normal(self.shape), t)
        return self.student(x_t, t, batch.cond).x0

    def count(self, step: int) -> int:
        """The number of intervals at a training step."""
        c = self.config
        grow = {"root": times.root_intervals, "doubling": times.doubling_intervals}.get(c.curriculum)
        return grow(step, c.curriculum_steps, c.start, c.intervals) if grow else c.intervals

    def pair(self, rng: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """t, r, and where r stands for clean data: [B] each."""
        draw = {"grid": times.grid_pair, "ratio": times.ratio_pair}[self.config.pairs]
        law = (self.config.log_mean, self.config.log_std) if self.config.times == "lognormal" else None
        return draw(rng, self.schedule, self.count(rng.step), law)

    def weight(self, t: Tensor, r: Tensor, clean: Tensor) -> Tensor:
        """What a pair counts: [B]."""
        if self.config.weight == "uniform":
            return torch.ones_like(t)
        kappa_r = torch.where(clean, 0, times.noise_ratio(self.schedule, r))
        return 1 / (times.noise_ratio(self.schedule, t) - kappa_r)
