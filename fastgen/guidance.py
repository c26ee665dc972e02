"""The guidance scale as an input of the student: one pass does what classifier-free guidance needs two for.

The scale is Diffusers' everywhere, uncond + scale (cond - uncond), 1.0 is off. Papers that write
(1 + w) cond - w uncond mean w = scale - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .config import option
from .denoiser import Cond, Denoise, guided
from .family import Family
from .rng import Noise


def with_guidance(cond: Cond, scale: Tensor | float) -> Cond:
    """``cond`` with a guidance scale for each sample, [B] or one number, for a network that takes it as an input.

    The family's ``call`` makes of it what its stock pipeline makes of ``guidance_scale``.
    """
    first = next(iter(cond.values()))
    return {**cond, "guidance": torch.as_tensor(scale, device=first.device).expand(len(first))}


@dataclass(frozen=True)
class Scales:
    """Guidance scales of the teacher that a student learns, drawn uniformly for each sample."""

    low: float = option(3.0, "smallest scale", low=1)
    high: float = option(15.0, "largest scale", low=1)
    embed: bool = option(
        True, "the scale is an input of the student; else it learns their mean, and calls it ignores guidance_scale"
    )
    default: float = option(7.5, "scale that fastgen calls the student with where none is given", low=1)

    def __post_init__(self) -> None:
        """Raise ValueError on an empty range, and on a default outside it."""
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} must not be above high {self.high:g}")
        if self.embed:
            self._within("default", self.default)

    def _within(self, name: str, scale: float) -> None:
        if not self.low <= scale <= self.high:
            raise ValueError(f"{name} {scale:g} must be one of the scales trained, {self.low:g} to {self.high:g}")

    def student(self, family: Family) -> nn.Module:
        """A student's network, with the scale as an input if so chosen.

        Raises ValueError where the pipeline has no place for one, or where its call would give one never trained.
        """
        if not self.embed:
            return family.student()
        if family.stock_guidance is None:
            raise ValueError("this family's pipeline has no place for a guidance scale; set embed: false")
        self._within("the pipeline's own default guidance_scale", family.stock_guidance)
        return family.student(embed_guidance=True)

    def draw(self, rng: Noise) -> Tensor:
        """A scale for each sample: [B]."""
        return self.low + (self.high - self.low) * rng.uniform()

    def guide(self, teacher: Denoise, uncond: Cond, scale: Tensor) -> Denoise:
        """The teacher guided by each sample's scale, [B]; the teacher itself if no scale but 1 is trained."""
        return guided(teacher, uncond, self.low if self.low == self.high else scale)

    def cond(self, cond: Cond, scale: Tensor) -> Cond:
        """What the student is called with."""
        return with_guidance(cond, scale) if self.embed else cond

    @property
    def of_student(self) -> float | None:
        """The default scale of a student that takes one as an input; None: it takes none."""
        return self.default if self.embed else None


@runtime_checkable
class TakesGuidance(Protocol):
    """A method whose students may take the guidance scale as an input."""

    @property
    def student_guidance(self) -> float | None:
        """The scale of a call that names none; None: this student takes none."""
        ...


def student_guidance(method: object) -> float | None:
    """The scale that the method's student is called with; None: it takes none, and ignores ``guidance_scale``."""
    return method.student_guidance if isinstance(method, TakesGuidance) else None
