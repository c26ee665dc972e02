"""LPIPS: how far apart two images look, by the features of a VGG16 (Zhang et al. 2018, arXiv 1801.03924, sec. 3.2).

    f_k = features after each of VGG16's five stages, scaled to length 1 over the channels
    distance = sum over k of the mean over positions of w_k (f_k(x) - f_k(y))^2,  w_k learnt from people's judgements

Version 0.1 of the weights, as torchmetrics has it. One safetensors file holds VGG16 and the w_k;
``python -m fastgen.lpips [FILE]`` writes it, from torchvision's VGG16 (in torch's cache, else from the network) and
the w_k that come with torchmetrics. Training then needs neither of them, and no network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import checkpoint
from .config import option

FILE = "lpips_vgg16.safetensors"
STAGES = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 16
"""Pixels of a side below which nothing is left after four halvings."""
# ImageNet's mean and deviation, for pixels in [-1, 1]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Perceptual:
    """Options of LPIPS; a method that offers it as its distance has them under ``lpips``."""

    weights: str = option("", f"file, or its folder; empty: {FILE} in $FASTGEN_WEIGHTS_DIR or ~/.cache/fastgen")
    # the consistency models' code
    size: int = option(224, "pixels to which images of less than 256 are resized; 0 leaves them as they are", low=0)


class Lpips(nn.Module):
    """VGG16's convolutions, numbered as torchvision does, and a weight for each channel that is compared."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, inputs = [], 3
        for stage, (count, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2, 2))
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            self.ends.append(len(layers) - 1)
        self.features = nn.ModuleList(layers)
        self.heads = nn.ParameterList([torch.zeros(width) for width in WIDTHS])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: pixels in [-1, 1], [B, 3, H, W], H and W at least 16 -> [B], in the weights' own precision."""
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self.heads, self.maps(x), self.maps(y), strict=True)
            parts = [((f - g).square() * head[:, None, None]).sum(1).mean((1, 2)) for head, f, g in pairs]
            return torch.stack(parts).sum(0)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The unit features of each stage: [B, C, h, w]."""
        dtype, found = self.heads[0].dtype, []
        shift, scale = (torch.tensor(v, dtype=dtype, device=pixels.device)[:, None, None] for v in (SHIFT, SCALE))
        h = (pixels.to(dtype) - shift) / scale
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                found.append(h / (h.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


def locate(weights: str) -> Path:
    """The file that ``Perceptual.weights`` means, which need not be there."""
    place = Path(weights or os.environ.get("FASTGEN_WEIGHTS_DIR") or Path.home() / ".cache" / "fastgen")
    return place if place.suffix == ".safetensors" else place / FILE


def load(file: Path) -> Lpips:
    """LPIPS with the weights of a file, float32 and frozen. Raises ValueError, naming it, if it is not such a file."""
    remedy = f"`python -m fastgen.lpips {file}` writes it from torchvision's VGG16 and torchmetrics' heads"
    if not file.is_file():
        raise ValueError(f"{file}: no LPIPS weights; {remedy}; or set lpips.weights, or another distance")
    with torch.device("meta"):  # no random start, which would move the generator
        network = Lpips()
    try:
        network.load_state_dict(load_file(file), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file}: not LPIPS weights ({' '.join(str(error).split())[:200]}); {remedy}") from None
    return network.float().requires_grad_(False).eval()


def make(file: Path) -> None:
    """Write the weights' file. Raises ValueError without torchmetrics and torchvision, OSError without network."""
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        found = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.state_dict()
    except ImportError:
        raise ValueError(
            f"{file}: is made from torchvision's and torchmetrics' weights; pip install 'fastgen-diffusion[eval]'"
        ) from None
    tensors = {}
    for name, value in found.items():
        first, *rest = name.split(".")
        if first == "net":  # net.slice2.5.weight
            tensors["features." + ".".join(rest[1:])] = value.contiguous()
        elif first.removeprefix("lin").isdigit():  # lin2.model.1.weight; a list of them holds the same again
            tensors[f"heads.{first.removeprefix('lin')}"] = value.flatten()
    file.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_file(file) as partial:
        save_file(tensors, partial)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    file = locate(*arguments or [""])
    try:
        make(file)
    except (ValueError, OSError) as error:
        print(f"fastgen: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"{file} holds LPIPS's weights")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
