"""A training step waits for the GPU once in each turn of a phase: for the numbers that it logs and checks.

``tests/unit/test_syncs.py`` counts on the CPU what reads values. Here torch itself tells of each wait, also of those
for copies to the GPU out of memory that is not pinned, which on a CPU are nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.gpu import world
from tests.gpu.report import note

WAITED = "called a synchronizing CUDA operation"


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Within it each wait counts, by the module and the line of this project that asked for it."""
    found: Counter[str] = Counter()

    def told(message: Any, *rest: Any, **named: Any) -> None:
        if WAITED in str(message):
            found[place()] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # each, not the first from a line
        warnings.showwarning = told
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def place() -> str:
    """The innermost line of the package on the stack, and the line of a library that it called if that is another."""
    frame: FrameType | None = sys._getframe(1)
    inner = ""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        at = f"{name}:{frame.f_lineno}"
        if name.split(".")[0] == "fastgen":
            return f"{at} ({inner})" if inner else at
        if not inner and name != __name__ and name.split(".")[0] not in ("warnings", "torch", "contextlib"):
            inner = at
        frame = frame.f_back
    return inner or "elsewhere"


def test_waits_are_seen() -> None:
    x = torch.ones(3, device=world.CUDA)
    with waits() as found:
        for _ in range(2):
            x.sum().item()
    assert sum(found.values()) == 2, found
    with waits() as found:
        torch.ones(1000).to(world.CUDA)
    assert sum(found.values()) == 1, found
    pinned = torch.ones(1000).pin_memory()
    with waits() as found:
        pinned.to(world.CUDA, non_blocking=True).mul(2).sum()
    assert not found


@pytest.mark.parametrize("name", world.methods())
def test_a_turn_waits_once(name: str, tmp_path: Path) -> None:
    session = world.built(name, tmp_path, "run.batch_size=8")
    engine, phases = session.engine, session.method.phases
    start = max(phase.every for phase in phases)
    world.turns(session, range(start + 1))
    table: dict[str, dict[str, int]] = {}
    for phase in phases:
        step = world.due(phase, start + 1)
        for samples in engine.micro_batches(step):
            engine.data.batch(samples)  # images are encoded and prompts are known
        engine.turn(phase, step)
        with waits() as found:
            engine.turn(phase, step)
        note("waits", f"{name} {phase.name}", dict(found.most_common()))
        if name == "phased_dmd":  # which expert a row goes to, and only what is asked of it then runs
            found = Counter({at: n for at, n in found.items() if not at.startswith("fastgen.experts:")})
        table[phase.name] = dict(found.most_common())
    assert all([at.split(":")[0] for at in found] == ["fastgen.engine"] for found in table.values()), table
    assert all([*found.values()] == [1] for found in table.values()), table
