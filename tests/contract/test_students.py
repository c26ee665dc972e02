"""Several students with a router on disk: trained apart, joined, and routed by plain Diffusers as by us."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import best, config, export, join, lora, recipe, route
from fastgen import train as training
from fastgen.family import Family
from fastgen.pipelines import dit, sd, sdxl
from fastgen.pipelines import students as shipped
from fastgen.students import Students, fit, points_of
from tests import command, tiny
from tests.families import dit as tiny_dit
from tests.families import sdxl as tiny_sdxl

TOLERANCE = 1e-4
PROMPTS = ["a red apple", "a dog left of a cat", "a", "a cat left of a red dog"]
CARD = {"method": "dmd2", "num_inference_steps": 2, "guidance_scale": 1.0, "students": 3}
FAMILIES: dict[str, Callable[[], Family]] = {
    "sd": lambda: sd.wrap(tiny.pipeline("v_prediction")),
    "sdxl": lambda: sdxl.wrap(tiny_sdxl.pipeline(0)),
    "dit": lambda: dit.wrap(tiny_dit.pipeline(0)),
}


def prompts_of(name: str) -> list[str]:
    return ["goldfish", "500", "white shark", "999"] if name == "dit" else PROMPTS


def several(family: Family, prompts: list[str]) -> Students:
    """Three students that are neither their teacher nor each other, and a router that needs them all."""
    router = fit(points_of(family.encode_prompts(prompts)[family.routed_by]), 3)
    return Students([tiny.perturbed(family.student(), seed) for seed in range(3)], router, family.routed_by)


def ours(family: Family, network: nn.Module, prompts: list[str]) -> Tensor:
    """The trainer's sampler: latents."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        g = torch.Generator().manual_seed(3)
        return export.drawn(family, network, prompts, 2, "renoise", None, g)


def close(one: Tensor, two: Tensor) -> None:
    assert torch.isfinite(one).all()
    assert (one - two).abs().max() <= TOLERANCE * two.abs().max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Through the gate, by family."""
    base = tmp_path_factory.mktemp("students")
    for name, make in FAMILIES.items():
        family, prompts = make(), prompts_of(name)
        made = several(family, prompts)
        assert sorted({k for k, _ in made.rows(family.encode_prompts(prompts))}) == [0, 1, 2]
        export.export(family, made, 2, base / name, prompts=prompts, card=CARD)
    return {name: base / name for name in FAMILIES}


FRESH = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, call in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    images = pipeline(generator=g, output_type="latent", **call).images
    np.save(f"{folder}/latent.npy", images.numpy())
    pipeline.save_pretrained(f"{folder}/again")
    again = DiffusionPipeline.from_pretrained(f"{folder}/again", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    assert torch.equal(again(generator=g, output_type="latent", **call).images, images)
assert not [name for name in sys.modules if name.split(".")[0] == "fastgen"]
"""


def fresh(calls: dict[str, dict[str, Any]], cache: Path) -> None:
    """Call pipelines in a process that has never heard of fastgen; their latents are then in their folders."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(cache)}
    words = [sys.executable, "-I", "-c", FRESH, json.dumps(calls)]
    run = subprocess.run(words, cwd=cache, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_alone_routes_a_mixed_batch_as_we_do(name: str, exported: dict[str, Path], tmp_path: Path) -> None:
    family, prompts = FAMILIES[name](), prompts_of(name)
    fresh({str(exported[name]): {"prompt": prompts, "num_inference_steps": 2, **size(family)}}, tmp_path)
    latents = torch.from_numpy(np.load(exported[name] / "latent.npy"))
    network = several(family, prompts)
    close(latents, ours(family, network, prompts))
    for k in range(3):  # no one student makes them all
        assert (latents - ours(family, network[k], prompts)).abs().max() > 20 * TOLERANCE * latents.abs().max()


def size(family: Family) -> dict[str, int]:
    return dict(zip(("height", "width"), family.image_size, strict=True))


def test_all_is_stock_but_one_component_whose_code_is_beside_its_weights(exported: dict[str, Path]) -> None:
    for name, (part, kind) in {
        "sd": ("unet", "UNetStudents"),
        "sdxl": ("unet", "UNetStudents"),
        "dit": ("transformer", "DiTStudents"),
    }.items():
        folder = exported[name]
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] in vars({"sd": sd, "sdxl": sdxl, "dit": dit}[name])["ABOUT"].pipelines
        assert index[part] == ["fastgen_students", kind]
        assert export.read_card(folder)["students"] == 3
        assert export.read_card(folder)["use"] == export.USE
        brought = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if "again" not in p.parts}
        assert brought == {f"{part}/fastgen_students.py"}
        assert (folder / part / "fastgen_students.py").read_bytes() == Path(str(shipped.__file__)).read_bytes()
        with pytest.raises(
            ValueError, match=rf"its {part} is a {kind}, which brings its own code; this family takes D"
        ):
            export.check_pipeline(folder, index["_class_name"])


def test_the_code_that_travels_needs_only_torch_and_diffusers() -> None:
    nodes = list(ast.walk(ast.parse(Path(str(shipped.__file__)).read_text(encoding="utf-8"))))
    used = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    assert used - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_an_image_does_not_depend_on_the_rest_of_the_batch(exported: dict[str, Path]) -> None:
    """Not on lengths either: prompts are padded to one width, whatever stands beside them."""
    pipeline = fastgen.load(exported["sd"])
    pipeline.set_progress_bar_config(disable=True)
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 1, "output_type": "latent"}
    together = pipeline(PROMPTS, latents=x_t, **call).images
    for i, prompt in enumerate(PROMPTS):
        close(pipeline(prompt, latents=x_t[i : i + 1], **call).images, together[i : i + 1])


def test_a_call_costs_each_row_one_evaluation(exported: dict[str, Path]) -> None:
    pipeline = fastgen.load(exported["sd"])
    pipeline.set_progress_bar_config(disable=True)
    rows: list[int] = []
    for student in pipeline.unet.students:
        student.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["sample"])), with_kwargs=True)
    pipeline(PROMPTS, num_inference_steps=2, guidance_scale=7.5, output_type="latent")
    assert sum(rows) == 2 * len(PROMPTS)


def test_the_network_is_called_as_a_stock_one(exported: dict[str, Path]) -> None:
    unet, text = fastgen.load(exported["sd"]).unet, FAMILIES["sd"]().encode_prompts(PROMPTS)["text"]
    x_t = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        found = unet(x_t, 999, text).sample
        assert torch.equal(unet(x_t, torch.tensor([999] * 4), encoder_hidden_states=text, return_dict=False)[0], found)
        for i, k in enumerate(shipped.which(text, unet.axes, unet.cuts).tolist()):
            torch.testing.assert_close(unet.students[k](x_t[i : i + 1], 999, text[i : i + 1]).sample[0], found[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_weights_and_no_router(dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["sd"]()
    network = several(family, PROMPTS)
    export.export(family, network, 2, tmp_path / "half", prompts=PROMPTS, card=CARD, dtype=dtype)
    unet = export.from_pretrained(tmp_path / "half", dtype=dtype).unet
    assert {p.dtype for p in unet.parameters()} == {dtype}
    assert torch.equal(unet.axes, network.router.axes)
    assert torch.equal(unet.cuts, network.router.cuts)


def test_as_a_component_alone_they_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["sd"]()
    with pytest.raises(ValueError, match="the student's unet is a UNetStudents, whose code only a pipeline's folder"):
        export.export_component(
            family, several(family, PROMPTS), 2, tmp_path / "unet", "base", prompts=PROMPTS, card=CARD
        )


# Whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def decoded(world: Path, out: Path, *changes: str) -> recipe.Recipe:
    route_ = ["student.route={students: 2, own: 0}", "run.steps=2", f"run.out={out}"]
    return recipe.decode(config.override(config.read(world / "run.yaml"), [*route_, *changes]), "test")


@pytest.fixture(scope="module")
def runs(world: Path) -> list[Path]:
    """Two students, two steps each."""
    return [
        training.train(decoded(world, world / f"student-{own}", f"student.route.own={own}", f"run.seed={own}"))
        for own in range(2)
    ]


@pytest.fixture(scope="module")
def joined(runs: list[Path], world: Path) -> Path:
    result = command.done("join", runs[1], runs[0], "--out", world / "joined")
    assert result.out == f"{world / 'joined'} holds 2 students\n"
    return world / "joined"


def test_students_are_trained_apart_and_joined_into_one_pipeline(
    joined: Path, runs: list[Path], world: Path, tmp_path: Path
) -> None:
    """In a process without fastgen each prompt gives what its own student's pipeline gives."""
    family = sd.load(world / "teacher")
    router, _ = route.read(runs[0])
    own = router.which(points_of(family.encode_prompts(command.CAPTIONS)["text"])).tolist()
    assert sorted(own.count(k) for k in range(2)) == [3, 4]
    call = {"prompt": command.CAPTIONS, "num_inference_steps": 1}
    fresh({str(folder): call for folder in (joined, *(run / "pipeline" for run in runs))}, tmp_path)
    latents = [torch.from_numpy(np.load(f / "latent.npy")) for f in (joined, *(run / "pipeline" for run in runs))]
    close(latents[0], torch.stack([latents[1 + k][i] for i, k in enumerate(own)]))
    assert (latents[1] - latents[2]).abs().max() > 20 * TOLERANCE * latents[0].abs().max()


def test_each_run_trains_on_its_own_prompts(runs: list[Path]) -> None:
    seen = []
    for run in runs:
        session = training.build(recipe.decode(config.read(run / "config.yaml"), "test"))
        router, own = route.read(run)
        which = router.which(points_of(session.batches.batch(range(20)).cond["text"]))
        assert which.tolist() == [own] * 20
        seen.append(set(training.sample_prompts(session)))
    assert seen[0].isdisjoint(seen[1])
    assert seen[0] | seen[1] == set(command.CAPTIONS)


def test_cards_say_whose_prompts_are_whose(joined: Path, runs: list[Path]) -> None:
    card = export.read_card(joined)
    assert (card["method"], card["students"], card["num_inference_steps"]) == ("dmd2", 2, 1)
    text = (joined / "README.md").read_text()
    assert "Its network holds **2 students**, each trained on its share of the prompts" in text
    assert "arXiv:2410.23274" in text
    assert "| Images seen | 8 |" in text
    assert 'from_pretrained("path/to/joined", trust_remote_code=True)' in text
    assert (joined / "samples.png").is_file()
    assert export.read_card(runs[1] / "pipeline")["route"] == {"students": 2, "own": 1}
    assert (
        "**It is student 1 of 2 and learnt its share of the prompts alone**"
        in (runs[1] / "pipeline" / "README.md").read_text()
    )


def test_it_is_generated_from_and_evaluated_by_its_folder(joined: Path, tmp_path: Path) -> None:
    assert command.fastgen("generate", joined, "-p", "a dog", "-o", tmp_path / "images").code == 0
    assert (tmp_path / "images" / "0000_00.png").is_file()


@pytest.mark.parametrize("share", [False, True], ids=["adapters", "shared"])
def test_adapters_are_joined_as_whole_networks(world: Path, tmp_path: Path, share: bool) -> None:
    changes = ["student.lora={rank: 2}", f"student.share_backbone={str(share).lower()}", "run.ema=0.5"]
    made = [
        training.train(decoded(world, tmp_path / str(own), f"student.route.own={own}", *changes)) for own in range(2)
    ]
    assert join.join(made, tmp_path / "joined", "fp16") == 2
    alone, unet = [fastgen.load(run / "pipeline").unet for run in made], fastgen.load(tmp_path / "joined").unet
    for own, student in enumerate(unet.students):
        assert not any(isinstance(part, lora.View) for part in student.modules())
        for name, value in alone[own].state_dict().items():
            torch.testing.assert_close(student.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_a_run_goes_on_as_the_student_that_it_is(runs: list[Path], world: Path) -> None:
    assert training.train(decoded(world, runs[0], "run.steps=2")) == runs[0]
    with pytest.raises(ValueError, match=r"student-0: is the run of student 0, this would be 1; set another run.out"):
        training.train(decoded(world, runs[0], "student.route.own=1"))


def test_a_run_that_exports_its_best_checkpoint_is_joined_by_it(runs: list[Path], tmp_path: Path) -> None:
    run = changed(runs[1], tmp_path / "run", "run.keep_best=fid", "run.export=best")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    best.write(run, best.Best(1, "fid", 3.0, "low"))
    part = join.part_of(run)
    assert (part.checkpoint.name, part.steps_done, part.route.own) == ("checkpoint-1", 2, 1)
    assert join.part_of(runs[1]).checkpoint.name == "checkpoint-2"


def changed(run: Path, folder: Path, *changes: str) -> Path:
    """A copy of a run whose config says otherwise."""
    shutil.copytree(run, folder)
    tree = config.override(config.read(folder / "config.yaml"), list(changes))
    (folder / "config.yaml").write_text(json.dumps(tree))
    return folder


def test_runs_that_are_no_students_of_one_router_are_told_in_a_line(
    runs: list[Path], world: Path, tmp_path: Path
) -> None:
    zero, one = runs

    def refused(message: str, *given: Path) -> None:
        result = command.fastgen("join", *given, "--out", tmp_path / "joined")
        assert result.code == 2
        assert message in result.err.splitlines()[-1]  # above it may be what the log tells
        assert not (tmp_path / "joined").exists()

    refused(f"{world}: not a run folder (no config.yaml)", zero, world)
    refused(f"{zero} and {zero}: both are student 0; leave one out", zero, zero, one)
    refused("student 1 of 2 is not among the runs; name the run with this student.route.own too", zero)
    whole = changed(one, tmp_path / "whole", "student.route=null")
    refused(f"{whole}: its student takes all prompts; train it with student.route to share them", zero, whole)
    more = changed(one, tmp_path / "more", "student.steps=2")
    refused(f"{more}: its student.steps is 2, not the 1 of {zero}; train the students of one pipeline", zero, more)
    base = changed(one, tmp_path / "base", "model.path=other")
    refused(f"{base}: its model.path is 'other', not the '{world / 'teacher'}' of {zero}", zero, base)
    kind = changed(one, tmp_path / "kind", "method.guidance_scale=3.0")
    refused(f"{kind}: its method.guidance_scale is 3.0, not the 2.0 of {zero}", zero, kind)
    empty = changed(one, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoint-2")
    refused(f"{empty}: holds no checkpoint yet", zero, empty)
    early = changed(one, tmp_path / "early")
    state = json.loads((early / "checkpoint-2" / "state.json").read_text()) | {"steps_done": 1}
    del state["own"], state["sha256"]  # as an older version wrote it, without digests
    (early / "checkpoint-2" / "state.json").write_text(json.dumps(state))
    refused(f"{early}: has done 1 steps, {zero} 2; let both end", zero, early)
    other = changed(one, tmp_path / "other")
    router, own = route.read(other)
    turned = fit(torch.randn(9, router.axes.shape[1]), 2)
    route.record(other, route.Share(turned, own, []))
    refused(f"{other}: shares the prompts otherwise than {zero}; train it on the same data", zero, other)
    pair = [changed(run, tmp_path / f"pair-{k}") for k, run in enumerate(runs)]
    for k, run in enumerate(pair):
        route.record(run, route.Share(turned, k, []))
    refused(f"{pair[0]}: its data are no longer those that it was trained on; set them back", *pair)


def test_what_takes_no_share_is_refused(world: Path, tmp_path: Path) -> None:
    def refused(message: str, *changes: str) -> None:
        with pytest.raises(ValueError, match=message):
            training.build(decoded(world, tmp_path / "run", *changes))

    message = "student.route: method '{}' makes no few-step student of one network; leave it out"
    refused(message.format("phased_dmd"), "method.name=phased_dmd", "student.steps=4")
    tree = config.override(config.read(world / "run.yaml"), ["student.route={students: 2, own: 0}"])
    tree |= {"method": {"name": "pretrain"}, "optim": {"student": {}}}
    with pytest.raises(ValueError, match=message.format("pretrain")):
        training.build(recipe.decode(tree, "test"))
    images = f"data={{source: images, path: {world / 'images'}}}"
    refused("student.route: this data source reads an image with each prompt; let `fastgen cache` encode it", images)
