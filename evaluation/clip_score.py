"""CLIP score, and retrieval accuracy: does the CLIP find the image's own caption among all.

CLIP score: mean of 100 max(cos(image, caption), 0) (Hessel et al. 2021, arXiv 2104.08718). torchmetrics' CLIPScore is
not used: it refuses local folders, fails on Transformers 5, clamps the mean instead of each score, sums in float32,
and would encode each image a second time for retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.config import suggest

from . import features
from .context import Context


class Metric:
    """``clip_score``, 0 to 100, and ``retrieval``, the share of images whose best candidate is their own."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a CLIP, or if the candidates are not distinct."""
        if context.clip is None:
            raise ValueError("clip_score needs a CLIP; set eval.clip to a folder or a Hub id")
        self._clip = features.load_clip(context.clip, str(context.device))
        self._concept, self._number = context.concept, {c: i for i, c in enumerate(context.candidates)}
        if len(self._number) < len(context.candidates):
            raise ValueError("the candidates of retrieval must be distinct captions")
        self._candidates = normalize(self._clip.texts(context.candidates)).T if context.candidates else None
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in ("score", "right", "count")}

    @property
    def state(self) -> dict[str, Tensor]:
        """Sums of scores and of right retrievals, and the number of images."""
        return self._sums

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """images: uint8 [B, 3, H, W]; prompts: [B]. Raises ValueError if a prompt stands for no candidate."""
        seen = normalize(self._clip.images(images))
        cosine = (seen * normalize(self._clip.texts(prompts))).sum(1)
        if self._candidates is not None:
            own = torch.tensor([self._own(prompt) for prompt in prompts])
            best = (seen @ self._candidates).argmax(1).cpu()
            self._sums["right"] += (best == own).sum()
        self._sums["score"] += 100 * cosine.double().clamp(min=0).sum().cpu()
        self._sums["count"] += len(images)

    def _own(self, prompt: str) -> int:
        concept = self._concept(prompt)
        if concept not in self._number:
            raise ValueError(
                f"prompt {prompt!r} stands for {concept!r}, which is no candidate of retrieval"
                f"{suggest(concept, list(self._number)[:5] if len(self._number) > 50 else self._number)}"
            )
        return self._number[concept]

    def compute(self) -> dict[str, float]:
        """``clip_score`` and, with candidates, ``retrieval``. Raises ValueError without images."""
        count = float(self._sums["count"])
        if not count:
            raise ValueError("clip_score needs at least 1 image, got 0")
        values = {"clip_score": float(self._sums["score"]) / count}
        if self._candidates is not None:
            values["retrieval"] = float(self._sums["right"]) / count
        return values

    def protocol(self) -> dict[str, Any]:
        """The CLIP, the number of images and of candidates."""
        return {
            **self._clip.protocol(),
            "num_images": int(self._sums["count"]),
            "score": "mean of 100 max(cos, 0)",
            "candidates": len(self._number),
        }
