"""What this machine has, and what a config would lack here."""

from __future__ import annotations

import json
import math
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastgen import doctor, estimate, recipe, stream, train
from fastgen.config import override, read
from tests import tiny
from tests.command import done, fastgen, images, teacher

CONFIG = """\
model: {{path: {teacher}}}
method: {{name: dmd2}}
data: {{source: prompts, path: {prompts}}}
optim: {{student: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
run: {{out: {out}, steps: 4, keep: 2, ema: 0.9}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a training whose teacher is a tiny pipeline, all of it here."""
    teacher(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    paths = {"teacher": tmp_path / "teacher", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "run"}
    (tmp_path / "c.yaml").write_text(CONFIG.format(**paths))
    return tmp_path / "c.yaml"


def counted(*networks: nn.Module) -> tuple[int, int]:
    """Numbers, and tensors, of these networks."""
    found = [p for network in networks for p in network.parameters()]
    return sum(p.numel() for p in found), len(found)


def written(config: Path, *changes: str) -> tuple[int, int]:
    tree = override(read(config), list(changes))
    return estimate.written(recipe.decode(tree, "c.yaml"))


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
    each, pipeline = written(config)
    said = found["disk"]["found"]  # keep 2, and one that is being written
    assert f"needed: 3 checkpoints of {each / 1e6:.1f} MB, a pipeline of {pipeline / 1e6:.1f} MB" in said
    assert f"about {(3 * each + pipeline) / 1e6:.1f} MB needed" in said
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
    assert not rows(config, "student.lora={rank: 4}")["disk"]["ok"]  # adapters take room, too


def test_a_checkpoint_holds_what_learns_with_two_moments_and_a_count_each_and_averages(config: Path) -> None:
    unet = tiny.unet()
    student = tiny.unet(time_cond_proj_dim=32)  # of which the projection itself does not learn
    numbers, tensors = counted(unet)
    assert counted(student)[0] > numbers
    whole = 2 * (3 * 4 * numbers + 4 * tensors) + 4 * numbers
    assert written(config)[0] == whole
    assert written(config, "run.ema=0")[0] == whole - 4 * numbers
    parts = tiny.pipeline()
    others = counted(parts.vae, parts.text_encoder)[0] + counted(student)[0]
    assert written(config)[1] == 4 * others
    assert written(config, "run.save_dtype=bf16")[1] == 2 * others


def test_a_checkpoint_is_as_large_with_adapters_and_a_discriminator_as_the_one_that_a_run_writes(
    config: Path, tmp_path: Path
) -> None:
    images(tmp_path / "images")
    gan = ["method.adversarial.weight=0.1", "optim.discriminator.lr=1.0e-3"]
    gan += ["data.source=images", f"data.path={tmp_path / 'images'}"]
    plain, heads = written(config)[0], written(config, *gan)[0]
    assert heads > plain
    for number, changes in enumerate((gan, ["student.lora={rank: 4}", *gan])):
        out = tmp_path / str(number)
        given = recipe.decode(override(read(config), [*changes, f"run.out={out}", "run.steps=1"]), "c.yaml")
        train.train(given)
        files = [f for f in (out / "checkpoint-1").iterdir() if f.suffix == ".safetensors"]
        found = sum(math.prod(s) for f in files for s in stream.shapes(f).values())
        assert 4 * found == estimate.written(given)[0]


def test_what_cannot_be_counted_is_told(config: Path) -> None:
    (config.parent / "teacher" / "model_index.json").write_text("{")
    [row] = doctor.of_disk(recipe.decode(read(config), "c.yaml"))
    assert row["ok"]
    assert "free in" in row["found"]
    assert "what is needed cannot be counted (" in row["found"]


def test_a_bad_config_is_one_line(tmp_path: Path) -> None:
    result = fastgen("doctor", tmp_path / "none.yaml")
    assert (result.code, result.out) == (2, "")
    assert "none.yaml" in result.err
