"""The roles of score distillation, and how its fake score follows the student's samples."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from . import losses, times
from .denoiser import Cond, Denoiser
from .family import Family
from .rng import Noise
from .schedule import add_noise


def roles(teacher: Denoiser, family: Family) -> tuple[Denoiser, Denoiser, dict[str, nn.Module]]:
    """(student, fake score, networks by role); the fake score starts as a copy of the teacher."""
    student = teacher.with_network(family.student())
    fake_score = copied(teacher)
    networks = {"teacher": teacher.network, "student": student.network, "fake_score": fake_score.network}
    return student, fake_score, networks


def copied(teacher: Denoiser) -> Denoiser:
    """A fake score as it starts: a copy of the teacher that learns."""
    return teacher.with_network(copy.deepcopy(teacher.network).requires_grad_(True))


def denoising(fake_score: Denoiser, x0: Tensor, cond: Cond, rng: Noise) -> Tensor:
    """Denoising score matching on the student's x0: [B, ...], held fixed, t ~ U(all times): [B]."""
    x0, schedule = x0.detach(), fake_score.schedule
    t, eps = times.uniform(rng, schedule), rng.normal(x0.shape[1:])
    return losses.denoising(fake_score(add_noise(schedule, x0, eps, t), t, cond), x0, eps)
