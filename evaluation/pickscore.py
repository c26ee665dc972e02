"""PickScore: how much people who make pictures would like an image for its prompt.

    pickscore = exp(logit scale) cos(image, prompt),  by a CLIP ViT-H/14 trained on choices between two images

Kirstain et al. 2023, arXiv 2305.01569. The mean over images; about 20 for good images, and only differences mean
something. The checkpoint is a folder of a CLIPModel with its processor, and the learnt scale is in it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from . import features, weights
from .context import About, Context
from .preference import ClipScores, Preference

ABOUT = About(title="PickScore", needs=("pickscore",), values=("pickscore",), better="high")


@functools.lru_cache(maxsize=1)
def load(folder: Path, device: str) -> ClipScores:
    """The extractor of a folder. Raises ValueError if it holds no CLIPModel with its processor."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        network = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: not a CLIPModel with tokenizer and image processor ({reason})") from None

    def prepare(images: Tensor) -> Tensor:
        found: Tensor = processor.image_processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        return found

    factor = float(network.logit_scale.detach().double().exp())
    told = {
        "extractor": f"PickScore {folder.name}",
        "sha256": features.fingerprint({"clip": network}),
        "resize": "the folder's own image processor",
        "score": f"{factor:g} cos",
    }
    return ClipScores("pickscore", network, processor.tokenizer, prepare, factor, told, device)


class Metric(Preference):
    """``pickscore``, the mean over the images seen."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if the weights are missing."""
        folder = weights.find("pickscore", context.weights.get("pickscore"))
        super().__init__("pickscore", load(folder, str(context.device)))
