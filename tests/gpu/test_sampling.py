"""Exported students in plain Diffusers on the GPU, and what ``fastgen doctor`` says there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastgen import attention, train
from tests.gpu import world
from tests.gpu.report import note

PROMPTS = ["a red apple", "a dog", "a blue heart", "a bicycle"]


def pictures(folder: Path, device: torch.device, dtype: torch.dtype, steps: int) -> Tensor:
    """By the stock call, from noise that is drawn on the CPU: [B, H, W, 3] in [0, 1].

    The first noise is given, since in another number format Diffusers draws other numbers.
    """
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    noise = torch.randn(len(PROMPTS), channels, side, side, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": steps, "latents": noise.to(device, dtype), "generator": generators}
    made = pipe(PROMPTS, **given, output_type="np").images
    return torch.from_numpy(made)


@pytest.mark.parametrize(("name", "steps"), [("dmd2_prompts", 1), ("lcm", 4), ("pcm", 4)])
def test_an_exported_student_draws_on_the_gpu_what_it_draws_on_the_cpu(
    name: str, steps: int, tmp_path: Path, full_float32: None
) -> None:
    given = ("run.batch_size=8", "run.save_dtype=fp32", "run.ema=0", "method.student_every=1")
    session = world.built(name, tmp_path, *given[: 4 if name == "dmd2_prompts" else 3])
    world.turns(session, range(2))
    folder = tmp_path / "pipeline"
    train.export_run(session, folder)
    expected = pictures(folder, world.CPU, torch.float32, steps)
    assert expected.std() > 0.05
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        off = (pictures(folder, world.CUDA, dtype, steps) - expected).abs()
        found[str(dtype).removeprefix("torch.")] = {"largest": float(off.max()), "mean": float(off.mean())}
    note("sampling", f"{name}, {steps} steps", found)
    assert found["float32"]["largest"] < 2e-3
    assert found["float32"]["mean"] < 1e-4
    if name != "lcm":  # whose sampler draws more noise on the way
        assert found["bfloat16"]["mean"] < 0.05
        assert found["float16"]["mean"] < 0.05


def test_doctor_says_what_is_here() -> None:
    done = world.fastgen("doctor", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    note("doctor", "rows", {what: row["found"] for what, row in rows.items() if "/" not in row["found"]})  # no paths
    assert torch.cuda.get_device_properties(0).name in rows["cuda:0"]["found"]
    assert {name: rows[f"attention {name}"]["ok"] for name in attention.NAMES} == {
        name: not reason for name, reason in attention.available(world.CUDA).items()
    }
