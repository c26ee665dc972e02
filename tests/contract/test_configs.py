"""Every YAML that ships decodes, and every training run in it builds on tiny networks and takes a step."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastgen import config, estimate, pairs, recipe
from fastgen.emoji import world
from fastgen.evaluation import judge
from fastgen.recipe import Recipe
from fastgen.train import build
from tests import command

ROOT = Path(__file__).parents[2] / "configs"
FOUND = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.rglob("*.yaml"))}
ALL = {name: path for name, path in FOUND.items() if not name.startswith("accelerate/")}  # these are a launcher's


def kind(tree: dict[str, Any]) -> str:
    """A recipe, pairs to make, a training of the emoji world's own networks, or part of what other files build on."""
    if "method" in tree:
        return "recipe"
    if "pairs" in tree:
        return "pairs"
    return "world" if "pool" in tree or "optim" in tree else "part"


RECIPES = [name for name, path in ALL.items() if kind(config.read(path)) == "recipe"]
ON_PAIRS = [name for name in RECIPES if config.read(ALL[name])["data"]["source"] == "pairs"]


OURS = ("emoji/", "scenes/")
"""Folders of the emoji world's configs; the others are of real models."""


def test_there_are_configs() -> None:
    assert {"emoji/clip.yaml", "emoji/vae.yaml", "emoji/eval.yaml"} <= set(ALL)
    assert {"emoji/teacher.yaml", "emoji/dmd2.yaml", "emoji/demo.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", ALL)
def test_it_says_in_its_first_line_what_it_is(name: str) -> None:
    assert ALL[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ALL)
def test_it_decodes(name: str) -> None:
    tree = config.read(ALL[name])
    if kind(tree) == "recipe":
        decoded = recipe.decode(tree, name)
        assert recipe.decode(recipe.encode(decoded), name) == decoded
    if kind(tree) == "pairs":
        assert pairs.decode(tree, name).pairs.number > 0
    if kind(tree) == "world":
        assert config.decode(world.Recipe, tree, name).steps > 0
    if "eval" in tree:
        found = judge.settings(tree["eval"], name)
        recipe.choose("source", "source", found.reference, name, "eval.reference")
    elif kind(tree) == "part":
        assert set(tree) <= {"model", "method", "student", "data", "optim", "run"}


@pytest.mark.parametrize("name", ALL)
def test_what_ships_with_the_package_is_there(name: str) -> None:
    tree = config.read(ALL[name])
    paths = [tree.get("model", {}).get("path", ""), *tree.get("eval", {}).get("weights", {}).values()]
    for path in paths:
        if path.startswith(recipe.ASSETS):
            assert Path(recipe.locate(path)).is_dir(), f"{path} is missing"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of 32 x 32 pixels, since the emoji world's are."""
    return command.teacher(tmp_path_factory.mktemp("teacher") / "teacher", sample_size=16)


@pytest.fixture(scope="module")
def made(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few pairs by each config that makes some, by its name, with the tiny pipeline as the teacher."""
    folders = {}
    for name, path in ALL.items():
        tree = config.read(path)
        if kind(tree) == "pairs":
            folders[name] = tmp_path_factory.mktemp("pairs") / "pairs"
            decoded = pairs.decode(tree, name)
            small = replace(decoded.pairs, out=str(folders[name]), number=6, batch_size=6)
            pairs.make(replace(decoded, model=replace(decoded.model, path=str(teacher)), pairs=small))
    return folders


@pytest.mark.parametrize("name", ON_PAIRS)
def test_pairs_that_are_not_made_yet_name_the_command_and_that_makes_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command.fastgen("train", ALL[name])
    told = re.fullmatch(
        r"fastgen: \S+: holds no teacher pairs; `fastgen pairs (\S+) pairs.out=(\S+)` makes them\n", result.err
    )
    assert result.code == 2
    assert told, result.err
    maker = pairs.decode(config.read(ALL[f"{told[1]}.yaml"]), told[1])
    assert maker.pairs.out == told[2] == config.read(ALL[name])["data"]["path"]
    assert maker.model.path == config.read(ALL[name])["model"]["path"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """The recipe on tiny networks of the same family and on data that are there."""
    decoded = recipe.decode(config.read(ALL[name]), name)
    model, data = decoded.model, decoded.data
    if name.startswith(OURS):
        path = request.getfixturevalue("teacher")
        if data.name == "pairs":
            folder = request.getfixturevalue("made")[f"{data.options.made_by}.yaml"]
            data = replace(data, options=replace(data.options, path=str(folder)))
    else:
        of_family = importlib.import_module(f"tests.families.{model.family}")
        case = of_family.MORE["dev"] if model.path.endswith("-dev") else of_family.CASE
        path = tmp_path / "teacher"
        case.pipeline(0).save_pretrained(path)
        model = replace(model, image_size=case.image_size, num_frames=case.num_frames)
        (tmp_path / "prompts.txt").write_text("\n".join(case.prompts))
        place = tmp_path / "prompts.txt"
        if data.name == "images":
            place = command.images(tmp_path / "images")
            rows = [{"file": file.name, "caption": case.prompts[0]} for file in sorted(place.glob("*.png"))]
            (place / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = replace(data, options=replace(data.options, path=str(place)))
    return replace(
        decoded,
        model=replace(model, path=str(path), compile=False),
        data=data,
        run=replace(decoded.run, batch_size=2, accumulate=1),
    )


@pytest.mark.filterwarnings("ignore:a prompt of")  # the tiny tokenizer knows few words, so captions get long
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of norms in bf16 on a CPU, as Wan's
@pytest.mark.parametrize("name", RECIPES)
def test_it_builds_and_each_phase_takes_a_step(name: str, tiny: Recipe) -> None:
    if tiny.student.init:  # the result of another config's run; how one starts from it is tested elsewhere
        assert tiny.student.init in {f"{config.read(ALL[other])['run']['out']}/pipeline" for other in RECIPES}
        tiny = replace(tiny, student=replace(tiny.student, init=""))
    session = build(tiny)
    if name.startswith(OURS):
        assert session.family.image_size == (32, 32)
    logs = {name: value for phase in session.method.phases for name, value in session.engine.turn(phase, 0).items()}
    assert {name.split("/")[0] for name in logs} == {phase.name for phase in session.method.phases}
    assert all(math.isfinite(value) for value in logs.values())
    assert bool(session.ema) == (tiny.run.ema > 0)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(OURS)])
def test_a_recipe_of_a_real_model_says_what_it_needs_and_that_it_was_not_run(name: str) -> None:
    text, decoded = ALL[name].read_text(encoding="utf-8"), recipe.decode(config.read(ALL[name]), name)
    assert "# Not yet run." in text
    assert re.search(r"^#   .* GiB", text, re.MULTILINE)
    assert decoded.run.out == f"runs/{name.removesuffix('.yaml')}"
    folder, about = estimate.folder_of(decoded.model)
    assert about is not None
    assert folder.parent.name == decoded.model.family
