"""``model.compile`` and gradient checkpointing: the same losses; what they cost and save."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgen.train import Session
from tests.gpu import world
from tests.gpu.report import note

STEPS = 3


def round_of(session: Session) -> Callable[[], None]:
    def run() -> None:
        for phase in session.method.phases:
            session.engine.turn(phase, world.due(phase, STEPS))

    return run


@pytest.mark.parametrize(("name", "computed"), [("teacher", "bf16")])  # one: a network takes 46 s to compile
def test_a_compiled_training_has_the_losses_of_a_plain_one(
    name: str, computed: str, tmp_path: Path, full_float32: None
) -> None:
    logs, peaks, times, first = {}, {}, {}, {}
    for way in ("plain", "compiled"):
        torch.compiler.reset()
        world.free()
        given = ("run.batch_size=64", f"run.precision={computed}", f"model.compile={str(way == 'compiled').lower()}")
        session = world.built(name, tmp_path, *given)
        began = time.perf_counter()
        logs[way] = world.turns(session, range(STEPS))
        first[way] = time.perf_counter() - began
        round_of(session)()
        peaks[way], times[way] = world.peak(round_of(session)), world.seconds(round_of(session), 9)
        del session
    off = [world.apart(mine, theirs) for mine, theirs in zip(logs["compiled"], logs["plain"], strict=True)]
    note(
        "compile",
        f"{name} {computed}",
        {
            "time ratio": times["compiled"] / times["plain"],
            "memory ratio": peaks["compiled"] / peaks["plain"],
            "seconds": times["plain"],
            "seconds of the first steps": first,
            "off": off,
        },
    )
    most = 1e-3 if computed == "fp32" else 3e-2
    losses = [value for one in off for key, value in one.items() if not key.endswith("grad_norm")]
    assert all(value < most for value in losses), off


@pytest.mark.parametrize("name", ["teacher", "dmd2", "lcm"])
def test_recomputed_activations_take_less_and_give_the_same_losses(
    name: str, tmp_path: Path, full_float32: None
) -> None:
    logs, peaks, times = {}, {}, {}
    for way, on in (("plain", "false"), ("recomputed", "true")):
        world.free()
        given = ("run.batch_size=64", "run.precision=fp32", f"model.gradient_checkpointing={on}")
        session = world.built(name, tmp_path, *given)
        logs[way] = world.turns(session, range(STEPS))
        peaks[way], times[way] = world.peak(round_of(session)), world.seconds(round_of(session))
        del session
    off = [world.apart(mine, theirs) for mine, theirs in zip(logs["recomputed"], logs["plain"], strict=True)]
    figures = {
        "time ratio": times["recomputed"] / times["plain"],
        "memory ratio": peaks["recomputed"] / peaks["plain"],
        "peak": peaks["plain"],
        "off": off,
    }
    note("gradient checkpointing", name, figures)
    assert peaks["recomputed"] < peaks["plain"]
    assert all(value < 1e-3 for value in off[0].values()), off[0]
