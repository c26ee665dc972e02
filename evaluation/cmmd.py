"""CMMD: how far apart the CLIP embeddings of made and real images lie, by the maximum mean discrepancy.

    k(x, y) = exp(-|x - y|^2 / (2 10^2)) on embeddings scaled to length 1
    cmmd = 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),  each mean over all pairs, an image with itself too

Jayasumana et al. 2024, arXiv 2401.09603, with OpenAI's CLIP ViT-L/14 at 336 pixels; numbers of another CLIP do not
compare, so its name is in the protocol. The means keep the pairs of an image with itself, as the authors' code does
(the biased estimate of Gretton et al. 2012, eq. 5): the value is never negative, and of few images it is too high.
Here all is summed in float64; in the authors' float32 the means, near 1, leave about three digits of the value.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import features, weights
from .context import About, Context, Extractor, Reference, Seen

ABOUT = About(title="CMMD", needs=("clip_336", "reference"), values=("cmmd",), better="low")
SIGMA = 10.0
"""Width of the kernel, in lengths of an embedding."""
SCALE = 1000.0
_BLOCK = 2048


def kernel_mean(x: Tensor, y: Tensor) -> float:
    """Mean of k over all pairs of x [N, D] and y [M, D], float64 of length 1, a block of x at a time."""
    total = 0.0
    for part in x.split(_BLOCK):
        # |x - y|^2 = 2 - 2 x.y of unit vectors
        total += float(((part @ y.T - 1) / SIGMA**2).exp().sum())
    return total / (len(x) * len(y))


def unit(rows: Tensor) -> Tensor:
    """Rows [N, D] as float64 of length 1."""
    return normalize(rows.double())


def clip_of(context: Context) -> features.Clip:
    """The CLIP that ``eval.weights`` names, ``clip_336`` before ``clip``; else ViT-L/14 at 336 pixels."""
    named = next((name for name in ("clip_336", "clip") if name in context.weights), "clip_336")
    return features.load_clip(str(weights.find(named, context.weights.get(named))), str(context.device))


class Metric:
    """``cmmd`` of the images seen against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a CLIP, or without real images (their statistics are not enough)."""
        if context.reference is None:
            raise ValueError("cmmd needs real images; set eval.reference to a source that has them")
        self._clip = clip_of(context)
        self.extractors: tuple[Extractor, ...] = (self._clip,)
        self._reference = context.reference
        # not every accelerator knows float64
        self._device = torch.device(context.device if torch.device(context.device).type == "cuda" else "cpu")
        reference: Any = context.reference  # to a type checker a protocol cannot be hashed
        self._real, self._within = real_side(reference, self._clip, self._device)

    def compute(self, seen: Seen) -> dict[str, float]:
        """``cmmd``. Raises ValueError without images."""
        if not len(seen):
            raise ValueError("cmmd needs at least 1 image, got 0")
        made = unit(seen.rows[self._clip.key]).to(self._device)
        found = kernel_mean(made, made) + self._within - 2 * kernel_mean(made, self._real)
        # rounding can leave a distance of 0 a hair below it
        return {"cmmd": max(0.0, SCALE * found)}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a distance of two sets."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The CLIP, the kernel and the reference."""
        return {
            **self._clip.protocol(),
            "kernel": f"exp(-|x - y|^2 / (2 {SIGMA:g}^2)) of unit embeddings, means over all pairs, x {SCALE:g}",
            "reference": self._reference.protocol(),
        }


@functools.lru_cache(maxsize=4)
def real_side(reference: Reference, extractor: Extractor, device: torch.device) -> tuple[Tensor, float]:
    """Unit embeddings [M, D] of the real images and their own mean of k, found once. Raises ValueError."""
    real = unit(reference.rows(extractor)).to(device)
    if not len(real):
        raise ValueError("cmmd needs at least 1 real image, the reference has 0")
    return real, kernel_mean(real, real)
