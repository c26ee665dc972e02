"""``accelerate launch`` and ``torchrun`` with the shipped files, two gloo processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DiffusionPipeline

from fastgen import checkpoint
from tests import command

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
NAMES = ("single", "ddp", "fsdp2", "zero2", "multi_node")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launched(*given: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in given],
        cwd=cwd,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )


def accelerate(name: str, *given: object) -> subprocess.CompletedProcess[str]:
    few = ["--num_processes", "2", "--main_process_port", "0"]
    return launched(*ACCELERATE, "--config_file", CONFIGS / f"{name}.yaml", *few, *given)


def test_there_is_a_file_for_each() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it(name: str) -> None:
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    split = found.distributed_type == "FSDP"
    assert split == (name in ("fsdp2", "zero2", "multi_node"))
    assert found.num_processes == {"single": 1, "multi_node": 16}.get(name, 8)
    assert found.fsdp_config.get("fsdp_version") == (2 if split else None)


def check(ended: subprocess.CompletedProcess[str], folder: Path, kind: str | None) -> None:
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        assert json.loads((folder / f"{rank}.json").read_text()) == [2, 2.0, "cpu", kind]


@pytest.mark.parametrize(("name", "kind"), [("ddp", None), ("zero2", "zero2")])
def test_two_processes_are_launched_by_it(tmp_path: Path, name: str, kind: str | None) -> None:
    check(accelerate(name, "-m", "tests.contract.launch_child", tmp_path), tmp_path, kind)


def test_torchrun_launches_two(tmp_path: Path) -> None:
    ended = launched(*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "tests.contract.launch_child", tmp_path)
    check(ended, tmp_path, None)


def recipe(folder: Path, **changes: object) -> Path:
    """The tiny recipe of ``tests.command``, of two steps."""
    (folder / "prompts.txt").write_text("\n".join(command.CAPTIONS))
    teacher = command.teacher(folder / "teacher")
    text = command.RECIPE.format(teacher=teacher, prompts=folder / "prompts.txt", out=folder / "run")
    tree = yaml.safe_load(text)
    tree["run"] |= {"steps": 2, "checkpoint_every": 1, "health": None} | changes
    del tree["run"]["health"]
    tree["health"] = {"every": 1, "prompts": 1, "seeds": 2, "teacher_steps": 2}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> Sequence[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["critic/denoising"] for row in rows if "critic/denoising" in row]


def test_a_training_of_split_networks_ends_in_a_pipeline_and_goes_on_in_one_process(tmp_path: Path) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    ended = accelerate("fsdp2", "-m", "fastgen", "train", path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("holds the result") == 1
    DiffusionPipeline.from_pretrained(run / "pipeline")
    assert (run / "samples" / "step_000002.png").is_file()
    assert "split over 2 processes (full)" in (run / "train.log").read_text()
    assert [p.name for p in checkpoint.all_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]

    command.done("train", path, "run.steps=3", "run.batch_size=4")
    assert "resuming from" in (run / "train.log").read_text()
    assert len(losses(run)) == 3

    # one process from the start, with the same global batch
    other = tmp_path / "other"
    command.done("train", path, f"run.out={other}", "run.steps=3", "run.batch_size=4")
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)


def test_another_engine_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    result = command.fastgen("train", recipe(tmp_path))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "configs/accelerate/zero2.yaml" in result.err
    assert not (tmp_path / "run").exists()
