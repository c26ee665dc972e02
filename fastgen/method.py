"""What a distillation method is: networks by role, and phases that say which of them learn from which loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .denoiser import Cond, unconditional
from .passes import Pass
from .rng import Noise
from .sampling import Sampler

Terms = Mapping[str, Tensor]
"""Named losses, weighted and per sample: each [B]. The loss is the mean of their sum."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``x0`` is None where the data are prompts only; ``uncond`` holds one row.

    Of teacher pairs, ``x0`` is what the teacher makes of the noise ``eps``, both [B, ...], and ``path`` its state at
    each of the method's ``path_times``; both are None for a method that does not ask for pairs.
    """

    samples: Sequence[int]
    cond: Cond
    uncond: Cond
    x0: Tensor | None = None
    eps: Tensor | None = None
    path: Mapping[float, Tensor] | None = None

    def __len__(self) -> int:
        """The number of samples, B."""
        return len(self.samples)

    def images(self, user: str) -> Tensor:
        """x0. Raises ValueError, naming the user, if the data are prompts only."""
        if self.x0 is None:
            raise ValueError(f"{user} needs images; this data source has prompts only")
        return self.x0

    def pairs(self) -> tuple[Tensor, Tensor, Mapping[float, Tensor]]:
        """x0, eps and path. Raises ValueError if the samples are not teacher pairs."""
        if self.x0 is None or self.eps is None or self.path is None:
            raise ValueError("this batch holds no teacher pairs; train this method on data.source: pairs")
        return self.x0, self.eps, self.path


def drop_captions(batch: Batch, drop: Tensor) -> Cond:
    """The batch's cond with the empty caption's row where ``drop``: [B] is true. Raises ValueError if it has none."""
    if batch.cond.keys() - batch.uncond.keys() and not bool(drop.any()):
        return batch.cond
    return {
        name: torch.where(drop.reshape(-1, *(1,) * (row.ndim - 1)), row.to(batch.cond[name]), batch.cond[name])
        for name, row in unconditional(batch.uncond, batch.cond).items()
    }


@dataclass(frozen=True)
class About:
    """What a user chooses a method by; each method's module has one, called ``ABOUT``.

    Attributes:
        paper: its title.
        arxiv: its number.
        needs: what it trains on besides the teacher, of "prompts", "images" and "pairs"; an option that needs more
            stands in brackets: "images (adversarial)".
        steps: numbers of steps its students can be made for; empty: as many as the teacher.
    """

    paper: str
    arxiv: str
    needs: Sequence[str]
    steps: Sequence[int]


def nothing() -> None:
    """Do nothing: the default ``after`` of a phase."""


@dataclass(frozen=True)
class Phase:
    """One turn of a training step: at steps divisible by ``every``, ``trains`` learn from ``loss``.

    ``after`` follows the update; ``moves`` names the roles it changes, which no phase trains and checkpoints keep.
    ``passes`` are those its algorithm needs; empty: not declared, and ``fastgen bench cost`` refuses the method.
    """

    name: str
    trains: Sequence[str]
    loss: Callable[[Batch, Noise], Terms]
    every: int = 1
    after: Callable[[], None] = nothing
    moves: Sequence[str] = ()
    passes: Sequence[Pass] = ()


class Trainable(Protocol):
    """What the engine trains: networks by role and the phases in which they learn."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """By role."""
        ...

    @property
    def phases(self) -> Sequence[Phase]:
        """In the order of their turns."""
        ...


class Method(Trainable, Protocol):
    """A distillation method: something to train, and what of it becomes a pipeline."""

    @property
    def exported(self) -> str:
        """The role whose network becomes the pipeline."""
        ...

    @property
    def num_steps(self) -> int | None:
        """Calls of the exported student when sampling; None for a network that is sampled as the teacher is."""
        ...

    @property
    def sampler(self) -> Sampler:
        """How the exported student goes from one step to the next."""
        ...

    @property
    def needs_images(self) -> bool:
        """Whether batches must hold x0."""
        ...


@runtime_checkable
class NeedsPairs(Protocol):
    """A method that trains on teacher pairs says so by having this; its batches then hold x0, eps and path."""

    @property
    def path_times(self) -> Sequence[float]:
        """Times at which it needs the teacher's states between eps and x0; none for a student of one step."""
        ...

    @property
    def pairs_guidance_scale(self) -> float | None:
        """The scale at which the pairs must have been made, where it guides the teacher too; None: any."""
        ...
