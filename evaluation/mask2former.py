"""Mask2Former as GenEval's detector: Transformers' network between the official evaluator's own first and last steps.

Before it, as MMDetection's test pipeline does: the shorter side to 800 pixels, the longer to at most 1333, by OpenCV's
bilinear resize of 8-bit images, which aliases; padded on the right and below to multiples of 32 with 128; then
ImageNet's mean and standard deviation. After it, as its instance post-processing does: the 100 best pairs of query and
class; mask logits brought to the padded size, cut, brought to the image's size, positive there; score = probability of
the class x mean of the mask's own sigmoid. Transformers' post_process_instance_segmentation differs in all of these.
Cheng et al. 2022, arXiv 2112.01527. Float32 on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from . import weights

SIZE = (800, 1333)
"""Shorter side, and the most of the longer one, in pixels."""
DIVISOR = 32
PADDING = 128.0
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
CLASSES = 80
MOST = 100
"""Detections of an image."""
ORIGIN = "origin.txt"
"""A file of a converted folder: where its weights come from, in words."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects of one image, best first.

    Attributes:
        classes: int64 [K].
        scores: float32 [K], 0 to 1.
        boxes: float32 [K, 4], x0, y0, x1, y1 in pixels; tight round the mask, x1 and y1 just outside.
        masks: bool [K, H, W].
    """

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


def fitted(height: int, width: int, size: tuple[int, int] = SIZE) -> tuple[int, int]:
    """Height and width after the resize, which keeps the ratio."""
    scale = min(max(size) / max(height, width), min(size) / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(images: Tensor, size: tuple[int, int] = SIZE) -> tuple[Tensor, tuple[int, int]]:
    """What the network is given.

    Args:
        images: uint8 [B, 3, H, W].
        size: shorter side, and the most of the longer one.

    Returns:
        float32 [B, 3, H', W'], and the height and width in its upper left that are image.
    """
    inner = fitted(images.shape[-2], images.shape[-1], size)
    pixels = resize(images, *inner).float()
    pixels = pad(pixels, (0, -inner[1] % DIVISOR, 0, -inner[0] % DIVISOR), value=PADDING)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, inner


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """OpenCV's bilinear resize of 8-bit images, to the bit: uint8 [..., H, W] -> uint8 [..., height, width].

    Weights are whole 2048ths, and each sum is cut, not rounded, by 4 and by 16 bits before the last two are rounded.
    """
    left, right, at_left, at_right = _neighbours(images.shape[-1], width, images.device)
    beside = (left >= 0) & (left < images.shape[-1] - 1)  # in a row, outer pixels are taken whole; in a column, twice
    at_left, at_right = torch.where(beside, at_left, _ONE), torch.where(beside, at_right, 0)
    above, below, at_above, at_below = _neighbours(images.shape[-2], height, images.device)
    row, rows = images.shape[-1] - 1, images.shape[-2] - 1
    values = images.int()
    values = (values[..., left.clamp(0, row)] * at_left + values[..., right.clamp(0, row)] * at_right) >> 4
    upper = (values[..., above.clamp(0, rows), :] * at_above[:, None]) >> 16
    lower = (values[..., below.clamp(0, rows), :] * at_below[:, None]) >> 16
    return ((upper + lower + 2) >> 2).to(torch.uint8)


_ONE = 2048


def _neighbours(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each new place the old ones before and after it, which may lie outside, and their weights in 2048ths."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    before = places.floor()
    share = places - before
    weights = ((1 - share) * _ONE).round().int(), (share * _ONE).round().int()
    return before.long().to(device), before.long().to(device) + 1, weights[0].to(device), weights[1].to(device)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    inner: tuple[int, int],
    original: tuple[int, int],
    above: float = 0.0,
) -> Detections:
    """The objects of one image from what the network gives.

    Args:
        class_logits: [Q, C + 1], the last for no object.
        mask_logits: [Q, h, w].
        padded: height and width of the network's input.
        inner: of these, what is image.
        original: height and width of the image itself.
        above: objects of this score or less are left out. As no mask raises a score, those of a class probability of
            this or less need no mask, which is most of the work.
    """
    probability = class_logits.softmax(-1)[:, :-1]
    best, index = probability.flatten().topk(min(MOST, probability.numel()))
    index, best = index[best > above], best[best > above]
    query, inverse = index.div(probability.shape[1], rounding_mode="floor").unique(return_inverse=True)
    masks = torch.zeros(len(query), *original, dtype=torch.bool, device=class_logits.device)
    inside = torch.zeros(len(query), device=class_logits.device)
    for i, one in enumerate(mask_logits[query]):  # one at a time: a hundred large images would not fit
        logits = interpolate(one[None, None], padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, : inner[0], : inner[1]]
        logits = interpolate(logits, original, mode="bilinear", align_corners=False)[0, 0]
        masks[i] = logits > 0
        inside[i] = (logits.sigmoid() * masks[i]).sum() / (masks[i].sum() + 1e-6)
    scores = best * inside[inverse]
    keep = torch.nonzero(scores > above).flatten()
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    masks = masks[inverse[keep]]
    boxes = torch.tensor([box(mask) for mask in masks], device=masks.device).view(-1, 4)
    return Detections((index % probability.shape[1])[keep], scores[keep], boxes, masks)


def box(mask: Tensor) -> tuple[float, float, float, float]:
    """The extent of a mask [H, W] as x0, y0, x1, y1; zeros if it is empty."""
    x, y = torch.nonzero(mask.any(0)).flatten(), torch.nonzero(mask.any(1)).flatten()
    return (float(x[0]), float(y[0]), float(x[-1]) + 1, float(y[-1]) + 1) if len(x) else (0.0, 0.0, 0.0, 0.0)


class Mask2Former:
    """Transformers' network, found by its folder; images of one call are of one size."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", size: tuple[int, int] = SIZE) -> None:
        """Raises ValueError if the folder has no whole Mask2Former of COCO's 80 classes."""
        from transformers import Mask2FormerForUniversalSegmentation

        try:
            network, found = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{folder}: no Mask2Former that Transformers reads ({reason})") from None
        if network.config.num_labels != CLASSES:
            raise ValueError(
                f"{folder}: a Mask2Former of {network.config.num_labels} classes; GenEval needs COCO's 80"
            )
        if missing := needed(found["missing_keys"]):
            raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} the first")
        self._network = network.to(device).eval()
        self._device, self._size, self._name = device, size, folder.name
        self._origin = (folder / ORIGIN).read_text(encoding="utf-8").strip() if (folder / ORIGIN).is_file() else ""
        self._sha256 = weights.sha256(folder)
        self.key = f"mask2former {self._sha256} {size}"

    @torch.inference_mode()
    def __call__(self, images: Tensor, above: float = 0.0) -> Iterator[Detections]:
        """uint8 [B, 3, H, W] -> an image's objects of a score over `above` each, on the network's device."""
        pixels, inner = prepare(images.to(self._device), self._size)
        output = self._network(pixel_values=pixels)
        padded, original = (pixels.shape[-2], pixels.shape[-1]), (images.shape[-2], images.shape[-1])
        for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True):
            yield instances(classes, masks, padded, inner, original, above)

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights, where they come from if they were converted, and the resize."""
        origin = {"origin": self._origin} if self._origin else {}
        return {
            "extractor": f"Mask2Former {self._name}",
            "sha256": self._sha256,
            **origin,
            "resize": f"{self._size[0]} to {self._size[1]}, as OpenCV's bilinear",
        }


def needed(names: list[str] | set[str]) -> list[str]:
    """Of missing weights those that the output depends on: not the loss's, nor a last norm that no stage passes."""
    return sorted(n for n in names if not n.startswith("criterion.") and ".encoder.swin.layernorm." not in n)


load = functools.lru_cache(maxsize=1)(Mask2Former)
