"""Diversity across seeds by LPIPS: how far apart the images of one prompt look.

The mean LPIPS distance (Zhang et al. 2018, arXiv 1801.03924; ``fastgen.lpips``: version 0.1 on VGG16) over pairs of
images of one prompt, then over the prompts that come more than once. Images are compared at their own size. A prompt
with many images is judged by at most ``PAIRS`` pairs, those nearest in number first, so that its images have equal
shares; they are the same for every set of equally many images. Papers take AlexNet's LPIPS as often: numbers of the
two, and those of other image sizes, do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastgen import lpips

from . import weights
from .context import About, Context, Extractor, Seen
from .diversity import check_repeated, repeated

ABOUT = About(
    title="LPIPS diversity",
    needs=("lpips", "prompt seeds"),
    values=("lpips_diversity",),
    better="high",
    resampled=False,
)
PAIRS = 28
"""Of a prompt, at most: all pairs of 8 images."""
_BATCH = 4


def rings(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of 0 ... count - 1, first those one apart on a ring, then two apart, and so on."""
    for apart in range(1, count // 2 + 1):
        for i in range(count if 2 * apart < count else apart):
            yield i, (i + apart) % count


class Metric:
    """``lpips_diversity``: 0 where a prompt always gives the same picture.

    It looks at pairs of the context's images, not at rows, so it has no extractors.
    """

    extractors: tuple[Extractor, ...] = ()

    def __init__(self, context: Context) -> None:
        """Raises ValueError if the weights are missing, or if no prompt of the context comes twice."""
        check_repeated("lpips_diversity", context.prompts)
        file = weights.find("lpips", context.weights.get("lpips"))
        self._network = lpips.load(file).to(context.device)
        self._sha256 = weights.sha256(file)
        self._image, self._device = context.images, context.device
        self._numbers: dict[str, list[int]] = {prompt: [] for prompt in repeated(context.prompts)}
        for number, prompt in enumerate(context.prompts):
            if prompt in self._numbers:
                self._numbers[prompt].append(number)
        self._means: dict[str, float] = {}
        self._size = ""

    def compute(self, seen: Seen) -> dict[str, float]:
        """``lpips_diversity``, over the prompts that come twice in what was seen. Raises ValueError if none does.

        A prompt's distances are those of all its images in the context, found once.
        """
        chosen = [prompt for prompt in repeated(seen.prompts) if prompt in self._numbers]
        if not chosen:
            raise ValueError("lpips_diversity needs at least 2 images of one prompt, got none")
        for prompt in chosen:
            if prompt not in self._means:
                self._means[prompt] = self._mean(self._numbers[prompt])
        return {"lpips_diversity": sum(self._means[prompt] for prompt in chosen) / len(chosen)}

    @torch.no_grad()
    def _mean(self, numbers: list[int]) -> float:
        pairs = list(islice(rings(len(numbers)), PAIRS))
        pixels = {i: self._pixels(numbers[i]) for i in sorted({i for pair in pairs for i in pair})}
        total = 0.0
        for start in range(0, len(pairs), _BATCH):
            left, right = zip(*pairs[start : start + _BATCH], strict=True)
            x, y = (torch.stack([pixels[i] for i in side]).to(self._device) for side in (left, right))
            total += float(self._network(x, y).double().sum())
        return total / len(pairs)

    def _pixels(self, number: int) -> Tensor:
        """float32 [3, H, W] in [-1, 1]. Raises ValueError without images, or for one that LPIPS cannot see."""
        if self._image is None:
            raise ValueError("lpips_diversity compares images in pairs; give Context.images")
        image = self._image(number)
        if min(image.shape[-2:]) < lpips.SMALLEST:
            raise ValueError(
                f"lpips_diversity needs images of at least {lpips.SMALLEST} pixels a side, image {number} has "
                f"{image.shape[-2]} x {image.shape[-1]}"
            )
        self._size = f"{image.shape[-1]} x {image.shape[-2]}"
        return image.float() / 127.5 - 1

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a value of pairs."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The network, the size at which it saw the images, and the pairs."""
        return {
            "extractor": "LPIPS 0.1, VGG16",
            "sha256": self._sha256,
            "resize": "none",
            "size": self._size,
            "pairs": f"at most {PAIRS} of a prompt; mean over them, then over prompts",
            "num_prompts": len(self._numbers),
        }
