"""``fastgen pairs`` and the runs on what it made, called as a user calls them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, TCDScheduler
from safetensors.torch import load_file
from torch import nn

from fastgen import recipe, registry
from fastgen.experts import members
from fastgen.recipe import Model
from fastgen.train import load_teacher, started_from
from tests import command
from tests.command import Result, done, fastgen

OPTIONS: dict[str, Any] = {"number": 10, "num_steps": 4, "guidance_scale": 2.0, "path": [499], "shard_size": 4}
UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"


def one_line(result: Result, message: str) -> None:
    """The error is said in one line on stderr, and only there."""
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"fastgen: [^\n]+\n", result.err), result.err
    assert re.search(message, result.err), result.err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """command.world, with pairs.yaml, its pairs, and kd.yaml, which trains two steps on them."""
    folder = command.world(tmp_path_factory.mktemp("world"))
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    maker = {"model": tree["model"], "data": tree["data"], "pairs": {"out": str(folder / "pairs"), **OPTIONS}}
    (folder / "pairs.yaml").write_text(yaml.safe_dump(maker))
    tree |= {"method": {"name": "kd"}, "student": {"steps": 2}}
    tree["data"] = {"source": "pairs", "path": str(folder / "pairs")}
    tree["optim"].pop("fake_score")
    tree["run"] |= {"out": str(folder / "kd"), "steps": 3}
    (folder / "kd.yaml").write_text(yaml.safe_dump(tree))
    result = done("pairs", folder / "pairs.yaml")
    assert result.out == f"{folder / 'pairs'} holds 10 pairs, 10 made now\n"
    return folder


@pytest.fixture(scope="module")
def kd(world: Path) -> Path:
    done("train", world / "kd.yaml")
    return world / "kd"


def test_a_folder_of_pairs_holds_what_was_promised(world: Path) -> None:
    names = sorted(p.name for p in (world / "pairs").iterdir())
    assert names == ["card.json", *(f"shard-{k:05d}.safetensors" for k in range(3))]
    card = json.loads((world / "pairs" / "card.json").read_text())
    assert (card["teacher_path"], card["latent_shape"]) == (str(world / "teacher"), [4, 8, 8])


def test_given_again_it_makes_none_and_with_a_shard_gone_that_shard(world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world / "pairs", tmp_path / "pairs")
    again = lambda: done("pairs", world / "pairs.yaml", f"pairs.out={copy}").out  # noqa: E731
    assert again() == f"{copy} holds 10 pairs, none made now\n"
    (copy / "shard-00001.safetensors").unlink()
    assert again() == f"{copy} holds 10 pairs, 4 made now\n"
    for file in (world / "pairs").iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()


def test_a_student_of_two_steps_leaves_as_a_stock_pipeline_on_ddim(kd: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(kd / "pipeline")
    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.scheduler) is TCDScheduler
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a dog", num_inference_steps=2).images[0].size == (16, 16)
    rows = [json.loads(line) for line in (kd / "metrics.jsonl").read_text().splitlines()]
    assert all(row["student/regression"] > 0 for row in rows)


METHODS = [name for name in registry.names("method") if name != "pretrain"]  # which makes no student


@pytest.mark.parametrize("name", METHODS)
def test_any_other_method_starts_from_the_run_s_pipeline(name: str, kd: Path, world: Path) -> None:
    """Its student is the regression's, while teacher and fake score are still the teacher."""
    device = torch.device("cpu")
    family, module = load_teacher(Model(str(world / "teacher")), "fp32", device)
    started = started_from(family, module, str(kd / "pipeline"), device)
    module_of_method = registry.find("method", name)
    steps = module_of_method.ABOUT.steps or [1]
    method = module_of_method.Method(module_of_method.Config(), started, min(steps))
    learnt = module.load(kd / "pipeline", device).denoiser
    x_t, t = torch.randn(2, *family.latent_shape), torch.tensor([999.0, 499.0])

    def output(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return learnt.with_network(network)(x_t, t, family.encode_prompts(["a dog", "a cat"])).y

    wanted, teacher = output(learnt.network), output(family.denoiser.network)
    assert (wanted - teacher).abs().max() > 1e-3
    for network in members(method.networks[method.exported]):
        torch.testing.assert_close(output(network), wanted, rtol=1e-4, atol=1e-5)
    for role in method.networks.keys() & {"teacher", "fake_score"}:
        for network in members(method.networks[role]):
            torch.testing.assert_close(output(network), teacher, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dmd2", "dmd"])
def test_a_run_goes_on_from_it(method: str, kd: Path, world: Path, tmp_path: Path) -> None:
    """From the command line, with learning rates that move nothing: what comes out is what went in."""
    tree = yaml.safe_load((world / "run.yaml").read_text())
    scale = OPTIONS["guidance_scale"]
    tree |= {"method": {"name": method, "guidance_scale": scale}}
    tree |= {"student": {"steps": 1, "init": str(kd / "pipeline")}}
    if method == "dmd":
        tree["data"] = {"source": "pairs", "path": str(world / "pairs")}
    tree["optim"] = {role: {"lr": 1e-12, "weight_decay": 0.0} for role in tree["optim"]}
    tree["run"] |= {"out": str(tmp_path / "run"), "steps": 1, "ema": 0, "sample_every": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done("train", tmp_path / "run.yaml")
    one, two = load_file(kd / UNET), load_file(tmp_path / "run" / UNET)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-9


# What is refused


def changed(world: Path, folder: Path, **sections: Any) -> Path:
    """kd.yaml with sections replaced."""
    tree = yaml.safe_load((world / "kd.yaml").read_text()) | sections
    tree["run"]["out"] = str(folder / "out")
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": (
        {"data": {"source": "prompts", "path": "WORLD/prompts.txt"}},
        r"this method needs teacher pairs and the data source has none; make them by `fastgen pairs` and use data: {",
    ),
    "missing": (
        {"data": {"source": "pairs", "path": "WORLD/none", "made_by": "my.yaml"}},
        r"none: holds no teacher pairs; `fastgen pairs my.yaml pairs.out=\S+none` makes them",
    ),
    "path": (
        {"student": {"steps": 4}},
        r"needs the teacher's states at \[749.0, 499.0, 249.0\], kept are those at \[49",
    ),
    "teacher": (
        {"model": {"family": "sd", "path": "WORLD/other"}},
        r"pairs: pairs of another teacher \(\S+teacher\); set model.path to it, or make pairs with this one",
    ),
    "shape": (
        {"model": {"family": "sd", "path": "WORLD/large"}},
        r"pairs: latents of shape \(4, 8, 8\), this teacher's are \(4, 16, 16\)",
    ),
    "steps": (
        {"method": {"name": "dmd"}},
        r"dmd makes one-step students, not 2: set student.steps 1, or use method dmd2",
    ),
    "weight": (
        {"method": {"name": "dmd", "regression_weight": 0}},
        r"method.regression_weight must be above 0, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(world: Path, tmp_path: Path, name: str) -> None:
    if name == "teacher" and not (world / "other").exists():
        command.teacher(world / "other", seed=1)
    if name == "shape" and not (world / "large").exists():
        command.teacher(world / "large", sample_size=16)
    sections, message = BAD[name]
    sections = json.loads(json.dumps(sections).replace("WORLD", str(world)))
    one_line(fastgen("train", changed(world, tmp_path, **sections)), message)
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_ends_the_run_in_one_line_that_names_it(world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world / "pairs", tmp_path / "pairs"))
    for file in copy.glob("shard-*"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    config = changed(world, tmp_path, data={"source": "pairs", "path": str(copy)})
    result = fastgen("train", config)
    assert result.code == 2
    told = result.err.splitlines()[-1]
    assert re.search(
        r"^fastgen: \S+shard-0000\d.safetensors: damaged \(its digest differs\); delete it and give", told
    )


def test_bad_input_to_pairs_is_one_line(world: Path, tmp_path: Path) -> None:
    one_line(fastgen("pairs", world / "run.yaml"), r"run.yaml: pairs is missing")
    one_line(fastgen("pairs", tmp_path / "no.yaml"), r"no.yaml: no such config file")
    one_line(
        fastgen("pairs", world / "pairs.yaml", "pairs.seed=3"), r"holds other pairs \(seed 0, not 3\); set another"
    )
    one_line(fastgen("pairs", world / "pairs.yaml", "pairs.path=[333]"), r"4 DDIM steps do not meet \[333.0\]")
    one_line(fastgen("pairs", world / "pairs.yaml", f"model.path={tmp_path / 'no'}"), r"no: no such pipeline folder")


def test_pairs_serve_as_prompts(world: Path) -> None:
    """A method that needs no pairs trains on their prompts."""
    config = yaml.safe_load((world / "run.yaml").read_text())
    config["data"] = {"source": "pairs", "path": str(world / "pairs")}
    assert recipe.decode(config, "x").data.name == "pairs"
    (world / "prompts_of_pairs.yaml").write_text(yaml.safe_dump(config))
    result = done("train", world / "prompts_of_pairs.yaml", "--dry-run")
    assert "dmd" in result.out


def test_dmd_on_pairs_of_another_scale_is_refused_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((world / "run.yaml").read_text())
    tree |= {"method": {"name": "dmd"}, "data": {"source": "pairs", "path": str(world / "pairs")}}
    tree["run"]["out"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    result = fastgen("train", tmp_path / "run.yaml")
    one_line(result, r"pairs made at guidance scale 2, while .* by 8, .* set method\.guidance_scale=2, or make pairs")
    assert not (tmp_path / "run").exists()


def test_more_pairs_are_added_by_a_larger_number(world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world / "pairs", tmp_path / "pairs")
    result = done("pairs", world / "pairs.yaml", f"pairs.out={copy}", "pairs.number=13")
    assert result.out == f"{copy} holds 13 pairs, 5 made now\n"
    for k in (0, 1):
        name = f"shard-{k:05d}.safetensors"
        assert (copy / name).read_bytes() == (world / "pairs" / name).read_bytes()
