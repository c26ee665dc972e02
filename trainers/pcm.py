"""PCM: phased consistency models (Wang et al. 2024, arXiv 2405.18407).

    the student's own times cut the clock into phases; f(x_t, t) = DDIM step of the student from t to its phase's end e
    grid = falling times of the teacher's DDIM solver, the student's own among them
    phase "student":
        t ~ U(grid), r = the grid's next time;  scale ~ U[low, high], per sample
        x_t = alpha x0 + sigma eps
        x_r = DDIM step of the guided teacher from x_t at t to r
        x = f(x_t, t);  y = f(x_r, r), no gradient, or x_r itself where r = e
        loss = mean(sqrt((x - y)^2 + c^2) - c)
        with the GAN: + weight (-D(x)), x noised on from e to a time of its phase
    phase "discriminator", with the GAN: its heads on the teacher's features learn y as real against x as fake, both
        noised on from e to the same time

A phase's end is the next one's start, so sampling is deterministic, by DDIM on the student's own times, and each step
is the map that was trained. There is no target network. The paper's w is scale - 1; the scale is no input here.

Departures from the reference code: the phases are the intervals between the student's own times, where the code's end
up to 15 of 1000 off its sampler's unless the solver's steps are a multiple of them. The GAN's two sides learn at each
step, from pairs of their own, where the code alternates them; its noise reaches from just above the phase's end to
its start; heads and features are the toolkit's, the code's are 4 heads on each of 9 levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import adversary, losses, passes, times
from fastgen.adversary import Adversarial, Noising
from fastgen.config import option, section
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.prediction import Prediction
from fastgen.rng import Noise
from fastgen.rollout import along_ode
from fastgen.sampling import Sampler
from fastgen.schedule import add_more_noise, add_noise
from fastgen.transfer import to_device

ABOUT = About(paper="Phased Consistency Models", arxiv="2405.18407", needs=("images",), steps=range(1, 9))


@dataclass(frozen=True)
class Config:
    """Options of ``pcm``."""

    # the code's SDXL setting: w in [6, 7]
    guidance: Scales = section(Scales(low=7.0, high=8.0, embed=False), "scales of the teacher")
    # SDXL: 40, SD 1.5: 50
    solver_steps: int = option(
        40, "teacher's DDIM steps over all times, rounded up to a multiple of the student's", low=1
    )
    metric: Literal["huber", "l2"] = option("huber", "distance of the two jumps")
    huber_c: float = option(1e-3, "below this a difference counts by its square", above=0)
    adversarial: Adversarial = section(Adversarial(loss="hinge"), "the GAN; paper: 0.1")


class Method:
    """Consistency within each of the student's own intervals."""

    exported = "student"
    needs_images = True
    sampler: Sampler = "ddim"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """num_steps: phases, and calls of the student when sampling."""
        self.config, self.num_steps, self.shape = config, num_steps, family.latent_shape
        self.teacher, self.schedule = family.denoiser, family.denoiser.schedule
        self.edges = [*family.student_times(num_steps), self.schedule.t_min]
        self.shares = [times.share(self.schedule, t) for t in self.edges]
        self.grid = times.solver_grid(self.schedule, self.edges[:-1], config.solver_steps)
        self.student = self.teacher.with_network(config.guidance.student(family))
        self.student_guidance = config.guidance.of_student
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.network, "student": self.student.network}
        self.adversary = adversary.make(config.adversarial, family, self.teacher)
        step = Pass("teacher", rows=passes.rows(config.guidance.low, config.guidance.high))
        needs = (step, Pass("student"), Pass("student", "weights"), *adversary.student_passes(self.adversary))
        self.phases: tuple[Phase, ...] = (Phase("student", ["student"], self.student_loss, passes=needs),)
        if self.adversary:
            self.networks["discriminator"] = self.adversary.heads
            needs = (step, Pass("student", count=2), *adversary.critic_passes(self.adversary))
            critic = Phase("discriminator", ["discriminator"], self.discriminator_loss, passes=needs)
            self.phases = (critic, *self.phases)

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"consistency", "gan"}: each [B]."""
        x, y, phase = self.jumps(batch, rng)
        l2 = self.config.metric == "l2"
        terms = {"consistency": losses.mse(x, y) if l2 else losses.huber(x, y, self.config.huber_c)}
        if self.adversary:
            terms["gan"] = self.adversary.student(x, batch.cond, rng, self.noising(phase, rng))
        return terms

    def discriminator_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"gan": [B]}."""
        assert self.adversary is not None
        with torch.no_grad():
            x, y, phase = self.jumps(batch, rng)
        return {"gan": self.adversary.discriminator(y, x, batch.cond, rng, self.noising(phase, rng))}

    def jumps(self, batch: Batch, rng: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """The student's two jumps to the end of a phase, from t and from r: [B, ...] both, and which phase: [B]."""
        scales, schedule = self.config.guidance, self.schedule
        (t, r), scale = times.on_grid(rng, self.grid), scales.draw(rng)
        x_t = add_noise(schedule, batch.images("pcm"), rng.normal(self.shape), t)
        phase, cond = self.phase_of(t), scales.cond(batch.cond, scale)
        end = to_device(torch.tensor(self.edges[1:], dtype=t.dtype), t.device)[phase]
        with torch.no_grad():
            teacher = scales.guide(self.teacher, batch.uncond, scale)
            x_r, _ = along_ode(teacher, schedule, x_t, t, r, batch.cond, "euler")
            at_end = (r == end).reshape(-1, *(1,) * (x_t.ndim - 1))
            y = torch.where(at_end, x_r, self.jump(self.student(x_r, r, cond), end))
        return self.jump(self.student(x_t, t, cond), end), y, phase

    def phase_of(self, t: Tensor) -> Tensor:
        """Which of the student's intervals, its start included, holds t: [B] -> [B], 0 being the noisiest."""
        starts = to_device(torch.tensor(self.edges[:-1], dtype=t.dtype), t.device)
        return (t[:, None] <= starts).sum(1) - 1

    def jump(self, pred: Prediction, end: Tensor) -> Tensor:
        """A prediction's DDIM step to ``end``: [B, ...]."""
        return add_noise(self.schedule, pred.x0, pred.eps, end)

    def noising(self, phase: Tensor, rng: Noise) -> Noising:
        """Noise on from the end of each sample's phase, to a time within it that all that is judged shares."""
        given = (torch.tensor(v, dtype=torch.float64) for v in (self.edges, self.shares))
        edges, shares = (to_device(v, phase.device) for v in given)
        t = times.uniform(rng, self.schedule, shares[phase + 1], shares[phase])

        def noised(x: Tensor, rng: Noise) -> tuple[Tensor, Tensor]:
            return add_more_noise(self.schedule, x, rng.normal(self.shape), edges[phase + 1], t), t

        return noised
