"""A folder of images, with captions from a list in it (jsonl or csv), a .txt beside each, or class folders."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastgen.config import option
from fastgen.data import Item, Skipped, Source
from fastgen.data.pictures import LIMIT, SUFFIXES, Captions, digest, load, readable
from fastgen.plain import from_json

LISTS = {
    "captions.jsonl": ("file", "caption"),
    "captions.csv": ("file", "caption"),
    "metadata.jsonl": ("file_name", "text"),  # as Hugging Face's image folders have it
    "metadata.csv": ("file_name", "text"),
}
"""A list of captions -> its keys, or columns."""


@dataclass(frozen=True)
class Config:
    """Options of the source ``images``."""

    path: str = option(help="a folder of images, searched with its subfolders")
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)
    captions: Literal["files", "folders"] = option(
        "files",
        "files: captions.jsonl or .csv in the folder (file, caption), metadata.jsonl or .csv (file_name, text), else "
        "a .txt beside each image; folders: an image's caption, or class, is the name of its folder under path",
    )
    unreadable: float = option(0.01, LIMIT, low=0)


class Images:
    """A shuffled folder of captioned images, resized and centre-cropped to the pipeline's size."""

    has_images = True

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """List the folder. Raises ValueError if it is missing, holds no image, or its captions are no list."""
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such image folder")
        self._files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self._files:
            raise ValueError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
        self._folder, self._size, self._by_folder = folder, image_size, config.captions == "folders"
        if self._by_folder:
            for file in self._files:
                if file.parent == folder:
                    raise ValueError(
                        f"{file}: lies in no class folder; move it to {folder}/CLASS/, or set captions: files"
                    )
        self._captions = {} if self._by_folder else _captions(folder)
        self.seed, self.skipped = config.seed, Skipped(len(self._files), config.unreadable)
        self.candidates = Captions(lambda: [self._caption(file) for file in self._files])

    def concept(self, prompt: str) -> str:
        """The caption itself."""
        return prompt

    def __len__(self) -> int:
        """The number of images."""
        return len(self._files)

    def item(self, index: int) -> Item:
        """An image and its caption; without one, the empty caption. One that cannot be read is passed over."""
        return readable(self.read, index, len(self), self.seed, self.skipped)

    def read(self, number: int) -> Item:
        """The image of this number by name. Raises Unreadable."""
        file = self._files[number]
        return Item(self._caption(file), load_image(file, self._size))

    def digest(self) -> str:
        """Of the images' names, sizes and captions."""
        return digest(*((self._name(f), f.stat().st_size, self._caption(f)) for f in self._files))

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _caption(self, file: Path) -> str:
        name = self._name(file)
        if self._by_folder:
            return name.partition("/")[0]
        caption = self._captions.get(name)
        if caption is not None:
            return caption
        beside = file.with_suffix(".txt")
        return _text(beside).strip() if beside.is_file() else ""


def load_image(file: Path, size: tuple[int, int]) -> np.ndarray:
    """The image as ``pictures.load`` makes it: uint8 [H, W, 3]. Raises Unreadable."""
    return load(file, str(file), size)


def _captions(folder: Path) -> dict[str, str]:
    """File -> caption, of the list in the folder. Raises ValueError if there are two, or one that is none."""
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise ValueError(f"{folder}: holds {lists[0].name} and {lists[1].name}; keep one list of captions")
    found = {}
    for path in lists:
        file, caption = LISTS[path.name]
        what = "a JSON object" if path.suffix == ".jsonl" else "a row"
        for number, row in _rows(path):
            try:
                values = row[file], row[caption]
                if not isinstance(values[0], str) or type(values[1]) not in (str, int):
                    raise KeyError
            except (KeyError, TypeError):
                raise ValueError(f"{path}: line {number} is not {what} with {file!r} and {caption!r}") from None
            found[str(values[0])] = str(values[1])
    return found


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    """The rows of a list with the lines they end on; of what is none, None."""
    text = _text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            if not {*LISTS[path.name]} <= {*(reader.fieldnames or ())}:
                file, caption = LISTS[path.name]
                raise ValueError(f"{path}: line 1 must name the columns {file!r} and {caption!r}")
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num + 1} is not CSV ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, from_json(line)
            except ValueError:
                yield number, None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Images(config, image_size)
