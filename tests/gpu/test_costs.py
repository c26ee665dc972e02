"""What an iteration costs beyond its network passes on the GPU: ``fastgen bench cost``, and what it leaves unused."""

from __future__ import annotations

import json

import pytest

from tests.gpu import world
from tests.gpu.report import note

NAMES = ("kd", "dmd2", "scm")


@pytest.mark.parametrize("batch", [32, 256])
def test_an_iteration_against_its_floor(batch: int) -> None:
    """Noted; what a small network takes on a GPU is mostly launches of kernels, so no bound is promised."""
    configs = [world.CONFIGS / f"{name}.yaml" for name in NAMES]
    done = world.fastgen("bench", "cost", *configs, "--json", "--batch-size", batch, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(NAMES)
    for row in rows:
        kept = ("seconds", "floor_seconds", "ratio", "ratio_low", "ratio_high", "rest", "precision", "device")
        note("cost", f"{row['method']} batch {batch}", {key: row[key] for key in kept})
        assert row["device"].startswith("cuda")
        assert row["ratio"] > 0.5
