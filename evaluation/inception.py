"""InceptionV3 as FID has it: the network of 2015, its weights from any of the files that carry them.

Szegedy et al. 2016, arXiv 1512.00567, as Google released it in TensorFlow on 2015-12-05. What differs from
torchvision's: average pools leave padding out of the mean, the last block pools by the maximum, and 1008 classes.

pytorch-fid and torch-fidelity have the weights as a ``.pth`` (read by ``weights_only``), NVIDIA and clean-fid as
TorchScript. Of that only the tensors are taken: none of the program in the file is run. A ``.safetensors`` with the
names of the ``.pth`` is read too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from . import weights

SIZE = 299
"""Pixels of a side that the network was trained on."""
FEATURES, CLASSES = 2048, 1008
SPATIAL = 7
"""Channels of the 1 x 1 branch of Mixed_6d that sFID looks at, [17, 17] each."""


class Unit(NamedTuple):
    """A convolution with batch norm and ReLU.

    Attributes:
        name: in pytorch-fid's file.
        nvidia: its path in NVIDIA's, within the block.
        width: channels out.
        kernel: pixels, (height, width).
        stride: pixels; 1 keeps the size, 2 is without padding.
    """

    name: str
    nvidia: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Step = str | Unit | tuple[Unit, Unit]
"""A pool, a unit, or two units side by side."""
Branches = Sequence[Sequence[Step]]


def block_a(width: int) -> Branches:
    """35 x 35 pixels. width: of the pooled branch."""
    return (
        [Unit("branch1x1", "conv", 64)],
        [Unit("branch5x5_1", "tower.conv", 48), Unit("branch5x5_2", "tower.conv_1", 64, (5, 5))],
        [
            Unit("branch3x3dbl_1", "tower_1.conv", 64),
            Unit("branch3x3dbl_2", "tower_1.conv_1", 96, (3, 3)),
            Unit("branch3x3dbl_3", "tower_1.conv_2", 96, (3, 3)),
        ],
        ["average", Unit("branch_pool", "tower_2.conv", width)],
    )


def block_b() -> Branches:
    """To 17 x 17 pixels."""
    return (
        [Unit("branch3x3", "conv", 384, (3, 3), 2)],
        [
            Unit("branch3x3dbl_1", "tower.conv", 64),
            Unit("branch3x3dbl_2", "tower.conv_1", 96, (3, 3)),
            Unit("branch3x3dbl_3", "tower.conv_2", 96, (3, 3), 2),
        ],
        ["halve"],
    )


def block_c(width: int) -> Branches:
    """17 x 17 pixels. width: within the branches of 7 x 1 and 1 x 7."""
    return (
        [Unit("branch1x1", "conv", 192)],
        [
            Unit("branch7x7_1", "tower.conv", width),
            Unit("branch7x7_2", "tower.conv_1", width, (1, 7)),
            Unit("branch7x7_3", "tower.conv_2", 192, (7, 1)),
        ],
        [
            Unit("branch7x7dbl_1", "tower_1.conv", width),
            Unit("branch7x7dbl_2", "tower_1.conv_1", width, (7, 1)),
            Unit("branch7x7dbl_3", "tower_1.conv_2", width, (1, 7)),
            Unit("branch7x7dbl_4", "tower_1.conv_3", width, (7, 1)),
            Unit("branch7x7dbl_5", "tower_1.conv_4", 192, (1, 7)),
        ],
        ["average", Unit("branch_pool", "tower_2.conv", 192)],
    )


def block_d() -> Branches:
    """To 8 x 8 pixels."""
    return (
        [Unit("branch3x3_1", "tower.conv", 192), Unit("branch3x3_2", "tower.conv_1", 320, (3, 3), 2)],
        [
            Unit("branch7x7x3_1", "tower_1.conv", 192),
            Unit("branch7x7x3_2", "tower_1.conv_1", 192, (1, 7)),
            Unit("branch7x7x3_3", "tower_1.conv_2", 192, (7, 1)),
            Unit("branch7x7x3_4", "tower_1.conv_3", 192, (3, 3), 2),
        ],
        ["halve"],
    )


def block_e(pool: str) -> Branches:
    """8 x 8 pixels. pool: of the last branch."""
    return (
        [Unit("branch1x1", "conv", 320)],
        [
            Unit("branch3x3_1", "tower_conv", 384),
            (
                Unit("branch3x3_2a", "tower_mixed_conv", 384, (1, 3)),
                Unit("branch3x3_2b", "tower_mixed_conv_1", 384, (3, 1)),
            ),
        ],
        [
            Unit("branch3x3dbl_1", "tower_1_conv", 448),
            Unit("branch3x3dbl_2", "tower_1_conv_1", 384, (3, 3)),
            (
                Unit("branch3x3dbl_3a", "tower_1_mixed_conv", 384, (1, 3)),
                Unit("branch3x3dbl_3b", "tower_1_mixed_conv_1", 384, (3, 1)),
            ),
        ],
        [pool, Unit("branch_pool", "tower_2_conv", 192)],
    )


STEM: Sequence[tuple[Unit, int]] = (
    (Unit("Conv2d_1a_3x3", "conv", 32, (3, 3), 2), 0),
    (Unit("Conv2d_2a_3x3", "conv_1", 32, (3, 3)), 0),
    (Unit("Conv2d_2b_3x3", "conv_2", 64, (3, 3)), 1),
    (Unit("Conv2d_3b_1x1", "conv_3", 80), 0),
    (Unit("Conv2d_4a_3x3", "conv_4", 192, (3, 3)), 0),
)
"""The first units and their padding; the third and the last are halved."""
BLOCKS: Sequence[tuple[str, str, Branches]] = (
    ("Mixed_5b", "mixed", block_a(32)),
    ("Mixed_5c", "mixed_1", block_a(64)),
    ("Mixed_5d", "mixed_2", block_a(64)),
    ("Mixed_6a", "mixed_3", block_b()),
    ("Mixed_6b", "mixed_4", block_c(128)),
    ("Mixed_6c", "mixed_5", block_c(160)),
    ("Mixed_6d", "mixed_6", block_c(160)),
    ("Mixed_6e", "mixed_7", block_c(192)),
    ("Mixed_7a", "mixed_8", block_d()),
    ("Mixed_7b", "mixed_9", block_e("average")),
    ("Mixed_7c", "mixed_10", block_e("largest")),
)
"""Names in pytorch-fid's file and in NVIDIA's."""
HALVED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


def units(step: Step) -> Sequence[Unit]:
    """The units of a step."""
    if isinstance(step, str):
        return ()
    return (step,) if isinstance(step, Unit) else step


class Conv(nn.Module):
    """A ``Unit``."""

    def __init__(self, inputs: int, unit: Unit, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, unit.width, unit.kernel, unit.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(unit.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, width, h', w']."""
        return relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side."""

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        self.branches, self.outputs = branches, 0
        for branch in branches:
            width = inputs
            for step in branch:
                made = units(step)
                for unit in made:
                    padding = (unit.kernel[0] // 2, unit.kernel[1] // 2) if unit.stride == 1 else (0, 0)
                    self.add_module(unit.name, Conv(width, unit, padding))
                width = sum(unit.width for unit in made) or width
            self.outputs += width

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h', w']."""
        found = []
        for branch in self.branches:
            h = x
            for step in branch:
                h = pool(step, h) if isinstance(step, str) else torch.cat([self.unit(u)(h) for u in units(step)], 1)
            found.append(h)
        return torch.cat(found, 1)

    def unit(self, unit: Unit) -> nn.Module:
        """Its convolution."""
        return self.get_submodule(unit.name)


def pool(kind: str, x: Tensor) -> Tensor:
    """Over 3 x 3 pixels: their mean, without what is padded; their maximum; or that, to half the size."""
    if kind == "average":
        return avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return max_pool2d(x, 3, 1, 1) if kind == "largest" else max_pool2d(x, 3, 2)


class Outputs(NamedTuple):
    """What is looked at.

    Attributes:
        pool: [B, 2048], the mean over positions of the last block, for FID and KID.
        spatial: [B, 2023], 7 channels at 17 x 17 positions, channels last, for sFID.
        logits: [B, 1008], without the bias, for the inception score.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionV3(nn.Module):
    """The network, under the names of pytorch-fid's file."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for unit, padding in STEM:
            self.add_module(unit.name, Conv(width, unit, (padding, padding)))
            width = unit.width
        for name, _, branches in BLOCKS:
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Outputs:
        """x: [B, 3, 299, 299], about -1 to 1."""
        for unit, _ in STEM:
            x = self.get_submodule(unit.name)(x)
            if unit.name in HALVED:
                x = pool("halve", x)
        spatial = x
        for name, _, _ in BLOCKS:
            if name == "Mixed_6d":
                spatial = self.get_submodule(f"{name}.branch1x1")(x)[:, :SPATIAL]
            x = self.get_submodule(name)(x)
        pooled = x.mean((2, 3))
        # Salimans et al.'s code, and all that follow it, leave out the bias
        return Outputs(pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.fc.weight.T)


def load(file: Path) -> InceptionV3:
    """The network with the weights of a file, float32 and frozen. Raises ValueError, naming it, if it has none."""
    with torch.device("meta"):  # no random start, which would move the generator
        network = InceptionV3()
    tensors = read(file)
    try:
        wanted = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"lacks {len(missing)} tensors, such as {missing[0]}")
        network.load_state_dict({name: tensors[name].float() for name in wanted}, strict=False, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: not InceptionV3's weights ({reason}); fetch the file again") from None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # of training; it is still on the meta device
    return network.requires_grad_(False).eval()


def read(file: Path) -> dict[str, Tensor]:
    """A file's tensors, under pytorch-fid's names. Raises ValueError, naming it, if it is not readable."""
    plain = file.suffix in (".safetensors", ".pth")
    tensors = weights.tensors(file, "fetch the file again") if plain else scripted(file)
    try:
        return renamed(tensors) if "output.weight" in tensors else tensors
    except KeyError as error:
        raise ValueError(f"{file}: not InceptionV3's weights (lacks {error}); fetch the file again") from None


def scripted(file: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript. Raises ValueError, naming the file, if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is", FutureWarning)
            return dict(torch.jit.load(file, map_location="cpu").state_dict())
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise ValueError(f"{file}: no TorchScript ({reason}); fetch the file again") from None


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVIDIA's names -> pytorch-fid's. NVIDIA leaves out batch norm's factors, which are 1."""
    paths = {unit.nvidia: unit.name for unit, _ in STEM}
    for name, nvidia, branches in BLOCKS:
        for branch in branches:
            for step in branch:
                paths |= {f"{nvidia}.{unit.nvidia}": f"{name}.{unit.name}" for unit in units(step)}
    found = {"fc.weight": tensors["output.weight"], "fc.bias": tensors["output.bias"]}
    for nvidia, name in paths.items():
        at = f"layers.{nvidia}"
        found[f"{name}.conv.weight"] = tensors[f"{at}.weight"]
        found[f"{name}.bn.weight"] = torch.ones_like(tensors[f"{at}.beta"])
        found[f"{name}.bn.bias"] = tensors[f"{at}.beta"]
        found[f"{name}.bn.running_mean"] = tensors[f"{at}.mean"]
        found[f"{name}.bn.running_var"] = tensors[f"{at}.var"]
    return found
