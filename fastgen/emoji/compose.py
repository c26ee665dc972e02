"""Pictures and captions from sprites: single draws, scenes with known boxes, and a dataset addressed by number.

Every choice comes from the numpy `Generator` handed in, so a seed fixes the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from fastgen.emoji import names, sprites
from fastgen.emoji.names import Core
from fastgen.geneval import RELATIONS, TAGS, relations

T = TypeVar("T")

SIZE = 32
"""Default side of a canvas in pixels."""

SIDE_RANGE = (0.72, 1.0)
"""Side of a single sprite, its own margins included, as a share of the canvas."""

SCENE_SIDE_RANGE = (0.40, 0.50)
"""Side of each sprite of a scene of two to four, as a share of the canvas; at most half, so that four fit."""

MIRROR_CHANCE = 0.5
"""Chance of a horizontal mirror, where the concept allows it."""

STYLE_CHANCE = 0.2
"""Chance that a caption names the style."""

WHITE_CHANCE = 0.5
"""Chance of a white background, where no sprite is white."""

WHITE = (255, 255, 255)

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "cream": (253, 243, 214),
    "sand": (222, 203, 168),
    "mint": (200, 236, 213),
    "sky": (191, 222, 246),
    "lavender": (217, 208, 243),
    "blush": (249, 213, 219),
    "silver": (205, 209, 214),
    "steel": (140, 156, 176),
}
"""The backgrounds other than white, as RGB."""

DARK_BACKGROUNDS = ("sand", "silver", "steel")
"""The only backgrounds behind a white sprite, which the paler ones would swallow."""

TASKS = TAGS
"""GenEval's tags."""

EXTRA_TASKS = ("color_pair",)
"""Tags outside GenEval: two of one noun in two colours ("a red heart and a blue heart")."""

MAX_COUNT = 4


@dataclasses.dataclass(frozen=True)
class Box:
    """A sprite's visible extent on the canvas.

    Attributes:
        name: the concept ("red apple").
        noun: its object class ("apple"), the class of the scene's metadata.
        colour: its colour, where it has an obvious one.
        style: its drawing style.
        xyxy: pixels [x0, y0, x1, y1), where more than half opaque.
    """

    name: str
    noun: str
    colour: str | None
    style: str
    xyxy: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A composed picture.

    Attributes:
        image: uint8 [size, size, 3].
        prompt: what it shows.
        metadata: GenEval's record: `tag`, `include`, `exclude` (counting only) and `prompt`.
        boxes: one per sprite, in the order of the prompt.
    """

    image: np.ndarray
    prompt: str
    metadata: dict[str, Any]
    boxes: tuple[Box, ...]


@functools.lru_cache(maxsize=16384)
def _premultiplied(number: int) -> Image.Image:
    """Shipped sprite `number` with premultiplied colour, as Pillow's "RGBa"."""
    return Image.fromarray(sprites.load().rgba[number]).convert("RGBa")


def _resized(number: int, side: int, mirrored: bool) -> np.ndarray:
    """Sprite `number` at `side` pixels: uint8 [side, side, 4], premultiplied."""
    tile = np.asarray(_premultiplied(number).resize((side, side), Image.Resampling.BICUBIC))
    return tile[:, ::-1] if mirrored else tile


def _side(rng: np.random.Generator, size: int, share: tuple[float, float]) -> int:
    """A whole number of pixels, uniform over those in the range."""
    low, high = round(share[0] * size), int(share[1] * size)
    return int(rng.integers(low, high + 1))


def _mirrored(rng: np.random.Generator, name: str) -> bool:
    """Whether to mirror, which only core concepts allow; the draw is made in any case, so later ones stay the same."""
    chosen = bool(rng.random() < MIRROR_CHANCE)
    core = names.by_name().get(name)
    return chosen and core is not None and core.mirror


def _background(rng: np.random.Generator, shown: Sequence[str]) -> tuple[int, int, int]:
    """A background on which every sprite named can be seen."""
    white, pick = rng.random() < WHITE_CHANCE, float(rng.random())
    cores = [names.by_name().get(name) for name in shown]
    pale = any(core is not None and core.colour == "white" for core in cores)
    if white and not pale:
        return WHITE
    choices = DARK_BACKGROUNDS if pale else tuple(BACKGROUNDS)
    return BACKGROUNDS[choices[int(pick * len(choices))]]


def _paste(canvas: np.ndarray, tile: np.ndarray, x: int, y: int) -> None:
    """Lay a premultiplied tile over the canvas, in place."""
    part = canvas[y : y + tile.shape[0], x : x + tile.shape[1]]
    rest = 255 - tile[..., 3:].astype(np.uint16)
    part[...] = np.minimum(tile[..., :3] + (part * rest + 127) // 255, 255)


def _extent(tile: np.ndarray) -> tuple[int, int, int, int]:
    """The part of a tile that is more than half opaque, or half as opaque as its densest pixel: x0, y0, x1, y1."""
    alpha = tile[..., 3]
    solid = alpha > min(127, int(alpha.max()) // 2)
    across, down = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    return int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1


def _canvas(size: int, colour: tuple[int, int, int]) -> np.ndarray:
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[...] = colour
    return canvas


def draw(number: int, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Put one sprite on a canvas at random size, place, mirror and background.

    Args:
        number: position in `sprites.load()`.
        rng: source of every choice.
        size: side of the canvas in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    _check_size(size)
    name = sprites.load().rows[number].name
    side = _side(rng, size, SIDE_RANGE)
    x, y = (int(v) for v in rng.integers(0, size - side + 1, 2))
    mirrored = _mirrored(rng, name)
    canvas = _canvas(size, _background(rng, [name]))
    _paste(canvas, _resized(number, side, mirrored), x, y)
    return canvas


def open_caption(name: str) -> str:
    """The caption that leaves style, place, size and background open: "a red apple"."""
    return names.phrase(name)


def style_caption(name: str, style: str) -> str:
    """The caption that names the style: "twemoji of a red apple"."""
    return f"{style} of {names.phrase(name)}"


def caption(name: str, style: str, rng: np.random.Generator) -> str:
    """The caption of a draw; it names the style with chance `STYLE_CHANCE`."""
    return style_caption(name, style) if rng.random() < STYLE_CHANCE else open_caption(name)


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"size is {size} pixels; sprites need a canvas of at least 16")


@functools.cache
def _available(split: str) -> dict[str, tuple[int, ...]]:
    """Positions of each core name's sprites in a split."""
    if split not in sprites.SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(map(repr, sprites.SPLITS))}")
    everything = sprites.load()
    found: dict[str, list[int]] = {}
    for number in everything.where(split=split, core=True):
        found.setdefault(everything.rows[number].name, []).append(number)
    return {core.name: tuple(found[core.name]) for core in names.CORE if core.name in found}


@functools.cache
def _nouns(split: str) -> dict[str, tuple[Core, ...]]:
    """The core concepts of a split by noun."""
    there = _available(split)
    found = {noun: tuple(core for core in cores if core.name in there) for noun, cores in names.by_noun().items()}
    return {noun: cores for noun, cores in found.items() if cores}


def _choose(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, uniformly."""
    return items[int(rng.integers(len(items)))]


def _pick(
    rng: np.random.Generator, split: str, count: int, coloured: bool = False, counted: bool = False
) -> list[Core]:
    """Concepts of `count` distinct nouns, and of distinct colours if `coloured`; uniform over nouns first."""
    chosen: list[Core] = []
    for _ in range(count):
        choices = {
            noun: fit
            for noun, cores in _nouns(split).items()
            if all(noun != core.noun for core in chosen)
            and (
                fit := [
                    core
                    for core in cores
                    if (core.countable or not counted)
                    and (not coloured or (core.colour is not None and all(core.colour != c.colour for c in chosen)))
                ]
            )
        }
        chosen.append(_choose(rng, choices[_choose(rng, list(choices))]))
    return chosen


def _pick_pair(rng: np.random.Generator, split: str) -> list[Core]:
    """Two colours of one noun."""
    nouns = [cores for cores in _nouns(split).values() if len({core.colour for core in cores} - {None}) > 1]
    cores = _choose(rng, nouns)
    first, second = rng.choice(len(cores), 2, replace=False)
    return [cores[first], cores[second]]


def _tiles(
    rng: np.random.Generator, split: str, cores: Sequence[Core], size: int
) -> tuple[list[int], list[np.ndarray]]:
    """A sprite of each concept at a random style, size and mirror."""
    share = SIDE_RANGE if len(cores) == 1 else SCENE_SIDE_RANGE
    numbers, tiles = [], []
    for core in cores:
        number = _choose(rng, _available(split)[core.name])
        side = _side(rng, size, share)
        tiles.append(_resized(number, side, _mirrored(rng, core.name)))
        numbers.append(number)
    return numbers, tiles


def _spread(rng: np.random.Generator, tiles: Sequence[np.ndarray], size: int) -> list[tuple[int, int]]:
    """A place for each tile such that none overlap."""
    if len(tiles) == 1:
        room = size - len(tiles[0])
        return [(int(rng.integers(room + 1)), int(rng.integers(room + 1)))]
    half = size // 2
    places: list[tuple[int, int]] = []
    for quarter in rng.permutation(4)[: len(tiles)]:
        room = half - len(tiles[len(places)])
        x, y = (int(v) for v in rng.integers(0, room + 1, 2))
        places.append((x + half * int(quarter % 2), y + half * int(quarter // 2)))
    return places


def _shift(extent: Sequence[int], x: int, y: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = extent
    return x0 + x, y0 + y, x1 + x, y1 + y


def _place_relation(
    rng: np.random.Generator, tiles: Sequence[np.ndarray], size: int, relation: str
) -> list[tuple[int, int]]:
    """Places for the reference (first) and the positioned tile (second) such that only `relation` holds."""
    extents = [_extent(tile) for tile in tiles]
    half = size // 2
    lead = relation in ("right of", "below")
    for tries in range(64):
        places: list[tuple[int, int]] = []
        for tile, near in zip(tiles, (lead, not lead), strict=True):
            along = int(rng.integers(half - len(tile) + 1)) + (0 if near else half)
            across = int(rng.integers(size - len(tile) + 1)) if tries < 63 else (size - len(tile)) // 2
            places.append((along, across) if relation in RELATIONS[:2] else (across, along))
        reference, positioned = (_shift(e, *p) for e, p in zip(extents, places, strict=True))
        if relations(positioned, reference) == {relation}:
            break
    return places


def _clauses(task: str, cores: Sequence[Core], relation: str) -> tuple[str, list[dict[str, Any]]]:
    """Prompt and `include` of a task."""
    include: list[dict[str, Any]] = [{"class": core.noun, "count": 1} for core in cores]
    if task in ("single_object", "two_object"):
        return " and ".join(core.noun_phrase for core in cores), include
    if task == "counting":
        return f"{names.NUMBERS[len(cores)]} {cores[0].noun_plural}", [{"class": cores[0].noun, "count": len(cores)}]
    if task == "position":
        reference, positioned = cores
        include[1]["position"] = [relation, 0]
        return f"{positioned.noun_phrase} {relation} {reference.noun_phrase}", include
    for clause, core in zip(include, cores, strict=True):
        clause["color"] = core.colour
    return " and ".join(core.coloured_phrase for core in cores), include


def scene(rng: np.random.Generator, task: str | None = None, *, split: str = "train", size: int = SIZE) -> Scene:
    """Compose one to four sprites for one of GenEval's tasks, without overlap.

    Prompts are GenEval's without their opening "a photo of". Classes are nouns ("apple"); outside the colour tasks a
    noun may appear in any of its colours.

    Args:
        rng: source of every choice.
        task: one of `TASKS` or `EXTRA_TASKS`; None chooses among `TASKS`.
        split: the sprites used.
        size: side of the canvas in pixels.
    """
    _check_size(size)
    if task is None:
        task = _choose(rng, TASKS)
    if task not in TASKS + EXTRA_TASKS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(map(repr, TASKS + EXTRA_TASKS))}")
    relation = _choose(rng, RELATIONS)
    if task == "counting":
        cores = _pick(rng, split, 1, counted=True) * int(rng.integers(2, MAX_COUNT + 1))
    elif task == "color_pair":
        cores = _pick_pair(rng, split)
    else:
        cores = _pick(rng, split, 1 if task in ("single_object", "colors") else 2, coloured=task.startswith("color"))
    numbers, tiles = _tiles(rng, split, cores, size)
    places = _place_relation(rng, tiles, size, relation) if task == "position" else _spread(rng, tiles, size)
    canvas = _canvas(size, _background(rng, [core.name for core in cores]))
    boxes = []
    for core, number, tile, (x, y) in zip(cores, numbers, tiles, places, strict=True):
        _paste(canvas, tile, x, y)
        style = sprites.load().rows[number].style
        boxes.append(Box(core.name, core.noun, core.colour, style, _shift(_extent(tile), x, y)))
    prompt, include = _clauses(task, cores, relation)
    metadata: dict[str, Any] = {"tag": task, "include": include}
    if task == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    if task == "position":
        boxes = boxes[::-1]
    return Scene(canvas, prompt, {**metadata, "prompt": prompt}, tuple(boxes))


class EmojiSet:
    """Draws of single sprites with captions, addressed by number and without end.

    Item `index` depends on the seed and the index only: first a name, uniform, then one of its styles in the split,
    then the caption and the draw.

    Args:
        split: "train" or "heldout".
        size: side of a picture in pixels.
        seed: 0 or more.
        core: whether only the core concepts count; the others belong to the training split whole.
    """

    def __init__(self, split: str = "train", size: int = SIZE, seed: int = 0, core: bool = True) -> None:
        """Find the sprites of the split."""
        _check_size(size)
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        self.split, self.size, self.seed = split, size, seed
        available = dict(_available(split))
        if not core:
            everything = sprites.load()
            chosen = everything.where(split=split)
            found: dict[str, list[int]] = {}
            for number in chosen:
                found.setdefault(everything.rows[number].name, []).append(number)
            available = {name: tuple(numbers) for name, numbers in found.items()}
        self.names = tuple(available)
        self._numbers = tuple(available.values())

    def item(self, index: int) -> tuple[np.ndarray, str]:
        """Picture and caption number `index`: uint8 [size, size, 3], str."""
        number, rng = self._chosen(index)
        row = sprites.load().rows[number]
        words = caption(row.name, row.style, rng)
        return draw(number, rng, self.size), words

    def row(self, index: int) -> sprites.Row:
        """What item `index` shows, without drawing it."""
        return sprites.load().rows[self._chosen(index)[0]]

    def _chosen(self, index: int) -> tuple[int, np.random.Generator]:
        """The sprite of item `index` and the generator of its further choices."""
        if index < 0:
            raise ValueError(f"index is {index}; it must be 0 or more")
        rng = np.random.default_rng([self.seed, index])
        numbers = self._numbers[int(rng.integers(len(self._numbers)))]
        return numbers[int(rng.integers(len(numbers)))], rng

    def prompts(self) -> list[str]:
        """The open caption of each name in the split, in order."""
        return [open_caption(name) for name in self.names]
