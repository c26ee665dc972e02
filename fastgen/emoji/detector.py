"""The emoji world's detector: which drawings a picture shows, where, and in which colours.

It judges generators, so it is trained on composed scenes of *both* splits of the drawings: an evaluator must know all
that may be asked for, as GenEval's Mask2Former knows COCO. A generator is still judged on drawings that it never saw.

An anchor-free convolutional network in the manner of CenterNet (Zhou et al. 2019, arXiv 1904.07850) and FCOS (Tian et
al. 2019, arXiv 1904.01355): a grid of 16 x 16 cells of 2 x 2 pixels; each cell says whether an object's centre lies in
it, of which noun and colour the object is and how far its four sides are. Pictures of another size are brought to 32
pixels by ``resized``.

``python -m fastgen.emoji.detector CONFIG`` trains it and resumes from the newest checkpoint; ``... ship RUN`` copies
what came out into the package and the log into docs/emoji/.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import checkpoint, config
from ..method import Batch, Phase, Terms
from ..plain import from_json
from ..rng import Noise
from . import compose, names

ASSETS = Path(__file__).parent / "assets" / "detector"

SIZE = 32
"""Side in pixels of the pictures that the network sees."""

STRIDE = 2
"""Pixels of a cell's side."""

GRID = SIZE // STRIDE

NOUNS: tuple[str, ...] = tuple(names.by_noun())
"""The classes, in order."""

COLOURS: tuple[str, ...] = (*names.COLOURS, "none")
"""GenEval's colour words, and "none" for a drawing without an obvious colour."""

MOST = 16
"""Objects reported of a picture at most, GenEval's ``max_objects``."""

FLOOR = 0.05
"""Lowest score reported."""

MAX_OVERLAP = 0.5
"""Of two boxes that overlap more than this (IoU) only the better is reported: the world's drawings do not overlap."""

IGNORED = -1
"""A noun or colour that nothing is learnt of."""

FIELDS = ("class", "score", "x0", "y0", "x1", "y1", "colour")
"""What a row of a detection holds; class and colour are numbers in ``NOUNS`` and ``COLOURS``, the box is in pixels."""


# ---------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Maps:
    """What the network says of each cell.

    Attributes:
        centre: logit of an object's centre lying here, [B, GRID, GRID].
        noun: logits, [B, len(NOUNS), GRID, GRID].
        colour: logits, [B, len(COLOURS), GRID, GRID].
        sides: left, top, right and bottom side of the object, as pixels outward from the cell's middle,
            [B, 4, GRID, GRID].
    """

    centre: Tensor
    noun: Tensor
    colour: Tensor
    sides: Tensor


def _convolution(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.GroupNorm(out // 16, out), nn.SiLU(inplace=True)
    )


class _Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.second(self.first(x)))


class Detector(nn.Module):
    """Two levels, 16 x 16 and 8 x 8, the second laid back over the first."""

    def __init__(self, width: int = 64, deep: int = 112) -> None:
        """width, deep: channels of the two levels, multiples of 16."""
        super().__init__()
        self.width, self.deep = width, deep
        self.stem = nn.Sequential(_convolution(3, 32), _convolution(32, width, 2), _Residual(width), _Residual(width))
        self.down = nn.Sequential(_convolution(width, deep, 2), *(_Residual(deep) for _ in range(3)))
        self.across = nn.Conv2d(deep, width, 1)
        self.merge = nn.Sequential(_Residual(width), _convolution(width, 128))
        self.heads = nn.Conv2d(128, 1 + len(NOUNS) + len(COLOURS) + 4, 1)
        bias = torch.zeros(self.heads.out_channels)
        bias[0] = -4.0  # few cells are centres
        self.heads.bias = nn.Parameter(bias)

    def forward(self, pixels: Tensor) -> Maps:
        """pixels: [B, 3, SIZE, SIZE] in [-1, 1]."""
        near = self.stem(pixels)
        far = F.interpolate(self.across(self.down(near)), scale_factor=2.0, mode="nearest")
        out = self.heads(self.merge(near + far)).float()
        centre, noun, colour, sides = out.split([1, len(NOUNS), len(COLOURS), 4], dim=1)
        return Maps(centre[:, 0], noun, colour, sides * SIZE / 4)


# ---------------------------------------------------------------------------------------------------------- boxes


def middles() -> Tensor:
    """The middle of each cell in pixels, x and y: [2, GRID, GRID]."""
    at = (torch.arange(GRID) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


def sides_of(boxes: Tensor) -> Tensor:
    """boxes: x0, y0, x1, y1 in pixels, [..., 4] -> ``Maps.sides`` of every cell, [..., 4, GRID, GRID]."""
    x, y = middles()
    x0, y0, x1, y1 = (side[..., None, None] for side in boxes.unbind(-1))
    return torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=-3)


def boxes_of(sides: Tensor) -> Tensor:
    """The inverse of ``sides_of``: [..., 4, GRID, GRID] -> [..., 4, GRID, GRID], x0, y0, x1, y1 in pixels."""
    x, y = middles().to(sides.device)
    left, top, right, bottom = sides.unbind(-3)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-3)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes x0, y0, x1, y1: [..., 4], [..., 4] -> [...]; 0 for two empty boxes."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


# ---------------------------------------------------------------------------------------------------------- decoding


def decode(maps: Maps, floor: float = FLOOR) -> Tensor:
    """The detections of each picture, best first: float32 [B, MOST, 7] as in ``FIELDS``, padded with NaN.

    A peak is a cell whose centre logit is the largest of its 3 x 3 neighbours; its score is the chance of a centre
    times that of the likeliest noun.
    """
    centre = maps.centre.sigmoid()
    peak = centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0]
    noun, number = maps.noun.softmax(1).max(1)
    score = torch.where(peak, centre * noun, 0.0).flatten(1)
    boxes = boxes_of(maps.sides).clamp(0, SIZE)
    values = torch.cat(
        [number[:, None], score.reshape_as(number)[:, None], boxes, maps.colour.argmax(1, keepdim=True)], dim=1
    )
    best, cells = score.topk(MOST, dim=1)
    rows = values.flatten(2).gather(2, cells[:, None].expand(-1, len(FIELDS), -1)).mT.float()
    kept = best > floor
    shared = overlap(rows[:, :, None, 2:6], rows[:, None, :, 2:6]) > MAX_OVERLAP  # [B, of, by]
    for i in range(1, MOST):
        kept[:, i] &= ~(shared[:, i, :i] & kept[:, :i]).any(1)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    rows = torch.where(kept[..., None], rows, torch.nan)
    return rows.gather(1, order[..., None].expand_as(rows))


def resized(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float [B, 3, SIZE, SIZE] in [-1, 1], bilinear with antialiasing where S is not SIZE.

    Raises ValueError if the images are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"the emoji detector takes square images, got {images.shape[-1]} x {images.shape[-2]}; crop them first"
        )
    pixels = images.float() / 127.5 - 1
    if images.shape[-1] == SIZE:
        return pixels
    return F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


@torch.no_grad()
def detect(network: Detector, images: Tensor, chunk: int = 256) -> Tensor:
    """The detections of each image, boxes in its own pixels: uint8 [B, 3, S, S] -> float32 [B, MOST, 7] on the CPU.

    chunk: images at a time.
    """
    device = network.heads.weight.device
    found = [decode(network(resized(part.to(device)))).cpu() for part in images.split(chunk)]
    rows = torch.cat(found) if found else torch.empty(0, MOST, len(FIELDS))
    rows[..., 2:6] *= images.shape[-1] / SIZE
    return rows


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Example:
    """A picture and what is to be found in it.

    Attributes:
        image: uint8 [SIZE, SIZE, 3].
        boxes: float32 [N, 4], x0, y0, x1, y1 in pixels.
        nouns: int64 [N], numbers in ``NOUNS`` or ``IGNORED``.
        colours: int64 [N], numbers in ``COLOURS`` or ``IGNORED``.
    """

    image: np.ndarray
    boxes: np.ndarray
    nouns: np.ndarray
    colours: np.ndarray

    def keep(self, image: np.ndarray, kept: np.ndarray) -> Example:
        """Another image, and of the objects those where ``kept``: bool [N]."""
        return Example(image, self.boxes[kept], self.nouns[kept], self.colours[kept])


def example(scene: compose.Scene) -> Example:
    """A scene as it is."""
    return Example(
        scene.image,
        np.array([box.xyxy for box in scene.boxes], np.float32),
        np.array([NOUNS.index(box.noun) for box in scene.boxes]),
        np.array([COLOURS.index(box.colour or "none") for box in scene.boxes]),
    )


HUES: Mapping[str, float] = {"red": 0, "orange": 30, "yellow": 50, "green": 120, "blue": 210, "purple": 280}
"""Degrees on the colour circle, of the colours that have a place there."""


def recoloured(shown: Example, rng: np.random.Generator) -> Example:
    """All hues turned by one angle, so that a colour is read off the picture and not off the noun.

    The turned drawing is not one that anybody drew, so its noun is ignored; its colour is known if it turned into
    another of ``HUES`` (within 10 degrees) or has no hue.
    """
    angle = int(rng.integers(20, 341))
    hue, saturation, value = Image.fromarray(shown.image).convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue).astype(int) + round(angle * 256 / 360)).astype(np.uint8))
    image = np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))

    def after(number: int) -> int:
        colour = COLOURS[number]
        if colour in ("black", "white"):
            return number
        for other, place in HUES.items() if colour in HUES else ():
            if abs((HUES[colour] + angle - place + 180) % 360 - 180) <= 10:
                return COLOURS.index(other)
        return IGNORED

    colours = np.array([after(int(number)) for number in shown.colours])
    return Example(image, shown.boxes, np.full_like(shown.nouns, IGNORED), colours)


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur; radius: standard deviation in pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def spoilt(shown: Example, other: Example, rng: np.random.Generator) -> Example:
    """A picture of what a bad generator makes, in which nothing, or one object less, is to be found.

    One of: blurred beyond recognition; half transparent under another picture; its blocks shuffled; an empty
    background, its own, black, white or of any colour; one object joined from halves of two.
    """
    nothing = np.zeros(len(shown.boxes), bool)
    kind = int(rng.integers(8))
    if kind == 0:
        return shown.keep(blurred(shown.image, rng.uniform(2.5, 5) * (2 if len(shown.boxes) == 1 else 1)), nothing)
    if kind == 1:
        share = rng.uniform(0.35, 0.65)
        mixed = share * shown.image + (1 - share) * other.image
        return shown.keep(mixed.round().astype(np.uint8), nothing)
    if kind == 2:
        side = 4 if len(shown.boxes) > 1 else int(rng.choice([4, 8]))
        rows = SIZE // side
        blocks = shown.image.reshape(rows, side, rows, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        shuffled = rng.permutation(blocks).reshape(rows, rows, side, side, 3).swapaxes(1, 2)
        return shown.keep(shuffled.reshape(SIZE, SIZE, 3), nothing)
    if kind == 3:
        grounds = (_ground(shown.image), (0, 0, 0), (255, 255, 255), rng.integers(0, 256, 3))
        plain = np.asarray(grounds[int(rng.integers(len(grounds)))], np.uint8)
        return shown.keep(np.broadcast_to(plain, shown.image.shape).copy(), nothing)
    number, donor = int(rng.integers(len(shown.boxes))), int(rng.integers(len(other.boxes)))
    if shown.nouns[number] == other.nouns[donor]:
        return shown
    x0, y0, x1, y1 = (int(v) for v in shown.boxes[number])
    left, top, right, bottom = (int(v) for v in other.boxes[donor])
    patch = Image.fromarray(other.image).crop((left, top, right, bottom)).resize((x1 - x0, y1 - y0))
    image, part = shown.image.copy(), np.asarray(patch)
    across, first = bool(rng.integers(2)), bool(rng.integers(2))
    middle = (x1 - x0 if across else y1 - y0) // 2
    half = slice(0, middle) if first else slice(middle, None)
    cut = (slice(None), half) if across else (half, slice(None))
    image[y0:y1, x0:x1][cut] = part[cut]
    return shown.keep(image, np.arange(len(shown.boxes)) != number)


def _ground(image: np.ndarray) -> np.ndarray:
    """The colour of most pixels, uint8 [3]."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return np.asarray(colours[counts.argmax()])


TASKS = compose.TASKS + compose.EXTRA_TASKS
SHARES: Mapping[str, float] = {"heldout": 0.2, "spoilt": 0.2, "recoloured": 0.1, "through": 0.3, "soft": 0.3}
"""Of the training pictures: of the other split; spoilt; recoloured; through the teacher's autoencoder; blurred a
little, of another brightness and noisy."""


class Examples:
    """Scenes without end, by number: x0 holds pixels, cond the objects, padded with ``IGNORED``.

    ``through`` is the teacher's autoencoder: generated pictures come out of its decoder, so a part goes through it.
    """

    def __init__(self, seed: int, pool: int, through: Any = None) -> None:
        """pool: how many there are before they repeat."""
        self.seed, self.pool, self.through = seed, pool, through

    def scene(self, rng: np.random.Generator) -> Example:
        """One scene of either split."""
        split = "heldout" if rng.random() < SHARES["heldout"] else "train"
        return example(compose.scene(rng, TASKS[int(rng.integers(len(TASKS)))], split=split, size=SIZE))

    def item(self, number: int) -> Example:
        """Picture ``number``, before brightness, noise and autoencoder."""
        rng = np.random.default_rng([self.seed, number % self.pool])
        shown, chance = self.scene(rng), rng.random()
        if chance < SHARES["spoilt"]:
            return spoilt(shown, self.scene(rng), rng)
        if chance < SHARES["spoilt"] + SHARES["recoloured"]:
            return recoloured(shown, rng)
        return shown

    def batch(self, samples: Sequence[int]) -> Batch:
        """samples -> pixels [B, 3, SIZE, SIZE] in [-1, 1] and, as cond, boxes [B, M, 4], nouns and colours [B, M]."""
        items = [self.item(s) for s in samples]
        pixels = torch.from_numpy(np.stack([i.image for i in items])).permute(0, 3, 1, 2).float() / 127.5 - 1
        rngs = [np.random.default_rng([self.seed, s % self.pool, 1]) for s in samples]
        chances = [rng.random() for rng in rngs]
        there = [i for i, c in enumerate(chances) if c < SHARES["through"]]
        if there and self.through is not None:
            pixels[there] = self._through(pixels[there], [rngs[i] for i in there])
        for i, chance in enumerate(chances):
            if SHARES["through"] <= chance < SHARES["through"] + SHARES["soft"]:
                pixels[i] = _softened(pixels[i], rngs[i])
        most = compose.MAX_COUNT
        cond = {
            "boxes": torch.from_numpy(np.stack([_padded(i.boxes, most, 0) for i in items])),
            "nouns": torch.from_numpy(np.stack([_padded(i.nouns, most, IGNORED) for i in items])),
            "colours": torch.from_numpy(np.stack([_padded(i.colours, most, IGNORED) for i in items])),
            "there": torch.tensor([[k < len(i.boxes) for k in range(most)] for i in items]),
        }
        return Batch(list(samples), cond, {}, pixels.clamp(-1, 1))

    @torch.no_grad()
    def _through(self, pixels: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Encoded, shaken by up to 0.3 of the latents' deviation, and decoded."""
        assert self.through is not None
        with torch.autocast("cpu", torch.bfloat16):
            z = self.through.encode(pixels).latent_dist.mean.float()
            noise = [rng.uniform(0, 0.3) * rng.standard_normal(z.shape[1:], np.float32) for rng in rngs]
            z = z + torch.from_numpy(np.stack(noise)).float()
            return torch.as_tensor(self.through.decode(z).sample.float())


def _padded(rows: np.ndarray, most: int, value: float) -> np.ndarray:
    out = np.full((most, *rows.shape[1:]), value, rows.dtype)
    out[: len(rows)] = rows
    return out


def _softened(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurred by up to 0.7 pixels, contrast and brightness changed by up to 0.1, noise of up to 0.08: [3, S, S]."""
    image = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    soft = torch.from_numpy(blurred(image, rng.uniform(0, 0.7)).copy()).permute(2, 0, 1).float() / 127.5 - 1
    noise = torch.from_numpy(rng.uniform(0, 0.08) * rng.standard_normal(soft.shape, np.float32))
    return soft * rng.uniform(0.9, 1.1) + rng.uniform(-0.1, 0.1) + noise.float()


@dataclass(frozen=True)
class Targets:
    """What the maps should say.

    Attributes:
        centre: 1 at centres, falling off as a Gaussian around them, [B, GRID, GRID].
        owner: the object that a cell learns noun, colour and sides of: the nearest whose centre's cell is this cell or
            a neighbour; else ``IGNORED``. [B, GRID, GRID].
        sides: of the owner, [B, 4, GRID, GRID].
    """

    centre: Tensor
    owner: Tensor
    sides: Tensor


def assign(boxes: Tensor, there: Tensor) -> Targets:
    """boxes: x0, y0, x1, y1 in pixels, [B, M, 4]; there: which of them are objects, bool [B, M]."""
    centre = ((boxes[..., :2] + boxes[..., 2:]) / 2 / STRIDE).floor().clamp(0, GRID - 1)  # cell, x and y: [B, M, 2]
    cells = middles() / STRIDE - 0.5
    away = cells - centre[..., None, None]  # [B, M, 2, GRID, GRID]
    extent = ((boxes[..., 2:] - boxes[..., :2]).amin(-1) / STRIDE / 6).clamp(min=0.5, max=1.5)
    heat = torch.exp(-away.square().sum(2) / (2 * extent.square()[..., None, None]))
    heat = torch.where(there[..., None, None], heat, 0.0)
    near = (away.abs().amax(2) <= 1) & there[..., None, None]
    distance = torch.where(near, away.square().sum(2), torch.inf)
    closest, owner = distance.min(1)
    sides = sides_of(boxes).gather(1, owner[:, None, None].expand(-1, 1, 4, -1, -1))[:, 0]
    return Targets(heat.amax(1), torch.where(closest < torch.inf, owner, IGNORED), sides)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's penalty-reduced focal loss of the centre map, with alpha 2 and beta 4 (its equation 1), summed: [B].

    logits, target: [B, GRID, GRID].
    """
    p = logits.sigmoid()
    at = target == 1
    right = (1 - p).square() * F.logsigmoid(logits)
    wrong = (1 - target) ** 4 * p.square() * F.logsigmoid(-logits)
    return -torch.where(at, right, wrong).flatten(1).sum(1)


def sides_loss(sides: Tensor, target: Tensor) -> Tensor:
    """1 - IoU of the boxes plus the mean error of their sides in units of 8 pixels: [..., 4] and [..., 4] -> [...].

    Both are told from one middle, so what they share reaches from it as far as the nearer of each pair of sides.
    """
    low, high = torch.minimum(sides, target), torch.maximum(sides, target)
    shared = (low[..., :2] + low[..., 2:]).clamp(min=0).prod(-1)
    area, true = ((s[..., :2] + s[..., 2:]).clamp(min=0).prod(-1) for s in (sides, target))
    return 1 - shared / (area + true - shared).clamp(min=1e-3) + (high - low).mean(-1) / 8


class Detecting:
    """The losses of the maps."""

    def __init__(self, network: Detector) -> None:
        self.network = network
        self.networks: Mapping[str, nn.Module] = {"detector": network}
        self.phases = (Phase("detector", ["detector"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"centre", "noun", "colour", "sides"}: each [B], the mean over the picture's objects."""
        assert batch.x0 is not None
        cond = batch.cond
        with torch.autocast(batch.x0.device.type, torch.bfloat16):
            maps = self.network(batch.x0)
        targets = assign(cond["boxes"], cond["there"])
        owned = targets.owner >= 0
        count = cond["there"].sum(1).clamp(min=1)
        cells = owned.flatten(1).sum(1).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            """Of [B, GRID, GRID] over the owned cells."""
            return torch.where(owned, values, 0.0).flatten(1).sum(1) / cells

        owner = targets.owner.clamp(min=0).flatten(1)
        nouns = torch.where(owned, cond["nouns"].gather(1, owner).reshape(owned.shape), IGNORED)
        colours = torch.where(owned, cond["colours"].gather(1, owner).reshape(owned.shape), IGNORED)
        cross = functools.partial(F.cross_entropy, ignore_index=IGNORED, reduction="none")
        return {
            "centre": focal(maps.centre, targets.centre) / count,
            "noun": mean(cross(maps.noun, nouns)),
            "colour": 0.5 * mean(cross(maps.colour, colours)),
            "sides": mean(sides_loss(maps.sides.movedim(1, -1), targets.sides.movedim(1, -1))),
        }


# ---------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Quality:
    """How well detections agree with what is there.

    Attributes:
        precision: by noun, the share of its detections that are right; NaN for a noun that is never detected.
        recall: by noun, the share of its objects that are found; NaN for a noun that is never there.
        colour: of the objects found that have a colour, the share whose colour is right.
        objects: how many there are.
    """

    precision: np.ndarray
    recall: np.ndarray
    colour: float
    objects: int


def quality(rows: Tensor, truths: Sequence[Example], threshold: float, least_overlap: float = 0.5) -> Quality:
    """Hold detections against the truth; each object is found once at most, by the best that fits.

    Args:
        rows: of ``detect``, [B, MOST, 7].
        truths: [B], all nouns known.
        threshold: detections count above this score.
        least_overlap: IoU with an object of the same noun from which a detection is right.
    """
    right, made, there = (np.zeros(len(NOUNS)) for _ in range(3))
    colours: list[bool] = []
    for row, truth in zip(rows, truths, strict=True):
        boxes, left = torch.from_numpy(truth.boxes), np.ones(len(truth.boxes), bool)
        np.add.at(there, truth.nouns, 1)
        for one in row[row[:, 1] > threshold]:
            noun = int(one[0])
            made[noun] += 1
            shared = overlap(boxes, one[2:6]).numpy() * (left & (truth.nouns == noun))
            if len(shared) and shared.max() >= least_overlap:
                number = int(shared.argmax())
                left[number] = False
                right[noun] += 1
                if truth.colours[number] != COLOURS.index("none"):
                    colours.append(int(one[6]) == truth.colours[number])
    with np.errstate(invalid="ignore"):
        return Quality(right / made, right / there, float(np.mean(colours)) if colours else np.nan, int(there.sum()))


# ---------------------------------------------------------------------------------------------------------- files

WEIGHTS = "model.safetensors"


def save(network: Detector, folder: Path) -> None:
    """Write weights (float16) and config."""
    with checkpoint.atomic_folder(folder) as out:
        save_file({name: p.detach().half().contiguous() for name, p in network.state_dict().items()}, out / WEIGHTS)
        text = {"width": network.width, "deep": network.deep, "nouns": NOUNS, "colours": COLOURS}
        (out / "config.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def weights_file(folder: str | Path = ASSETS) -> Path:
    """Where ``save`` puts the weights."""
    return Path(folder) / WEIGHTS


def load(folder: str | Path = ASSETS) -> Detector:
    """The trained network, in float32, for inference. Raises ValueError if files are missing or of another world."""
    folder = Path(folder)
    try:
        about = from_json((folder / "config.json").read_text(encoding="utf-8"))
        network = Detector(about["width"], about["deep"])
        known = (tuple(about["nouns"]), tuple(about["colours"])) == (NOUNS, COLOURS)
        weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no emoji detector there ({error}); name the folder it was saved to") from None
    if not known:
        raise ValueError(f"{folder}: this detector knows other nouns or colours; train it anew")
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval()


def train(recipe_file: str) -> None:
    """Train to the end of the recipe and write the averaged weights to ``out/detector``."""
    from diffusers import AutoencoderKL

    from . import world

    recipe = config.decode(world.Recipe, config.read(recipe_file), recipe_file)
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    network = Detector()
    through = AutoencoderKL.from_pretrained(Path(__file__).parent / "assets" / "teacher" / "vae")
    data = Examples(recipe.seed, recipe.pool, through.requires_grad_(False).eval())
    world.train(Detecting(network), data, recipe)
    save(network, Path(recipe.out) / "detector")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) == 2 and arguments[0] == "ship":
        with checkpoint.atomic_folder(ASSETS) as folder:
            shutil.copytree(Path(arguments[1]) / "detector", folder, dirs_exist_ok=True)
        shutil.copy(Path(arguments[1]) / "train.log", Path("docs/emoji/detector.log"))
    elif len(arguments) == 1:
        train(arguments[0])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
