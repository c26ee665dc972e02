"""Frechet distance between features of made and real images (FID; with a CLIP's features, CLIP-FID).

Heusel et al. 2017, arXiv 1706.08500; Kynkäänniemi et al. 2023, arXiv 2203.06026, on CLIP's features. Sums and distance
are torchmetrics', in float64 throughout: its eigenvalue form holds for fewer images than features, too.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import features
from .context import Context

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


@dataclass(frozen=True)
class Statistics:
    """Sums over the real images' features; sha256 is of their pixels, in order."""

    total: Tensor
    outer: Tensor
    count: int
    sha256: str


@functools.lru_cache(maxsize=4)
def statistics(reference: Callable[[], Iterable[Tensor]], extractor: features.Extractor) -> Statistics:
    """Go through the real images, once per process for the same two objects. Raises ValueError if they are < 2."""
    fid = _torchmetric(extractor)
    digest = hashlib.sha256()
    for batch in reference():
        fid.update(batch, real=True)
        for image in batch:
            digest.update(image.cpu().contiguous().numpy().data)
    count = int(fid.real_features_num_samples)
    if count < 2:
        raise ValueError(f"fid needs at least 2 real images, the reference has {count}")
    return Statistics(fid.real_features_sum, fid.real_features_cov_sum, count, digest.hexdigest())


class Metric:
    """``fid`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a reference, or if the extractor's weights are missing."""
        if context.reference is None:
            raise ValueError("fid needs real images; set eval.reference to a source that has them")
        self._extractor = features.extractor(context)
        self._fid = _torchmetric(self._extractor)
        real = self._real = statistics(context.reference, self._extractor)
        self._fid.real_features_sum.copy_(real.total)
        self._fid.real_features_cov_sum.copy_(real.outer)
        self._fid.real_features_num_samples.fill_(real.count)
        self._fid.update(torch.empty(0, 3, 1, 1, dtype=torch.uint8), real=False)  # tells it the dtype

    @property
    def state(self) -> dict[str, Tensor]:
        """Sums over the features of the images seen."""
        return {
            "total": self._fid.fake_features_sum,
            "outer": self._fid.fake_features_cov_sum,
            "count": self._fid.fake_features_num_samples,
        }

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """images: uint8 [B, 3, H, W]; the prompts are not looked at."""
        self._fid.update(images, real=False)

    def compute(self) -> dict[str, float]:
        """``fid``. Raises ValueError below two images."""
        count = int(self._fid.fake_features_num_samples)
        if count < 2:
            raise ValueError(f"fid needs at least 2 images, got {count}")
        # rounding can leave a distance of 0 a hair below it
        return {"fid": max(0.0, float(self._fid.compute()))}

    def protocol(self) -> dict[str, Any]:
        """Extractor, counts and the reference's hash."""
        return {
            **self._extractor.protocol(),
            "num_images": int(self._fid.fake_features_num_samples),
            "reference": {"num_images": self._real.count, "sha256": self._real.sha256},
            "torchmetrics": version("torchmetrics"),
        }


class _Features(nn.Module):
    """An extractor as torchmetrics takes it, in float64 so that no sum is rounded."""

    def __init__(self, extractor: features.Extractor) -> None:
        super().__init__()
        self._extractor, self.num_features = extractor, extractor.num_features

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W], B may be 0 -> float64 [B, D], on the CPU, where the sums are."""
        if not len(images):
            return torch.empty(0, self.num_features, dtype=torch.float64)
        return self._extractor.images(images).double().cpu()


def _torchmetric(extractor: features.Extractor) -> FrechetInceptionDistance:
    from torchmetrics.image.fid import FrechetInceptionDistance

    # sync_on_compute would add up the reference over processes too, and a cached value would miss what is merged in
    return FrechetInceptionDistance(_Features(extractor), sync_on_compute=False, compute_with_cache=False)
