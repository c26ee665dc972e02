"""Precision, recall, density and coverage: is what is made real, and is what is real made.

    r_k(x, X) = distance of x to its k-th nearest other point of X
    precision = share of made y with |x - y| <= r_3(x, real) for some real x      (y lies where real images lie)
    recall    = share of real x with |x - y| <= r_3(y, made) for some made y
    density   = mean over made y of the number of real x with |x - y| < r_5(x, real), / 5    (can exceed 1)
    coverage  = share of real x with |x - y| < r_5(x, real) for some made y

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3 and the closed ball, as in ADM's evaluator
(Dhariwal & Nichol 2021). Density and coverage: Naeem et al. 2020, arXiv 2002.09797, k = 5 and the open ball, as in
its authors' package ``prdc`` (which takes one k and the open ball for all four). In the features of ``eval.features``:
the papers' are VGG16's and Inception's, so numbers of other features do not compare, nor do those of other counts of
images, on which the radii depend. There is no interval by resampling: images drawn twice would be each other's
nearest, and make the radii smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import features
from .context import About, Context, Extractor, Reference, Seen

ABOUT = About(
    title="Precision and recall",
    needs=("features", "reference"),
    values=("precision", "recall", "density", "coverage"),
    better="high",
    resampled=False,
)
NEAREST = 3
"""k of precision and recall."""
NEAREST_DENSITY = 5
"""k of density and coverage."""
_BLOCK = 1024


@dataclass(frozen=True)
class Found:
    """What each image has, float64: made images [N] precision and density, real ones [M] recall and coverage."""

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def squares(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of x [N, D] to y [M, D], float64: a slice of x and its [B, M], block by block."""
    norms = y.square().sum(1)
    for start in range(0, len(x), _BLOCK):
        part = x[start : start + _BLOCK]
        found = part.square().sum(1, keepdim=True) + norms - 2 * part @ y.T
        yield slice(start, start + len(part)), found.clamp_(min=0)


def radii(x: Tensor, *nearest: int) -> list[Tensor]:
    """Squared distance of each of x [N, D] to its k-th nearest other one: [N] for each k, all less than N."""
    found = [x.new_empty(len(x)) for _ in nearest]
    for rows, block in squares(x, x):
        block[:, rows].fill_diagonal_(0)  # itself, exactly, so that it is the nearest
        order = block.topk(max(nearest) + 1, dim=1, largest=False).values
        for k, radius in zip(nearest, found, strict=True):
            radius[rows] = order[:, k]
    return found


def compare(real: Tensor, made: Tensor, real_radii: tuple[Tensor, Tensor]) -> Found:
    """real: [M, D], made: [N, D], float64; real_radii: squared, of ``NEAREST`` and ``NEAREST_DENSITY``, [M] each."""
    closed, opened = real_radii
    (made_radii,) = radii(made, NEAREST)
    precise, inside = made.new_zeros(len(made), dtype=torch.bool), made.new_zeros(len(made))
    recalled, covered = made.new_zeros(2, len(real), dtype=torch.bool)
    for rows, block in squares(real, made):
        precise |= (block <= closed[rows, None]).any(0)
        recalled[rows] = (block <= made_radii).any(1)
        near = block < opened[rows, None]
        inside += near.sum(0)
        covered[rows] = near.any(1)
    return Found(*(each.double().cpu() for each in (precise, inside / NEAREST_DENSITY, recalled, covered)))


class Metric:
    """``precision``, ``recall``, ``coverage``, 0 to 1, and ``density`` of the images seen against the reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without enough real images, or if the extractor's weights are missing."""
        if context.reference is None:
            raise ValueError("prdc needs real images; set eval.reference to a source that has them")
        self._extractor = features.extractor(context)
        self.extractors: tuple[Extractor, ...] = (self._extractor,)
        self._reference = context.reference
        # not every accelerator knows float64
        self._device = torch.device(context.device if torch.device(context.device).type == "cuda" else "cpu")
        reference, extractor = cast("tuple[Any, Any]", (context.reference, self._extractor))  # protocols, not hashable
        self._last: tuple[Seen, Found] | None = None  # asked for values, then for each image's
        self._real, self._radii = real_side(reference, extractor, self._device)

    def _found(self, seen: Seen) -> Found:
        if len(seen) <= NEAREST:
            raise ValueError(f"prdc needs at least {NEAREST + 1} images, got {len(seen)}")
        if self._last is None or self._last[0] is not seen:
            made = seen.rows[self._extractor.key].double().to(self._device)
            self._last = seen, compare(self._real, made, self._radii)
        return self._last[1]

    def compute(self, seen: Seen) -> dict[str, float]:
        """The four values. Raises ValueError for too few images."""
        found = self._found(seen)
        return {name: float(getattr(found, name).mean()) for name in ABOUT.values}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """``precision`` and ``density``; recall and coverage are means over the real images."""
        found = self._found(seen)
        return {"precision": found.precision, "density": found.density}

    def protocol(self) -> dict[str, Any]:
        """The extractor, the k and the reference."""
        return {
            **self._extractor.protocol(),
            "nearest": {"precision, recall": NEAREST, "density, coverage": NEAREST_DENSITY},
            "reference": self._reference.protocol(),
        }


@functools.lru_cache(maxsize=4)
def real_side(
    reference: Reference, extractor: Extractor, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Features [M, D] of the real images, float64, and their squared radii, found once. Raises ValueError."""
    real = reference.rows(extractor).double().to(device)
    if len(real) <= NEAREST_DENSITY:
        raise ValueError(f"prdc needs at least {NEAREST_DENSITY + 1} real images, the reference has {len(real)}")
    closed, opened = radii(real, NEAREST, NEAREST_DENSITY)
    return real, (closed, opened)
