"""The one training loop. It knows phases, optimizers and precision; it knows no method, no model and no data.

``Engine.run`` yields after each step; what is done there (averaging, logging, samples, checkpoints) is the caller's
visible loop body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import optimizers, parallel
from .method import Batch, Phase, Trainable
from .offload import Host, Offload
from .optimizers import Optim
from .rng import Noise

Logs = dict[str, float]
MakeNoise = Callable[[Sequence[int], int, int, str, torch.device], Noise]
"""(samples, seed, step, phase, device) -> the random numbers of a micro-batch."""


class Data(Protocol):
    """An index-addressable source: the same samples give the same batch, in any process, at any time."""

    def batch(self, samples: Sequence[int]) -> Batch:
        """samples: global indices, [B], unbounded; the source wraps round and shuffles as it likes."""
        ...


class NonFiniteLoss(FloatingPointError):
    """A loss or a gradient norm was NaN or infinite; the optimizer has not moved."""


class Engine:
    """Trains a method's networks in its phases."""

    def __init__(
        self,
        method: Trainable,
        data: Data,
        optim: Mapping[str, Optim],
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        accumulate: int = 1,
        fp16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """batch_size: samples per micro-batch and process; one update sees batch_size * accumulate * processes.

        optim: by role; a role that some phase trains and that is missing raises ValueError. fp16: scale the losses.
        """
        self.method, self.data, self.steps, self.seed = method, data, steps, seed
        self.batch_size, self.accumulate, self.device = batch_size, accumulate, torch.device(device)
        self.noise: MakeNoise = Noise
        self.offload = Offload(Host(self.device))  # of nothing
        roles = sorted({role for phase in method.phases for role in phase.trains})
        for role in roles:
            if role not in method.networks:
                raise ValueError(f"a phase trains {role!r}, but the networks are {', '.join(method.networks)}")
            if role not in optim:
                raise ValueError(f"no optimizer for {role!r}; add optim.{role}")
        for role in optim:
            if role not in roles:
                raise ValueError(f"optim.{role} is given, but this method trains only {', '.join(roles)}")
        self.moving = sorted({role for phase in method.phases for role in phase.moves})
        for role in self.moving:
            if role not in method.networks or role in roles:
                raise ValueError(f"a phase moves {role!r}, which must be a network that no phase trains")
            parallel.broadcast(method.networks[role])
        self.parameters = {
            role: {n: p for n, p in method.networks[role].named_parameters() if p.requires_grad} for role in roles
        }
        for role, parameters in self.parameters.items():
            if not parameters:
                raise ValueError(f"{role!r} has no trainable parameter")
            parallel.broadcast(method.networks[role])
        self.optim = dict(optim)
        self.optimizers = {role: optimizers.make(optim[role], self.parameters[role].values()) for role in roles}
        self.scalers = {p.name: torch.amp.GradScaler(self.device.type, enabled=fp16) for p in method.phases}
        for network in method.networks.values():
            network.requires_grad_(False).eval()

    def run(self, steps: Iterable[int]) -> Iterator[tuple[int, Logs]]:
        """Train at each of ``steps`` (numbered from 0) and yield its number and logs, keys ``phase/term``."""
        for step in steps:
            logs: Logs = {}
            for phase in self.method.phases:
                if step % phase.every == 0:
                    logs |= self.turn(phase, step)
            yield step, logs

    def turn(self, phase: Phase, step: int) -> Logs:
        """Give one phase its turn: all micro-batches, then the update. Raises NonFiniteLoss."""
        self.train_only(phase.trains)
        sums: dict[str, Tensor] = {}
        count = self.batch_size * self.accumulate * parallel.size()
        for samples in self.micro_batches(step):
            batch = self.data.batch(samples)
            terms = phase.loss(batch, self.noise(samples, self.seed, step, phase.name, self.device))
            loss = torch.stack([term.sum() for term in terms.values()]).sum() / count
            if not loss.requires_grad:
                raise ValueError(
                    f"the loss of phase {phase.name!r} reaches no parameter of {phase.trains[0]!r}, which it trains"
                )
            self.scalers[phase.name].scale(loss).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().sum() / count
        self.reshard()
        norms = self.gradient_norms(phase)
        names = [*sums, *(f"{role}.grad_norm" for role in norms)]
        reduced = parallel.sum_over_processes(torch.stack([v.double() for v in sums.values()]))
        values = torch.cat([reduced, torch.stack([v.double() for v in norms.values()])]).tolist()  # the only sync
        logs = dict(zip(names, values, strict=True))
        self._check(phase, step, logs)
        self.clip(phase, norms, {role: logs[f"{role}.grad_norm"] for role in norms})
        self.update(phase, step)
        phase.after()
        return {f"{phase.name}/{name}": value for name, value in logs.items()}

    def micro_batches(self, step: int) -> Iterator[list[int]]:
        """Global sample indices: those of a step are consecutive, split by process, then by micro-batch."""
        per_process = self.batch_size * self.accumulate
        start = (step * parallel.size() + parallel.rank()) * per_process
        for i in range(self.accumulate):
            first = start + i * self.batch_size
            yield list(range(first, first + self.batch_size))

    def train_only(self, roles: Sequence[str]) -> None:
        """Let these roles learn, and no other."""
        self.reshard()
        self.offload.turn(roles)
        for role, parameters in self.parameters.items():
            network, learns = self.method.networks[role], role in roles
            if network.training != learns:  # thousands of modules to visit for nothing where it is so already
                network.train(learns)
            for p in parameters.values():
                p.requires_grad_(learns)

    def reshard(self) -> None:
        """Drop what was put together of networks that are split over the processes, or brought of those that wait."""
        self.offload.rest()
        for network in self.method.networks.values():
            parallel.reshard(network)

    def gradient_norms(self, phase: Phase) -> dict[str, Tensor]:
        """Sum the gradients over processes, undo the loss scale; their norms by role."""
        norms = {}
        for role in phase.trains:
            parameters = self.parameters[role].values()
            if all(p.grad is None for p in parameters):
                raise ValueError(f"the loss of phase {phase.name!r} reaches no parameter of {role!r}, which it trains")
            parallel.sum_gradients(parameters)
            self.scalers[phase.name].unscale_(self.optimizers[role])
            norms[role] = parallel.total_norm([p.grad for p in parameters if p.grad is not None])
        return norms

    def clip(self, phase: Phase, norms: Mapping[str, Tensor], known: Mapping[str, float]) -> None:
        """Have the gradients of each role scaled down whose norm is above its largest one.

        known: the norms on the host. Some optimizers scale in their step, which must follow.
        """
        for role in phase.trains:
            largest = self.optim[role].clip
            # elsewhere the factor is 1, and a pass over all gradients for nothing; 1e-6 is the divisor's own
            if largest and not known[role] + 1e-6 <= largest:
                found = [p.grad for p in self.parameters[role].values() if p.grad is not None]
                excess = ((norms[role] + 1e-6) / largest).clamp(min=1.0)
                scaled = self.scalers[phase.name].is_enabled()
                optimizers.divide(self.optimizers[role], found, excess, at_once=scaled)

    def update(self, phase: Phase, step: int) -> None:
        """Move the weights of the roles that the phase trains by their gradients, and drop these."""
        scaler = self.scalers[phase.name]
        for role in phase.trains:
            optimizers.set_lr(self.optimizers[role], self.optim[role].lr_at(step, self.steps))
            scaler.step(self.optimizers[role])
            optimizers.forget(self.optimizers[role])
        scaler.update()

    def _check(self, phase: Phase, step: int, logs: Logs) -> None:
        for name, value in logs.items():
            # an fp16 gradient may overflow: the scaler skips that update and lowers its scale
            overflow = self.scalers[phase.name].is_enabled() and name.endswith(".grad_norm")
            if not math.isfinite(value) and not overflow:
                self._stop(phase, step, logs)

    def _stop(self, phase: Phase, step: int, logs: Logs) -> None:
        shown = ", ".join(f"{name}={value:.4g}" for name, value in logs.items())
        raise NonFiniteLoss(
            f"not finite at step {step}, phase {phase.name!r}: {shown}; "
            "the optimizer has not moved; lower the learning rate or resume from an earlier checkpoint"
        )
