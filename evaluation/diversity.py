"""Diversity across seeds: how far apart the images of one prompt lie, as the CLIP sees them.

The distance of two images is 1 - cos of their CLIP embeddings (``lpips_diversity`` takes LPIPS; numbers of the two do
not compare). A prompt's value is the mean over its pairs of images, and the metric the mean over the prompts that come
more than once. With unit embeddings f and their sum S the n (n - 1) ordered pairs of a prompt have cosines that add up
to |S|^2 - n, which gives the mean over all pairs without going through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import features
from .context import About, Context, Extractor, Seen

ABOUT = About(title="Diversity", needs=("clip", "prompt seeds"), values=("diversity",), better="high", resampled=False)


def repeated(prompts: Iterable[str]) -> list[str]:
    """The prompts that come more than once, in order of appearance."""
    return [prompt for prompt, count in Counter(prompts).items() if count > 1]


def check_repeated(metric: str, prompts: Sequence[str]) -> None:
    """Raise ValueError if no prompt comes twice."""
    if not repeated(prompts):
        raise ValueError(
            f"{metric} compares images of one prompt, but none of the {len(prompts)} comes twice; raise the number of "
            f"images, or leave {metric} out of eval.metrics"
        )


class Metric:
    """``diversity``, 0 to 2: 0 where a prompt always gives the same picture."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a CLIP, or if no prompt of the context comes twice."""
        check_repeated("diversity", context.prompts)
        self._clip = features.clip(context, "diversity")
        self.extractors: tuple[Extractor, ...] = (self._clip,)

    def compute(self, seen: Seen) -> dict[str, float]:
        """``diversity``. Raises ValueError if no prompt has two images."""
        place = {prompt: i for i, prompt in enumerate(repeated(seen.prompts))}
        if not place:
            raise ValueError("diversity needs at least 2 images of one prompt, got none")
        chosen = [i for i, prompt in enumerate(seen.prompts) if prompt in place]
        own = torch.tensor([place[seen.prompts[i]] for i in chosen])
        unit = normalize(seen.rows[self._clip.key][torch.tensor(chosen)].double())
        total = unit.new_zeros(len(place), unit.shape[1]).index_add_(0, own, unit)
        n = torch.bincount(own).double()
        cosines = (total.square().sum(1) - n) / (n * (n - 1))
        return {"diversity": float((1 - cosines).mean())}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a value of pairs."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The CLIP and the distance."""
        return {
            **self._clip.protocol(),
            "distance": "1 - cos of two CLIP image embeddings; mean over a prompt's pairs, then over prompts",
        }
