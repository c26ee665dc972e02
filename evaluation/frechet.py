"""The Frechet distance of two sets of features, as Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017, eq. 6).

    d^2 = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2

With S_a = F F^T the eigenvalues of S_a S_b, but for zeros, are those of the symmetric F^T S_b F, so that no root of a
product has to be taken. F comes from the eigenvectors of S_a, those of eigenvalue zero left out; it is the
reference's, and is kept. Where S_b is that of N rows fewer than F has columns, the same eigenvalues are those of the
N x N Gram matrix of the rows seen through F. All is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .context import Context, Extractor, Reference, Seen


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [D], a factor [D, R] of the covariance, factor factor^T, and the covariance's trace; float64."""

    mean: Tensor
    factor: Tensor
    trace: float


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    """Of mean [D] and covariance [D, D]. Raises ValueError if they cannot be such."""
    mean, covariance = mean.double(), covariance.double()
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean of {len(mean)} features has no covariance of shape {tuple(covariance.shape)}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("mean and covariance must be finite; some feature is not a number")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    rounding = float(values.abs().max()) * len(mean) * torch.finfo(values.dtype).eps
    if values.min() < -1e-6 * values.abs().max():  # what a sum in float32 leaves is smaller
        raise ValueError(f"a covariance cannot have the eigenvalue {float(values.min()):.3g}")
    kept = values > rounding
    return Gaussian(mean, vectors[:, kept] * values[kept].sqrt(), float(covariance.trace()))


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared distance of two Gaussians: means [D], covariances [D, D]."""
    one, other = gaussian(mean_a, covariance_a), covariance_b.double()
    return _squared(one, mean_b.double(), float(other.trace()), one.factor.T @ other @ one.factor)


def to_rows(one: Gaussian, rows: Tensor) -> float:
    """Squared distance to the Gaussian of rows [N, D], N at least 2, whose covariance divides by N - 1."""
    rows = rows.double()
    if rows.shape[1] != len(one.mean):
        raise ValueError(f"features of {rows.shape[1]} numbers cannot be held against statistics of {len(one.mean)}")
    mean = rows.mean(0)
    centred = (rows - mean) / (len(rows) - 1) ** 0.5
    seen = centred @ one.factor
    gram = seen @ seen.T if len(seen) < seen.shape[1] else seen.T @ seen
    return _squared(one, mean, float(centred.square().sum()), gram)


def _squared(one: Gaussian, mean: Tensor, trace: float, symmetric: Tensor) -> float:
    """symmetric: a matrix with the eigenvalues of the covariances' product."""
    # rounding can leave an eigenvalue of 0, or a distance of 0, a hair below it
    roots = torch.linalg.eigvalsh(symmetric).clamp(min=0).sqrt().sum() if len(symmetric) else torch.zeros(())
    return max(0.0, float((one.mean - mean).square().sum()) + one.trace + trace - 2 * float(roots))


class Distance:
    """A Frechet distance of the images seen to the reference, as a metric."""

    def __init__(self, name: str, extractor: Extractor, context: Context) -> None:
        """name: of the value. Raises ValueError without a reference, or if it is of other features."""
        if context.reference is None:
            raise ValueError(f"{name} needs real images; set eval.reference to a source that has them")
        self._name, self._extractor, self._reference = name, extractor, context.reference
        self.extractors: tuple[Extractor, ...] = (extractor,)
        self._real = real(context.reference, extractor)

    def compute(self, seen: Seen) -> dict[str, float]:
        """The distance. Raises ValueError below two images."""
        if len(seen) < 2:
            raise ValueError(f"{self._name} needs at least 2 images, got {len(seen)}")
        return {self._name: to_rows(self._real, seen.rows[self._extractor.key])}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: a distance of two sets."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """The extractor and the reference."""
        return {**self._extractor.protocol(), "reference": self._reference.protocol()}


_known: WeakKeyDictionary[Any, dict[str, Gaussian]] = WeakKeyDictionary()


def real(reference: Reference, extractor: Extractor) -> Gaussian:
    """The reference's side, made once: of 2048 features it takes seconds."""
    known = _known.setdefault(reference, {})
    if extractor.key not in known:
        known[extractor.key] = gaussian(*reference.statistics(extractor))
    return known[extractor.key]
