"""The one pass over images: rows by extractor, shared out over processes; intervals by resampling them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen import parallel
from fastgen.data import Source

from .context import Extractor, MetricLike, Seen
from .features import hash_images

Moments = tuple[Tensor, Tensor]
"""Mean [D] and covariance [D, D], float64."""
Images = Callable[[Sequence[int]], Tensor]
"""Numbers -> those images, uint8 [B, 3, H, W]."""


def see(
    images: Images, prompts: Sequence[str], extractors: Sequence[Extractor], batch_size: int, alone: bool = False
) -> Seen:
    """Go through the images once; every process sees its share and gets the rows of all.

    alone: this process sees them all, and the others know nothing of it.
    """
    wanted = {extractor.key: extractor for extractor in extractors}
    rows: dict[str, Tensor] = {}
    for part in shares(range(len(prompts)), batch_size, alone):
        batch = images(part)
        for key, extractor in wanted.items():
            found = extractor(batch, [prompts[i] for i in part])
            if key not in rows:
                rows[key] = torch.zeros(len(prompts), *found.shape[1:])
            rows[key][list(part)] = found
    if not alone:
        for key in wanted:
            parallel.sum_over_processes(rows[key])  # each row is one process's, and zero in the others
    return Seen(prompts, rows)


def shares(indices: range, batch_size: int, alone: bool = False) -> Iterator[range]:
    """This process's batches of the indices; all of them if it is alone. Raises ValueError if some would have none."""
    if not alone and parallel.size() > len(indices):
        raise ValueError(f"{len(indices)} images cannot be shared out over {parallel.size()} processes; make more")
    own = indices if alone else indices[parallel.rank() :: parallel.size()]
    for start in range(0, len(own), batch_size):
        yield own[start : start + batch_size]


def told(source: Source, indices: Sequence[int]) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """The prompts of a source's items, and GenEval's records of those that have one; no image is kept."""
    prompts, records = [], {}
    for i in indices:
        item = source.item(i)
        prompts.append(item.prompt)
        if item.metadata is not None:
            records[item.prompt] = item.metadata
    return prompts, records


class Real:
    """The real images of some of a source's items, as ``context.Reference``."""

    def __init__(
        self,
        source: Source,
        indices: range,
        batch_size: int,
        alone: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """alone: as ``see`` takes it. prompts: of these items, where they are known; else the source is asked."""
        self.prompts = told(source, indices)[0] if prompts is None else prompts
        self._source, self._indices, self._batch_size, self._alone = source, indices, batch_size, alone
        self._rows: dict[str, Tensor] = {}
        self._statistics: dict[str, Moments] = {}
        self._sha256 = ""

    def images(self, part: Sequence[int]) -> Tensor:
        """Of these places in the range: uint8 [B, 3, H, W]."""
        return real_images(self._source, [self._indices[i] for i in part])

    def rows(self, extractor: Extractor) -> Tensor:
        """float32 [M, ...], each extractor's made once."""
        if extractor.key not in self._rows:
            digest = hashlib.sha256()

            def images(part: Sequence[int]) -> Tensor:
                batch = self.images(part)
                digest.update(batch.contiguous().numpy().data)
                return batch

            self._rows |= see(images, self.prompts, [extractor], self._batch_size, self._alone).rows
            if self._alone or parallel.size() == 1:  # it has seen them all, in their order
                self._sha256 = digest.hexdigest()
        return self._rows[extractor.key]

    def statistics(self, extractor: Extractor) -> Moments:
        """Mean [D] and covariance [D, D], float64. Raises ValueError below two images."""
        if extractor.key not in self._statistics:
            rows = self.rows(extractor)
            if len(rows) < 2:
                raise ValueError(f"statistics need at least 2 real images, the reference has {len(rows)}")
            self._statistics[extractor.key] = moments_of(rows)
        return self._statistics[extractor.key]

    def protocol(self) -> dict[str, object]:
        """Their number, and the hash of their pixels in order."""
        if not self._sha256:
            everything = shares(range(len(self._indices)), self._batch_size, alone=True)
            self._sha256 = hash_images(self.images(part) for part in everything)
        return {"num_images": len(self._indices), "sha256": self._sha256}


def moments_of(rows: Tensor) -> Moments:
    """Of rows [M, D], M at least 2; the covariance divides by M - 1."""
    rows = rows.double()
    centred = rows - rows.mean(0)
    return rows.mean(0), centred.T @ centred / (len(rows) - 1)


def real_images(source: Source, indices: Sequence[int]) -> Tensor:
    """Of these items: uint8 [B, 3, H, W]. Raises ValueError if one has none."""
    found = [source.item(i).image for i in indices]
    pixels = [image for image in found if image is not None]
    if len(pixels) < len(found):
        raise ValueError("an item of the reference has no image; give a source whose items all have")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def intervals(
    metric: MetricLike, seen: Seen, values: dict[str, float], resamplings: int, seed: int, share: bool = False
) -> dict[str, list[float]]:
    """95 % intervals of a metric's values by the bootstrap over images (Efron 1979): name -> [low, high].

    A value lies in the middle of its interval, 1.96 deviations of the resampled values wide to each side: resampled
    sets hold images twice, which shifts a distance between distributions (FID) upwards, but hardly its deviation.
    share: the values are shares, so that none of their intervals goes below 0 or above 1.
    """
    if not resamplings or not metric.extractors:
        return {}
    rng = np.random.default_rng([seed, len(seen)])
    found: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(resamplings):
        drawn = metric.compute(seen.take(rng.integers(len(seen), size=len(seen)).tolist()))
        for name, value in drawn.items():
            found[name].append(value)
    width = {name: 1.96 * float(np.std(drawn, ddof=1)) for name, drawn in found.items()}
    low, high = (0.0, 1.0) if share else (-math.inf, math.inf)
    return {name: [max(low, v - width[name]), min(high, v + width[name])] for name, v in values.items()}
