"""Vendi score: how many different images a set is worth.

    K = the n x n matrix of cosines of the images' features;  w = the eigenvalues of K / n, which add up to 1
    vendi = exp(-sum of w log w):  1 for n times the same, n where all are at right angles

Friedman & Dieng 2023, arXiv 2210.02410, with its cosine kernel on Inception's features (``eval.features``).
``vendi`` is that of all images; ``vendi_prompt``, where prompts come more than once, the mean over these prompts of
the score of their own images: diversity across seeds, 1 where a prompt always gives the same picture. Both grow with
the number of images, so that only sets of one size compare.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import features
from .context import About, Context, Extractor, Seen

ABOUT = About(
    title="Vendi score", needs=("features",), values=("vendi", "vendi_prompt"), better="high", resampled=False
)


def score(rows: Tensor) -> Tensor:
    """Features of sets of n images [..., n, D], any float -> float64 [...], 1 to n."""
    unit = normalize(rows.double(), dim=-1)
    n, width = unit.shape[-2:]
    # K and the features' second moment have the same eigenvalues but for zeros, which add nothing
    gram = unit @ unit.mT if n <= width else unit.mT @ unit
    return torch.special.entr(torch.linalg.eigvalsh(gram / n).clamp(min=0)).sum(-1).exp()


class Metric:
    """``vendi`` of all images seen, and ``vendi_prompt``, the mean over prompts that come more than once."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if the extractor's weights are missing."""
        self._extractor = features.extractor(context)
        self.extractors: tuple[Extractor, ...] = (self._extractor,)
        self._by_prompt = len(set(context.prompts)) < len(context.prompts)

    def compute(self, seen: Seen) -> dict[str, float]:
        """``vendi`` and, if a prompt of the context comes twice, ``vendi_prompt``. Raises ValueError for no images."""
        if not len(seen):
            raise ValueError("vendi needs at least 1 image, got 0")
        rows = seen.rows[self._extractor.key]
        found = {"vendi": float(score(rows))}
        places = defaultdict(list)
        for i, prompt in enumerate(seen.prompts):
            places[prompt].append(i)
        sizes = defaultdict(list)
        for own in places.values():
            if len(own) > 1:
                sizes[len(own)].append(own)
        if self._by_prompt and sizes:
            found["vendi_prompt"] = float(torch.cat([score(rows[torch.tensor(own)]) for own in sizes.values()]).mean())
        return found

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a value of sets."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The extractor and the kernel."""
        return {**self._extractor.protocol(), "kernel": "cosine"}
