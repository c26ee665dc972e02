"""LCM: latent consistency models, with the guidance scale as an input (Luo et al. 2023, arXiv 2310.04378).

    grid = falling times of the teacher's DDIM solver, the student's own among them
    phase "student":
        t ~ U(grid), r = the grid's next time;  scale ~ U[low, high], per sample
        x_t = alpha x0 + sigma eps
        x_r = DDIM step of the guided teacher from x_t at t to r
        x = student(x_t, t, scale)'s x0
        y = target(x_r, r, scale)'s x0, no gradient;  at the grid's end x_r itself
        loss = mean(sqrt((x - y)^2 + c^2) - c)
        target <- decay target + (1 - decay) student

The paper's w is scale - 1, and its skipping step k is (number of times) / ``solver_steps``. It is sampled by noising
the predicted x0 afresh. LCM-LoRA (arXiv 2311.05556) is ``student.lora`` with ``guidance.embed: false`` and
``target_decay: 0``: the student then holds one mean of the scales and ignores ``guidance_scale``.

Departures from the reference code (Diffusers' examples/consistency_distillation): its boundary weights c_skip, c_out,
7e-6 and 1 at the grid's first time, are 0 and 1 here, as in the exported scheduler. The student's own times are on the
grid, which for 4 steps has 52 instead of 50 (else they would lie between trained ones). The projection of the scale's
embedding starts at zero, so that the student starts as its teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import losses, passes, times
from fastgen.config import option, section
from fastgen.ema import Target
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.rollout import along_ode
from fastgen.sampling import Sampler
from fastgen.schedule import add_noise

ABOUT = About(
    paper="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
    arxiv="2310.04378",
    needs=("images",),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``lcm``."""

    # the paper: w in [2, 14]
    guidance: Scales = section(Scales(low=3.0, high=15.0), "scales learnt")
    # the paper: k = 20 of 1000
    solver_steps: int = option(
        50, "teacher's DDIM steps over all times, rounded up to a multiple of the student's", low=1
    )
    # Diffusers' script; 0: as LCM-LoRA
    target_decay: float = option(0.95, "decay of the target's average; 0: the student itself", low=0, below=1)
    metric: Literal["huber", "l2"] = option("huber", "distance of student and target")
    huber_c: float = option(1e-3, "below this a difference counts by its square", above=0)


class Method:
    """Consistency distillation of the guided teacher, one to a few steps."""

    exported = "student"
    needs_images = True
    sampler: Sampler = "renoise"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """num_steps: calls of the student when sampling."""
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher = family.denoiser
        self.grid = times.solver_grid(self.teacher.schedule, family.student_times(num_steps), config.solver_steps)
        self.student = self.teacher.with_network(config.guidance.student(family))
        self.student_guidance = config.guidance.of_student
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        self.target = Target(self.student, config.target_decay)
        self.networks |= self.target.networks
        needs = (
            Pass("teacher", rows=passes.rows(config.guidance.low, config.guidance.high)),
            Pass(self.target.role),
            Pass("student", "weights"),
        )
        self.phases = (
            Phase(
                "student",
                ["student"],
                self.loss,
                after=self.target.follow,
                moves=[*self.target.networks],
                passes=needs,
            ),
        )

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"consistency": [B]}."""
        scales, schedule = self.config.guidance, self.teacher.schedule
        (t, r), scale = times.on_grid(rng, self.grid), scales.draw(rng)
        x_t = add_noise(schedule, batch.images("lcm"), rng.normal(self.shape), t)
        cond = scales.cond(batch.cond, scale)
        with torch.no_grad():
            teacher = scales.guide(self.teacher, batch.uncond, scale)
            x_r, _ = along_ode(teacher, schedule, x_t, t, r, batch.cond, "euler")
            at_end = (r == schedule.t_min).reshape(-1, *(1,) * (x_t.ndim - 1))
            y = torch.where(at_end, x_r, self.target.denoiser(x_r, r, cond).x0)
        return {"consistency": self.distance(self.student(x_t, t, cond).x0, y)}

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Of each sample: [B, ...] -> [B]."""
        return losses.mse(x, y) if self.config.metric == "l2" else losses.huber(x, y, self.config.huber_c)
