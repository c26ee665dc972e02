"""Inception score: how sure InceptionV3 is of what an image shows, and how many things it sees in all.

    exp of the mean over images of KL(p(class | image) || mean of p(class)), averaged over 10 splits of the images

Salimans et al. 2016, arXiv 1606.03498, sec. 4. As in their code and all that follow it, the 1008 classes' logits are
without bias, images come resized as TensorFlow 1 does, whatever ``eval.features`` is, and split i of N images holds
the numbers from i N / 10 on, in order. Over few images the score is low: each split is judged by its own mean, and
5000 images in each are the custom. It says nothing of likeness to real images, or of prompts.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import features
from .context import About, Context, Extractor, Seen

ABOUT = About(title="IS", needs=("inception",), values=("inception_score",), better="high")
SPLITS = 10


def inception_score(logits: Tensor, splits: int = SPLITS) -> Tensor:
    """Of logits [N, C], N at least ``splits``: each split's score, float64 [splits], 1 to C."""
    log_p = logits.double().log_softmax(1)
    bounds = [i * len(log_p) // splits for i in range(splits + 1)]
    return torch.stack([_score(log_p[low:high]) for low, high in pairwise(bounds)])


def _score(log_p: Tensor) -> Tensor:
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # a class that no image shows has no finite log of its mean
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()


class Metric:
    """``inception_score`` of the images seen, 1 to 1008."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if InceptionV3's weights are missing."""
        self._extractor = features.inception_extractor(context, "legacy_tensorflow", "logits")
        self.extractors: tuple[Extractor, ...] = (self._extractor,)

    def compute(self, seen: Seen) -> dict[str, float]:
        """``inception_score``. Raises ValueError for fewer images than splits."""
        if len(seen) < SPLITS:
            raise ValueError(f"inception_score needs at least {SPLITS} images, got {len(seen)}")
        return {"inception_score": float(inception_score(seen.rows[self._extractor.key]).mean())}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: an image's part in it depends on the others."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The extractor and the splits."""
        return {**self._extractor.protocol(), "splits": f"{SPLITS}, by the images' numbers"}
