"""Composed scenes of the emoji world: one to four drawings for GenEval's tasks, with captions and records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastgen.config import option
from fastgen.data import Item, Source


@dataclass(frozen=True)
class Config:
    """Options of the source ``scenes``."""

    split: Literal["train", "heldout"] = option("train", "heldout drawings are used by no training of a generator")
    seed: int = option(0, "of the compositions", low=0)
    size: int = option(24576, "distinct compositions before they repeat", low=1)
    singles: float = option(0.0, "share of items that are single drawings, as of the source emoji", low=0, high=1)
    extra: bool = option(False, "also two of one noun in two colours, which is none of GenEval's tasks")


class Scenes:
    """Compositions of one to four drawings; the tasks take turns, so that each has as many items as another."""

    has_images = True
    candidates: Sequence[str] = ()

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """image_size: (height, width), which must be equal."""
        from fastgen.emoji.compose import EXTRA_TASKS, TASKS, EmojiSet

        if image_size[0] != image_size[1]:
            raise ValueError(f"the emoji world is square, this pipeline makes {image_size[1]}x{image_size[0]} images")
        self._config, self._side = config, image_size[0]
        self._single = EmojiSet(config.split, image_size[0], config.seed)
        self._tasks = TASKS + EXTRA_TASKS * config.extra

    def concept(self, prompt: str) -> str:
        """The prompt itself: there is nothing to choose among."""
        return prompt

    def __len__(self) -> int:
        """The number of distinct compositions."""
        return self._config.size

    def item(self, index: int) -> Item:
        """A composition, its caption, and GenEval's record of it unless it is a single drawing's."""
        from fastgen.emoji.compose import scene

        index %= len(self)
        config = self._config
        if np.random.default_rng([config.seed, index, 1]).random() < config.singles:
            image, caption = self._single.item(index)
            return Item(caption, image)
        task = self._tasks[index % len(self._tasks)]
        made = scene(np.random.default_rng([config.seed, index, 2]), task, split=config.split, size=self._side)
        return Item(made.prompt, made.image, made.metadata)


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Scenes(config, image_size)
