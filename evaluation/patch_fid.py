"""Patch FID: the Frechet distance by the middle 299 x 299 pixels, not resized, so that fine detail counts.

Lin et al. 2024, arXiv 2402.13929 (SDXL-Lightning), and DMD2's SDXL tables (Yin et al. 2024, arXiv 2405.14867): of
1024-pixel images FID sees little, as it shrinks them to 299. DMD2's code takes an image with a side of less than 299
pixels as a whole; here that is an error. The real images must be as large as the made ones for the number to say
something.
"""

from __future__ import annotations

from . import features
from .context import About, Context
from .frechet import Distance

ABOUT = About(title="patch FID", needs=("inception", "reference"), values=("patch_fid",), better="low")


class Metric(Distance):
    """``patch_fid`` of the images seen, against the context's reference."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError without a reference, if weights are missing, or if real images are too small."""
        super().__init__("patch_fid", features.inception_extractor(context, "patch"), context)
