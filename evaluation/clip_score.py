"""CLIP score, and retrieval accuracy: does the CLIP find the image's own caption among all.

CLIP score: mean of 100 max(cos(image, caption), 0) (Hessel et al. 2021, arXiv 2104.08718). torchmetrics' CLIPScore is
not used: it refuses local folders, fails on Transformers 5, clamps the mean instead of each score, sums in float32,
and would encode each image a second time for retrieval. Numbers of different CLIPs do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.config import suggest

from . import features
from .context import About, Context, Extractor, Seen

ABOUT = About(title="CLIP score", needs=("clip",), values=("clip_score", "retrieval"), better="high")
_BLOCK = 4096


class Metric:
    """``clip_score``, 0 to 100, and ``retrieval``, the share of images whose best candidate is their own."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a CLIP, or if the candidates are not distinct or are not those of the prompts."""
        self._clip = features.clip(context, "clip_score")
        self.extractors: tuple[Extractor, ...] = (self._clip,)
        self._concept, self._number = context.concept, {c: i for i, c in enumerate(context.candidates)}
        if len(self._number) < len(context.candidates):
            raise ValueError("the candidates of retrieval must be distinct captions")
        self._own(context.prompts)
        self._candidates = self._texts(context.candidates).T if context.candidates else None

    def compute(self, seen: Seen) -> dict[str, float]:
        """``clip_score`` and, with candidates, ``retrieval``. Raises ValueError without images."""
        if not len(seen):
            raise ValueError("clip_score needs at least 1 image, got 0")
        return {name: float(values.mean()) for name, values in self.per_image(seen).items()}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Both: 100 max(cos, 0), and 1 where the best candidate is the image's own, else 0."""
        images = normalize(seen.rows[self._clip.key].double())
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(seen.prompts))}
        captions = self._texts(list(distinct))[torch.tensor([distinct[prompt] for prompt in seen.prompts])]
        found = {"clip_score": 100 * (images * captions).sum(1).clamp(min=0)}
        if self._candidates is not None:
            best = torch.cat([(part @ self._candidates).argmax(1) for part in images.split(_BLOCK)])
            found["retrieval"] = (best == torch.tensor(self._own(seen.prompts))).double()
        return found

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """[N] -> float64 [N, D] of length 1."""
        return normalize(self._clip.texts(texts).double())

    def _own(self, prompts: Sequence[str]) -> list[int]:
        """The number of the candidate that each stands for; none without candidates."""
        if not self._number:
            return []
        found = []
        for prompt in prompts:
            concept = self._concept(prompt)
            if concept not in self._number:
                raise ValueError(
                    f"prompt {prompt!r} stands for {concept!r}, which is no candidate of retrieval"
                    f"{suggest(concept, list(self._number)[:5] if len(self._number) > 50 else self._number)}"
                )
            found.append(self._number[concept])
        return found

    def protocol(self) -> dict[str, Any]:
        """The CLIP, the score and the number of candidates."""
        return {**self._clip.protocol(), "score": "mean of 100 max(cos, 0)", "candidates": len(self._number)}
