"""Spatial FID: the Frechet distance by where things are in the image, not only by what there is.

Nash et al. 2021, arXiv 2103.03841, sec. 5; here with the features of ADM's evaluator (Dhariwal and Nichol 2021, arXiv
2105.05233), from which published numbers come: the first 7 channels of the 1 x 1 branch of Mixed_6d ("mixed_6/conv"),
17 x 17 positions each, 2023 numbers in all, on images as TensorFlow 1 resizes them, whatever ``eval.features`` is.
ADM's reference files (``mu_s``, ``sigma_s``) are read.
"""

from __future__ import annotations

from . import features
from .context import About, Context
from .frechet import Distance

ABOUT = About(title="sFID", needs=("inception", "reference"), values=("sfid",), better="low")


class Metric(Distance):
    """``sfid`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a reference, or if InceptionV3's weights are missing."""
        seen_by = features.inception_extractor(context, "legacy_tensorflow", "spatial")
        super().__init__("sfid", seen_by, context)
