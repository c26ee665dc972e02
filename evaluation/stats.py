"""Statistics of real images in an ``.npz``, so that a reference need not be gone through, or even be there, again.

Arrays: ``mu`` [D] and ``sigma`` [D, D], float64, as clean-fid, EDM and ADM write them; ours also say of what:
``features`` (an extractor's key), ``number`` of images and ``sha256`` of their pixels, in order. ``feats`` [M, D], as
clean-fid writes for KID, are the features themselves. ADM's files have ``mu_s`` and ``sigma_s`` for sFID besides.
Nothing in such a file is unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.checkpoint import atomic_file
from fastgen.data import Source

from . import weights
from .context import Extractor
from .seen import Moments, moments_of, real_images


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file holds, as ``context.Reference``.

    Attributes:
        path: of the file.
        moments: one or, in ADM's files, two.
        features: the extractor's key; empty: not said.
        number: of images; None: not said.
        sha256: of their pixels; empty: not said.
        feats: features of each image, float32 [M, D], if they are there.
    """

    path: Path
    moments: tuple[Moments, ...]
    features: str = ""
    number: int | None = None
    sha256: str = ""
    feats: Tensor | None = None
    _widths: dict[str, int] = field(default_factory=dict)

    def rows(self, extractor: Extractor) -> Tensor:
        """float32 [M, D]. Raises ValueError if there are statistics only, or of other features."""
        if self.feats is None:
            raise ValueError(
                f"{self.path}: has statistics only, no features of each image; set eval.reference to a source of "
                "images, or make the file anew with them"
            )
        self._check(extractor, [self.feats.shape[1]])
        return self.feats

    def statistics(self, extractor: Extractor) -> Moments:
        """Mean and covariance. Raises ValueError if they are of other features."""
        widths = [len(mean) for mean, _ in self.moments]
        return self.moments[widths.index(self._check(extractor, widths))]

    def _check(self, extractor: Extractor, widths: list[int]) -> int:
        """The width of the extractor's features, if it may be the one that these are of."""
        if self.features and self.features != extractor.key:
            raise ValueError(
                f"{self.path}: statistics of {self.features}, but images are seen by {extractor.key}; make them anew "
                "with `fastgen stats`, or set eval.features and eval.weights to theirs"
            )
        if extractor.key not in self._widths:  # a file that does not say: at least the width must be right
            grey = torch.full((1, 3, 299, 299), 128, dtype=torch.uint8)
            self._widths[extractor.key] = extractor(grey, [""]).shape[1]
        width = self._widths[extractor.key]
        if width not in widths:
            told = " and ".join(str(w) for w in widths)
            raise ValueError(
                f"{self.path}: statistics of {told} features, but {extractor.key} gives {width}; set eval.features to "
                "theirs"
            )
        return width

    def protocol(self) -> dict[str, Any]:
        """``num_images`` and ``sha256`` of their pixels; where the file does not say, its own name and hash."""
        if self.sha256:
            return {"num_images": self.number, "sha256": self.sha256}
        return {"num_images": self.number, "file": self.path.name, "file_sha256": weights.sha256(self.path)}


def load(path: Path) -> Stored:
    """Read a file. Raises ValueError, naming it, if it has no statistics."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file of statistics; `fastgen stats` makes one")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as opened:  # which leaves its own file open
            names = ("mu", "sigma", "mu_s", "sigma_s", "feats", "features", "number", "sha256")
            arrays = {name: opened[name] for name in names if name in opened}
        for name, array in arrays.items():
            wanted = "U" if name in ("features", "sha256") else "iu" if name == "number" else "fiu"
            if array.dtype.kind not in wanted or (wanted != "fiu" and array.ndim):
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not an .npz of plain arrays ({reason}); `fastgen stats` makes one") from None
    feats = torch.from_numpy(arrays["feats"]).float() if "feats" in arrays else None
    moments = []
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean in arrays and covariance in arrays:
            moments.append(_checked(path, arrays[mean], arrays[covariance]))
    if feats is not None and not moments:
        if feats.dim() != 2 or len(feats) < 2:
            raise ValueError(f"{path}: feats must be [images, features], at least 2 images; got {tuple(feats.shape)}")
        moments.append(moments_of(feats))
    if not moments:
        raise ValueError(f"{path}: has neither mu and sigma nor feats; `fastgen stats` makes such a file")
    number = int(arrays["number"]) if "number" in arrays else None if feats is None else len(feats)
    text = {name: str(arrays[name]) if name in arrays else "" for name in ("features", "sha256")}
    return Stored(path, tuple(moments), text["features"], number, text["sha256"], feats)


def _checked(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: a mean of shape {mean.shape} has no covariance of shape {covariance.shape}")
    return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()


def save(path: Path, moments: Moments, features: str, number: int, sha256: str, feats: Tensor | None = None) -> None:
    """Write a file that appears whole or not at all."""
    arrays: dict[str, Any] = {
        "mu": moments[0].numpy(),
        "sigma": moments[1].numpy(),
        "features": np.array(features),
        "number": np.array(number),
        "sha256": np.array(sha256),
    }
    if feats is not None:
        arrays["feats"] = feats.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def make(source: Source, extractor: Extractor, path: Path, batch_size: int, keep_rows: bool = False) -> dict[str, Any]:
    """Go through all images of a source and write their statistics.

    Args:
        source: with images.
        extractor: of features of images alone, not of prompts; FID's is ``features.extractor(context)``.
        path: of the ``.npz``.
        batch_size: images at a time.
        keep_rows: leave each image's features in the file, for KID and others that need them.

    Returns:
        What the file says: ``path``, ``features``, ``number``, ``sha256``, and the extractor's ``protocol``.

    Raises:
        ValueError: if the source has fewer than two images.
    """
    number = len(source) if source.has_images else 0
    if number < 2:
        raise ValueError(f"statistics need at least 2 images, the source has {number}")
    digest, kept = hashlib.sha256(), []
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, number, batch_size):
        indices = range(start, min(start + batch_size, number))
        images = real_images(source, indices)
        digest.update(images.contiguous().numpy().data)
        found = extractor(images, [""] * len(images))
        kept += [found] if keep_rows else []
        # parts merge without loss of digits (Chan et al. 1983)
        rows = found.double()
        away = rows.mean(0) - mean
        total = count + len(rows)
        scatter = scatter + (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        scatter = scatter + torch.outer(away, away) * (count * len(rows) / total)
        mean, count = mean + away * (len(rows) / total), total
    sha256 = digest.hexdigest()
    feats = torch.cat(kept) if keep_rows else None
    save(path, (mean, scatter / (count - 1)), extractor.key, count, sha256, feats)
    told = {"path": str(path), "features": extractor.key, "number": count, "sha256": sha256}
    return told | {"protocol": extractor.protocol()}
