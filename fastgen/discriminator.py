"""Discriminator heads on the features of a denoiser's network, taken by forward hooks on named blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import parallel
from .denoiser import Cond, Denoiser
from .experts import Experts
from .lora import plain


class _Enough(Exception):  # not an error: it ends a forward pass whose rest nobody needs
    pass


def features(denoiser: Denoiser, blocks: Sequence[str], x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """The outputs of the named blocks, in the order given; the pass ends at the last one to be reached.

    x_t: [B, ...]; t: [B] -> one [B, C, ...] per block. Of several experts each reads its own rows. Raises ValueError
    if a name is not a module of the network.
    """
    network = denoiser.network
    if isinstance(network, Experts):
        parts = network.rows(t)
        maps = [
            features(denoiser.with_network(network[k]), blocks, x_t[i], t[i], {name: v[i] for name, v in cond.items()})
            for k, i in parts
        ]
        order = torch.cat([i for _, i in parts]).argsort()
        return [torch.cat(found)[order] for found in zip(*maps, strict=True)]
    modules = dict(plain(denoiser.network).named_modules())
    for name in blocks:
        if name not in modules:
            known = ", ".join(n for n, _ in plain(denoiser.network).named_children())
            raise ValueError(
                f"no block {name!r} in {type(plain(denoiser.network)).__name__}; its children are: {known}"
            )
    found: dict[str, Tensor] = {}
    split = bool(parallel.units(network))

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            read = denoiser.read(output, x_t)
            if not isinstance(read, Tensor):
                raise ValueError(f"block {name!r} gives {type(read).__name__}, not a tensor; choose another block")
            # of a split network no gradient is to be taken at the block's own output, which would free its weights
            found[name] = read.float().clone() if split else read.float()
            # a network that is split over processes keeps account of its passes, which end in order only as a whole
            if len(found) == len(set(blocks)) and not split:
                raise _Enough

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in blocks]
    try:
        denoiser(x_t, t, cond)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name in blocks]


class Heads(nn.Module):
    """One small convolutional head per feature map, each giving logits: [B, C, H, W] -> [B, sum of logits].

    4x4 convolutions of stride 2 while the map is larger than 4, then one to a single logit, as in DMD2 (arXiv
    2405.14867, sec. 4.3).
    """

    def __init__(self, channels: Sequence[int], sizes: Sequence[int]) -> None:
        """channels, sizes: of each feature map, whose shorter side is ``size`` or larger."""
        super().__init__()
        self.heads = nn.ModuleList(_head(c, s) for c, s in zip(channels, sizes, strict=True))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: each [B, C, H, W] -> logits [B, L]."""
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


def _head(channels: int, size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or channels % (4 * g) == 0)  # a group of 1 has no spread
    while size > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
        size //= 2
    layers += [nn.Conv2d(channels, channels, size), nn.GroupNorm(groups, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))
