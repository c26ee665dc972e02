"""From a source's prompts and pixels to what a method trains on: conditions and latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Cond
from ..family import Family
from ..method import Batch
from ..transfer import to_device
from . import Item, LatentSource, PairSource, Source

T = TypeVar("T")

_CACHED_BYTES = 2**30
"""Of prompts' conditions that are kept: 4,500 prompts of SD 1.5, 120 of FLUX.1."""


class Batches:
    """Batches of a source, encoded by a family. A prompt is encoded once; so is an image, if ``cache`` is given.

    Without, it is encoded once for all the phases of a step that ask for it in turn.

    An encoder is always given as many rows as the batch has, some of them again where fewer are new. Which kernel a
    GPU takes depends on their number, and its rounding with it: what a sample is encoded to must not depend on what
    was seen before it, or a resumed training would go another way. It costs those rows, in batches with anything new.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        images: bool,
        cache: bool = False,
        path_times: Sequence[float] | None = None,
        place: Callable[[int], int] = int,
    ) -> None:
        """images: whether the method needs them. path_times: of a method that needs pairs; None: it needs none.

        place: a sample's index -> the number of its item, where not all of the source's are trained on.

        Raises ValueError if the source does not have what the method needs.
        """
        if images and not source.has_images:
            own = "set data.as_images for those of the teacher"
            remedy = own if isinstance(source, PairSource) else "use data.source: images"
            raise ValueError(f"this method needs images and the data source has prompts only; {remedy}")
        if images and isinstance(source, PairSource):
            path_times = path_times or ()  # its x0 are the images
        self._pairs: PairSource | None = None
        if path_times is not None:
            if not isinstance(source, PairSource):
                raise ValueError(
                    "this method needs teacher pairs and the data source has none; make them by `fastgen pairs` and "
                    "use data: {source: pairs, path: THEIR FOLDER}"
                )
            source.check_path(path_times)
            self._pairs, self._times = source, list(path_times)
        self._source, self._family, self._images, self._cache = source, family, images, cache
        self._place = place
        self._conds: dict[str, Cond] = {}
        self._latents: dict[int, Tensor] = {}
        self._prompts: dict[int, str] = {}
        self._uncond = family.uncond()

    def batch(self, samples: Sequence[int]) -> Batch:
        """samples: global indices, [B]."""
        known = [s % len(self._source) if self._cache else s for s in map(self._place, samples)]
        if not self._cache:
            self._prompts = {s: self._prompts[s] for s in known if s in self._prompts}
            self._latents = {s: self._latents[s] for s in known if s in self._latents}
        items = {s: self._source.item(s) for s in dict.fromkeys(known) if s not in self._prompts}
        self._prompts |= {s: item.prompt for s, item in items.items()}
        prompts, x0 = [self._prompts[s] for s in known], None
        if self._images and self._pairs is None:
            if items:
                fresh = self._encoded(items, len(known))
                self._latents |= dict(zip(items, fresh, strict=True))
            x0 = torch.stack([self._latents[s] for s in known])
        if self._pairs is None:
            return Batch(list(samples), self._cond(prompts), self._uncond, x0)
        device = next(self._family.denoiser.network.parameters()).device
        x0, eps, path = self._pairs.pairs(known, self._times)
        x0, eps = to_device(x0, device), to_device(eps, device)
        path = {t: to_device(x_t, device) for t, x_t in path.items()}
        return Batch(list(samples), self._cond(prompts), self._uncond, x0, eps, path)

    def _encoded(self, items: Mapping[int, Item], rows: int) -> Tensor:
        if isinstance(self._source, LatentSource):
            device = next(self._family.denoiser.network.parameters()).device
            return to_device(self._source.latents(list(items)), device)
        images = filled([item.image for item in items.values()], rows)
        return _first(self._family.encode(pixels(images)), len(items))

    def _cond(self, prompts: Sequence[str]) -> Cond:
        new = sorted({p for p in prompts if p not in self._conds})
        row = sum(value.nbytes for value in self._uncond.values())  # one prompt's
        if (len(self._conds) + len(new)) * row > _CACHED_BYTES:
            self._conds.clear()
            new = sorted(set(prompts))
        if new:
            encoded = self._family.encode_prompts(filled(new, len(prompts)))
            rows = {name: _first(value, len(new)) for name, value in encoded.items()}
            for i, prompt in enumerate(new):
                self._conds[prompt] = {name: value[i] for name, value in rows.items()}
        return {name: torch.stack([self._conds[p][name] for p in prompts]) for name in self._conds[prompts[0]]}


def filled(values: Sequence[T], count: int) -> list[T]:
    """As many as ``count``: from the start again where there are fewer.

    A row is then encoded to the same wherever it is: kernels for fewer rows, or for one, may round otherwise.
    """
    return [values[i % len(values)] for i in range(count)]


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows, without the memory of the others."""
    return rows if len(rows) == count else rows[:count].clone()


def pixels(images: Sequence[np.ndarray | None]) -> Tensor:
    """uint8 [H, W, 3] each -> float [B, 3, H, W] in [-1, 1]."""
    stacked = np.stack([image for image in images if image is not None])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def still(pixels: Tensor) -> Tensor:
    """Images as they are, of videos the middle frame: [B, 3, H, W] or [B, 3, F, H, W] -> [B, 3, H, W]."""
    return pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]


def to_uint8(pixels: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8, rounded as Diffusers' image processor does."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
