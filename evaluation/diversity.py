"""Diversity across seeds: how far apart the images of one prompt lie, as the CLIP sees them.

The distance of two images is 1 - cos of their CLIP embeddings (no LPIPS weights come with this package; numbers of
the two do not compare). A prompt's value is the mean over its pairs of images, and the metric the mean over the
prompts that come more than once. With unit embeddings f and their sum S the n (n - 1) ordered pairs of a prompt have
cosines that add up to |S|^2 - n, so that one pass over the images of the other metrics is enough and exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import features
from .context import Context


class Metric:
    """``diversity``, 0 to 2: 0 where a prompt always gives the same picture."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a CLIP, or if no prompt of the context comes twice."""
        if context.clip is None:
            raise ValueError("diversity needs a CLIP; set eval.clip to a folder or a Hub id")
        repeated = [prompt for prompt, count in Counter(context.prompts).items() if count > 1]
        if not repeated:
            raise ValueError(
                f"diversity compares images of one prompt, but none of the {len(context.prompts)} comes twice; raise "
                "the number of images, or leave diversity out of eval.metrics"
            )
        self._clip = features.load_clip(context.clip, str(context.device))
        self._place = {prompt: i for i, prompt in enumerate(repeated)}
        self._alone = set(context.prompts) - set(repeated)
        self._sums = {
            "total": torch.zeros(len(repeated), self._clip.num_features, dtype=torch.float64),
            "count": torch.zeros(len(repeated), dtype=torch.float64),
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """By prompt that comes more than once: the sum of its images' unit embeddings, and their number."""
        return self._sums

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """images: uint8 [B, 3, H, W]; prompts: [B], of the context's. Raises ValueError for another one."""
        for prompt in prompts:
            if prompt not in self._place and prompt not in self._alone:
                raise ValueError(f"prompt {prompt!r} is none of the {len(self._place) + len(self._alone)} announced")
        chosen = [i for i, prompt in enumerate(prompts) if prompt in self._place]
        if not chosen:
            return
        seen = normalize(self._clip.images(images)[chosen].double()).cpu()
        places = torch.tensor([self._place[prompts[i]] for i in chosen])
        self._sums["total"].index_add_(0, places, seen)
        self._sums["count"].index_add_(0, places, torch.ones(len(chosen), dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        """``diversity``. Raises ValueError before any prompt has two images."""
        count = self._sums["count"]
        several = count > 1
        if not several.any():
            raise ValueError("diversity needs at least 2 images of one prompt, got none")
        n, total = count[several], self._sums["total"][several]
        cosines = (total.square().sum(1) - n) / (n * (n - 1))
        return {"diversity": float((1 - cosines).mean())}

    def protocol(self) -> dict[str, Any]:
        """The CLIP, the distance, and over how many prompts, images and pairs it was taken."""
        count = self._sums["count"]
        several = count[count > 1]
        return {
            **self._clip.protocol(),
            "distance": "1 - cos of two CLIP image embeddings; mean over a prompt's pairs, then over prompts",
            "num_prompts": len(several),
            "num_images": int(several.sum()),
            "pairs": int((several * (several - 1) / 2).sum()),
        }
