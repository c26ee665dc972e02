"""An exponential moving average of a network's trainable weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Move a network's parameters towards another's of the same shape: decay target + (1 - decay) source."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)


class EMA:
    """Averages in float32; the decay warms up as min(decay, (1 + n) / (10 + n)) so that the start is forgotten."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Follow the parameters of ``network`` that require gradients now. decay: in [0, 1)."""
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of this network learns; make its average before the engine freezes it")
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach().float() for p in self.parameters.values()], 1 - decay
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network holds the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
