"""A `datasets` set: a folder of save_to_disk, parquet or arrow files, or one of the Hub by its id."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.config import option, suggest
from fastgen.data import Item, Skipped, Source, Unreadable
from fastgen.data.pictures import LIMIT, Captions, digest, load, readable

_ROWS = 4096  # captions read at a time


@dataclass(frozen=True)
class Config:
    """Options of the source ``hf``."""

    path: str = option(help="a folder of save_to_disk, a folder or file of parquet or arrow, or a Hub id")
    split: str = option("train", "of a set that has several, or a slice of it: train[:1000]")
    subset: str = option("", "configuration of a set on the Hub that has several")
    revision: str = option("", "of a set on the Hub: a branch, a tag or a commit")
    image: str = option("image", "column of images; empty: there are prompts only")
    caption: str = option("text", "column of captions, text or class labels; empty: no image has one")
    unreadable: float = option(0.01, LIMIT, low=0)
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)


class HF:
    """A shuffled set of rows with a caption and perhaps an image, which is decoded as those of ``images`` are."""

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """Open the set. Raises ValueError if it, its split or a column is not there, or its rows have no numbers."""
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise ValueError(
                "data source hf needs the package datasets; pip install 'fastgen-diffusion[hf]'"
            ) from None
        if not (config.image or config.caption):
            raise ValueError(f"{config.path}: neither image nor caption names a column; set one")
        data, where = opened(config, datasets), f"{config.path}, split {config.split}"
        for option_, column in (("image", config.image), ("caption", config.caption)):
            if column and column not in data.column_names:
                raise ValueError(
                    f"{where}: has no column {column!r}; set {option_}{suggest(column, data.column_names)}"
                )
        self._labels: list[str] | None = None
        if config.caption:
            feature = data.features[config.caption]
            if isinstance(feature, datasets.ClassLabel):
                self._labels = list(feature.names)
            elif getattr(feature, "dtype", "") not in ("string", "large_string"):
                raise ValueError(
                    f"{where}: column {config.caption!r} holds {feature}, not text; set caption to another"
                )
        if config.image:
            try:
                data = data.cast_column(config.image, datasets.Image(decode=False))
            except Exception:
                feature = data.features[config.image]
                raise ValueError(
                    f"{where}: column {config.image!r} holds {feature}, not images; set image to another"
                ) from None
        self._data = data.select_columns([c for c in (config.image, config.caption) if c])
        self._config, self._where, self._size = config, where, image_size
        if not len(self._data):
            raise ValueError(f"{where}: holds no row")
        self.has_images, self.seed = bool(config.image), config.seed
        self.skipped = Skipped(len(self._data), config.unreadable)
        self.candidates = Captions(lambda: self._labels or list(self._captions()))

    def concept(self, prompt: str) -> str:
        """The caption itself."""
        return prompt

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._data)

    def item(self, index: int) -> Item:
        """A row; one whose image cannot be read is passed over."""
        return readable(self.read, index, len(self), self.seed, self.skipped)

    def read(self, number: int) -> Item:
        """The row of this number. Raises Unreadable."""
        row, config = self._data[number], self._config
        caption = self._text(row[config.caption]) if config.caption else ""
        if not config.image:
            return Item(caption)
        name, found = f"{self._where}, row {number}", row[config.image] or {}
        if found.get("bytes") is not None:
            return Item(caption, load(io.BytesIO(found["bytes"]), name, self._size))
        if found.get("path"):
            return Item(caption, load(Path(found["path"]), name, self._size))
        raise Unreadable(name, "the row has none")

    def digest(self) -> str:
        """Of the number of rows, their captions and the bytes that they take."""
        return digest(len(self), self._data.data.nbytes, *self._captions())

    def _captions(self) -> Iterator[str]:
        column = self._config.caption
        alone = self._data.select_columns([column]) if column else self._data
        for start in range(0, len(alone) if column else 0, _ROWS):
            for value in alone[start : start + _ROWS][column]:
                yield self._text(value)

    def _text(self, value: Any) -> str:
        if value is None or value == -1:  # which stands for no label
            return ""
        return str(value) if self._labels is None else self._labels[value]


def opened(config: Config, datasets: Any) -> Any:
    """The set that a config names; nothing of its own code is run. Raises ValueError."""
    place = Path(config.path)
    try:
        if place.is_file():
            reader = datasets.Dataset.from_parquet if place.suffix == ".parquet" else datasets.Dataset.from_file
            return reader(str(place))
        if (place / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(place))
            if config.split not in splits:
                raise ValueError(f"no split {config.split!r}{suggest(config.split, list(splits))}")
            return splits[config.split]
        if (place / "state.json").is_file():
            return datasets.load_from_disk(str(place))
        return datasets.load_dataset(
            config.path, config.subset or None, split=config.split, revision=config.revision or None
        )
    except Exception as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        where = "" if place.exists() else "no such file or folder, and not on the Hub or not reachable: "
        raise ValueError(f"{config.path}: cannot be opened as a data set ({where}{told})") from None


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return HF(config, image_size)
