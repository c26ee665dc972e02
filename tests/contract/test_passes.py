"""Every method makes the passes that it declares for each phase: no other, and all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fastgen import lora
from fastgen.cost import Even
from fastgen.engine import Engine
from fastgen.experts import members
from fastgen.family import Family
from fastgen.method import Batch, Phase, Terms
from fastgen.rng import Noise
from tests.golden import record
from tests.oracle import Conv, Samples, Toy, conv_family, optims

BATCH = 2
CASES = [(name, variant) for name in record.methods() for variant in record.variants(name)]
Key = tuple[str, str, int, bool]
"""Role, mode, batches in a call, whether the call came to its end."""


@dataclass
class Call:
    """A call of a network as the hooks see it."""

    role: str
    rows: int
    tangent: bool
    learns: bool = False
    reached: bool = False
    backward: int = 0
    whole: bool = False

    @property
    def mode(self) -> str:
        if self.tangent:
            return "jvp"
        if not self.learns and not self.reached:
            return "forward"
        return {0: "a graph for nothing", 1: "weights" if self.learns else "inputs", 2: "penalty"}[self.backward]


@dataclass
class Watch:
    """The calls of a method's networks, by hooks."""

    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def on(self, networks: dict[str, nn.Module]) -> Iterator[None]:
        handles = []
        for role, network in networks.items():
            for member in members(network):
                handles.append(member.register_forward_pre_hook(self.entering(role)))
                handles.append(member.register_forward_hook(self.leaving))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entering(self, role: str) -> Any:
        def hook(network: nn.Module, args: tuple[Any, ...]) -> Any:
            maps = isinstance(args[0], list)
            first = args[0][0] if maps else args[0]
            call = Call(role, len(first), unpack_dual(first).tangent is not None)
            self.calls.append(call)
            if not torch.is_grad_enabled() or call.tangent:
                return None
            call.learns = any(p.requires_grad for p in network.parameters())
            call.reached = first.requires_grad
            if not call.learns and not call.reached:
                return None
            # an input of this call alone: whatever flows back through the call reaches it
            own = first.view_as(first) if call.reached else first.detach().requires_grad_()

            def back(grad: Tensor) -> None:
                call.backward += 1

            own.register_hook(back)
            return ([own, *args[0][1:]] if maps else own, *args[1:])

        return hook

    def leaving(self, network: nn.Module, args: object, output: object) -> None:
        self.calls[-1].whole = True

    def counted(self, turns: int) -> dict[Key, float]:
        """Calls a turn."""
        found = Counter((c.role, c.mode, c.rows // BATCH, c.whole) for c in self.calls)
        return {key: count / turns for key, count in found.items()}


def needed(phase: Phase) -> dict[Key, float]:
    """The declared passes as the hooks would see them."""
    found: Counter[Key] = Counter()
    for p in phase.passes:
        mode, calls = ("forward", 2) if p.mode == "finite_differences" else (p.mode, 1)
        found[p.role, mode, p.rows, not p.blocks] += p.count * calls  # type: ignore[assignment]
    return {key: count for key, count in found.items() if count}


def made(method: Any, data: Any, phase: Phase, turns: int) -> dict[Key, float]:
    """Calls of each kind in a turn of the phase, on average over ``turns``."""
    engine, watch = Engine(method, data, optims(method), batch_size=BATCH, steps=100), Watch()
    engine.noise = Even
    with watch.on(method.networks):
        for step in range(turns):
            engine.turn(phase, step)
    return watch.counted(turns)


def check(name: str, variant: str, family: Callable[[], Family]) -> None:
    """Each phase, on networks that no other has frozen; as many turns as the student has calls, one at each."""
    options, num_steps = record.variants(name)[variant]
    for i in range(len(record.make(name, options, family(), num_steps).phases)):
        method = record.make(name, options, family(), num_steps)
        phase = method.phases[i]
        assert made(method, Samples((2, 8, 8)), phase, num_steps) == pytest.approx(needed(phase)), phase.name


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_phase_makes_the_passes_it_declares(name: str, variant: str) -> None:
    check(name, variant, conv_family)


@pytest.mark.parametrize(
    ("name", "variant"), [("dmd2", "gan"), ("sid", "few"), ("vsd", "default"), ("lcm", "default")]
)
def test_roles_that_share_a_network_make_the_same_passes(name: str, variant: str) -> None:
    check(name, variant, lambda: lora.adapted(conv_family(), lora.Lora(rank=2), share_backbone=True))


def test_the_hooks_tell_every_kind_of_pass_and_waste_from_use() -> None:
    """By a loss written out; a graph that no gradient comes back through is none of a declared pass's modes."""
    networks = {"learns": Conv(), "fixed": Conv().requires_grad_(False)}
    parts = (torch.full((BATCH,), 3.0), torch.eye(3)[:BATCH])

    def loss(batch: Batch, rng: Noise) -> Terms:
        x = rng.normal((2, 8, 8))
        with torch.no_grad():
            networks["learns"](x, *parts)
        y = networks["learns"](x, *parts)
        networks["learns"](x, *parts)  # for nothing, with a graph
        networks["fixed"](torch.cat([x, x]), *(torch.cat([part, part]) for part in parts))
        z = networks["fixed"](y, *parts) + networks["fixed"](y.detach(), *parts)
        torch.func.jvp(lambda x: networks["fixed"](x, *parts), (x,), (x,))
        own = x.clone().requires_grad_()
        slope = torch.autograd.grad(networks["learns"](own, *parts).square().sum(), own, create_graph=True)[0]
        return {"error": z.square().mean((1, 2, 3)) + slope.square().mean((1, 2, 3))}

    phase = Phase("only", ["learns"], loss)
    assert made(Toy(networks, (phase,)), Samples((2, 8, 8)), phase, 1) == {
        ("learns", "forward", 1, True): 1,
        ("learns", "weights", 1, True): 1,
        ("learns", "a graph for nothing", 1, True): 1,
        ("learns", "penalty", 1, True): 1,
        ("fixed", "forward", 2, True): 1,
        ("fixed", "forward", 1, True): 1,
        ("fixed", "inputs", 1, True): 1,
        ("fixed", "jvp", 1, True): 1,
    }
