"""What a turn has no use for waits in the host's memory: ``run.offload``.

    weights of a network that no phase trains or moves     on the device from its first call in a turn until the
                                                           backward passes of the turn are over
    states of a role's optimizer                           on the device from the turn of a phase that trains the
                                                           role until that of one that does not

The values are the same wherever they are, so a run with it is a run without it, bit for bit. Such weights never
change: their copy on the host is made once, and the one on the device is dropped when it is not needed. States are
copied both ways, once for each change of phase. Weights that learn, their averages, the VAE and the text encoder stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import lora
from .experts import members
from .method import Trainable
from .precision import memory_of


class Move(Protocol):
    """The way between a device and the memory that things wait in."""

    def is_here(self, tensor: Tensor) -> bool:
        """Whether it is on the device. Some states, such as an update count, may never be."""
        ...

    def away(self, tensor: Tensor) -> Tensor:
        """A copy where it waits."""
        ...

    def here(self, tensor: Tensor) -> Tensor:
        """A copy on the device, of what ``away`` gave."""
        ...


@dataclass(frozen=True)
class Host:
    """Between an accelerator and pinned memory of its host."""

    device: torch.device

    def is_here(self, tensor: Tensor) -> bool:
        """Whether it is on the accelerator."""
        return tensor.device.type == self.device.type

    def away(self, tensor: Tensor) -> Tensor:
        """A copy that is whole on return: what reads it next may be the host."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def here(self, tensor: Tensor) -> Tensor:
        """A copy that is whole for what the accelerator does next."""
        return tensor.to(self.device, non_blocking=True)


def way(device: torch.device) -> Move | None:
    """From a device to its host; None: it is the host's own."""
    return None if device.type == "cpu" else Host(device)


class Offload:
    """Brings what a turn needs and takes away the rest. Of no networks and no optimizers it does nothing."""

    def __init__(
        self,
        move: Move,
        networks: Iterable[nn.Module] = (),
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    ) -> None:
        """networks: whose weights never change, which are taken away now; optimizers: by role."""
        self.move, self.optimizers = move, dict(optimizers or {})
        self.waiting: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}
        self.called: list[nn.Module] = []
        self.gone: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for network in networks:
            self.waiting[network] = [(p, move.away(p.detach())) for p in network.parameters() if move.is_here(p)]
            network.register_forward_pre_hook(self._bring, prepend=True)
            self._drop(network)

    def turn(self, roles: Iterable[str]) -> None:
        """Let these roles' optimizers have their states on the device, and no other's."""
        learning = set(roles)
        for role, optimizer in self.optimizers.items():  # away first, so that never both are there
            if role not in learning and role not in self.gone:
                found = [(state, key) for state, key in _tensors(optimizer) if self.move.is_here(state[key])]
                for state, key in found:
                    state[key] = self.move.away(state[key])
                self.gone[role] = found
        for role in learning & self.gone.keys():
            for state, key in self.gone.pop(role):
                state[key] = self.move.here(state[key])

    def rest(self) -> None:
        """Drop the weights that calls have brought; to be called when no backward pass is to come any more."""
        for network in self.called:
            self._drop(network)
        self.called.clear()

    def _drop(self, network: nn.Module) -> None:
        for p, kept in self.waiting[network]:
            p.data = kept

    def _bring(self, network: nn.Module, args: Any) -> None:
        if network not in self.called:
            self.called.append(network)
            for p, kept in self.waiting[network]:
                p.data = self.move.here(kept)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], str]]:
    """Where each tensor of its states is."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield state, key


def of(method: Trainable, teacher: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], move: Move) -> Offload:
    """All that may wait of a method, and its teacher even where no role has it; optimizers: by role."""
    changing = {role for phase in method.phases for role in (*phase.trains, *phase.moves)}
    frozen = [network for role, network in method.networks.items() if role not in changing]
    return Offload(move, unchanging([teacher, *frozen], [method.networks[role] for role in changing]), optimizers)


def unchanging(frozen: Iterable[nn.Module], changing: Iterable[nn.Module]) -> list[nn.Module]:
    """The networks among ``frozen``, of several experts each, that share no weight with one that changes.

    An adapter's frozen base is part of a network that changes, and so is a teacher whose weights that base has.
    """
    kept = {memory_of(p) for network in changing for one in members(network) for p in lora.plain(one).parameters()}
    found = {id(n): n for network in frozen for n in map(lora.plain, members(network))}
    return [n for n in found.values() if not kept & {memory_of(p) for p in n.parameters()}]
