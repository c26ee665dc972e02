"""InceptionV3 of the true architecture with random weights, in the files that FID's libraries read.

``Nvidia`` is written after the TorchScript that clean-fid uses: its names, its resize, its two outputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Module):
    def __init__(self, inputs: int, width: int, kh: int, kw: int, stride: int = 1, padding: tuple[int, int] = (0, 0)):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.randn(width, inputs, kh, kw) * (2 / (inputs * kh * kw)) ** 0.5)
        self.beta = nn.Parameter(0.1 * torch.randn(width))
        self.mean = nn.Parameter(0.1 * torch.randn(width))
        self.var = nn.Parameter(0.5 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, bias=self.beta, eps=1e-3))


def tower(inputs: int, *units: tuple[int, int, int] | tuple[int, int, int, int]) -> nn.Sequential:
    """Units of (width, height, width of the kernel[, stride]); stride 2 is without padding."""
    found = nn.Sequential()
    for i, (width, kh, kw, *stride) in enumerate(units):
        padding = (0, 0) if stride else (kh // 2, kw // 2)
        found.add_module(f"conv_{i}" if i else "conv", Conv(inputs, width, kh, kw, *stride, padding=padding))
        inputs = width
    return found


def pooled(inputs: int, width: int) -> nn.Sequential:
    found = nn.Sequential()
    found.add_module("pool", nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    found.add_module("conv", Conv(inputs, width, 1, 1))
    return found


class Mixed(nn.Module):
    """Blocks A and C: a 1 x 1 convolution, two towers, a pool."""

    def __init__(self, conv: Conv, first: nn.Sequential, second: nn.Sequential, third: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.tower, self.tower_1, self.tower_2 = conv, first, second, third

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(x)], 1)


class B(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(288, 384, 3, 3, 2)
        self.tower = tower(288, (64, 1, 1), (96, 3, 3), (96, 3, 3, 2))
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.pool(x)], 1)


class D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = tower(768, (192, 1, 1), (320, 3, 3, 2))
        self.tower_1 = tower(768, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2))
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(x), self.tower_1(x), self.pool(x)], 1)


class E(nn.Module):
    def __init__(self, inputs: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = Conv(inputs, 320, 1, 1)
        self.tower_conv = Conv(inputs, 384, 1, 1)
        self.tower_mixed_conv = Conv(384, 384, 1, 3, padding=(0, 1))
        self.tower_mixed_conv_1 = Conv(384, 384, 3, 1, padding=(1, 0))
        self.tower_1_conv = Conv(inputs, 448, 1, 1)
        self.tower_1_conv_1 = Conv(448, 384, 3, 3, padding=(1, 1))
        self.tower_1_mixed_conv = Conv(384, 384, 1, 3, padding=(0, 1))
        self.tower_1_mixed_conv_1 = Conv(384, 384, 3, 1, padding=(1, 0))
        self.tower_2_pool = pool
        self.tower_2_conv = Conv(inputs, 192, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.tower_conv(x)
        b = self.tower_1_conv_1(self.tower_1_conv(x))
        left = [self.conv(x), self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        right = [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b), self.tower_2_conv(self.tower_2_pool(x))]
        return torch.cat(left + right, 1)


def a(inputs: int, width: int) -> Mixed:
    first, second = tower(inputs, (48, 1, 1), (64, 5, 5)), tower(inputs, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return Mixed(Conv(inputs, 64, 1, 1), first, second, pooled(inputs, width))


def c(w: int) -> Mixed:
    second = tower(768, (w, 1, 1), (w, 7, 1), (w, 1, 7), (w, 7, 1), (192, 1, 7))
    return Mixed(Conv(768, 192, 1, 1), tower(768, (w, 1, 1), (w, 1, 7), (192, 7, 1)), second, pooled(768, 192))


class Nvidia(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = {
            "conv": Conv(3, 32, 3, 3, 2),
            "conv_1": Conv(32, 32, 3, 3),
            "conv_2": Conv(32, 64, 3, 3, padding=(1, 1)),
            "pool0": nn.MaxPool2d(3, 2),
            "conv_3": Conv(64, 80, 1, 1),
            "conv_4": Conv(80, 192, 3, 3),
            "pool1": nn.MaxPool2d(3, 2),
            "mixed": a(192, 32),
            "mixed_1": a(256, 64),
            "mixed_2": a(288, 64),
            "mixed_3": B(),
            "mixed_4": c(128),
            "mixed_5": c(160),
            "mixed_6": c(160),
            "mixed_7": c(192),
            "mixed_8": D(),
            "mixed_9": E(1280, nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            "mixed_10": E(2048, nn.MaxPool2d(3, 1, 1)),
            "pool2": nn.AvgPool2d(8),
        }
        self.layers = nn.Sequential()
        for name, part in parts.items():
            self.layers.add_module(name, part)
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = img.to(torch.float32)
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / x.shape[3] - 1 / 299
        theta[1, 2] += 1 / x.shape[2] - 1 / 299
        grid = F.affine_grid(theta[None].repeat(len(x), 1, 1), [len(x), 3, 299, 299], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        found = self.layers((x - 128) / 128).reshape(-1, 2048)
        if return_features:
            return found
        if no_output_bias:
            return F.softmax(F.linear(found, self.output.weight), 1)
        return F.softmax(self.output(found), 1)


def write(folder: Path) -> Nvidia:
    """``inception-2015-12-05.pt`` with random weights in the folder, and the module itself."""
    torch.manual_seed(0)
    module = Nvidia().eval().requires_grad_(False)
    torch.jit.script(module).save(str(folder / "inception-2015-12-05.pt"))
    return module
