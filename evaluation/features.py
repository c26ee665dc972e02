"""What the metrics see with: a CLIP's embeddings of images and captions, or InceptionV3's features of images.

Both are float32, whatever the weights on disk are, and are loaded once per process.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from . import inception, weights
from .context import Context, Extractor

Output = Literal["pool", "spatial", "logits"]
Preparation = Literal["clean", "legacy_pytorch", "legacy_tensorflow", "patch"]
_TEXT_BATCH = 256


def extractor(context: Context) -> Extractor:
    """The feature space of fid, kid and others: ``context.features``. Raises ValueError if its weights are missing."""
    if context.features == "clip":
        return clip(context, "eval.features=clip")
    return inception_extractor(context, context.features)


def clip(context: Context, wanted_by: str) -> Clip:
    """The context's CLIP. Raises ValueError, saying which metric wants it, if there is none."""
    try:
        folder = weights.find("clip", context.weights.get("clip"))
    except ValueError as error:
        raise ValueError(f"{wanted_by} needs a CLIP; {error}") from None
    return load_clip(str(folder), str(context.device))


def inception_extractor(context: Context, preparation: Preparation, output: Output = "pool") -> Inception:
    """InceptionV3 with the context's weights. Raises ValueError if they are missing."""
    name = "inception_pytorch" if preparation == "legacy_pytorch" else "inception"
    return load_inception(str(weights.find(name, context.weights.get(name))), str(context.device), preparation, output)


class Clip:
    """A CLIP's two towers. Features are the projected embeddings, not normalised, as CLIP-FID takes them."""

    def __init__(self, path: str, device: str) -> None:
        """path: folder. Raises ValueError if there is no CLIP."""
        from transformers import CLIPModel, CLIPProcessor

        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such CLIP folder; set eval.weights.clip to one, or to a Hub id")
        try:
            self._model = CLIPModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
            processor = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path}: not a CLIPModel with tokenizer and image processor ({reason})") from None
        self._tokenizer, self._processor = processor.tokenizer, processor.image_processor
        self._tokens = self._model.config.text_config.max_position_embeddings
        self._texts: dict[str, Tensor] = {}
        self._path, self._device = path, device
        self.num_features: int = self._model.config.projection_dim
        self._sha256 = fingerprint({"clip": self._model})
        self.key = f"clip-{_short(self._sha256, self._resize())}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D], prepared exactly as the CLIP's own image processor does."""
        pixels = self._processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        return _embedding(self._model.get_image_features(pixel_values=pixels.to(self._device))).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N] -> float32 [N, D]; a text longer than the CLIP takes is cut. Each is encoded once."""
        new = sorted({text for text in texts if text not in self._texts})
        for start in range(0, len(new), _TEXT_BATCH):
            part = new[start : start + _TEXT_BATCH]
            tokens = self._tokenizer(
                part, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
            )
            rows = self._model.get_text_features(
                input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
            )
            self._texts |= dict(zip(part, _embedding(rows).cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        return {
            "extractor": f"CLIP {'/'.join(Path(self._path).parts[-2:])}",
            "features": f"projected image embedding, {self.num_features} wide",
            "sha256": self._sha256,
            "resize": self._resize(),
        }

    def _resize(self) -> dict[str, Any]:
        from PIL.Image import Resampling

        settings = self._processor.to_dict()
        settings["resample"] = Resampling(settings["resample"]).name.lower()
        kept = ("size", "crop_size", "resample", "image_mean", "image_std")
        return {name: _plain(settings[name]) for name in kept if name in settings}


def _embedding(output: Tensor | Any) -> Tensor:
    """Transformers 5 wraps the projected embedding in an output object, earlier versions give it bare."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _plain(value: Any) -> Any:
    """A processor's setting as JSON takes it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {k: v for k, v in dict(value).items() if v is not None}


def _short(*parts: Any) -> str:
    """16 hex digits of what makes rows differ."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# InceptionV3: how images come to it. uint8 [B, 3, H, W] on the CPU -> float32 [B, 3, 299, 299]


def clean(images: Tensor) -> Tensor:
    """clean-fid's: each channel by PIL's bicubic filter, which does not alias, in float and not rounded to 8 bits.

    Parmar et al. 2022, arXiv 2104.11222.
    """
    size = (inception.SIZE, inception.SIZE)
    channels = images.flatten(0, 1).numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    return _centred(torch.from_numpy(np.stack(resized)).clamp(0, 255).unflatten(0, (-1, 3)))


def legacy_pytorch(images: Tensor) -> Tensor:
    """pytorch-fid's and clean-fid's of that name: bilinear, pixel centres aligned, aliasing when it shrinks."""
    size = (inception.SIZE, inception.SIZE)
    resized = interpolate(images.float(), size, mode="bilinear", align_corners=False)
    return 2 * (resized.clamp(0, 255) / 255) - 1


def legacy_tensorflow(images: Tensor) -> Tensor:
    """TensorFlow 1's: bilinear, the first pixels' corners aligned (position i looks at i H / 299), aliasing."""
    resized = images.float()
    for axis in (3, 2):
        length = resized.shape[axis]
        at = torch.arange(inception.SIZE, dtype=torch.float32) * (length / inception.SIZE)
        low = at.long()
        part = (at - low).view(-1, *[1] * (3 - axis))
        first = resized.index_select(axis, low)
        resized = first + (resized.index_select(axis, (low + 1).clamp_max(length - 1)) - first) * part
    return _centred(resized)


def patch(images: Tensor) -> Tensor:
    """The middle 299 x 299 pixels, not resized. Raises ValueError if there are fewer."""
    height, width = images.shape[2:]
    if min(height, width) < inception.SIZE:
        raise ValueError(
            f"patch_fid looks at {inception.SIZE} x {inception.SIZE} pixels, the images are {height} x {width}; "
            "leave it out of eval.metrics"
        )
    top, left = (round((side - inception.SIZE) / 2) for side in (height, width))  # as torchvision's center_crop
    return _centred(images[:, :, top : top + inception.SIZE, left : left + inception.SIZE].float())


def _centred(pixels: Tensor) -> Tensor:
    return (pixels - 128) / 128


PREPARATIONS: Mapping[Preparation, tuple[Callable[[Tensor], Tensor], str]] = {
    "clean": (clean, "clean-fid clean: 299 x 299, PIL bicubic, float"),
    "legacy_pytorch": (legacy_pytorch, "pytorch-fid: 299 x 299, bilinear, half-pixel centres, not antialiased"),
    "legacy_tensorflow": (legacy_tensorflow, "TensorFlow 1: 299 x 299, bilinear, aligned corner, not antialiased"),
    "patch": (patch, "none: the middle 299 x 299 pixels"),
}
"""By name, with what the protocol says of it."""
WIDTHS: Mapping[Output, tuple[int, str]] = {
    "pool": (inception.FEATURES, "pooled, 2048 wide"),
    "spatial": (17 * 17 * inception.SPATIAL, "first 7 channels of the 1 x 1 branch of Mixed_6d, 17 x 17"),
    "logits": (inception.CLASSES, "logits of 1008 classes, without bias"),
}


class Network:
    """InceptionV3 on a device. What it gave for the last batch is kept: several extractors ask for it in turn."""

    def __init__(self, file: str, device: str) -> None:
        """Raises ValueError if the file has no such weights."""
        network = inception.load(Path(file))
        self.sha256 = fingerprint({"inception": network})
        self._network, self._device = network.to(device), device
        self._images = torch.empty(0, dtype=torch.uint8)
        self._found: dict[Preparation, inception.Outputs] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, preparation: Preparation) -> inception.Outputs:
        """uint8 [B, 3, H, W] -> float32 on the CPU."""
        images = images.cpu()
        if not torch.equal(self._images, images):
            self._images, self._found = images.clone(), {}
        if preparation not in self._found:
            prepare, _ = PREPARATIONS[preparation]
            found = self._network(prepare(images).to(self._device))
            self._found[preparation] = inception.Outputs(*(rows.cpu() for rows in found))
        return self._found[preparation]


class Inception:
    """One of InceptionV3's outputs, on images prepared in one way."""

    def __init__(self, network: Network, preparation: Preparation, output: Output) -> None:
        self._network, self._preparation, self._output = network, preparation, output
        self.num_features, self._told = WIDTHS[output]
        self.key = f"inception-{preparation}-{output}-{network.sha256[:16]}"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, num_features]; the prompts are not looked at."""
        found: Tensor = getattr(self._network(images, self._preparation), self._output)
        return found.clone()

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights (of names, shapes and numbers, so that it is one for all files) and resize."""
        return {
            "extractor": "InceptionV3",
            "features": self._told,
            "sha256": self._network.sha256,
            "resize": PREPARATIONS[self._preparation][1],
        }


load_clip = functools.lru_cache(maxsize=2)(Clip)
_network = functools.lru_cache(maxsize=2)(Network)


@functools.lru_cache(maxsize=16)
def load_inception(file: str, device: str, preparation: Preparation, output: Output) -> Inception:
    """An output of InceptionV3; those of one file share a network, and its pass over a batch where they can."""
    return Inception(_network(file, device), preparation, output)


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, in sorted order."""
    digest = hashlib.sha256()
    for prefix, module in sorted(modules.items()):
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{prefix}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_images(batches: Iterable[Tensor]) -> str:
    """SHA-256 over the images in order, however they are batched."""
    digest = hashlib.sha256()
    for batch in batches:
        for image in batch:
            digest.update(image.cpu().contiguous().numpy().data)
    return digest.hexdigest()
