"""Frechet distance between features of made and real images (FID; with a CLIP's features, CLIP-FID).

Heusel et al. 2017, arXiv 1706.08500; Kynkäänniemi et al. 2023, arXiv 2203.06026, on CLIP's features. ``eval.features``
says how images come to InceptionV3: ``clean`` as in clean-fid (Parmar et al. 2022, arXiv 2104.11222; text-to-image
tables), ``legacy_tensorflow`` as in the first code, in EDM's and in ADM's (class-conditional tables),
``legacy_pytorch`` as in pytorch-fid. Numbers of different ones do not compare.
"""

from __future__ import annotations

from . import features
from .context import About, Context
from .frechet import Distance

ABOUT = About(title="FID", needs=("features", "reference"), values=("fid",), better="low")


class Metric(Distance):
    """``fid`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a reference, or if the extractor's weights are missing."""
        super().__init__("fid", features.extractor(context), context)
