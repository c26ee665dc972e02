"""Exponential moving averages of a network's weights: one to export, and one to learn from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import parallel
from .denoiser import Denoiser


class Target:
    """What a student's answers are compared with: an average that follows its updates, or the student itself.

    Attributes:
        denoiser: the one or the other.
        role: "target" or "student".
        networks: the average's by its role, so that it is kept in checkpoints; nothing for the student itself.
        decay: of the next update; a method may change it.
    """

    def __init__(self, student: Denoiser, decay: float) -> None:
        """Copy the student's network as it is now, with decay in (0, 1); 0: take the student itself."""
        self.student = self.denoiser = student
        self.decay, self.role, self.networks = decay, "student", dict[str, nn.Module]()
        if decay > 0:
            self.denoiser = student.with_network(copy.deepcopy(student.network).requires_grad_(False))
            self.role, self.networks = "target", {"target": self.denoiser.network}

    @torch.no_grad()
    def follow(self) -> None:
        """After an update: decay target + (1 - decay) student."""
        for network in self.networks.values():
            own, student = ([parallel.local(p) for p in each.parameters()] for each in (network, self.student.network))
            torch._foreach_lerp_(own, student, 1 - self.decay)


class EMA:
    """Averages in float32; the decay warms up as min(decay, (1 + n) / (10 + n)) so that the start is forgotten.

    Of weights that are split over the processes each averages its own.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Follow the parameters of ``network`` that require gradients now. decay: in [0, 1)."""
        self.decay = decay
        self.updates = 0
        self._network = network
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of this network learns; make its average before the engine freezes it")
        self.average = {name: parallel.local(p.detach()).float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.average.values()),
            [parallel.local(p).float() for p in self.parameters.values()],
            1 - decay,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the network holds the averaged weights."""
        kept = {name: parallel.local(p.detach()).clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            parallel.local(p).copy_(values[name])
        parallel.reshard(self._network)
