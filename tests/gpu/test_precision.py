"""Number formats: what networks compute in, and what frozen ones are held in."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from fastgen import precision
from fastgen.experts import members
from fastgen.recipe import DTYPES
from fastgen.train import Session
from tests.gpu import world
from tests.gpu.report import note

STEPS = 4
GIVEN = ("run.batch_size=32", "optim.student.warmup=0")
DMD2 = ("method.student_every=2", "optim.fake_score.warmup=0")
NEAR = {"bf16": 0.1, "fp16": 0.02}
"""How far the first losses may be from those in float32, in units of these."""


def session(name: str, folder: Path, computed: str, held: str = "fp32", *more: str) -> Session:
    world.free()
    own = DMD2 if name == "dmd2_prompts" else ()
    return world.built(name, folder, *GIVEN, *own, f"run.precision={computed}", f"model.dtype={held}", *more)


def round_of(one: Session) -> None:
    for phase in one.method.phases:
        one.engine.turn(phase, world.due(phase, STEPS))


def test_each_format_trains_and_its_losses_are_float32_s(tmp_path: Path, full_float32: None) -> None:
    """dmd2 without its GAN; the teacher in the format as well."""
    logs, figures = {}, {}
    for computed in ("fp32", "bf16", "fp16"):
        one = session("dmd2_prompts", tmp_path, computed, computed)
        before, built = world.weights(one), torch.cuda.memory_allocated()
        logs[computed] = world.turns(one, range(STEPS))
        after = world.weights(one)
        peak, time = world.peak(partial(round_of, one)), world.seconds(partial(round_of, one))
        figures[computed] = {
            "memory after building": built,
            "peak": peak,
            "seconds": time,
            "logs": logs[computed],
            "scale": {name: scaler.get_scale() for name, scaler in one.engine.scalers.items()},
        }
        note("precision", computed, figures[computed])
        assert all(math.isfinite(v) for log in logs[computed] for k, v in log.items() if not k.endswith("grad_norm"))
        for role in one.engine.parameters:
            moved = [n for n in before if n.startswith(f"{role}.") and not torch.equal(before[n], after[n])]
            assert len(moved) > 50, (computed, role)
        del one
    for computed, most in NEAR.items():
        off = world.apart(logs[computed][0], logs["fp32"][0])
        note("precision", f"{computed} against fp32, first step", off)
        losses = {name: value for name, value in off.items() if "." not in name}
        assert all(value < most for value in losses.values()), losses
        assert figures[computed]["peak"] < figures["fp32"]["peak"]  # type: ignore[operator]


def test_the_scaler_skips_an_update_that_overflows_and_lowers_its_scale(tmp_path: Path) -> None:
    one = session("lcm", tmp_path, "fp16")
    [phase], [scaler] = one.method.phases, one.engine.scalers.values()
    one.engine.turn(phase, 0)
    scaler.update(2.0**60)
    before = world.weights(one)
    logs = one.engine.turn(phase, 1)
    assert not math.isfinite(logs[f"{phase.name}/student.grad_norm"])
    assert scaler.get_scale() == 2.0**59
    after = world.weights(one)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("student."))
    scaler.update(2.0**10)
    logs = one.engine.turn(phase, 2)
    assert math.isfinite(logs[f"{phase.name}/student.grad_norm"])
    moved = world.weights(one)
    assert any(not torch.equal(after[name], moved[name]) for name in after if name.startswith("student."))


@pytest.mark.parametrize("held", ["bf16", "fp16"])
def test_a_frozen_teacher_in_half_precision_takes_half_and_changes_nothing(
    held: str, tmp_path: Path, ordered: None
) -> None:
    logs, built, figures = {}, {}, {}
    for name, dtype in (("plain", "fp32"), ("again", "fp32"), ("held", held)):
        one = session("dmd2_prompts", tmp_path, held, dtype, "model.attention=eager")
        torch.cuda.synchronize()
        # what was asked for: the allocator gives up to 1 MB more where a block's rest is too small to be another's
        built[name] = torch.cuda.memory_stats()["requested_bytes.all.current"]
        if name == "held":
            teacher = members(one.method.networks["teacher"])
            layers = [m for n in teacher for m in n.modules() if isinstance(m, precision.LAYERS)]
            assert {layer.weight.dtype for layer in layers} == {DTYPES[held]}
            expected = sum(2 * layer.weight.numel() for layer in layers)
            figures["expected"] = expected
        logs[name] = world.turns(one, range(3))
        del one
    saved = built["again"] - built["held"]  # after the first also what libraries take once is there
    same, control = logs["held"] == logs["plain"], logs["again"] == logs["plain"]
    note("precision", f"teacher in {held}", {**figures, "saved": saved, "same": same, "two plain runs same": control})
    assert abs(saved - figures["expected"]) < 2**12, saved - figures["expected"]
    if control:
        assert same
    else:
        off = world.apart(logs["held"][0], logs["plain"][0])
        assert all(value < 1e-3 for value in off.values()), off
