"""MeanFlow: average velocities over restricted intervals (Geng et al. 2025, arXiv 2505.13447).

    every step, on rectified flow's coordinates z = x_t / (alpha + sigma), s = sigma / (alpha + sigma):
        log(sigma / alpha) ~ N, t between the trained times;  r = the student's next time below t, or t_min
        x_t = alpha x0 + sigma eps of a real image
        v = the teacher's guided eps - x0                         (velocity: data takes that of x0 and eps)
        u = student's eps - x0;  du/ds along v with r fixed, exact and without gradient
        student <- |u - sg(v - (s_t - s_r) du/ds)|^2 / sg(the same + c)^p

u is the velocity averaged from t to r, z_r = z - (s_t - s_r) u. Since the student's x0 is z - s_t u and its eps is
z + (1 - s_t) u, that step is (1 - s_r) x0 + s_r eps, which in x_t is alpha_r x0 + sigma_r eps: DDIM, whatever the
schedule. So the student is sampled by ``ddim`` at its own times, each jump being the one it was trained for, and the
last one ends on t_min, where the shipped scheduler ends. At r = t the loss is flow matching.

Departures: stock networks take no r, so r follows from t, the intervals are the student's own, and no r = t is mixed
in; as a function of t the average jumps at each of the student's times, whose own value belongs to the interval below.
The network keeps the teacher's output kind and clock. Guidance is the teacher's: the paper's, from the student's own
u at r = t, needs an r. Derivatives are computed in the weights' own precision (float32), also where passes run in
bfloat16. ``warmup``, as for sCM, lets the second part of the target come in slowly (not in the paper; off at 0). Not
there either is the average (``target_decay``), which small batches need as they do for sCM: its u, moved by a share of
the way to the target (``relaxation``), takes the target's place. That leaves the fixed point where it is; by a share
as large as the ``span`` of finite differences one comes to the average's u at their other end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import derivative, losses, passes, times
from fastgen.config import option
from fastgen.coordinates import rectified
from fastgen.denoiser import guided
from fastgen.derivative import SPAN, Derivative
from fastgen.ema import Target
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.prediction import Prediction, combine
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise
from fastgen.transfer import to_device

ABOUT = About(
    paper="Mean Flows for One-step Generative Modeling",
    arxiv="2505.13447",
    needs=("prompts", "images"),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``meanflow``; the numbers are the paper's for ImageNet 256."""

    velocity: Literal["teacher", "data"] = option("teacher", "the flow's: of the teacher, or of data and noise")
    guidance_scale: float = option(3.0, "of the teacher; 1.0 is off", low=1)  # NVlabs/FastGen's for Wan
    noise_mean: float = option(-0.4, "of log(sigma / alpha), the logit of s")
    noise_std: float = option(1.0, "of the same", above=0)
    power: float = option(1.0, "p of the adaptive weight; 0 is the squared error", low=0)
    floor: float = option(1e-3, "c of the adaptive weight", above=0)
    warmup: int = option(0, "steps over which the change of u comes into the target", low=0)
    derivative: Derivative = option("jvp", "exact, about three passes; or finite_differences, two passes, any kernel")
    relaxation: float = option(0.1, "share of the way from the average to the target", above=0, high=1)
    target_decay: float = option(0.0, "of the average that is moved on; 0: the student itself", low=0, below=1)
    span: float = option(SPAN, "of finite_differences, looking back; wider for networks of whole timesteps", above=0)

    def __post_init__(self) -> None:
        """Raises ValueError where options contradict each other."""
        if self.velocity == "data" and self.guidance_scale != 1.0:
            raise ValueError(f"velocity data leaves guidance_scale {self.guidance_scale:g} no teacher; set it to 1.0")


class Method:
    """The average velocity down to the student's next time."""

    exported = "student"
    sampler: Sampler = "ddim"
    needs_images = True

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher. num_steps: calls of the student when sampling."""
        times.check_start(family.denoiser.schedule, family.student_times(num_steps))
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher = family.denoiser
        self.student = self.teacher.with_network(family.student())
        self.edges = sorted({self.teacher.schedule.t_min, *family.student_times(num_steps)})
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        self.target = Target(self.student, config.target_decay)
        self.networks |= self.target.networks
        needs = (
            Pass("teacher", count=config.velocity == "teacher", rows=passes.rows(config.guidance_scale)),
            Pass(self.target.role, config.derivative),
            Pass("student", "weights"),
        )
        self.phases = (
            Phase(
                "student",
                ["student"],
                self.student_loss,
                after=self.target.follow,
                moves=[*self.target.networks],
                passes=needs,
            ),
        )

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"meanflow": [B]}, near 1 at power 1 until the error is small."""
        config, schedule, x0 = self.config, self.teacher.schedule, batch.images("meanflow")
        t = times.logit_normal(rng, schedule, config.noise_mean, config.noise_std, continuous=True)
        share = min(1.0, rng.step / config.warmup) if config.warmup else 1.0
        u, target = self.average(batch, x0, rng.normal(self.shape), t, self.next_time(t), share)
        return {"meanflow": losses.adaptive(u, target, config.power, config.floor)}

    def average(
        self, batch: Batch, x0: Tensor, eps: Tensor, t: Tensor, r: Tensor, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The student's u with its gradient, and its target: [B, ...] each, from x_t of x0 and eps at t to r: [B]."""
        schedule = self.teacher.schedule
        at, x_t = schedule(t).like(x0), add_noise(schedule, x0, eps, t)
        if self.config.velocity == "teacher":
            with torch.no_grad():
                pred = guided(self.teacher, batch.uncond, self.config.guidance_scale)(x_t, t, batch.cond)
                x0, eps = pred.x0, pred.eps
        here, there = rectified(at), rectified(schedule(r).like(x0))
        dt = (here.clock - there.clock) / here.rate  # the interval within the tangent
        dx = dt * combine("flow", x0, eps, at)
        how, span, dt = self.config.derivative, self.config.span, dt.flatten()
        now, change = derivative.along(self.target.denoiser, velocity, x_t, t, batch.cond, dx, dt, how, span)
        u, target = velocity(self.student(x_t, t, batch.cond)), here.velocity(x0, eps) - share * change
        if self.config.target_decay > 0:
            target = now + self.config.relaxation * (target - now)
        return u, target

    def next_time(self, t: Tensor) -> Tensor:
        """The largest of the student's times and t_min that is below t: [B] -> [B]; t_min itself at t_min."""
        edges = to_device(torch.tensor(self.edges, dtype=t.dtype), t.device)
        return edges[(torch.searchsorted(edges, t) - 1).clamp(min=0)]


def velocity(pred: Prediction) -> Tensor:
    """A prediction's velocity on rectified flow: [B, ...]."""
    return pred.eps - pred.x0
