"""Several networks in one role, each of which is called within a part of the times of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .transfer import to_device


class Experts(nn.ModuleList):
    """A mixture of experts by noise level, in the place of one network; a ``Denoiser`` calls whichever it needs.

    Expert k takes the times from ``starts[k]`` down to just above ``starts[k + 1]``, the first also all noisier ones.
    """

    def __init__(self, networks: Sequence[nn.Module], starts: Sequence[float]) -> None:
        """starts: falling times, one for each network. Raises ValueError if one of them is several itself."""
        if any(isinstance(network, Experts) for network in networks):
            raise ValueError(
                "a student of experts cannot have a teacher of several experts; choose a method without experts of "
                "its own, or a teacher of one network"
            )
        super().__init__(networks)
        self.starts = list(starts)

    def which(self, t: Tensor) -> Tensor:
        """The number of the expert for each time: [B] -> [B], 0 being the noisiest's."""
        starts = to_device(torch.tensor(self.starts[1:], dtype=t.dtype), t.device)
        return (t[:, None] <= starts).sum(1)

    def rows(self, t: Tensor) -> list[tuple[int, Tensor]]:
        """The numbers of the experts that these times need: [B], with the rows of each."""
        which = self.which(t)
        return [(k, (which == k).nonzero()[:, 0]) for k in which.unique().tolist()]


def members(network: nn.Module) -> list[nn.Module]:
    """The networks of a role: each of several, or the one."""
    return list(network) if isinstance(network, nn.ModuleList) else [network]


def each(change: Callable[[nn.Module], nn.Module], network: nn.Module) -> nn.Module:
    """What ``change`` makes of the network, or of each of several experts, which then are experts again."""
    if isinstance(network, Experts):
        return Experts([change(expert) for expert in network], network.starts)
    return change(network)
