"""A folder of images, with captions from ``captions.jsonl`` in it or from a .txt beside each image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fastgen.config import option
from fastgen.data import Item, Source
from fastgen.data.prompts import shuffled

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Config:
    """Options of the source ``images``."""

    path: str = option(help="a folder of images, searched with its subfolders")
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)


class Images:
    """A shuffled folder of captioned images, resized and centre-cropped to the pipeline's size."""

    has_images = True

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """List the folder. Raises ValueError if it is missing or holds no image."""
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such image folder")
        self._files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self._files:
            raise ValueError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
        self._captions = _captions(folder)
        self._folder, self._size, self._seed = folder, image_size, config.seed
        self.candidates = sorted({self._caption(file) for file in self._files})

    def concept(self, prompt: str) -> str:
        """The caption itself."""
        return prompt

    def __len__(self) -> int:
        """The number of images."""
        return len(self._files)

    def item(self, index: int) -> Item:
        """An image and its caption; without one, the empty caption."""
        file = self._files[shuffled(index, len(self), self._seed)]
        return Item(self._caption(file), load_image(file, self._size))

    def _caption(self, file: Path) -> str:
        caption = self._captions.get(file.relative_to(self._folder).as_posix())
        if caption is not None:
            return caption
        beside = file.with_suffix(".txt")
        return beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""


def load_image(file: Path, size: tuple[int, int]) -> np.ndarray:
    """An RGB image resized to cover ``size`` (height, width) and centre-cropped: uint8 [H, W, 3].

    It stands as its EXIF says, and what is transparent is white. Raises ValueError, naming the file, if it cannot be
    read.
    """
    height, width = size
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            image = upright.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); remove or replace it") from None
    scale = max(width / image.width, height / image.height)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _captions(folder: Path) -> dict[str, str]:
    path = folder / "captions.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[str(row["file"])] = str(row["caption"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is not a JSON object with 'file' and 'caption'") from None
    return found


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Images(config, image_size)
