"""FD-DINOv2: the Frechet distance of FID, on what a DINOv2 ViT-L/14 sees.

Stein et al. 2023, arXiv 2306.04675, find that it agrees with people's judgement where Inception's features do not;
Karras et al. 2024, arXiv 2312.02696 (EDM2), report it for ImageNet. Features are the class token after the last norm,
1024 wide. Images come as EDM2's evaluator brings them: to 224 x 224 by an antialiased bicubic in float, neither cut
nor rounded, with ImageNet's mean and deviation. The table of positions, learnt for 37 x 37 patches, is brought to
16 x 16 as in the authors' own code (``positions``), which Transformers does a little otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from . import features, weights
from .context import About, Context
from .frechet import Distance

ABOUT = About(title="FD-DINOv2", needs=("dinov2", "reference"), values=("fd_dinov2",), better="low")
SIZE = 224
"""Pixels of a side."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> [B, 3, 224, 224], in ImageNet's units."""
    resized = interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (resized / 255 - mean) / std


def positions(table: Tensor, side: int) -> Tensor:
    """A table [1, 1 + n n, D] of the class token and n x n patches, brought to side x side: [1, 1 + side side, D].

    DINOv2's code scales by (side + 0.1) / n, and lets the scale itself, not the ratio of the sizes, say where to look.
    """
    n = round((table.shape[1] - 1) ** 0.5)
    if n == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)
    scaled = interpolate(grid, scale_factor=((side + 0.1) / n,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], scaled.flatten(2).mT.to(table.dtype)], 1)


class Dinov2:
    """A DINOv2's class token: an extractor."""

    def __init__(self, folder: Path, device: str) -> None:
        """Raises ValueError if the folder has no DINOv2."""
        from transformers import Dinov2Model

        try:
            self._network = Dinov2Model.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a Dinov2Model ({' '.join(str(error).split())[:200]})") from None
        self._sha256 = features.fingerprint({"dinov2": self._network})
        table = self._network.embeddings
        side = SIZE // self._network.config.patch_size
        table.position_embeddings = nn.Parameter(positions(table.position_embeddings, side), requires_grad=False)
        self._network, self._device, self._name = self._network.to(device), device, folder.name
        self.num_features: int = self._network.config.hidden_size
        self.key = f"dinov2-{self._sha256[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, num_features]; the prompts are not looked at."""
        found: Tensor = self._network(pixel_values=prepare(images.cpu()).to(self._device)).pooler_output
        return found.cpu()

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        return {
            "extractor": f"DINOv2 {self._name}",
            "features": f"class token, {self.num_features} wide",
            "sha256": self._sha256,
            "resize": f"{SIZE} x {SIZE}, bicubic with antialias, float",
        }


load = functools.lru_cache(maxsize=1)(Dinov2)


class Metric(Distance):
    """``fd_dinov2`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a reference, or if the weights are missing."""
        folder = weights.find("dinov2", context.weights.get("dinov2"))
        super().__init__("fd_dinov2", load(folder, str(context.device)), context)
