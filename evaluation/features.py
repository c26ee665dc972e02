"""What the metrics see with: a CLIP's embeddings of images and captions, or InceptionV3's features of images.

Both are float32, whatever the weights on disk are, and are loaded once per process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .context import Context

INCEPTION = "inception-2015-12-05.pt"
"""The TorchScript InceptionV3 of NVIDIA that clean-fid uses."""
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
_TEXT_BATCH = 256


class Extractor(Protocol):
    """Features of images, for fid."""

    num_features: int

    def __hash__(self) -> int:
        """By identity: fid's reference statistics are kept per extractor."""
        ...

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, num_features]."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        ...


def extractor(context: Context) -> Extractor:
    """The context's CLIP, or InceptionV3 without one. Raises ValueError if its weights are missing."""
    if context.clip is not None:
        return load_clip(context.clip, str(context.device))
    return load_inception(inception_file(context.inception), str(context.device))


class Clip:
    """A CLIP's two towers. Features are the projected embeddings, not normalised, as CLIP-FID takes them."""

    def __init__(self, path: str, device: str) -> None:
        """path: folder or Hub id. Raises ValueError if there is no CLIP."""
        from transformers import CLIPModel, CLIPProcessor

        # a folder that is not there would be asked of the Hub
        if not Path(path).is_dir() and (not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or Path(path).parent.is_dir()):
            raise ValueError(f"{path}: no such CLIP folder; set eval.clip to one, or to a Hub id")
        try:
            self._model = CLIPModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
            processor = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path}: not a CLIPModel with tokenizer and image processor ({reason})") from None
        self._tokenizer, self._processor = processor.tokenizer, processor.image_processor
        self._tokens = self._model.config.text_config.max_position_embeddings
        self._texts: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._path, self._device = path, device
        self.num_features: int = self._model.config.projection_dim
        self._sha256 = fingerprint({"clip": self._model})

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, D], prepared exactly as the CLIP's own image processor does.

        The metrics ask for the same batch in turn, so the last one's embeddings are kept.
        """
        if self._last is None or not torch.equal(self._last[0], images.cpu()):
            pixels = self._processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
            rows = _embedding(self._model.get_image_features(pixel_values=pixels.to(self._device)))
            self._last = (images.cpu().clone(), rows)
        return self._last[1].clone()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N] -> [N, D]; a text longer than the CLIP takes is cut. Each is encoded once."""
        new = sorted({text for text in texts if text not in self._texts})
        for start in range(0, len(new), _TEXT_BATCH):
            part = new[start : start + _TEXT_BATCH]
            tokens = self._tokenizer(
                part, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
            )
            rows = self._model.get_text_features(
                input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
            )
            self._texts |= dict(zip(part, _embedding(rows), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        from PIL.Image import Resampling

        settings = self._processor.to_dict()
        settings["resample"] = Resampling(settings["resample"]).name.lower()
        kept = ("size", "crop_size", "resample", "image_mean", "image_std")
        return {
            "extractor": f"CLIP {'/'.join(Path(self._path).parts[-2:])}",
            "features": f"projected image embedding, {self.num_features} wide",
            "sha256": self._sha256,
            "resize": {name: _plain(settings[name]) for name in kept if name in settings},
        }


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


class Inception:
    """InceptionV3's pooled features on images resized by clean-fid ("clean": PIL bicubic, not quantised).

    clean-fid reads the weights as TorchScript, which can hold more than numbers: use NVIDIA's own file.
    """

    num_features = 2048

    def __init__(self, file: str, device: str) -> None:
        """file: the weights, named ``INCEPTION``. Raises ValueError if they cannot be read."""
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.load` is", FutureWarning)  # as clean-fid does
                self._network = InceptionV3W(str(Path(file).parent), download=False).to(device).eval()
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{file}: not readable ({reason}); fetch it again from {INCEPTION_URL}") from None
        self._resize, self._device = build_resizer("clean"), device
        self._sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, 2048]."""
        rows = [torch.from_numpy(self._resize(image.permute(1, 2, 0).numpy())) for image in images.cpu()]
        return self._network(torch.stack(rows).permute(0, 3, 1, 2).to(self._device))

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        return {
            "extractor": "InceptionV3",
            "features": "pooled, 2048 wide",
            "sha256": self._sha256,
            "resize": "clean-fid clean: 299 x 299, PIL bicubic, float",
        }


def inception_place(given: str | None) -> Path:
    """The file of InceptionV3's weights: given or in its folder, else in $FASTGEN_WEIGHTS_DIR or ~/.cache/fastgen."""
    default = os.environ.get("FASTGEN_WEIGHTS_DIR") or Path.home() / ".cache" / "fastgen"
    place = Path(given or default)
    return place if place.suffix == ".pt" else place / INCEPTION


def inception_file(given: str | None) -> str:
    """Where InceptionV3's weights are. Raises ValueError if there is no such file."""
    file = inception_place(given)
    if not file.is_file():
        raise ValueError(f"{file}: no InceptionV3 weights; put {INCEPTION_URL} there, or set eval.clip")
    if file.name != INCEPTION:
        raise ValueError(f"{file}: clean-fid reads InceptionV3 from a file named {INCEPTION}; rename it")
    return str(file.absolute())


load_clip = functools.lru_cache(maxsize=2)(Clip)
load_inception = functools.lru_cache(maxsize=1)(Inception)


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
