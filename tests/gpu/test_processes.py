"""Launched trainings on one GPU: NCCL with one process, and two processes that share it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.gpu import world
from tests.gpu.report import note

CHILD = ("-m", "tests.gpu.child")
ALONE = [sys.executable, *CHILD]
CHANGES = (
    *(*world.QUICK, "run.steps=2", "run.precision=fp32", "run.save_dtype=fp32", "model.attention=eager"),
    *("optim.student.warmup=0", "optim.fake_score.warmup=0", "optim.discriminator.warmup=0"),
    *(f"optim.{role}.eps=1.0e-4" for role in ("student", "fake_score", "discriminator")),
)
"""eps: differences in the last bits of small gradients are not to be blown up to whole steps."""
WAYS = ("none", "full", "zero2")


def torchrun(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *CHILD]


def training(out: Path, *more: str) -> list[str]:
    return ["train", str(world.CONFIGS / "demo.yaml"), f"run.out={out}", *CHANGES, *more]


def exported(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run / "pipeline" / "unet").glob("*.safetensors")):
        found |= load_file(file)
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's two steps: unlaunched, launched as one process in each way, and unlaunched once more; all at once."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {name: [*ALONE, "trained", *training(folder / name)] for name in ("alone", "again")}
    for way in WAYS:
        commands[way] = [*torchrun(1), "trained", *training(folder / way, f"run.shard={way}")]
    together(folder, commands)
    return folder


def together(folder: Path, commands: Mapping[str, Sequence[object]]) -> None:
    """Run them all at once; FOLDER/NAME.err then has each one's exit code, and what it said."""

    def run(name: str) -> str:
        try:
            end = world.child(*commands[name], timeout=150)
        except AssertionError as error:
            return f"timeout\n{error}"
        return f"{end.returncode}\n{end.stderr[-4000:]}"

    with ThreadPoolExecutor() as pool:
        for name, text in zip(commands, pool.map(run, commands), strict=True):
            (folder / f"{name}.err").write_text(text)


def ends_well(folder: Path, name: str) -> None:
    code, _, err = (folder / f"{name}.err").read_text().partition("\n")
    assert code == "0", err


@pytest.mark.parametrize("way", WAYS)
def test_one_launched_process_trains_as_an_unlaunched_one(runs: Path, way: str) -> None:
    ends_well(runs, "alone")
    ends_well(runs, "again")
    ends_well(runs, way)
    DiffusionPipeline.from_pretrained(runs / way / "pipeline")
    alone = exported(runs / "alone")
    control, off = world.largest(exported(runs / "again"), alone), world.largest(exported(runs / way), alone)
    log = (runs / way / "train.log").read_text()
    assert "on cuda" in log
    note("one launched process", way, {"difference": off, "of two unlaunched": control, "splits": "are split" in log})
    assert off <= 2 * control + 1e-7


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    together(folder, {kind: [*torchrun(1), "split", folder, kind] for kind in ("whole", "full", "zero2")})
    return folder


@pytest.mark.parametrize("kind", ["full", "zero2"])
def test_networks_split_by_fsdp2_over_nccl_train_as_whole_ones(splits: Path, kind: str) -> None:
    """One process is all that there is, so every row is its own: what is tried is the way there and back."""
    ends_well(splits, "whole")
    ends_well(splits, kind)
    whole, mine = (json.loads((splits / f"{name}.json").read_text()) for name in ("whole", kind))
    assert whole["split"] == 0
    assert mine["split"] > 500
    off = [world.apart(one, other) for one, other in zip(mine["logs"], whole["logs"], strict=True)]
    squares = world.apart(mine["squares"], whole["squares"])
    most = max(value for one in off for value in one.values())
    figures = {"losses off": most, "weights off": max(squares.values()), "peak": mine["peak"], "whole": whole["peak"]}
    note("fsdp2 over nccl, one process", kind, figures)
    assert most < 1e-3, off
    assert max(squares.values()) < 1e-3


# Two processes on one GPU


def test_whether_nccl_lets_two_processes_share_a_gpu(tmp_path: Path) -> None:
    """It refuses by default; what the newest say of NCCL_MULTI_RANK_GPU_ENABLE=1 is noted, whatever it is."""
    found: dict[str, Any] = {}
    for name, more in (("plain", {}), ("allowed", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"})):
        folder = tmp_path / name
        folder.mkdir()
        try:
            end = world.child(*torchrun(2), "reduced", folder, timeout=60, **more)
            reason = [line.strip() for line in end.stderr.splitlines() if "uplicate GPU" in line or "Error:" in line]
            told = "works" if end.returncode == 0 else (reason or end.stderr.strip().splitlines() or ["?"])[0][:300]
        except AssertionError as error:
            told = str(error)[:300]
        found[name] = told
        if told == "works":
            sums = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
            assert sums == [[3.0] * 4] * 2
    note("two processes on one GPU", "nccl", found)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes over gloo, whole and split, and one process with twice their batch; all at once."""
    folder = tmp_path_factory.mktemp("double")
    commands = {"alone": [*ALONE, "trained", *training(folder / "alone", "run.batch_size=8", "run.log_every=1")]}
    for way in WAYS:
        more = ("run.batch_size=4", "run.log_every=1", f"run.shard={way}")
        commands[way] = [*torchrun(2), "gloo", *training(folder / way, *more)]
    together(folder, commands)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_on_one_gpu_train_as_one_with_twice_the_batch(double: Path, way: str) -> None:
    """Over gloo, which moves tensors of the GPU, too, but is not known to do all that splitting asks for."""
    ends_well(double, "alone")
    code, _, err = (double / f"{way}.err").read_text().partition("\n")
    if way != "none" and code != "0":
        lines = [line.strip() for line in err.splitlines() if "Error" in line or "fastgen:" in line]
        note("two processes on one GPU", f"gloo {way}", {"does not work": (lines or [err[-300:]])[0][:300]})
        pytest.skip(f"gloo on CUDA tensors, run.shard={way}: {(lines or ['?'])[0][:200]}")
    assert code == "0", err
    mine, theirs = ([row for row in metrics(double / name) if "critic/denoising" in row] for name in (way, "alone"))
    keys = [key for key in theirs[0] if "/" in key and "grad_norm" not in key]
    each = [
        world.apart({k: a[k] for k in keys if k in b}, {k: b[k] for k in keys if k in b})
        for a, b in zip(mine, theirs, strict=True)
    ]
    off = {key: max(one.get(key, 0.0) for one in each) for key in keys}
    weights = world.largest(exported(double / way), exported(double / "alone"))
    note("two processes on one GPU", f"gloo {way}", {"losses off": off, "weights off": weights})
    assert off["critic/denoising"] < 1e-3
