"""Whole runs and every command, called as a user calls them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastgen as package
from fastgen import checkpoint, cli, config, recipe, registry, stream, tracking
from fastgen import train as training
from fastgen.config import ConfigError, merge
from fastgen.evaluation import runner
from fastgen.evaluation.images import read_png, write_png
from fastgen.interrupt import Interrupted
from fastgen.rng import Noise
from fastgen.stream import Piece
from tests import command
from tests.command import Result, done, fastgen
from tests.oracle import same

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """An unbroken run of four steps, with averaged weights."""
    result = done("train", world / "run.yaml")
    out = world / "run"
    assert result.out == f"{out / 'pipeline'} holds the result; `fastgen evaluate {out}` judges it\n"
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run folder to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def train(world: Path, out: Path, *overrides: str, **options: str) -> Result:
    """``fastgen train`` of the world's recipe into another folder."""
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return fastgen("train", world / "run.yaml", f"run.out={out}", *overrides, *flags)


def trained(world: Path, out: Path, *overrides: str, **options: str) -> Path:
    result = train(world, out, *overrides, **options)
    assert result.code == 0, result.err
    return out


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without the time it took."""
    return [
        {k: v for k, v in r.items() if k not in tracking.MEASURED} for r in tracking.read(folder / "metrics.jsonl")
    ]


def weights(folder: Path, name: str = "student") -> dict[str, Tensor]:
    """Of a run's newest checkpoint."""
    return load_file(checkpoint.all_checkpoints(folder)[-1] / f"{name}.safetensors")


def equal_runs(one: Path, two: Path) -> None:
    """The same newest checkpoint bit for bit, the same rows, the same pipeline."""
    last = checkpoint.all_checkpoints(one)[-1].name
    assert checkpoint.all_checkpoints(two)[-1].name == last
    files = sorted(f.name for f in (one / last).glob("*.safetensors"))
    assert files == sorted(f.name for f in (two / last).glob("*.safetensors"))
    for file in files:
        assert same(load_file(one / last / file), load_file(two / last / file)), file
    assert rows(one) == rows(two)
    unet = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert same(load_file(one / unet), load_file(two / unet))


def largest_difference(one: Path, two: Path) -> float:
    pairs = [(weights(one, role), weights(two, role)) for role in ("student", "fake_score")]
    return max(float((a[n] - b[n]).abs().max()) for a, b in pairs for n in a)


# A run


def test_a_run_folder_holds_what_was_promised(run: Path) -> None:
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "config.yaml",
        "metrics.jsonl",
        "pipeline",
        "samples",
        "train.log",
    ]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_000002.png", "step_000004.png"]
    with Image.open(run / "samples" / "step_000004.png") as grid:
        assert grid.size == (4 * 16 * 4, 4 * 16 * 4)
    assert sorted(p.name for p in (run / "checkpoint-4").iterdir()) == [
        "fake_score.optim.safetensors",
        "fake_score.safetensors",
        "state.json",
        "student.ema.safetensors",
        "student.optim.safetensors",
        "student.safetensors",
    ]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert all({"critic/denoising", "critic/fake_score.grad_norm"} <= set(row) for row in rows(run))
    assert ["student/dmd" in row for row in rows(run)] == [True, False, True, False]
    log = (run / "train.log").read_text()
    assert "dmd2 on cpu, attention eager" in log
    assert "reloaded by Diffusers it differs from the trainer's sampler by" in log
    assert not [p for p in run.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt"} or p.name.startswith(".")]


def test_the_resolved_config_is_beside_the_run_and_is_itself_a_config(run: Path, world: Path) -> None:
    kept = config.read(run / "config.yaml")
    assert recipe.decode(kept, "config.yaml") == recipe.decode(config.read(world / "run.yaml"), "run.yaml")
    assert kept["run"]["accumulate"] == 1  # defaults are written out
    assert kept["optim"]["student"]["betas"] == [0.9, 0.999]


def test_overrides_are_read_as_yaml_and_recorded(world: Path, tmp_path: Path) -> None:
    changes = ["run.steps=1", "optim.student.lr=2e-5", "method.t_low=0.1", "run.sample_prompts=[a dog, a cat]"]
    tree = yaml.safe_load((trained(world, tmp_path / "run", *changes) / "config.yaml").read_text())
    assert (tree["run"]["steps"], tree["optim"]["student"]["lr"], tree["method"]["t_low"]) == (1, 2e-5, 0.1)
    assert tree["run"]["sample_prompts"] == ["a dog", "a cat"]


def test_the_exported_pipeline_is_stock_and_gives_what_the_trainer_s_sampler_gives(run: Path) -> None:
    """In plain Diffusers, from the newest checkpoint's averaged weights, to a level of 8 bits."""
    session = training.build(recipe.decode(config.read(run / "config.yaml"), "config.yaml"))
    checkpoint.load(run / "checkpoint-4", session.engine, session.ema)
    prompts, samples = ["a red apple", "a dog"], [3, 5]
    with session.weights():
        ours = session.images(prompts, samples)
    x_t = Noise(samples, 0, 0, "images").normal((4, 8, 8))
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(pipeline) is StableDiffusionPipeline
    theirs = pipeline(prompts, latents=x_t, num_inference_steps=1, output_type="pt").images
    assert (ours.float() - 255 * theirs).abs().max() <= 1
    assert same(weights(run, "student.ema"), {n: load_unet(run)[n] for n in weights(run, "student.ema")})
    assert not same(weights(run), {n: load_unet(run)[n] for n in weights(run)})
    assert json.loads((run / "pipeline" / "fastgen.json").read_text()) == {
        "method": "dmd2",
        "base_model": str(run.parent / "teacher"),
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "times": [999.0],
    }


def load_unet(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


# Going on


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_run_that_stops_and_goes_on_equals_an_unbroken_one(
    world: Path, run: Path, tmp_path: Path, log_every: int
) -> None:
    """Weights, moments, averages and pipeline bit for bit, and the same rows."""
    whole = run if log_every == 1 else trained(world, tmp_path / "whole", f"run.log_every={log_every}")
    out = trained(world, tmp_path / "run", f"run.log_every={log_every}", "run.steps=2")
    assert [p.name for p in checkpoint.all_checkpoints(out)] == ["checkpoint-2"]
    result = train(world, out, f"run.log_every={log_every}")
    assert f"resuming from {out / 'checkpoint-2'}" in result.err
    equal_runs(out, whole)


def test_a_finished_run_given_again_changes_nothing(run: Path, copy: Path, world: Path) -> None:
    trained(world, copy)
    equal_runs(copy, run)


def test_resume_never_refuses_a_folder_with_checkpoints(world: Path, copy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    result = train(world, copy, resume="never")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"fastgen: {copy}: holds checkpoint-4 of an earlier run; use another run.out or --resume auto\n"
    )
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*")}


def test_a_checkpoint_may_be_named(world: Path, run: Path, copy: Path, tmp_path: Path) -> None:
    refused = train(world, copy, resume=str(copy / "checkpoint-2"))
    assert (refused.code, refused.out) == (2, "")
    assert "holds checkpoint-4, which is newer than checkpoint-2; move it away, or set another run.out" in refused.err
    shutil.rmtree(copy / "checkpoint-4")
    trained(world, copy, resume=str(copy / "checkpoint-2"))
    equal_runs(copy, run)
    other = trained(world, tmp_path / "other", resume=str(run / "checkpoint-2"))
    assert same(weights(other), weights(run))
    assert [row["step"] for row in rows(other)] == [3, 4]


def test_a_killed_process_goes_on_from_its_newest_whole_checkpoint(world: Path, tmp_path: Path) -> None:
    """SIGKILL of a real ``python -m fastgen train``; its stderr has log lines and nothing else."""
    changes = ["run.steps=40", "run.checkpoint_every=3", "run.sample_every=0"]
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "fastgen", "train", str(world / "run.yaml"), f"run.out={out}", *changes]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 600
        while len(checkpoint.all_checkpoints(out)) < 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.kill()
        said, errors = child.communicate()
    assert (child.returncode, said) == (-signal.SIGKILL, ""), errors
    assert errors.splitlines()[0] == f"{out}: dmd2 on cpu, attention eager"
    assert all(re.match(r"step \d+/40 ", line) for line in errors.splitlines()[1:]), errors  # one a minute
    assert not (out / "pipeline").exists()
    result = train(world, out, *changes)
    assert result.code == 0, result.err
    assert "resuming from" in result.err
    equal_runs(out, trained(world, tmp_path / "whole", *changes))


# Variants


@pytest.mark.parametrize("changes", [["run.batch_size=1", "run.accumulate=2"], ["model.gradient_checkpointing=true"]])
def test_accumulation_checkpointing_and_kernel_change_nothing(
    world: Path, run: Path, tmp_path: Path, changes: list[str]
) -> None:
    other = trained(world, tmp_path / "run", *changes, "model.attention=sdpa", "run.sample_every=0")
    assert largest_difference(other, run) < 1e-4
    assert rows(other)[-1]["critic/denoising"] == pytest.approx(rows(run)[-1]["critic/denoising"], rel=1e-3)


VARIANTS = {
    "bf16": ["run.precision=bf16", "run.save_dtype=bf16"],
    "fp16": ["run.precision=fp16", "run.save_dtype=fp16"],
    "without averages": ["run.ema=0"],
    "two steps": ["student.steps=2"],
    "four steps": ["student.steps=4", "method.student_every=1"],
    "gan": [
        "data.source=images",
        "data.path=IMAGES",
        "method.adversarial.weight=1e-3",
        "optim.discriminator={lr: 1e-3}",
    ],
    "from data": ["data.source=images", "data.path=IMAGES", "method.rollout=data", "student.steps=2"],
    "earlier start": ["student.start=0.4"],
    "schedule": ["optim.student={lr: 1e-3, schedule: cosine, warmup: 1, betas: [0.0, 0.99], clip: 0}"],
    "tensorboard": ["run.trackers=[tensorboard]"],
    "pretrain": ["data.source=images", "data.path=IMAGES", "run.cache_latents=true", "run.sample_guidance=2"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_run_trains_and_exports(world: Path, tmp_path: Path, name: str) -> None:
    changes = [text.replace("IMAGES", str(world / "images")) for text in VARIANTS[name]]
    # options of one method are unknown to another
    other = {"method": {"name": "pretrain"}, "optim": {"teacher": LR}} if name == "pretrain" else {}
    source, out = edited(world, tmp_path, **other), tmp_path / "out"
    done("train", source, "run.steps=2", "run.checkpoint_every=1", "run.sample_every=0", *changes)
    assert all(abs(value) < 1e4 for row in rows(out) for value in row.values())
    roles = {"gan": {"student", "fake_score", "discriminator"}, "pretrain": {"teacher"}}
    kept = {f.name.partition(".")[0] for f in (out / "checkpoint-2").glob("*.safetensors")}
    assert kept == roles.get(name, {"student", "fake_score"})
    assert bool(list((out / "checkpoint-2").glob("*.ema.safetensors"))) == (name != "without averages")
    assert {p.dtype for p in weights(out, "teacher" if name == "pretrain" else "student").values()} == {torch.float32}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    assert {p.dtype for p in load_unet(out).values()} == {dtype}
    assert (out / "tb").exists() == (name == "tensorboard")
    card = json.loads((out / "pipeline" / "fastgen.json").read_text())
    steps = {"two steps": 2, "from data": 2, "four steps": 4, "pretrain": None}.get(name, 1)
    assert card.get("num_inference_steps") == steps
    assert steps != 1 or card["times"] == [399.0 if name == "earlier start" else 999.0]
    image = package.load(out / "pipeline")("a dog", **({} if steps else {"num_inference_steps": 2})).images[0]
    assert image.size == (16, 16)


# A rehearsal


def test_a_dry_run_says_what_a_run_would_cost_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    before = sorted(world.rglob("*"))
    changes = [f"run.out={tmp_path / 'run'}", "run.steps=10000", "run.accumulate=2"]
    said = done("train", world / "run.yaml", *changes, "--dry-run").out
    assert list(tmp_path.iterdir()) == []
    assert sorted(world.rglob("*")) == before
    session = training.build(recipe.decode(config.read(world / "run.yaml"), ""))
    for role, network in session.method.networks.items():
        count = sum(p.numel() for p in network.parameters())
        learning = sum(p.numel() for p in session.engine.parameters.get(role, {}).values())
        assert re.search(rf"^ *{role} +{count:,} +{learning:,} +[\d.]+ MiB *$", said, re.M), said
    assert "latents (2, 4, 8, 8), 4 samples an update, images (16, 16)" in said
    assert "attention eager, fp32, cpu" in said
    assert re.search(r"critic/denoising [\d.]+ .*student/dmd [\d.]+", said)
    assert re.search(r"memory: gradients [\d.]+ MiB, optimizer [\d.]+ MiB; peak of the process [\d,.]+ MiB", said)
    assert re.search(r"expected time: [\d.]+ s a step, 10000 steps: \d+ (min|h) \d+ (s|min)", said)


# Pictures


def test_generate_draws_by_prompt_and_seed(run: Path, tmp_path: Path) -> None:
    words = ["generate", run / "pipeline", "--prompt", "a dog", "-p", "a cat", "-n", "2", "--seed", "5"]
    said = done(*words, "--out", tmp_path / "one").out
    names = ["0000_00.png", "0000_01.png", "0001_00.png", "0001_01.png"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    assert said.splitlines() == [f"{tmp_path / 'one' / n}  {'a dog' if n[3] == '0' else 'a cat'}" for n in names]
    done("generate", run / "pipeline", "--prompt", "a cat", "--seed", 5, "-o", tmp_path / "two", "--steps", "1")
    assert (tmp_path / "two" / "0000_00.png").read_bytes() == (tmp_path / "one" / "0001_00.png").read_bytes()
    pixels = {(tmp_path / "one" / n).read_bytes() for n in names}
    assert len(pixels) == 4


def test_generate_takes_any_pipeline(world: Path, tmp_path: Path) -> None:
    words = ["generate", world / "teacher", "-p", "a dog", "--steps", "3"]
    done(*words, "--guidance-scale", "3", "-o", tmp_path / "a")
    done(*words, "--guidance-scale", "1", "-o", tmp_path / "b")
    done(*words, "--guidance-scale", "3", "--dtype", "bf16", "-o", tmp_path / "c")
    assert len({(tmp_path / name / "0000_00.png").read_bytes() for name in "abc"}) == 3


# Judgement


@pytest.fixture(scope="module")
def judged(run: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run with an eval: section, evaluated by ``fastgen evaluate RUN``."""
    folder = tmp_path_factory.mktemp("judged")
    section = {
        "metrics": ["fid", "clip_score", "latency"],
        "features": "clip",
        "weights": {"clip": str(command.clip(folder / "clip"))},
        "reference": {"source": "images", "path": str(world / "images")},
        "num_images": 6,
        "batch_size": 3,
        "repeats": 1,
        "comparison": 2,
        "teacher_steps": [2, 1],
        "every": 2,
        "num_images_training": 4,
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump({"eval": section}))
    out = folder / "run"
    (folder / "run.yaml").write_text(f"base: [{world / 'run.yaml'}, eval.yaml]\n")
    done("train", folder / "run.yaml", f"run.out={out}")
    return out, done("evaluate", out)


def test_quick_evaluations_are_in_the_run_s_rows(judged: tuple[Path, Result], run: Path) -> None:
    found = rows(judged[0])
    assert [row["step"] for row in found if "fid" in row] == [2, 4]
    assert all({"fid", "clip_score"} <= set(row) for row in found if "fid" in row)
    assert same(weights(judged[0]), weights(run)), "evaluation must not disturb the training"


def test_evaluate_judges_a_run_beside_its_teacher(judged: tuple[Path, Result]) -> None:
    out, result = judged
    results = json.loads((out / "results.json").read_text())
    assert [(row["name"], row["role"], row["steps"]) for row in results] == [
        ("real images", "data", None),
        ("teacher, 2 steps", "teacher", 2),
        ("teacher, 1 step", "teacher", 1),
        ("dmd2, 1 step", "student", 1),
    ]
    values = {"fid", "clip_score", "retrieval", "seconds_per_image"}
    assert all({"name", "role", "steps", "guidance_scale", "protocol", *values} <= set(row) for row in results)
    student = results[-1]
    assert all(student[name] is not None for name in values)
    assert student["guidance_scale"] == 1.0
    assert student["protocol"]["num_images"] == 6
    report = (out / "report.html").read_text()
    assert "dmd2, 1 step" in report
    assert not re.search(r"""(src|href)=["']https?:""", report), "one self-contained file"
    assert "dmd2, 1 step" in result.out
    assert result.out.splitlines()[-1] == str(out / "report.html")
    assert not (out / "evaluation.json").exists(), "it is whole"


def test_evaluate_judges_a_pipeline_by_a_config(judged: tuple[Path, Result], world: Path, tmp_path: Path) -> None:
    """A student with its teacher beside it, then a teacher alone; overrides are of the eval: section."""
    section = judged[0].parent / "eval.yaml"
    words = ["--config", section, "num_images=2", "metrics=[clip_score]", "teacher_steps=[1]"]
    done("evaluate", judged[0] / "pipeline", *words, "--teacher", world / "teacher", "--out", tmp_path / "both")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert [row["role"] for row in results] == ["data", "teacher", "student"]
    done("evaluate", world / "teacher", *words, "--out", tmp_path / "alone")
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert [(row["role"], row["protocol"]["num_images"]) for row in results] == [("data", 2), ("teacher", 2)]
    assert not (world / "teacher" / "results.json").exists()


def test_evaluate_names_metrics_and_reference_and_judges_several(
    judged: tuple[Path, Result], world: Path, tmp_path: Path
) -> None:
    """Two pipelines of one method are named by their folders; no config is needed."""
    student = shutil.copytree(judged[0] / "pipeline", tmp_path / "again")
    clip = f"weights={{clip: {judged[0].parent / 'clip'}}}"
    words = ["--metrics", "clip_score,fid", "--reference", world / "images", clip, "features=clip", "num_images=2"]
    done("evaluate", judged[0] / "pipeline", student, *words, "--out", tmp_path / "both")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert [row["name"] for row in results] == ["real images", "pipeline, 1 step", "again, 1 step"]
    assert results[1]["fid"] == results[2]["fid"]
    one_line(fastgen("evaluate", student, judged[0], *words), "have no folder for results; give --out")


def test_statistics_stand_for_the_reference_s_images(judged: tuple[Path, Result], world: Path, tmp_path: Path) -> None:
    clip, folder = judged[0].parent / "clip", tmp_path / "out"
    file = tmp_path / "real.npz"
    said = done(
        "stats", world / "images", "-o", file, "--features", "clip", "--weights", f"clip={clip}", "--size", "16"
    )
    assert re.match(rf"{file} holds statistics of \d+ images by clip-\w+, sha256 of their pixels \w+\n", said.out)
    words = ["--config", judged[0].parent / "eval.yaml", "num_images=4", "metrics=[fid]", "--out", folder]
    number = int(said.out.split(" images")[0].split()[-1])
    done("evaluate", judged[0] / "pipeline", *words, "--reference", file)
    row = json.loads((folder / "results.json").read_text())[-1]
    assert row["protocol"]["metrics"]["fid"]["reference"]["num_images"] == number
    shutil.rmtree(folder)
    done("evaluate", judged[0] / "pipeline", *words, f"num_images={number}")
    again = json.loads((folder / "results.json").read_text())[-1]
    assert again["protocol"]["metrics"]["fid"]["reference"]["num_images"] == number
    one_line(fastgen("stats", file, "-o", tmp_path / "x.npz"), "holds statistics already; give a source of images")
    one_line(fastgen("stats", "nowhere", "-o", file), "nowhere: no reference; give a folder of images, an .npz")


def test_an_evaluation_that_was_cut_off_goes_on(
    judged: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", judged[0].parent / "eval.yaml", "metrics=[clip_score]", "num_images=2", "--out", tmp_path]
    pipeline = judged[0] / "pipeline"
    whole = runner._subject_row

    def cut(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_subject_row", cut)
        assert fastgen("evaluate", pipeline, *words).code == 130
    assert (tmp_path / "evaluation.json").is_file()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results] == ["real images"]
    monkeypatch.setattr(runner, "_real_row", None)
    done("evaluate", pipeline, *words)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert runner._subject_row is whole


def test_geneval_s_images_are_made_in_its_layout_and_none_twice(run: Path, tmp_path: Path) -> None:
    words = ["geneval", "images", run / "pipeline", "-o", tmp_path, "--per-tag", "1", "-n", "2"]
    assert "holds 12 images, 12 made now" in done(*words).out
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert files[:3] == ["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]
    assert len(files) == 12
    assert json.loads((tmp_path / "00005" / "metadata.jsonl").read_text())["tag"] == "color_attr"
    before = (tmp_path / files[3]).read_bytes()
    (tmp_path / files[3]).unlink()
    assert "holds 12 images, 1 made now" in done(*words).out
    assert (tmp_path / files[3]).read_bytes() == before
    assert "none made now" in done(*words).out


def test_report_compares_two_rows_image_by_image(judged: tuple[Path, Result]) -> None:
    out = judged[0]
    told = done("report", "compare", f"{out}:teacher, 2 steps", f"{out}:dmd2, 1 step").out
    assert "clip_score" in told or "CLIP score" in told
    listed = json.loads(done("report", "compare", "teacher, 1 step", "dmd2, 1 step", "--out", out, "--json").out)
    assert {row["value"] for row in listed} >= {"clip_score", "retrieval"}
    one_line(fastgen("report", "compare", f"{out}:none", f"{out}:dmd2, 1 step"), "none")


def test_report_writes_the_html_anew(judged: tuple[Path, Result]) -> None:
    out = judged[0]
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    done("report", "page", out)
    assert len((out / "report.html").read_text()) == len(before)


# Export


def test_export_writes_a_checkpoint_s_student(run: Path, tmp_path: Path) -> None:
    said = done("export", run, "--out", tmp_path / "newest").out
    assert said == f"{tmp_path / 'newest'} written from checkpoint-4\n"
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert same(load_file(tmp_path / "newest" / unet), load_unet(run))
    words = ["--checkpoint", run / "checkpoint-2", "--out", tmp_path / "older", "--save-dtype", "fp16"]
    done("export", run, *words)
    older = load_file(tmp_path / "older" / unet)
    assert {p.dtype for p in older.values()} == {torch.float16}
    kept = load_file(run / "checkpoint-2" / "student.ema.safetensors")
    assert all(torch.equal(older[name], value.half()) for name, value in kept.items())


def test_export_writes_into_the_run_by_default(copy: Path) -> None:
    shutil.rmtree(copy / "pipeline")
    done("export", copy)
    assert (copy / "pipeline" / "model_index.json").is_file()


# Lists


def test_list_names_all_kinds_for_people_and_machines() -> None:
    listed = json.loads(done("list", "--json").out)
    assert {row["kind"] for row in listed} == {"method", "family", "metric", "source", "config"}
    said = {"kind", "name", "summary"}
    more = {
        "method": {"paper", "arxiv", "needs", "steps"},
        "family": {"pipelines", "kinds", "schedulers", "lora"},
        "metric": {"title", "needs", "values", "better", "resampled", "share"},
    }
    for row in listed:
        assert set(row) == said | more.get(row["kind"], set())
        assert row["summary"]
    shown = done("list").out
    for row in listed:
        assert f" {row['name']} " in shown
        assert row["summary"][:40] in shown


@pytest.mark.parametrize(
    ("plural", "kind"),
    [("methods", "method"), ("families", "family"), ("metrics", "metric"), ("sources", "source")],
)
def test_list_names_one_kind(plural: str, kind: str) -> None:
    listed = json.loads(done("list", plural, "--json").out)
    assert [row["name"] for row in listed] == registry.names(kind)
    assert {row["kind"] for row in listed} == {kind}


def test_the_table_of_families_in_the_readme_is_what_is_listed(tmp_path: Path) -> None:
    readme = Path(__file__).parents[2] / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    done("list", "families", "--into", copy)
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8"), (
        "fastgen list families --into README.md"
    )
    for row in json.loads(done("list", "families", "--json").out):
        assert all(f"`{name}`" in copy.read_text(encoding="utf-8") for name in row["pipelines"])


def test_only_the_families_have_a_table_in_a_document(tmp_path: Path) -> None:
    result = fastgen("list", "methods", "--into", tmp_path / "README.md")
    assert result.code == 2
    assert "--into writes the table of families, not of methods; give: list families --into" in result.err


def test_a_listed_config_may_be_given_by_its_name() -> None:
    names = [row["name"] for row in json.loads(done("list", "configs", "--json").out)]
    assert {"emoji/demo", "emoji/dmd2", "emoji/teacher"} <= set(names)
    for name in names:
        for given in (name, f"configs/{name}.yaml", f"{name}.yaml"):
            assert cli.find_config(Path(given)).is_file()
    assert cli.find_config(Path("emoji/nothing")) == Path("emoji/nothing")


def test_doctor_finds_lpips_s_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastgen import doctor, lpips

    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))

    def said() -> tuple[bool, str]:
        return next((row["ok"], row["found"]) for row in doctor.findings() if row["what"] == "LPIPS's weights")

    assert said() == (False, f"{tmp_path / lpips.FILE} is missing; `python -m fastgen.lpips` writes it")
    (tmp_path / lpips.FILE).touch()
    assert said() == (True, str(tmp_path / lpips.FILE))


def test_doctor_says_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(done("doctor", "--json").out)
    assert {"python", "torch", "diffusers", "xformers", "cores", "emoji sprites"} <= {row["what"] for row in found}
    assert all(set(row) == {"what", "found", "ok", "needed"} for row in found)
    shown = done("doctor").out.splitlines()
    assert len(shown) == len(found)
    assert all(line.startswith(("ok ", "-- ")) for line in shown)
    from fastgen import doctor

    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    result = fastgen("doctor")
    assert result.code == 1
    assert re.search(r"^-- no-such-package +missing; pip install no-such-package$", result.out, re.M)


# Help


def commands() -> Iterator[tuple[str, Any]]:
    import typer

    group = typer.main.get_command(cli.app)
    yield "", group
    yield from group.commands.items()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "found"), list(commands()))
def test_help_is_complete(name: str, found: Any) -> None:
    """Every command says what it does, every argument and option what it means."""
    assert found.help
    silent = [p.name for p in found.params if not getattr(p, "help", None) and p.name != "help"]
    assert silent == []
    shown = done(*name.split(), "--help").out
    for parameter in found.params:
        option = max(parameter.opts, key=len)
        assert option in shown or (parameter.metavar or option.upper()) in shown
    assert "--help" in shown


def test_all_commands_are_there() -> None:
    assert {"train", "pairs", "generate", "evaluate", "export", "list", "doctor"} <= {name for name, _ in commands()}
    assert fastgen().code == 2 or "Usage" in fastgen().out


def test_help_is_there_at_once() -> None:
    """Nothing that takes seconds to import is imported for it."""
    code = (
        "import sys; from fastgen import cli; sys.argv = ['fastgen', 'train', '--help']\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (child.returncode, child.stderr) == (0, "[]\n")
    assert "--dry-run" in child.stdout


# Several processes


def test_two_processes_under_accelerate_equal_one_with_the_same_batch(world: Path, run: Path, tmp_path: Path) -> None:
    """And only the main one writes and speaks."""
    out = tmp_path / "two"
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words = ["-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no", "--main_process_port", "0"]
    changes = [f"run.out={out}", "run.batch_size=1", "run.sample_every=0"]
    child = subprocess.run(
        [sys.executable, *words, "-m", "fastgen", "train", str(world / "run.yaml"), *changes],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert checkpoint.read_state(out / "checkpoint-4")["samples_per_step"] == 2
    assert largest_difference(out, run) < 1e-5
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    for one, two in zip(rows(out), rows(run), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    assert child.stdout.count("holds the result") == 1
    assert child.stderr.count("dmd2 on cpu") == 1
    assert child.stderr.count("exported") == 1
    assert (out / "train.log").read_text().count("dmd2 on cpu") == 1
    assert not list(out.glob(".*"))


# Errors


def edited(world: Path, folder: Path, **sections: Any) -> Path:
    """The recipe with sections replaced or, given None, left out."""
    tree = yaml.safe_load((world / "run.yaml").read_text())
    tree["run"]["out"] = str(folder / "out")
    tree |= sections
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in tree.items() if value is not None}))
    return path


def text(folder: Path, words: str) -> Path:
    path = folder / "edited.yaml"
    path.write_text(words)
    return path


def broken(world: Path, folder: Path, harm: Callable[[Path], object]) -> str:
    """An override that names a damaged copy of the teacher."""
    pipeline = folder / "broken"
    shutil.copytree(world / "teacher", pipeline)
    harm(pipeline)
    return f"model.path={pipeline}"


def another_class(pipeline: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))


def unreadable(world: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(world / "images", folder / "images")
    for file in (folder / "images").glob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    return {"source": "images", "path": str(folder / "images")}


def empty_file(folder: Path) -> dict[str, str]:
    (folder / "empty.txt").write_text("\n  \n")
    return {"source": "prompts", "path": str(folder / "empty.txt")}


UNET = "unet/diffusion_pytorch_model.safetensors"
GAN = {"name": "dmd2", "adversarial": {"weight": 0.1}}
BLOCK_UP = {"adversarial": {"blocks": ["up"]}}
LR = {"lr": 1e-3}

# name -> (world, empty folder) -> arguments after "train", and what the line must say
BAD: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "no config": (lambda w, f: [f / "none.yaml"], r"none.yaml: no such config file; `fastgen list configs` shows"),
    "config is a folder": (lambda w, f: [f], r": cannot be read: .*Is a directory"),
    "not YAML": (lambda w, f: [text(f, "a: [1\nb: 2")], r"edited.yaml: line 2 is not valid YAML"),
    "not a mapping": (lambda w, f: [text(f, "- a")], r"edited.yaml: must be a mapping of sections, got list"),
    "no base": (lambda w, f: [text(f, "base: gone.yaml")], r"gone.yaml: no such config file"),
    "unknown section": (lambda w, f: [edited(w, f, modle={})], r"edited.yaml: unknown key 'modle'; .*'model'\?"),
    "unknown key": (lambda w, f: [w / "run.yaml", "run.stesp=3"], r"unknown key 'run.stesp'; did you mean 'steps'\?"),
    "wrong type": (lambda w, f: [w / "run.yaml", "run.steps=many"], r"run.steps must be a whole number, got 'many'"),
    "out of range": (lambda w, f: [w / "run.yaml", "run.ema=1.5"], r"run.ema must be below 1, got 1.5"),
    "missing section": (lambda w, f: [edited(w, f, optim=None)], r"edited.yaml: optim is missing"),
    "not an override": (lambda w, f: [w / "run.yaml", "steps"], r"override 'steps' is not of the form key.key=value"),
    "method": (
        lambda w, f: [edited(w, f, method={"name": "dmd22"})],
        r"unknown method 'dmd22'; did you mean 'dmd2'\?",
    ),
    "family": (lambda w, f: [w / "run.yaml", "model.family=sdx"], r"unknown family 'sdx'"),
    "source": (lambda w, f: [edited(w, f, data={"source": "image"})], r"unknown source 'image'; .*'images'\?"),
    "metric": (
        lambda w, f: [edited(w, f, eval={"metrics": ["fidd"], "reference": {"source": "emoji"}, "every": 1})],
        r"edited.yaml: eval.metrics: unknown metric 'fidd'; did you mean 'fid'\?",
    ),
    "eval": (lambda w, f: [w / "run.yaml", "eval.num_imges=3"], r"unknown key 'eval.num_imges'; .*'num_images'\?"),
    "block": (
        lambda w, f: [edited(w, f, method=merge(GAN, BLOCK_UP), data=folder_of_images(w))],
        r"adversarial.blocks: no block 'up'; this family has down_blocks.0, down_blocks.1, mid_block",
    ),
    "times": (lambda w, f: [w / "run.yaml", "method.t_low=0.99"], r"t_low 0.99 must be below t_high 0.98"),
    "role missing": (
        lambda w, f: [edited(w, f, optim={"student": LR})],
        r"edited.yaml: no optimizer for 'fake_score'; add optim.fake_score",
    ),
    "role extra": (
        lambda w, f: [edited(w, f, optim={"student": LR, "fake_score": LR, "teacher": LR})],
        r"edited.yaml: optim.teacher is given, but this method trains only fake_score, student",
    ),
    "images needed": (
        lambda w, f: [edited(w, f, method=GAN)],
        r"this method needs images and the data source has prompts only; use data.source: images",
    ),
    "no prompt file": (lambda w, f: [w / "run.yaml", f"data.path={f}/no.txt"], r"no.txt: no such prompt file"),
    "empty prompt file": (lambda w, f: [edited(w, f, data=empty_file(f))], r"empty.txt: holds no prompt; write one"),
    "no image folder": (
        lambda w, f: [edited(w, f, data={"source": "images", "path": str(f / "no")})],
        r"no: no such image folder",
    ),
    "no pipeline": (lambda w, f: [w / "run.yaml", f"model.path={f}/none"], r"none: no such pipeline folder"),
    "no relative pipeline": (lambda w, f: [w / "run.yaml", "model.path=a/b/c"], r"a/b/c: no such pipeline folder"),
    "no component": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: shutil.rmtree(p / "vae"))],
        r"broken: the pipeline lacks its component 'vae'; save or download it again",
    ),
    "corrupt weights": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: (p / UNET).write_bytes(b"x" * 99))],
        r"broken/unet/diffusion_pytorch_model.safetensors: damaged weights \(.+\); save or download",
    ),
    "cut weights": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: os.truncate(p / UNET, 5000))],
        r"broken/unet/diffusion_pytorch_model.safetensors: damaged weights \(.+\); save or download",
    ),
    "other weights": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: save_file({"a": torch.zeros(1)}, p / UNET))],
        r"broken: cannot be opened as a pipeline \(.+\)",
    ),
    "corrupt config": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: (p / "unet/config.json").write_text("{"))],
        r"broken/unet/config.json: not the settings of a component \(.+\); save or download the pipeline again",
    ),
    "no weights": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: (p / UNET).unlink())],
        r"broken: cannot be opened as a pipeline \(.+\)",
    ),
    "corrupt index": (
        lambda w, f: [w / "run.yaml", broken(w, f, lambda p: (p / "model_index.json").write_text("{"))],
        r"broken/model_index.json: not valid JSON; save the pipeline again",
    ),
    "another family": (
        lambda w, f: [w / "run.yaml", broken(w, f, another_class)],
        r"broken: is a StableDiffusionXLPipeline, this family takes a StableDiffusionPipeline; change model.family or",
    ),
    "attention": (
        lambda w, f: [w / "run.yaml", "model.attention=xformers"],
        r"'xformers' does not work here \(.+auto",
    ),
    "no checkpoint": (
        lambda w, f: [w / "run.yaml", "--resume", f / "checkpoint-9"],
        r"checkpoint-9: no such checkpoint; leave out --resume to start anew, or name another",
    ),
}


def folder_of_images(world: Path) -> dict[str, Any]:
    return {"source": "images", "path": str(world / "images")}


def one_line(result: Result, message: str, code: int = 2) -> None:
    """The error is said in one line on stderr, and only there."""
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"fastgen: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 1000


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_train_is_one_line_and_writes_nothing(world: Path, tmp_path: Path, name: str) -> None:
    arguments, message = BAD[name]
    (tmp_path / "in").mkdir()
    words = arguments(world, tmp_path / "in")
    one_line(fastgen("train", *words, f"run.out={tmp_path / 'out'}"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no config", "unknown key", "corrupt weights", "metric", "role missing"])
def test_a_dry_run_finds_the_same(world: Path, tmp_path: Path, name: str) -> None:
    arguments, message = BAD[name]
    one_line(fastgen("train", *arguments(world, tmp_path), "--dry-run"), message)


def test_with_debug_the_traceback_is_there(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        fastgen("--debug", "train", tmp_path / "none.yaml")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def garbled(path: Path) -> None:
    """The same size, other bytes."""
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: cut(c / "student.safetensors"), "checkpoint-4: damaged checkpoint, student.safetensors is inc"),
        (lambda c: (c / "student.ema.safetensors").unlink(), "checkpoint-4: damaged checkpoint, student.ema.safet"),
        (
            lambda c: garbled(c / "fake_score.optim.safetensors"),
            "fake_score.optim.safetensors is not as it was written; checkpoint-2 before it is whole",
        ),
        (
            lambda c: (c / "state.json").write_text("{"),
            r"checkpoint-4: damaged checkpoint \(.+\); checkpoint-2 before",
        ),
        (lambda c: (c / "state.json").unlink(), r"checkpoint-4: damaged checkpoint \(.+\); checkpoint-2 before"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_an_older_one_goes_on(
    world: Path, run: Path, copy: Path, harm: Callable[[Path], object], message: str
) -> None:
    harm(copy / "checkpoint-4")
    before = (copy / "metrics.jsonl").read_bytes()
    one_line(train(world, copy), message)
    one_line(fastgen("export", copy), message)
    assert (copy / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(copy / "checkpoint-4")
    trained(world, copy)
    equal_runs(copy, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.seed=1", r"checkpoint-4: was made with seed 0, this run has 1; set it back"),
        ("run.batch_size=3", r"checkpoint-4: was made with samples_per_step 2, this run has 3; set it back"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(world: Path, copy: Path, change: str, message: str) -> None:
    one_line(train(world, copy, change), message)


def test_a_checkpoint_of_another_network_is_refused(world: Path, copy: Path, tmp_path: Path) -> None:
    wide = command.teacher(tmp_path / "wide", block_out_channels=(16, 48))
    result = train(world, copy, f"model.path={wide}", "run.steps=8")
    one_line(result, r"checkpoint-4/\S+: '\S+' is \(.*\), the network has \(")


def test_an_unreadable_image_is_named_when_it_comes_up(world: Path, tmp_path: Path) -> None:
    source = edited(world, tmp_path, data=unreadable(world, tmp_path), method=GAN, optim={"student": LR})
    optim = f"optim={json.dumps({'student': LR, 'fake_score': LR, 'discriminator': LR})}"
    result = fastgen("train", source, optim)
    assert result.code == 2
    assert re.search(r"^fastgen: \S+\d.png: not a readable image \(.+\); remove or replace it; .+$", result.err, re.M)
    assert "Traceback" not in result.err


def too_large(pieces: Mapping[str, Piece], path: Path) -> None:
    """What is met where no more can be written: a limit stands for the end of the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        stream.save_file(pieces, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_space(*args: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("writer", [no_space, too_large])
def test_a_full_disk_is_one_line_and_what_was_written_before_goes_on(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[..., None]
) -> None:
    writes, whole = itertools.count(), checkpoint.save_file
    full = lambda *args, **named: (whole if next(writes) < 6 else writer)(*args, **named)  # noqa: E731
    monkeypatch.setattr(checkpoint, "save_file", full)
    out = tmp_path / "run"
    result = train(world, out)
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if line.startswith("fastgen: ")]
    assert len(lines) == 1
    assert re.search(
        rf"^fastgen: {out}/checkpoint-4: cannot be written \(.*(No space left|File too large).*\)", lines[0]
    )
    assert "make room" in lines[0]
    assert "Traceback" not in result.err
    assert [p.name for p in checkpoint.all_checkpoints(out)] == ["checkpoint-2"]
    checkpoint.read_state(out / "checkpoint-2")
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    trained(world, out)
    equal_runs(out, run)


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_phase(world: Path, tmp_path: Path) -> None:
    result = train(world, tmp_path / "run", "optim.student.lr=1e30", "run.ema=0", "optim.student.clip=0")
    assert result.code == 1
    line = result.err.splitlines()[-1]
    assert re.search(r"^fastgen: not finite at step \d, phase 'critic': .*the optimizer has not moved", line)


OTHER: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "generate, no pipeline": (lambda r, f: ["generate", f / "none", "-p", "x"], r"none: no such pipeline folder"),
    "generate, a run folder": (
        lambda r, f: ["generate", r, "-p", "x"],
        r"run: is a run folder; its pipeline is \S+pipeline",
    ),
    "generate, too many steps": (
        lambda r, f: ["generate", r / "pipeline", "-p", "x", "--steps", "3", "-o", f],
        r"pipeline: is a student of 1 step; leave out --steps 3",
    ),
    "evaluate, nothing there": (
        lambda r, f: ["evaluate", f],
        r"neither a run folder \(config.yaml\) nor a pipeline folder \(model_index.json\)",
    ),
    "evaluate, into the package": (
        lambda r, f: ["evaluate", "assets:emoji/teacher", "--config", "emoji/eval"],
        r"those in the package, have no folder for results; give --out",
    ),
    "evaluate, a pipeline alone": (
        lambda r, f: ["evaluate", r / "pipeline"],
        r"a pipeline by itself says nothing of metrics; give --config .* or --metrics and --reference",
    ),
    "evaluate, no eval section": (lambda r, f: ["evaluate", r], r"eval.reference is missing; name a data source"),
    "evaluate, unknown key": (
        lambda r, f: ["evaluate", r, "num_imges=3"],
        r"config.yaml: unknown key 'eval.num_imges'; did you mean 'num_images'\?",
    ),
    "evaluate, no such config": (
        lambda r, f: ["evaluate", r, "--config", f / "none.yaml"],
        r"none.yaml: no such config file",
    ),
    "evaluate, no such teacher": (
        lambda r, f: ["evaluate", r, "--teacher", f / "none", "reference={source: emoji}"],
        r"none: no such pipeline folder",
    ),
    "evaluate, no such clip": (
        lambda r, f: [
            "evaluate",
            r,
            *by_images(r),
            "metrics=[clip_score]",
            f"weights={{clip: {f / 'none'}}}",
            f"--out={f}",
        ],
        r"clip_score needs a CLIP; .*none: no such folder; weights of clip come from https://",
    ),
    "evaluate, unknown weights": (
        lambda r, f: ["evaluate", r, *by_images(r), "weights={clpi: x}"],
        r"eval.weights: unknown weights 'clpi'; did you mean 'clip'\?",
    ),
    "evaluate, no reference": (
        lambda r, f: ["evaluate", r, "--reference", "emojis"],
        r"emojis: no reference; give a folder of images, an .npz, the name of a data source \(",
    ),
    "evaluate, a cache": (
        lambda r, f: ["evaluate", r, f"reference={{source: cached, path: {f}, of: {{source: emoji}}}}"],
        r"eval.reference: a cache has latents and no pictures; name the source that it was made of",
    ),
    "evaluate, nothing at all": (lambda r, f: ["evaluate", "num_images=3"], r"nothing to judge; name a run folder"),
    "evaluate, prompts only": (
        lambda r, f: ["evaluate", r, *by_images(r), *by_prompts(r), "metrics=[fid]"],
        r"fid needs real images; set eval.reference to a source that has them",
    ),
    "geneval judge, nothing there": (lambda r, f: ["geneval", "judge", f], r"no images of GenEval's layout"),
    "geneval images, no such prompts": (
        lambda r, f: ["geneval", "images", r / "pipeline", "-o", f, "--prompts", f / "none.jsonl"],
        r"none.jsonl",
    ),
    "geneval convert, nothing there": (
        lambda r, f: ["geneval", "convert", f / "none.pth", f / "out"],
        r"none.pth",
    ),
    "export, nothing there": (lambda r, f: ["export", f], r"not a run folder \(no config.yaml\)"),
    "export, no such checkpoint": (
        lambda r, f: ["export", r, "--checkpoint", f / "checkpoint-1"],
        r"checkpoint-1: no such checkpoint",
    ),
    "report, nothing there": (lambda r, f: ["report", "page", f], r"holds neither results.json nor metrics.jsonl"),
}


def by_images(run: Path) -> list[str]:
    return [f"reference={{source: images, path: {run.parent / 'images'}}}", "num_images=2"]


def by_prompts(run: Path) -> list[str]:
    return ["reference.source=prompts", f"reference.path={run.parent / 'prompts.txt'}"]


@pytest.mark.parametrize("name", OTHER)
def test_bad_input_to_the_other_commands_is_one_line(run: Path, tmp_path: Path, name: str) -> None:
    arguments, message = OTHER[name]
    one_line(fastgen(*arguments(run, tmp_path)), message)


def test_a_run_without_a_checkpoint_or_a_pipeline_says_so(copy: Path) -> None:
    for found in checkpoint.all_checkpoints(copy):
        shutil.rmtree(found)
    shutil.rmtree(copy / "pipeline")
    one_line(fastgen("export", copy), "copy: holds no checkpoint yet")
    one_line(fastgen("evaluate", copy, *by_images(copy)), "copy/pipeline: no such pipeline folder")


def test_what_is_no_mistake_of_the_user_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(kind: str) -> list[str]:
        raise KeyError("a bug")

    monkeypatch.setattr(registry, "names", bug)
    one_line(fastgen("list"), r"^fastgen: KeyError: 'a bug'; `fastgen --debug ...` shows where$", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], r"missing argument 'config'; `\S.* train -h` shows what there is$"),
        (["train", "run.yaml", "--resum", "never"], r"no such option: --resum .*--resume.*; `\S.* train -h` shows"),
        (["train", "run.yaml", "--resume"], r"option '--resume' requires an argument; `"),
        (["--verbose", "list"], r"no such option: --verbose; `\S+ -h` shows"),
        (["list", "methodz"], r"invalid value for .*'methodz' is not one of .*'methods'"),
        (["generate", "p", "-p", "x", "--steps", "0"], r"invalid value for '--steps': .*1"),
        (["list", "methods", "me"], r"unexpected extra argument"),
        (["tran"], r"no such command 'tran'"),
    ],
)
def test_a_misspelt_command_line_is_one_line_too(arguments: list[str], message: str) -> None:
    one_line(fastgen(*arguments), message)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "-h"]])
def test_help_comes_as_it_is(arguments: list[str]) -> None:
    result = fastgen(*arguments)
    assert result.code == (0 if arguments else 2)
    assert "Usage: " in result.out
    assert len((result.out + result.err).splitlines()) > 5
    assert "fastgen: " not in result.err


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(kind: str) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "names", stop)
    result = fastgen("list")
    one_line(result, r"^fastgen: ended by SIGINT; what was written before is whole$", 130)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("then", ["goes on", "fails"])
def test_a_signal_ends_a_command_in_one_line(number: int, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library keeps it to itself, as some do that are being imported, and then fails."""

    def stop(kind: str) -> list[str]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:
            if then == "goes on":
                raise
        raise RecursionError

    monkeypatch.setattr(registry, "names", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        result = fastgen("list")
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    finally:
        signal.signal(signal.SIGINT, before)
    name = signal.Signals(number).name
    one_line(result, rf"^fastgen: ended by {name}; what was written before is whole$", 128 + number)


def test_an_image_that_a_signal_cuts_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Any, file: Path, *_: Any) -> None:
        file.write_bytes(b"half")
        raise Interrupted

    write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "whole.png")
    monkeypatch.setattr(Image.Image, "save", cut)
    for name in ("whole.png", "new.png"):
        with pytest.raises(Interrupted):
            write_png(torch.ones(3, 4, 4, dtype=torch.uint8), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["whole.png"]
    assert not read_png(tmp_path / "whole.png").any()


def test_a_real_process_says_one_line_too_and_all_of_it_with_debug(world: Path, tmp_path: Path) -> None:
    """Neither the libraries' bars nor their notices come in between."""
    bad = broken(world, tmp_path, lambda p: save_file({"a": torch.zeros(1)}, p / UNET))
    result = real("train", world / "run.yaml", bad, f"run.out={tmp_path / 'out'}")
    one_line(result, r"broken: cannot be opened as a pipeline \(.+\)")
    one_line(real("train", tmp_path / "none.yaml"), r"none.yaml: no such config file")
    result = real("--debug", "train", tmp_path / "none.yaml")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last)")
    assert "ConfigError: " in result.err


def real(*arguments: object) -> Result:
    """``python -m fastgen ARGUMENTS`` in a process of its own."""
    words = [sys.executable, "-m", "fastgen", *map(str, arguments)]
    child = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    return Result(child.returncode, child.stdout, child.stderr)
