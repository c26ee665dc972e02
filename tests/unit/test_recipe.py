"""A run as one config: decoded, written out, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import fastgen
from fastgen import recipe
from fastgen.adversary import Adversarial
from fastgen.config import ConfigError
from fastgen.data import images, prompts
from fastgen.optimizers import Optim
from fastgen.recipe import choose, decode, encode, locate
from fastgen.trainers import dmd2

SMALL: dict[str, Any] = {
    "model": {"family": "sd", "path": "teacher"},
    "method": {"name": "dmd2"},
    "data": {"source": "prompts", "path": "prompts.txt"},
    "optim": {"student": {"lr": 1e-5}, "fake_score": {}},
    "run": {"out": "runs/x", "steps": 10},
}

LARGE: dict[str, Any] = {
    "model": {"family": "sd", "path": "t", "attention": "sdpa", "gradient_checkpointing": True, "compile": True},
    "method": {"name": "dmd2", "guidance_scale": 3, "adversarial": {"weight": "1e-3", "blocks": ["mid_block"]}},
    "student": {"steps": 4},
    "data": {"source": "images", "path": "pictures", "seed": 3},
    "optim": {
        "student": {"lr": "1e-5", "betas": [0, 0.99], "schedule": "cosine"},
        "fake_score": {"clip": 0},
        "discriminator": {},
    },
    "run": {"out": "o", "steps": 3, "precision": "bf16", "sample_prompts": ["a dog"], "trackers": ["tensorboard"]},
    "eval": {"every": 5, "reference": {"source": "images", "path": "pictures"}},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """SMALL with one value changed; "a.b" names it."""
    tree: dict[str, Any] = {name: dict(section) for name, section in SMALL.items()}
    *sections, last = key.split(".")
    into = tree
    for section in sections:
        into = into.setdefault(section, {})
    into[last] = value
    return tree


def test_defaults_are_those_of_each_part() -> None:
    found = decode(SMALL, "run.yaml")
    assert found.model == recipe.Model("teacher", "sd")
    assert found.method == recipe.Chosen("dmd2", dmd2.Config())
    assert found.data == recipe.Chosen("prompts", prompts.Config("prompts.txt"))
    assert found.optim == {"student": Optim(lr=1e-5), "fake_score": Optim()}
    assert found.run == recipe.Run("runs/x", 10)
    assert found.student == recipe.Student(1)
    assert found.eval == {}


def test_values_are_read_by_the_field_s_type() -> None:
    found = decode(LARGE, "run.yaml")
    term = Adversarial(weight=1e-3, critic_weight=1e-2, features="fake_score", blocks=["mid_block"])
    assert found.method.options == dmd2.Config(guidance_scale=3.0, adversarial=term)
    assert found.data.options == images.Config("pictures", 3)
    assert found.optim["student"].lr == 1e-5
    assert found.optim["student"].betas == (0.0, 0.99)


@pytest.mark.parametrize("tree", [SMALL, LARGE])
def test_a_recipe_survives_yaml(tree: dict[str, Any]) -> None:
    """As it is saved beside a run and read again: equal, with every default written out."""
    original = decode(tree, "run.yaml")
    written = yaml.safe_dump(encode(original), sort_keys=False)
    assert decode(yaml.safe_load(written), "config.yaml") == original
    assert yaml.safe_dump(encode(decode(yaml.safe_load(written), "config.yaml")), sort_keys=False) == written
    assert set(yaml.safe_load(written)) == set(recipe.SECTIONS)
    assert yaml.safe_load(written)["run"]["keep"] == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modle", {}, "unknown key 'modle'; did you mean 'model'?"),
        ("run.stesp", 3, "unknown key 'run.stesp'; did you mean 'steps'?"),
        ("method.guidance", 3, "unknown key 'method.guidance'; did you mean 'guidance_scale'?"),
        ("data.paht", "x", "unknown key 'data.paht'; did you mean 'path'?"),
        (
            "optim.student",
            {"weight_deacy": 1},
            "unknown key 'optim.student.weight_deacy'; did you mean 'weight_decay'?",
        ),
        ("run.steps", "many", "run.steps must be a whole number, got 'many'"),
        ("run.steps", 0, "run.steps must be at least 1, got 0"),
        ("run.ema", 1, "run.ema must be below 1, got 1"),
        ("run.precision", "fp8", "run.precision is 'fp8'; known: bf16, fp16, fp32"),
        ("run.trackers", ["mlflow"], r"run.trackers[0] is 'mlflow'; known: jsonl, tensorboard, trackio, wandb"),
        ("model.attention", "fast", "model.attention is 'fast'; did you mean 'flash'?"),
        ("model.gradient_checkpointing", "perhaps", "must be true or false, got 'perhaps'"),
        ("student", {"steps": 9}, "student.steps must be at most 8, got 9"),
        ("method", "dmd2", "method must be a mapping with 'name', got 'dmd2'"),
        ("method", {}, "method must be a mapping with 'name', got {}"),
        ("method.name", "dmd22", "method.name: unknown method 'dmd22'; did you mean 'dmd2'?"),
        ("method.name", "..x", "method.name: unknown method '..x'; known: adversarial, "),
        ("data", None, "data must be a mapping with 'source', got None"),
        ("data.source", "prompt", "data.source: unknown source 'prompt'; did you mean 'prompts'?"),
        ("optim", ["student"], "optim must map roles to optimizers, got ['student']"),
        ("eval", [1], "eval must be a mapping, got [1]"),
        ("run", 3, "run must be a mapping, got 3"),
    ],
)
def test_a_mistake_is_told_with_file_key_and_remedy(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(changed(key, value), "run.yaml")
    assert str(error.value).startswith("run.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["model", "method", "data", "run", "optim"])
def test_a_section_that_is_missing_is_named(section: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: {section} is missing"):
        decode({name: value for name, value in SMALL.items() if name != section}, "run.yaml")


def test_what_is_chosen_brings_its_own_options() -> None:
    found = choose("source", "source", {"source": "images", "path": "x"}, "run.yaml", "eval.reference")
    assert found == recipe.Chosen("images", images.Config("x"))
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'eval.reference.size'"):
        choose("source", "source", {"source": "images", "path": "x", "size": 3}, "run.yaml", "eval.reference")
    with pytest.raises(ConfigError, match=r"run.yaml: eval.reference.path is missing; a folder of images"):
        choose("source", "source", {"source": "images"}, "run.yaml", "eval.reference")
    with pytest.raises(ConfigError, match=r"run.yaml: eval.reference.source: unknown source 'folder'"):
        choose("source", "source", {"source": "folder"}, "run.yaml", "eval.reference")


def test_a_path_among_the_package_s_assets_is_found_wherever_it_is_installed() -> None:
    assert Path(locate("assets:emoji/clip")) == Path(str(fastgen.__file__)).parent / "emoji" / "assets" / "clip"
    assert Path(locate("assets:emoji/sprites/index.jsonl")).is_file()


@pytest.mark.parametrize("path", ["runs/x", "/abs/x", "./x", "stabilityai/sdxl-turbo", "assets", "x/assets:y"])
def test_any_other_path_is_left_as_it_is(path: str) -> None:
    assert locate(path) == path
