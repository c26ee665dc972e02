"""What sources of images share: opening a picture, and passing over what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import IO, overload

import numpy as np
from PIL import Image, ImageOps

from fastgen.data import Item, Skipped, Unreadable
from fastgen.data.prompts import shuffled

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
"""Of files that are taken for images."""
LIMIT = "images that may be unreadable before the run fails: below 1 a share of all, from 1 on a number"
"""The help of an option ``unreadable``."""


def load(file: Path | IO[bytes], name: str, size: tuple[int, int]) -> np.ndarray:
    """An RGB image resized to cover ``size`` (height, width) and centre-cropped: uint8 [H, W, 3].

    It stands as its EXIF says, and what is transparent is white. Raises Unreadable, with ``name``, if it is damaged,
    gone or forbidden, and OSError if the disk fails, which it may not do the next time.
    """
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            image = upright.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged bytes raise all sorts
        lasting = isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError)
        if isinstance(error, OSError) and error.errno is not None and not lasting:
            raise OSError(error.errno, f"cannot be read now: {error.strerror}", name) from error
        raise Unreadable(name, str(error) or type(error).__name__) from None
    return fit(image, size)


def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An RGB image resized to cover ``size`` (height, width) and centre-cropped: uint8 [H, W, 3]."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def turn(index: int, n: int, seed: int) -> Iterator[int]:
    """The number of item ``index`` of a shuffled source of n, then those that stand in for it, in the turn's order.

    What an item is thus depends on index and seed alone, whoever reads it and whatever was read before.
    """
    first = index - index % n
    for k in range(n):
        yield shuffled(first + (index + k) % n, n, seed)


def readable(read: Callable[[int], Item], index: int, n: int, seed: int, skipped: Skipped) -> Item:
    """Item ``index`` of a shuffled source of n, or the next in that turn's order that can be read.

    read: by an item's own number. Raises Unreadable where more cannot be read than may be.
    """
    for number in turn(index, n, seed):
        if number not in skipped:
            try:
                return read(number)
            except Unreadable as error:
                skipped.add(number, error)
    raise ValueError(f"none of the {n} images can be read; {next(iter(skipped))} is one of them")


class Captions(Sequence[str]):
    """The distinct captions of a source, gathered when first asked for, which may take as long as reading all."""

    def __init__(self, gather: Callable[[], Sequence[str]]) -> None:
        """gather: all captions, in whatever order."""
        self._gather = gather

    @cached_property
    def _distinct(self) -> list[str]:
        return sorted(set(self._gather()))

    def __len__(self) -> int:
        return len(self._distinct)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        return self._distinct[place]

    def __eq__(self, other: object) -> bool:
        return self._distinct == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def digest(*parts: object) -> str:
    """A digest of what these parts print as."""
    made = blake2b(digest_size=16)
    for part in parts:
        made.update(repr(part).encode())
    return made.hexdigest()
