"""KD: regression on what the teacher made of given noise, or its way there (Luhman & Luhman 2021, arXiv 2101.02388).

    before: eps -> x0 by the teacher's guided DDIM, its states x_t at the student's times kept: ``fastgen pairs``
    every step, phase "student":
        t one of the student's times; x_t = eps at the first, else the teacher's state
        target = x0                                           one step, or target: x0
                 the x0 by which DDIM steps on from x_t to the teacher's next state, or to x0 at the end
        student <- |student's x0(x_t) - target|^2             or pseudo-Huber, or LPIPS of the decoded images

With the default target a few-step student is sampled by DDIM and follows the teacher's own states. With target x0 it
learns where the probability flow ends, and is sampled by noising that afresh: DDIM with such a student would make too
little of the noise (on a Gaussian of deviation 0.5 it gives 0.73). Alone the regression blurs what one step cannot
tell apart; any method goes on from the exported pipeline by ``student.init``.

Departures from the paper: latents in the place of pixels, conditions and guidance (which lie in the pairs), more than
one step (target x0 is NVlabs/FastGen's KDModel, the other progressive distillation's, arXiv 2202.00512).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen import distance
from fastgen.config import option, section
from fastgen.family import Family
from fastgen.lpips import Perceptual
from fastgen.method import About, Batch, Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise
from fastgen.sampling import Sampler, ddim_x0
from fastgen.transfer import to_device

ABOUT = About(
    paper="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
    arxiv="2101.02388",
    needs=("pairs",),
    steps=range(1, 9),
)


@dataclass(frozen=True)
class Config:
    """Options of ``kd``."""

    target: Literal["next", "x0"] = option(
        "next", "of a student of several steps: the teacher's next state, or its x0"
    )
    distance: Literal["l2", "pseudo_huber", "lpips"] = option(
        "l2", "of the latents, l2 being the mean square; lpips: of the decoded images"
    )
    huber: float = option(0.00054, "c of pseudo-Huber, per element; 0 is the norm", low=0)  # iCT's (2310.14189)
    lpips: Perceptual = section(Perceptual(), "where distance is lpips")


class Method:
    """Regression on teacher pairs or paths."""

    exported = "student"
    needs_images = False
    pairs_guidance_scale: float | None = None

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """Copy the teacher. num_steps: calls of the student when sampling."""
        self.num_steps = num_steps
        self.distance = distance.make(config.distance, family, config.lpips, config.huber)
        self.schedule, self.times = family.denoiser.schedule, family.student_times(num_steps)
        self.path_times: Sequence[float] = self.times[1:]
        self.sampler: Sampler = "ddim" if num_steps > 1 and config.target == "next" else "renoise"
        self.student = family.denoiser.with_network(family.student())
        self.networks: dict[str, nn.Module] = {"student": self.student.network}
        self.phases = (Phase("student", ["student"], self.student_loss, passes=[Pass("student", "weights")]),)

    def student_loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"regression": [B]}."""
        x0, eps, path = batch.pairs()
        states = [eps, *(path[t] for t in self.path_times)]
        k, rows = (rng.uniform() * self.num_steps).long(), torch.arange(len(batch), device=x0.device)
        x_t, t = torch.stack(states)[k, rows], self._at(self.times, k)
        target = x0
        if self.sampler == "ddim":
            x_r, r = torch.stack([*states[1:], x0])[k, rows], self._at([*self.times[1:], self.schedule.t_min], k)
            target = ddim_x0(x_t, t, x_r, r, self.schedule)
        return {"regression": self.distance(self.student(x_t, t, batch.cond).x0, target)}

    @staticmethod
    def _at(times: Sequence[float], k: Tensor) -> Tensor:
        return to_device(torch.tensor(times, dtype=torch.float64), k.device)[k]
