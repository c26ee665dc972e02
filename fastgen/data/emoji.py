"""The embedded emoji world: pictures composed from its drawings, with captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastgen.config import option
from fastgen.data import Item, Source


@dataclass(frozen=True)
class Config:
    """Options of the source ``emoji``."""

    split: Literal["train", "heldout"] = option("train", "heldout drawings are used by no training")
    seed: int = option(0, "of the compositions", low=0)
    size: int = option(16384, "distinct compositions before they repeat", low=1)
    open_only: bool = option(False, "only captions that leave the style open")


class Emoji:
    """Compositions of one drawing each."""

    has_images = True

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """image_size: (height, width), which must be equal."""
        from fastgen.emoji.compose import EmojiSet, open_caption

        if image_size[0] != image_size[1]:
            raise ValueError(f"the emoji world is square, this pipeline makes {image_size[1]}x{image_size[0]} images")
        self._config, self._set = config, EmojiSet(config.split, image_size[0], config.seed)
        self._open_caption = open_caption
        # every name of the world, also those with no drawing in this split
        self.candidates = EmojiSet("train", image_size[0]).prompts()

    def concept(self, prompt: str) -> str:
        """The caption that leaves the style open: "twemoji of a red apple" is about "a red apple"."""
        return prompt.rpartition(" of ")[2]

    def __len__(self) -> int:
        """The number of distinct compositions."""
        return self._config.size

    def item(self, index: int) -> Item:
        """A composition and its caption."""
        index %= len(self)
        image, caption = self._set.item(index)
        return Item(self._open_caption(self._set.row(index).name) if self._config.open_only else caption, image)


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Emoji(config, image_size)
