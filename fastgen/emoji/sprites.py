"""The shipped sprites: `load()` reads the atlases once, the helpers select among them. Needs numpy and Pillow only."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastgen.emoji import names

ASSETS = Path(__file__).parent / "assets" / "sprites"

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `index.jsonl`.

    Attributes:
        name: what captions call it ("red apple").
        style: one of `names.STYLES`.
        group: emojibase's group ("food").
        code: code points, lower-case hexadecimal, joined by "-".
        icon: the source's own name of the drawing.
        label: CLDR short name.
        row: row of the atlas.
        column: column of the atlas.
        split: "train" or "heldout".
        core: whether it is one of `names.CORE`.
    """

    name: str
    style: str
    group: str
    code: str
    icon: str
    label: str
    row: int
    column: int
    split: str
    core: bool


@dataclasses.dataclass(frozen=True)
class Sprites:
    """All sprites, or a selection of them.

    Attributes:
        rgba: uint8 [N, S, S, 4], straight alpha.
        rows: the index, N long, in the same order.
    """

    rgba: np.ndarray
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        """Number of sprites."""
        return len(self.rows)

    @property
    def side(self) -> int:
        """Side of a sprite in pixels."""
        return int(self.rgba.shape[1])

    def where(
        self,
        *,
        split: str | None = None,
        core: bool | None = None,
        name: str | None = None,
        style: str | None = None,
    ) -> list[int]:
        """Positions of the sprites that meet every condition given, in order."""
        _known("split", split, SPLITS)
        _known("style", style, names.STYLES)
        found = [
            number
            for number, row in enumerate(self.rows)
            if (split is None or row.split == split)
            and (core is None or row.core == core)
            and (name is None or row.name == name)
            and (style is None or row.style == style)
        ]
        if name is not None and not found and all(row.name != name for row in self.rows):
            raise ValueError(
                f"no sprite is named {name!r}; names are listed in fastgen/emoji/assets/sprites/index.jsonl"
            )
        return found

    def select(
        self,
        *,
        split: str | None = None,
        core: bool | None = None,
        name: str | None = None,
        style: str | None = None,
    ) -> Sprites:
        """The sprites that meet every condition given."""
        return self.take(self.where(split=split, core=core, name=name, style=style))

    def take(self, numbers: Sequence[int]) -> Sprites:
        """The sprites at these positions."""
        return Sprites(self.rgba[list(numbers)], tuple(self.rows[number] for number in numbers))

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Positions of each name's sprites, in order of first appearance."""
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(row.name, []).append(number)
        return {name: tuple(numbers) for name, numbers in found.items()}

    def names(self) -> tuple[str, ...]:
        """The distinct names, in order of first appearance."""
        return tuple(dict.fromkeys(row.name for row in self.rows))


def _known(what: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"unknown {what} {value!r}; known are {', '.join(map(repr, known))}")


def read(folder: Path) -> Sprites:
    """Read index and atlases from a folder.

    Raises:
        ValueError: if the folder's files are missing, unreadable or do not fit together.
    """
    try:
        lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
        rows = tuple(Row(**json.loads(line)) for line in lines)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {folder / 'index.jsonl'} ({error}); reinstall fastgen") from error
    if not rows:
        raise ValueError(f"{folder / 'index.jsonl'} is empty; reinstall fastgen")
    columns = 1 + max(row.column for row in rows)
    styles = list(dict.fromkeys(row.style for row in rows))
    parts: list[np.ndarray] = []
    for style in styles:
        path = folder / f"{style.replace(' ', '-')}.webp"
        try:
            with Image.open(path) as image:
                sheet = np.asarray(image.convert("RGBA"))
        except OSError as error:
            raise ValueError(f"cannot read {path} ({error}); reinstall fastgen") from error
        down, across = np.array([(row.row, row.column) for row in rows if row.style == style]).T
        side = sheet.shape[1] // columns
        if sheet.shape[:2] != ((down.max() + 1) * side, columns * side) or (parts and side != parts[0].shape[1]):
            raise ValueError(f"{path} has {sheet.shape[1]} x {sheet.shape[0]} pixels, which does not fit its index")
        tiles = sheet.reshape(-1, side, columns, side, 4).swapaxes(1, 2)
        parts.append(tiles[down, across])
    rgba = np.empty((len(rows), *parts[0].shape[1:]), np.uint8)
    rgba[np.argsort([styles.index(row.style) for row in rows], kind="stable")] = np.concatenate(parts)
    rgba.setflags(write=False)
    return Sprites(rgba, rows)


@functools.cache
def load() -> Sprites:
    """All shipped sprites; read on the first call only."""
    return read(ASSETS)
