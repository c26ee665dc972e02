"""KID: the squared maximum mean discrepancy between features of made and real images, without bias.

    k(x, y) = (x.y / D + 1)^3
    kid = mean k(x_i, x_j) over i != j + mean k(y_i, y_j) over i != j - 2 mean k(x_i, y_j)

Bińkowski et al. 2018, arXiv 1801.01401, sec. 4 and eq. 4. clean-fid, torchmetrics and torch-fidelity average this over
random subsets of 1000 images; here it is taken once over all images, which is what these averages tend to: exact, the
same each time, and with less noise. It can be below 0.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import features
from .context import About, Context, Extractor, Reference, Seen

ABOUT = About(title="KID", needs=("features", "reference"), values=("kid",), better="low")
_BLOCK = 2048


def kernel_sum(x: Tensor, y: Tensor) -> float:
    """Sum of k over all pairs of x [N, D] and y [M, D], float64, a block at a time."""
    blocks = ((a @ b.T / x.shape[1] + 1).pow(3).sum() for a in x.split(_BLOCK) for b in y.split(_BLOCK))
    return float(sum(blocks, x.new_zeros(())))


def within(x: Tensor) -> float:
    """Mean of k over the pairs of different rows of x [N, D], float64, N at least 2."""
    own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    parts = x.split(_BLOCK)
    total = sum(kernel_sum(part, part) for part in parts)
    # the kernel is symmetric
    total += 2 * sum(kernel_sum(part, x[(i + 1) * _BLOCK :]) for i, part in enumerate(parts[:-1]))
    return (total - float(own)) / (len(x) * (len(x) - 1))


def kid(x: Tensor, y: Tensor, within_y: float) -> float:
    """Of rows x [N, D] and y [M, D], float64; within_y: ``within(y)``."""
    return within(x) + within_y - 2 * kernel_sum(x, y) / (len(x) * len(y))


class Metric:
    """``kid`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without real images (their statistics are not enough), or if weights are missing."""
        if context.reference is None:
            raise ValueError("kid needs real images; set eval.reference to a source that has them")
        self._extractor, self._reference = features.extractor(context), context.reference
        self.extractors: tuple[Extractor, ...] = (self._extractor,)
        # 50 000 images take 2.5e13 multiplications; not every accelerator knows float64
        self._device = torch.device(context.device if torch.device(context.device).type == "cuda" else "cpu")
        self._real, self._within = real(context.reference, self._extractor, self._device)

    def compute(self, seen: Seen) -> dict[str, float]:
        """``kid``. Raises ValueError below two images."""
        if len(seen) < 2:
            raise ValueError(f"kid needs at least 2 images, got {len(seen)}")
        made = seen.rows[self._extractor.key].double().to(self._device)
        return {"kid": kid(made, self._real, self._within)}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a distance of two sets."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The extractor, the kernel and the reference."""
        return {
            **self._extractor.protocol(),
            "kernel": "(x.y / D + 1)^3, unbiased, over all pairs of images at once, not over random subsets",
            "reference": self._reference.protocol(),
        }


_known: WeakKeyDictionary[Any, dict[str, tuple[Tensor, float]]] = WeakKeyDictionary()


def real(reference: Reference, extractor: Extractor, device: torch.device) -> tuple[Tensor, float]:
    """The reference's rows and their ``within``, made once. Raises ValueError below two."""
    known, key = _known.setdefault(reference, {}), f"{extractor.key} {device}"
    if key not in known:
        rows = reference.rows(extractor).double().to(device)
        if len(rows) < 2:
            raise ValueError(f"kid needs at least 2 real images, the reference has {len(rows)}")
        known[key] = rows, within(rows)
    return known[key]
