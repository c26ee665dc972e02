"""Tar shards of images with captions, as webdataset and img2dataset write them, read in place.

A sample is the members whose names are the same up to the first dot of the last part. Nothing is extracted: an index
of where the members lie is built once, kept beside each shard where the folder may be written to, and read by number.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgen import checkpoint
from fastgen.config import option
from fastgen.data import Item, Skipped, Source
from fastgen.data.pictures import LIMIT, SUFFIXES, Captions, digest, load, readable
from fastgen.plain import from_json

log = logging.getLogger("fastgen")

INDEX = ".fastgen-index.npy"
"""What the name of a shard's index ends in."""
_TEXT = (".txt", ".cls")
_VERSION = 1
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Config:
    """Options of the source ``webdataset``."""

    path: str = option(help="a folder of .tar shards, one shard, or several by a range: data/{0000..0012}.tar")
    caption: str = option("caption", "key in a sample's .json; its .txt or .cls comes first")
    unreadable: float = option(0.01, LIMIT, low=0)
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)


class WebDataset:
    """Shuffled samples of tar shards: those of them that have an image."""

    has_images = True

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        """Index the shards. Raises ValueError if one is missing or no tar, or if they hold no image."""
        self._shards, self._key, self._size = shards(config.path), config.caption, image_size
        indices = [index(shard) for shard in self._shards]
        self._ends = np.cumsum([len(rows) for rows in indices])
        self._rows = np.concatenate(indices)
        if not len(self._rows):
            raise ValueError(f"{config.path}: its shards hold no image ({', '.join(sorted(SUFFIXES))})")
        self.seed, self.skipped = config.seed, Skipped(len(self._rows), config.unreadable)
        self.candidates = Captions(lambda: [self._caption(i) for i in range(len(self))])

    def concept(self, prompt: str) -> str:
        """The caption itself."""
        return prompt

    def __len__(self) -> int:
        """The number of images."""
        return len(self._rows)

    def item(self, index: int) -> Item:
        """An image and its caption; without one, the empty caption. One that cannot be read is passed over."""
        return readable(self.read, index, len(self), self.seed, self.skipped)

    def read(self, number: int) -> Item:
        """The image of this number, in the order of shards and members. Raises Unreadable."""
        shard, (start, size) = self._shard(number), self._rows[number][:2]
        name = f"{shard}, image at byte {start}"
        return Item(self._caption(number), load(io.BytesIO(_bytes(shard, start, size)), name, self._size))

    def digest(self) -> str:
        """Of where the members lie in which shards, and of the captions."""
        rows = [shard.name for shard in self._shards], self._ends.tolist(), self._rows.tolist()
        return digest(*rows, *(self._caption(i) for i in range(len(self))))

    def _shard(self, number: int) -> Path:
        return self._shards[int(np.searchsorted(self._ends, number, side="right"))]

    def _caption(self, number: int) -> str:
        _, _, start, size, is_json = self._rows[number]
        if start == 0:  # where a header is, so that there is none
            return ""
        shard = self._shard(number)
        content = _bytes(shard, start, size)
        try:
            if not is_json:
                return content.decode().strip()
            return str(from_json(content.decode()).get(self._key) or "")
        except (ValueError, AttributeError) as error:
            kind = "a JSON object" if is_json else "text"
            raise ValueError(f"{shard}: the caption at byte {start} is not {kind} ({error})") from None


def shards(path: str) -> list[Path]:
    """The shards that a path names, in order. Raises ValueError."""
    found = _RANGE.search(path)
    if found:
        first, last = found.groups()
        names = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        made = [Path(path[: found.start()] + name + path[found.end() :]) for name in names]
    else:
        place = Path(path)
        made = sorted(place.rglob("*.tar")) if place.is_dir() else [place]
    if not made:
        raise ValueError(f"{path}: holds no .tar shard")
    for shard in made:
        if not shard.is_file():
            raise ValueError(f"{shard}: no such shard")
    return made


def index(shard: Path) -> np.ndarray:
    """Where a shard's samples lie: [n, 5] of image offset and size, caption offset and size, 1 if that is JSON.

    It is read from beside the shard if it is there and the shard has not changed since. Raises ValueError.
    """
    place, stat = shard.with_name(shard.name + INDEX), shard.stat()
    head = np.array([[_VERSION, stat.st_size, stat.st_mtime_ns, 0, 0]], dtype=np.int64)
    try:
        kept: np.ndarray = np.load(place, allow_pickle=False)
        if kept.ndim == 2 and np.array_equal(kept[:1], head):
            return kept[1:]
    except (OSError, ValueError, EOFError):
        pass  # not there, or not whole
    rows = _scan(shard)
    try:
        with checkpoint.atomic_file(place) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate([head, rows]))
    except OSError as error:
        log.info("%s: its index is built anew each time (%s)", shard, error.strerror)
    return rows


def _scan(shard: Path) -> np.ndarray:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                folder, _, name = member.name.rpartition("/")
                stem, dot, _ = name.partition(".")
                if not (member.isreg() and not member.issparse() and dot and stem):
                    continue
                suffix = Path(name).suffix.lower()
                kind = "image" if suffix in SUFFIXES else "text" if suffix in _TEXT else suffix
                samples.setdefault(f"{folder}/{stem}", {}).setdefault(kind, (member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar ({error}); make or download it again") from None
    rows = []
    for parts in samples.values():
        if "image" in parts:
            text, is_json = (parts["text"], 0) if "text" in parts else (parts.get(".json", (0, 0)), 1)
            rows.append([*parts["image"], *text, is_json])
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _bytes(shard: Path, start: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(int(start))
        return file.read(int(size))


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return WebDataset(config, image_size)
