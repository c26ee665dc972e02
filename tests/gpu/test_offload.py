"""``run.offload``: what a turn has no use for waits in the host's memory, and nothing else changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.method import Phase
from fastgen.train import Session
from tests.gpu import world
from tests.gpu.report import note

STEPS = 4
DMD2 = ("run.batch_size=8", "method.student_every=2", "model.attention=eager", "run.precision=fp32")


def moments(session: Session, role: str) -> list[Tensor]:
    return [t for state in session.engine.optimizers[role].state.values() for t in state.values()]


def idle(session: Session, phase: Phase) -> int:
    """Bytes that the phase has no use for: other roles' states, and frozen networks that it does not call."""
    states = [t for role in session.engine.optimizers if role not in phase.trains for t in moments(session, role)]
    called = {p.role for p in phase.passes}
    changing = {role for one in session.method.phases for role in (*one.trains, *one.moves)}
    frozen = [n for role, n in session.method.networks.items() if role not in changing and role not in called]
    return world.storage(states) + sum(map(world.size, frozen))


def turn(session: Session, phase: Phase) -> None:
    session.engine.turn(phase, world.due(phase, STEPS))


def round_of(session: Session) -> None:
    for phase in session.method.phases:
        turn(session, phase)


@pytest.mark.parametrize("name", ["dmd2", "lcm"])
def test_the_same_weights_and_less_memory(name: str, tmp_path: Path, ordered: None) -> None:
    own = DMD2 if name == "dmd2" else (DMD2[0], *DMD2[2:])
    results, peaks, times, waiting, left = {}, {}, {}, {}, {}
    for way in ("plain", "again", "offload"):
        world.free()
        left[way] = torch.cuda.memory_allocated()
        session = world.built(name, tmp_path, *own, f"run.offload={str(way == 'offload').lower()}")
        results[way] = world.turns(session, range(STEPS)), world.weights(session)
        waiting = {phase.name: idle(session, phase) for phase in session.method.phases}
        round_of(session)  # so that each turn that is measured begins after another's
        peaks[way] = {phase.name: world.peak(partial(turn, session, phase)) for phase in session.method.phases}
        times[way] = world.seconds(partial(round_of, session))
        del session
    (plain, own_weights), (again, their_weights), (away, our_weights) = results.values()
    control, difference = world.largest(their_weights, own_weights), world.largest(our_weights, own_weights)
    # of the first, libraries have yet to take what they keep
    lower = {phase: peaks["again"][phase] - peaks["offload"][phase] for phase in waiting}
    note(
        "offload",
        name,
        {
            "left of sessions before": left,
            "peak": peaks["again"],
            "peak with it": peaks["offload"],
            "lower by": lower,
            "waiting": waiting,
            "seconds": times["again"],
            "seconds with it": times["offload"],
            "time ratio": times["offload"] / times["again"],
            "largest difference of weights": difference,
            "that of two plain runs": control,
        },
    )
    if control == 0 and again == plain:
        assert difference == 0
        assert away == plain
    else:  # some kernel adds in no fixed order
        assert difference <= 10 * control + 1e-7
    assert left["offload"] - left["again"] < 2**20, left
    assert left["again"] - left["plain"] < 2**27, left  # cuBLAS keeps 32 MiB for each thread; a session has 320 MB
    for phase, count in waiting.items():
        assert abs(lower[phase] - count) <= 0.1 * count + 2**20, (phase, lower, waiting)


def test_copies_on_the_host_are_pinned(tmp_path: Path) -> None:
    session = world.built("dmd2", tmp_path, *DMD2, "run.offload=true")
    idle = session.engine.offload
    kept = [value for pairs in idle.waiting.values() for _, value in pairs]
    assert kept
    assert all(value.is_pinned() for value in kept)
    world.turns(session, range(2))  # the second has the critic alone
    gone = [state[key] for found in idle.gone.values() for state, key in found]
    assert idle.gone.keys() == {"student"}
    assert gone
    assert all(value.is_pinned() for value in gone)
    assert all(p.device.type == "cpu" for network in idle.waiting for p in network.parameters())
