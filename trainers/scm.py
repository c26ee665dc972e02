"""sCM: continuous-time consistency models in TrigFlow (Lu & Song 2024, arXiv 2410.11081).

    every step, phase "student", tau = atan(sigma / (alpha sigma_data)) being TrigFlow's time at the same SNR:
        log(sigma / alpha) ~ N, t between the trained times;  x_t = alpha x0 + sigma eps of a real image
        real = d x / d tau of the teacher, guided                 (velocity: data takes that of x0 and eps: training)
        v = student's;  change = cos sin dv / dtau along the teacher's flow, exact and without gradient
        g = -cos^2 (v - real) - min(1, step / warmup) (cos sin x + change)
        v <- v + g / (|g| + floor),  a sum over each sample;  on the right and in g, v may be an average's that follows
    with the adversarial term, SANA-Sprint (Chen et al. 2025, arXiv 2503.09641):
        x0 = student's from t, a share ``max_time`` of samples from its first;  + weight of the discriminator's verdict
        phase "discriminator": heads on the teacher's features, real images against such x0

The network keeps the teacher's output kind, inputs and clock; TrigFlow is only where the loss is stated, so any
teacher serves and the student leaves in a stock pipeline. Derivatives are computed in the weights' own precision
(float32), also where the passes run in bfloat16.

Departures: the weight e^w(t) that the papers learn is left out, and with it their prior weight: its best value is 1
over the mean of |g / (|g| + floor)|^2, which is 1 wherever |g| is far above ``floor`` (rCM, arXiv 2510.08431, leaves
it out as well). The teacher is not fine-tuned before (SANA-Sprint: dense time embedding, QK normalisation). The scale
of guidance is fixed, or an input of the student drawn from a range (``guidance``). Discriminator and student learn in
turns within each step, and mismatched captions are not shown to the heads. The norm of g is the whole vector's, as in
the paper. The average (``target_decay``) is not in the papers, whose batches have thousands of samples: at 32 an emoji
student that was its own target had lost the clean end of its paths after 40 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import adversary, derivative, losses, passes, times
from fastgen.adversary import Adversarial
from fastgen.config import option, section
from fastgen.coordinates import trigflow
from fastgen.derivative import SPAN, Derivative
from fastgen.ema import Target
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.prediction import Prediction, combine
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
    arxiv="2410.11081",
    needs=("prompts", "images"),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``scm``."""

    velocity: Literal["teacher", "data"] = option(
        "teacher", "the flow's: of the teacher (distillation), or of data and noise (training, as unbiased but noisy)"
    )
    guidance: Scales = section(Scales(4.5, 4.5, False, 4.5), "the teacher's; SANA-Sprint: 4 to 5, an input")
    # the paper: 0.5, to which its data are scaled; latents of Diffusers' pipelines are scaled to 1
    sigma_data: float = option(1.0, "standard deviation of the latents", above=0)
    # SANA-Sprint has N(0.2, 1.6), the paper on CIFAR-10 N(-1, 1.4), of log(0.5 tan tau): add 0.7 to the mean
    noise_mean: float = option(0.9, "of log tan tau, tan tau = sigma / (alpha sigma_data)")
    noise_std: float = option(1.6, "of the same", above=0)
    warmup: int = option(10_000, "steps over which the consistency part comes in; SANA-Sprint: 4000, rCM: 0", low=0)
    floor: float = option(0.1, "c, added to the norm that the tangent is divided by", above=0)
    derivative: Derivative = option("jvp", "exact, about three passes; or finite_differences, two passes, any kernel")
    span: float = option(SPAN, "of finite_differences, looking back; wider for networks of whole timesteps", above=0)
    target_decay: float = option(0.0, "of the average whose v is moved on; 0: the student itself", low=0, below=1)
    max_time: float = option(0.5, "share of the adversarial term's samples at the student's first time", low=0, high=1)
    # SANA-Sprint: 0.5, hinge, four blocks, log tan tau ~ N(-0.6 - log 0.5, 1)
    adversarial: Adversarial = section(
        Adversarial(loss="hinge", levels="logit_normal", level_mean=0.1), "SANA-Sprint's; its weight is 0.5"
    )

    def __post_init__(self) -> None:
        """Raises ValueError where options contradict each other."""
        if self.velocity == "data" and self.guidance.high != 1.0:
            raise ValueError(
                f"velocity data leaves guidance up to {self.guidance.high:g} no teacher; set low and high 1"
            )


class Method:
    """The consistency function by its tangent; one network for any number of steps."""

    exported = "student"
    sampler: Sampler = "renoise"
    needs_images = True

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher. num_steps: calls of the student when sampling."""
        self.start = family.student_times(num_steps)[0]
        times.check_start(family.denoiser.schedule, family.student_times(num_steps))
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher = family.denoiser
        self.student = self.teacher.with_network(config.guidance.student(family))
        self.student_guidance = config.guidance.of_student
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        self.target = Target(self.student, config.target_decay)
        self.networks |= self.target.networks
        self.adversary = adversary.make(config.adversarial, family, self.teacher)
        rows = passes.rows(config.guidance.low, config.guidance.high)
        needs = (
            Pass("teacher", count=config.velocity == "teacher", rows=rows),
            Pass(self.target.role, config.derivative),
            Pass("student", "weights", 2 if self.adversary else 1),
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
        """-> {"scm", "gan"}: each [B]; without an average "scm" is |g / (|g| + floor)|^2, near 1 until g is small."""
        share = min(1.0, rng.step / self.config.warmup) if self.config.warmup else 1.0
        eps, t, scale = rng.normal(self.shape), self.draw(rng), self.config.guidance.draw(rng)
        v, target, g = self.tangent(batch, batch.images("scm"), eps, t, scale, share)
        step = losses.normalised(g, self.config.floor)
        terms = {"scm": math.prod(self.shape) * losses.mse(v, target + step)}
        if self.adversary:
            terms["gan"] = self.adversary.student(self.generate(batch, rng), batch.cond, rng)
        return terms

    def tangent(
        self, batch: Batch, x0: Tensor, eps: Tensor, t: Tensor, scale: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the student's v with its gradient, the target's, g): [B, ...] each, at x_t of x0, eps; t, scale: [B]."""
        schedule = self.teacher.schedule
        at, x_t = schedule(t).like(x0), add_noise(schedule, x0, eps, t)
        here = trigflow(at, self.config.sigma_data)
        if self.config.velocity == "teacher":
            with torch.no_grad():
                pred = self.config.guidance.guide(self.teacher, batch.uncond, scale)(x_t, t, batch.cond)
                x0, eps = pred.x0, pred.eps
        cos, sin = here.level.alpha, -here.level.d_alpha
        dt = cos * sin / here.rate  # the factor within the tangent, where it keeps both small
        dx = dt * combine("flow", x0, eps, at)
        cond, how = self.config.guidance.cond(batch.cond, scale), self.config.derivative
        span, dt = self.config.span, dt.flatten()
        target, change = derivative.along(self.target.denoiser, self.velocity, x_t, t, cond, dx, dt, how, span)
        v, real = self.velocity(self.student(x_t, t, cond)), here.velocity(x0, eps)
        if self.config.target_decay == 0:
            target = v.detach()  # the same but for the precision of the passes, which g is smaller than
        return v, target, losses.consistency_tangent(here.scale * x_t, target, real, change, cos, sin, share)

    def generate(self, batch: Batch, rng: Noise) -> Tensor:
        """The student's x0 for the adversarial term, [B, ...]: from noised images, a share at its first time."""
        schedule, t = self.teacher.schedule, self.draw(rng)
        t = torch.where(rng.uniform() < self.config.max_time, self.start, t)
        x_t = add_noise(schedule, batch.images("scm"), rng.normal(self.shape), t)
        cond = self.config.guidance.cond(batch.cond, self.config.guidance.draw(rng))
        return self.student(x_t, t, cond).x0

    def draw(self, rng: Noise) -> Tensor:
        """Continuous times: [B]."""
        mean = self.config.noise_mean + math.log(self.config.sigma_data)
        return times.logit_normal(rng, self.teacher.schedule, mean, self.config.noise_std, continuous=True)

    def velocity(self, pred: Prediction) -> Tensor:
        """A prediction's velocity in TrigFlow: [B, ...]."""
        return trigflow(pred.at, self.config.sigma_data).velocity(pred.x0, pred.eps)
