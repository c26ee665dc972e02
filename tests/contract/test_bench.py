"""``fastgen bench cost`` and ``fastgen bench memory``, called as a user calls them, on tiny networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fastgen import cli, cost, memory, registry
from fastgen.config import read
from fastgen.family import Family
from fastgen.method import Batch, Terms
from fastgen.rng import Noise
from fastgen.trainers import dmd2
from tests import command
from tests.command import done, fastgen

PARTS = {"data", "clipping", "optimizer", "ema", "logging", "other"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def other(world: Path, folder: Path, method: dict[str, Any], *roles: str, **sections: dict[str, Any]) -> Path:
    """A config like the world's, of another method, on images."""
    optim = {role: {"lr": 1e-4} for role in roles}
    data = {"source": "images", "path": str(world / "images")}
    tree = read(world / "run.yaml") | {"method": method, "optim": optim, "data": data, **sections}
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measured(config: Path, *more: str) -> dict[str, Any]:
    """The row that ``fastgen bench cost --json`` prints of a config."""
    rows = json.loads(done("bench", "cost", config, *more, "--json", "--rounds=2", "--batch-size=2").out)
    assert len(rows) == 1
    return dict(rows[0])


def test_the_rows_of_cost_add_up(world: Path) -> None:
    row = measured(world / "run.yaml", "--clock=cpu")
    assert (row["method"], row["config"]) == ("dmd2", str(world / "run.yaml"))
    assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    assert set(row["rest"]) == PARTS
    assert row["seconds"] == pytest.approx(row["floor_seconds"] + sum(row["rest"].values()))
    every = {name: turn["every"] for name, turn in row["turns"].items()}
    assert every == {"critic": 1, "student": 2}
    floor = sum(p["count"] * p["seconds"] / every[p["phase"]] for p in row["passes"])
    assert row["floor_seconds"] == pytest.approx(floor)
    assert row["ratio_low"] <= row["ratio_high"]
    assert (row["batch_size"], row["rounds"], row["clock"], row["device"]) == (2, 2, "cpu", "cpu")
    assert not (world / "run").exists(), "nothing is trained"


def test_the_table_of_cost_names_method_ratio_and_parts(world: Path) -> None:
    out = done("bench", "cost", world / "run.yaml", "--rounds", 1, "--batch-size", 2, "run.ema=0").out
    head, line = (text.split() for text in out.strip().split("\n"))
    assert head[:5] == ["method", "config", "seconds", "floor", "ratio"]
    assert set(head) >= {*PARTS, "encoding"}
    assert line[0] == "dmd2"
    assert line.count("%") == len(PARTS) + 1


@pytest.mark.parametrize("what", ["cost", "memory"])
def test_a_document_without_a_place_is_refused_before_anything_is_measured(
    what: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "benched", None)
    (tmp_path / "page.md").write_text("nothing here")
    failed = fastgen("bench", what, world / "run.yaml", "--into", tmp_path / "page.md")
    assert failed.code == 2
    assert f"write <!-- {what} --> and <!-- /{what} -->" in failed.err


def test_the_table_of_cost_goes_into_a_document(world: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- cost -->\n<!-- /cost -->\nbelow\n")
    done("bench", "cost", world / "run.yaml", "--rounds", 1, "--batch-size", 2, "run.ema=0", "--into", page)
    above, head, rule, row, below = (line for line in page.read_text().split("\n") if line and "<!--" not in line)
    assert (above, below) == ("above", "below")
    assert head.startswith("| method | config | seconds |")
    assert rule.startswith("| --- | --- | ---: |")
    assert row.startswith("| dmd2 | ")
    assert head.count("|") == rule.count("|") == row.count("|")


class Rows:
    """A clock that goes on by one with each row that a U-Net is given, forward or with its tangent."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            self.now += len(args[0])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    rows = Rows()
    monkeypatch.setitem(cost.CLOCKS, "wall", rows)  # type: ignore[arg-type]
    handle = register_module_forward_pre_hook(rows.hook)
    yield rows
    handle.remove()


GAN = {"weight": 0.1, "blocks": ["all"], "loss": "non_saturating"}
SCALES = {"low": 1.0, "high": 8.0, "default": 2.0}
METHODS: dict[str, tuple[dict[str, Any], list[str], int, float]] = {
    # calls of two rows a step, each phase by how often it is due
    "dmd2": ({"name": "dmd2", "student_every": 2, "guidance_scale": 3.0}, ["student", "fake_score"], 4, 3.5 + 5.5 / 2),
    "gan": (
        {"name": "dmd2", "student_every": 4, "guidance_scale": 1.0, "adversarial": {**GAN, "features": "fake_score"}},
        ["student", "fake_score", "discriminator"],
        1,
        (2 + 2) + (1 + 1 + 1 + 1) / 4,
    ),
    "r1": (
        {"name": "adversarial", "adversarial": {**GAN, "r1": 0.1}, "rollout": "data"},
        ["student", "discriminator"],
        2,
        (1 + 2) + (1 + 1),
    ),
    "sid": ({"name": "sid", "guidance_scale": 2.0}, ["student", "fake_score"], 1, (1 + 2) + (1 + 2 + 2)),
    "vsd": ({"name": "vsd", "lora": {"rank": 2}}, ["student", "fake_score"], 1, 1 + 2 + 2 + 1),
    "consistency": ({"name": "consistency", "guidance_scale": 2.0}, ["student"], 1, 2 * 2 + 1 + 1),
    "lcm": ({"name": "lcm", "guidance": SCALES}, ["student"], 2, 2 + 1 + 1),
    "agd": ({"name": "agd", "states": 3, "guidance": SCALES, "lora": {"rank": 2}}, ["student"], 1, 3 * 2 + 3),
    "scm": ({"name": "scm", "guidance": SCALES}, ["student"], 1, 2 + 1 + 1),
    "meanflow": ({"name": "meanflow", "derivative": "finite_differences"}, ["student"], 1, 2 + 2 + 1),
}
"""Options, roles, the student's steps, and calls of two rows in a step, written out by hand."""


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", METHODS)
def test_where_only_calls_of_networks_take_time_a_step_takes_its_floor(name: str, world: Path, tmp_path: Path) -> None:
    """And the calls it makes are those written out above."""
    method, roles, steps, calls = METHODS[name]
    row = measured(other(world, tmp_path, method, *roles, student={"steps": steps}))
    assert row["floor_seconds"] == pytest.approx(2 * calls)
    assert row["seconds"] == pytest.approx(row["floor_seconds"])
    assert row["rest"] == pytest.approx(dict.fromkeys(PARTS, 0.0), abs=1e-9)
    assert row["ratio_low"] == row["ratio_high"] == pytest.approx(1.0)


@pytest.mark.usefixtures("clock")
def test_a_wasted_pass_shows(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = dmd2.Method.student_loss

    def wasteful(self: Any, batch: Batch, rng: Noise) -> Terms:
        with torch.no_grad():
            self.teacher(torch.zeros(len(batch), *self.shape), torch.ones(len(batch)).double(), batch.cond)
        return own(self, batch, rng)

    monkeypatch.setattr(dmd2.Method, "student_loss", wasteful)
    row = measured(world / "run.yaml")  # the student's turn is every second: 2 + (1 + 2 + 1) / 2 calls
    assert row["floor_seconds"] == pytest.approx(2 * 4)
    assert row["ratio"] == pytest.approx(4.5 / 4)
    assert row["rest"]["other"] == pytest.approx(2 * 0.5)


@pytest.mark.parametrize(("cache", "each", "once"), [("true", 0.0, 0.5), ("false", 1.0, 0.0)])
def test_images_count_by_how_often_a_run_encodes_them(
    cache: str, each: float, once: float, world: Path, tmp_path: Path, clock: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 images kept, half of the 16 steps of one have a new one; else each step, once for both of its phases."""
    family, load = registry.find("family", "sd"), vars(registry.find("family", "sd"))["load"]

    def counting(*args: Any, **options: Any) -> Family:
        found = load(*args, **options)

        def encode(pixels: Tensor) -> Tensor:
            clock.now += len(pixels)
            latents: Tensor = found.encode(pixels)
            return latents

        return replace(found, encode=encode)

    monkeypatch.setattr(family, "load", counting)
    method = {"name": "adversarial", "adversarial": GAN}
    config = other(world, tmp_path, method, "student", "discriminator")
    row = measured(config, "run.steps=16", "run.batch_size=1", f"run.cache_latents={cache}")
    assert row["rest"]["data"] == pytest.approx(each)
    assert row["encoding_seconds"] == pytest.approx(once)
    assert row["rest"]["other"] == pytest.approx(0, abs=1e-9)
    assert row["seconds"] == pytest.approx(row["floor_seconds"] + each)


def test_pairs_are_made_for_the_measurement_where_the_config_says_by_which(world: Path, tmp_path: Path) -> None:
    own = {
        "model": {"family": "sd", "path": str(world / "teacher")},
        "data": {"source": "prompts", "path": str(world / "prompts.txt")},
        "pairs": {"out": str(tmp_path / "pairs"), "number": 10**6, "num_steps": 2, "guidance_scale": 1.0},
    }
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(own))
    data = {"source": "pairs", "path": str(tmp_path / "pairs"), "made_by": str(tmp_path / "pairs.yaml")}
    row = measured(other(world, tmp_path, {"name": "kd"}, "student", data=data))
    assert [(p["role"], p["mode"]) for p in row["passes"]] == [("student", "weights")]
    assert not (tmp_path / "pairs").exists()
    without = fastgen("bench", "cost", tmp_path / "other.yaml", "data.made_by=''")
    assert without.code == 2
    assert "holds no teacher pairs" in without.err


def test_a_student_whose_start_is_not_there_is_measured_as_the_teacher(world: Path) -> None:
    words = ["--rounds", 1, "--batch-size", 2, "--json", f"student.init={world / 'never'}"]
    result = done("bench", "cost", world / "run.yaml", *words)
    assert f"student.init {world / 'never'} is no folder here; the teacher, whose shape it has, is m" in result.err
    assert json.loads(result.out)[0]["ratio"] > 0


def test_a_method_that_declares_no_passes_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = dmd2.Method.__init__

    def silent(self: Any, *args: Any) -> None:
        init(self, *args)
        self.phases = tuple(replace(phase, passes=()) for phase in self.phases)

    monkeypatch.setattr(dmd2.Method, "__init__", silent)
    result = fastgen("bench", "cost", world / "run.yaml")
    assert result.code == 2
    assert "method 'dmd2' declares no passes of its phase 'critic'" in result.err


def test_the_processors_clock_is_refused_where_it_does_not_see_the_device(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(cost, "build", lambda recipe: session)
    result = fastgen("bench", "cost", world / "run.yaml", "--clock", "cpu")
    assert result.code == 2
    assert "clock cpu does not see what cuda does; use wall" in result.err


def test_without_a_config_each_method_of_the_emoji_world_is_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "by_itself", lambda tree, folder: tree)
    trees = dict(cli.benched(["run.seed=3"], ["run.batch_size=32"], tmp_path))
    assert {tree["method"]["name"] for tree in trees.values()} == set(registry.names("method"))
    assert {name for name, tree in trees.items() if tree["method"]["name"] == "dmd2"} == {
        "emoji/dmd2",
        "emoji/dmd2_prompts",
    }
    for tree in trees.values():
        assert tree["model"]["path"] == "assets:emoji/teacher"
        assert (tree["run"]["batch_size"], tree["run"]["seed"]) == (32, 3)
    assert list(dict(cli.benched(["emoji/kd"], [], tmp_path))) == ["emoji/kd"]


# Memory


@pytest.fixture(scope="module")
def memories(world: Path) -> list[dict[str, Any]]:
    arguments = (world / "run.yaml", "student.lora={rank: 2}", "run.ema=0.9")
    return list(json.loads(done("bench", "memory", *arguments, "--json").out))


def test_the_rows_of_memory_are_the_three_forms_of_student(memories: list[dict[str, Any]], world: Path) -> None:
    assert [row["form"] for row in memories] == ["whole", "adapters", "shared"]
    for row in memories:
        assert (row["method"], row["config"]) == ("dmd2", str(world / "run.yaml"))
        assert row["held"] == memory.total(row["parts"])
        assert row["measured"] == "resident memory"
        assert row["peak"] > row["held"]
    assert not (world / "run").exists(), "nothing is trained"


def test_what_must_be_held_is_each_thing_once(memories: list[dict[str, Any]]) -> None:
    """In bytes of float32: weights, as many gradients and averages as learn, twice as many moments."""
    whole, adapters, shared = (row["parts"] for row in memories)
    counts = [row["trained"] for row in memories]
    assert set(whole["weights"]) == {"teacher", "student", "fake_score"}
    assert counts[0]["fake_score"] == counts[0]["student"] == counts[1]["fake_score"]
    assert counts[1]["student"] == counts[2]["student"] == counts[2]["fake_score"] < counts[0]["student"]
    for parts, count in zip((whole, adapters, shared), counts, strict=True):
        steps = 4 * 500  # AdamW keeps a number of steps for each tensor
        moments = 8 * sum(count.values())
        assert moments <= parts["optimizer"] <= moments + steps
        assert parts["gradients"] == 4 * max(count.values())
        assert parts["ema"] == 4 * count["student"]
    assert whole["pipeline"] == adapters["pipeline"] == shared["pipeline"] > 0
    teacher, projection = whole["weights"]["teacher"], whole["weights"]["student"] - whole["weights"]["teacher"]
    lora = 4 * counts[2]["student"]
    assert adapters["weights"] == {
        "teacher": teacher,
        "student": lora,
        "fake_score": teacher,
        "under adapters": projection,
    }
    assert shared["weights"] == {"teacher": teacher + projection, "student": lora, "fake_score": lora}


def test_the_table_of_memory_holds_a_line_for_each_form(
    memories: list[dict[str, Any]], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "rows", lambda tree, name, where: memories)
    lines = [text.split() for text in done("bench", "memory", world / "run.yaml").out.strip().split("\n")]
    assert lines[0] == ["config", "student", *memory.COLUMNS]
    for line, row in zip(lines[1:], memories, strict=True):
        assert line[1] == row["form"]
        sizes = dict(zip(memory.COLUMNS, (float(text.replace(",", "")) for text in line[2:]), strict=True))
        assert sizes["held"] + sizes["rest"] == pytest.approx(sizes["peak"], abs=0.2)
        assert sizes["peak"] == pytest.approx(row["peak"] / 2**20, abs=0.05)
