"""The distances of two batches of latents that a method lets its config choose among."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from . import losses, lpips
from .family import Family
from .lpips import Perceptual

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x, target: [B, ...]) -> [B]."""


def make(
    name: Literal["l2", "pseudo_huber", "lpips"], family: Family, options: Perceptual, huber: float = 0.0
) -> Distance:
    """The distance of this name. options: of LPIPS; huber: c of pseudo-Huber. Raises ValueError without weights."""
    if name == "lpips":
        return of_images(options, family)
    return losses.mse if name == "l2" else partial(losses.pseudo_huber, c=huber)


def of_images(options: Perceptual, family: Family) -> Distance:
    """LPIPS of the images that two latents decode to, of videos the mean over the frames; the decoder has a gradient.

    Images of less than 256 pixels are first resized, as the consistency models' code does (openai/consistency_models:
    cm/karras_diffusion.py). Raises ValueError if there are no weights, or too few pixels.
    """
    size = options.size if family.image_size[-1] < 256 else 0
    if (size or min(family.image_size)) < lpips.SMALLEST:
        given = f"lpips.size {size}" if size else f"images of {min(family.image_size)} pixels"
        raise ValueError(f"{given}: LPIPS needs {lpips.SMALLEST}; set lpips.size {lpips.SMALLEST} or more")
    network = lpips.load(lpips.locate(options.weights)).to(next(family.denoiser.network.parameters()).device)

    def seen(x: Tensor) -> Tensor:
        pixels = family.decode(x)
        if pixels.ndim == 5:
            pixels = pixels.transpose(1, 2).flatten(0, 1)
        return F.interpolate(pixels, (size, size), mode="bilinear") if size else pixels

    def distance(x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = network(seen(x), seen(target))
        return found.reshape(len(x), -1).mean(1)

    return distance
