"""What an iteration costs beyond its network passes on the GPU: ``fastgen bench cost``, and what it leaves unused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from fastgen import attention
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


SHAPES = {"SDXL at 64 x 64": (4, 4096, 10, 64), "Flux at 1024 x 1024": (1, 4608, 24, 128)}
"""Batch, tokens, heads and their width."""


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_of_attention_beside_each_other(shape: str) -> None:
    """Forward and backward of bfloat16, in units of PyTorch's own kernels; noted, for "auto" to be what is fast."""
    attention._without_cudnn(world.CUDA)
    g = torch.Generator().manual_seed(0)
    q, k, v, to = (torch.randn(SHAPES[shape], generator=g).to(world.CUDA, torch.bfloat16) for _ in range(4))

    def call(backend: AttentionBackendName, given: Sequence[torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = dispatch_attention_fn(*given, backend=backend)
        return found

    def timed(call: Callable[..., torch.Tensor], backend: AttentionBackendName) -> float:
        taken = []
        for _ in range(13):
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            torch.autograd.grad(call(backend, given), given, to)
            events[1].record()
            torch.cuda.synchronize()
            taken.append(events[0].elapsed_time(events[1]))
        return statistics.median(taken[3:])

    seconds = {}
    for name in attention.NAMES:
        try:
            attention._probe(name, world.CUDA, torch.bfloat16)
        except Exception:  # of several libraries: it is not here
            continue
        backend = AttentionBackendName(attention._BACKENDS.get(name, name))
        seconds[name] = timed(call, backend)
        if name == "flex":  # which is one kernel only where model.compile makes it one
            seconds["flex, compiled"] = timed(torch.compile(call), backend)
    note("cost", f"attention, {shape}", {name: one / seconds["sdpa"] for name, one in seconds.items()})
    assert seconds["sdpa"] < seconds["eager"]
    assert seconds["flex, compiled"] < seconds["flex"] / 2
