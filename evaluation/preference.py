"""What hpsv2, pickscore and image_reward share: a score of each image with its prompt, whose mean is the metric.

The networks see image and prompt together, so an extractor's row is the score itself, [B, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from .context import Extractor, Seen

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours, as OpenAI's CLIP has them."""
Prepare = Callable[[Tensor], Tensor]
"""uint8 [B, 3, H, W] -> float32 [B, 3, h, w], as a network takes images."""


class Preference:
    """The mean of an extractor's scores, as a metric."""

    def __init__(self, name: str, extractor: Extractor) -> None:
        """name: of the value; extractor: gives scores [B, 1]."""
        self._name, self._extractor = name, extractor
        self.extractors: tuple[Extractor, ...] = (extractor,)

    def compute(self, seen: Seen) -> dict[str, float]:
        """The mean. Raises ValueError without images."""
        if not len(seen):
            raise ValueError(f"{self._name} needs at least 1 image, got 0")
        return {name: float(scores.mean()) for name, scores in self.per_image(seen).items()}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Each image's score."""
        return {self._name: seen.rows[self._extractor.key].double().flatten()}

    def protocol(self) -> dict[str, Any]:
        """The checkpoint, the resize and what the score is."""
        return self._extractor.protocol()


class ClipScores:
    """``factor`` times the cosine of an image and its prompt, as a CLIP embeds them: an extractor."""

    def __init__(
        self,
        name: str,
        network: Any,
        tokenizer: Any,
        prepare: Prepare,
        factor: float,
        told: dict[str, Any],
        device: str,
    ) -> None:
        """name: of the rows; network: a CLIPModel; told: the protocol, with ``sha256``."""
        self._network, self._tokenizer, self._prepare = network.to(device).eval(), tokenizer, prepare
        self._factor, self._told, self._device = factor, told, device
        self._tokens = self._network.config.text_config.max_position_embeddings
        self.key = f"{name}-{told['sha256'][:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W], [B] -> [B, 1]; a prompt longer than the CLIP takes is cut."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        found = self._network(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=self._prepare(images).to(self._device),
        )
        cosine = (normalize(found.image_embeds) * normalize(found.text_embeds)).sum(1, keepdim=True)
        return (self._factor * cosine).cpu()

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        return self._told


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> [0, 1] [B, 3, size, size]: the short side by an antialiased bicubic, the middle cut out.

    As torchvision's Resize and CenterCrop (from 0.17 on) do with images in float, whose values can leave [0, 1].
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = [int(size * side / short) for side in (height, width)]
    found = interpolate(images.float() / 255, size=shape, mode="bicubic", antialias=True, align_corners=False)
    return cut(found, size)


def resized_in_steps(images: Tensor, size: int) -> Tensor:
    """The same by Pillow, which rounds to 256 levels: as torchvision's Resize and CenterCrop do with PIL images."""
    import numpy as np
    from PIL import Image

    height, width = images.shape[-2:]
    short = min(height, width)
    shape = int(size * width / short), int(size * height / short)
    made = [
        np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
        for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    ]
    return cut(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255, size)


def cut(images: Tensor, size: int) -> Tensor:
    """The middle of [B, 3, H, W], both sides at least size, to [B, 3, size, size]; half a pixel rounds to even."""
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def coloured(pixels: Tensor) -> Tensor:
    """[0, 1] [B, 3, H, W] -> CLIP's units."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def vocabulary(
    kind: Any, beside: Path, files: Sequence[str], otherwise: Callable[[], Path], sizes: Sequence[int]
) -> Any:
    """A tokenizer of Transformers, from a folder if it holds one of the files, else from ``otherwise()``.

    Raises ValueError, naming the folder, if there is none, or if it has none of the sizes.
    """
    folder = beside if any((beside / name).is_file() for name in files) else otherwise()
    if not any((folder / name).is_file() for name in files):  # Transformers 5 would make an empty one
        raise ValueError(f"{folder}: holds no {kind.__name__}; put {' or '.join(files)} there or into {beside}")
    try:
        found = kind.from_pretrained(folder)
    except Exception as error:  # those of tokenizers are plain Exceptions
        raise ValueError(f"{folder}: no {kind.__name__} ({' '.join(str(error).split())[:200]})") from None
    if len(found) not in sizes:
        raise ValueError(
            f"{folder}: its {kind.__name__} has {len(found)} tokens, the checkpoint {sizes[0]}; put the right one's "
            f"{' or '.join(files)} into {beside}"
        )
    return found


def filled(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> Any:
    """One of Transformers' networks with these tensors, all of them and no others, frozen. Raises ValueError."""
    with torch.device("meta"):  # no random start, which takes long and would move the generator
        network = make()
    wanted = network.state_dict()
    # in a checkpoint of an older Transformers; it holds 0, 1, 2, ...
    kept = {name: value for name, value in tensors.items() if name in wanted or not name.endswith("position_ids")}
    for name in sorted(wanted.keys() ^ kept.keys()):
        raise ValueError(f"{'lacks' if name in wanted else 'has the unknown'} {name!r}")
    for name, value in wanted.items():
        if kept[name].shape != value.shape:
            raise ValueError(f"{name!r} is {tuple(kept[name].shape)}, not {tuple(value.shape)}")
    network.load_state_dict(kept, assign=True)
    for path, buffer in list(network.named_buffers()):
        place, _, name = path.rpartition(".")
        if name == "position_ids":
            numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            network.get_submodule(place).register_buffer(name, numbers, persistent=False)
    return network.requires_grad_(False).eval()
