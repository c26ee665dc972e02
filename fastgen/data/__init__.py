"""Data sources, one file each, addressed by number. A module with ``Config`` and ``open`` is a source by existing.

``open(config, image_size) -> Source``. A source knows prompts and pixels; ``batches.Batches`` turns them into what a
method trains on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ..family import Family
from .skipped import Skipped as Skipped
from .skipped import Unreadable as Unreadable


@dataclass(frozen=True)
class Item:
    """A prompt and, where the source has them, its picture, uint8 [H, W, 3], and GenEval's record of the prompt."""

    prompt: str
    image: np.ndarray | None = None
    metadata: Mapping[str, Any] | None = None


class Source(Protocol):
    """Items by number, without end: what an item is depends on its index and the source's seed alone."""

    @property
    def has_images(self) -> bool:
        """Whether its items have pictures."""
        ...

    @property
    def candidates(self) -> Sequence[str]:
        """What its prompts can be about, for retrieval to choose among."""
        ...

    def concept(self, prompt: str) -> str:
        """The candidate that a prompt of this source is about."""
        ...

    def __len__(self) -> int:
        """How many items there are before they repeat."""
        ...

    def item(self, index: int) -> Item:
        """Item number ``index``, 0 or more; past the end the source goes round, shuffled anew."""
        ...


@runtime_checkable
class PairSource(Source, Protocol):
    """A source whose items are pairs of noise and what a teacher made of it."""

    def check(self, family: str, teacher: Family) -> None:
        """Raise ValueError unless this teacher, of the family of this name, made the pairs."""
        ...

    def check_path(self, times: Sequence[float]) -> None:
        """Raise ValueError unless the teacher's states at these times are kept."""
        ...

    def check_guidance(self, scale: float | None) -> None:
        """Raise ValueError unless the teacher was guided by this scale; None: by whichever."""
        ...

    def pairs(self, indices: Sequence[int], times: Sequence[float]) -> tuple[Tensor, Tensor, Mapping[float, Tensor]]:
        """Of these items: x0, eps and, by time, the states between: [B, ...] each, float32."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A source whose items have numbers of their own, gone through in the order of ``prompts.shuffled``."""

    @property
    def seed(self) -> int:
        """Of the order."""
        ...

    def read(self, number: int) -> Item:
        """The item of this number, below the source's length. Raises Unreadable."""
        ...

    def digest(self) -> str:
        """Of what is listed: where it differs the items do."""
        ...


@runtime_checkable
class Skips(Protocol):
    """A source that passes over what cannot be read."""

    @property
    def skipped(self) -> Skipped:
        """What it has passed over."""
        ...


@runtime_checkable
class LatentSource(Protocol):
    """A source whose images are encoded already."""

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Of these items, as the denoiser sees them: [B, ...], float32."""
        ...
