"""What this machine has, and what a config would lack here."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastgen import doctor
from tests.command import done, fastgen

CONFIG = """\
model: {{path: {teacher}}}
method: {{name: dmd2}}
data: {{source: prompts, path: {prompts}}}
optim: {{student: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
run: {{out: {out}, steps: 4, keep: 2, ema: 0.9}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a training whose teacher is a folder with 1000 weights, in two forms, all of it here."""
    (tmp_path / "teacher" / "unet").mkdir(parents=True)
    weights = {"a": torch.zeros(20, 40), "b": torch.zeros(200)}
    save_file(weights, tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    halves = {name: value.half() for name, value in weights.items()}
    save_file(halves, tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    paths = {"teacher": tmp_path / "teacher", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "run"}
    (tmp_path / "c.yaml").write_text(CONFIG.format(**paths))
    return tmp_path / "c.yaml"


def rows(config: Path, *changes: str) -> dict[str, dict[str, Any]]:
    result = fastgen("doctor", config, *changes, "--json")
    found = json.loads(result.out)
    assert result.code == int(not all(row["ok"] for row in found if row["needed"]))
    return {row["what"]: row for row in found}


def test_each_kernel_is_tried_and_each_cache_told_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"0" * 2_500_000)
    (tmp_path / "weights" / "link").symlink_to("a.bin")
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path / "weights"))
    found = {row["what"]: row for row in doctor.findings()}
    assert found["attention sdpa"]["ok"]
    assert found["metrics' weights"]["found"] == f"{tmp_path / 'weights'}, 2.5 MB"
    if not torch.cuda.is_available():
        assert found["attention flash"]["found"].startswith("does not work: ")
        assert not found["attention flash"]["needed"]


def test_a_config_that_has_all_it_needs(config: Path) -> None:
    found = rows(config)
    assert {name for name, row in found.items() if row["needed"] and not row["ok"]} == set()
    assert {"model.path", "data.path", "optim.student", "optim.fake_score", "disk"} <= found.keys()
    # 1000 weights of 4 bytes: two roles with two moments each, and an average; keep 2, one being written
    assert "needed: 3 checkpoints of 0.0 MB" in found["disk"]["found"]
    assert doctor.weights_in(config.parent / "teacher" / "unet") == 1000
    assert done("doctor", config).code == 0


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        (
            "model.path=nobody/nothing",
            "model.path",
            "nobody/nothing is missing; `fastgen prefetch CONFIG` downloads it",
        ),
        ("model.path=./no/folder", "model.path", "./no/folder is missing; put the teacher's pipeline there"),
        ("data.path=gone.txt", "data.path", "gone.txt is missing; "),
        (
            "run.trackers=[wandb]",
            "run.trackers wandb",
            "wandb is not installed; pip install 'fastgen-diffusion[wandb]'",
        ),
        (
            "optim.student.name=lion8bit",
            "optim.student",
            "it needs bitsandbytes; pip install 'fastgen-diffusion[8bit]'",
        ),
        ("run.out=/proc/self/run", "run.out", "/proc/self cannot be written; set another run.out"),
    ],
)
def test_each_thing_that_is_missing_is_told_with_what_would_do(
    config: Path, monkeypatch: pytest.MonkeyPatch, change: str, key: str, text: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "wandb" else "1")
    if key == "optim.student" and __import__("importlib.util").util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    if key == "run.out":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("/proc/self"))
    row = rows(config, change)[key]
    assert (row["ok"], row["needed"]) == (False, True)
    assert text.replace("CONFIG", str(config)) in row["found"]


def test_a_disk_that_is_too_small_is_told(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    row = rows(config)["disk"]
    assert not row["ok"]
    assert row["found"].endswith("; make room, or set run.out or run.keep")
    assert rows(config, "student.lora={rank: 4}")["disk"]["ok"]


def test_a_bad_config_is_one_line(tmp_path: Path) -> None:
    result = fastgen("doctor", tmp_path / "none.yaml")
    assert (result.code, result.out) == (2, "")
    assert "none.yaml" in result.err
