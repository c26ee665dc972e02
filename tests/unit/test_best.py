"""The best checkpoint: which it is, its mark, and what is said where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgen import best, checkpoint, recipe, registry
from fastgen.best import Best, Keeper
from fastgen.checkpoint import CheckpointError
from fastgen.config import ConfigError


def folders(run: Path, *steps: int) -> None:
    for step in steps:
        (run / f"checkpoint-{step}").mkdir(parents=True)


def test_better_is_strictly_lower_or_higher_and_finite() -> None:
    low, high = Best(1, "fid", 3.0, "low"), Best(1, "clip_score", 0.3, "high")
    assert low.beats(None)
    assert Best(2, "fid", 2.9, "low").beats(low)
    assert not Best(2, "fid", 3.0, "low").beats(low)
    assert not Best(2, "fid", 3.1, "low").beats(low)
    assert Best(2, "clip_score", 0.4, "high").beats(high)
    assert not Best(2, "clip_score", 0.3, "high").beats(high)
    assert not Best(2, "clip_score", 0.2, "high").beats(high)
    assert not any(Best(2, "fid", value, "low").beats(None) for value in (math.nan, math.inf, -math.inf))


def test_the_mark_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert best.read(tmp_path) is None
    found = Best(400, "fid", 12.25, "low")
    best.write(tmp_path, found)
    assert best.read(tmp_path) == found
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 400,
        "metric": "fid",
        "value": 12.25,
        "better": "low",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]  # nothing half-written
    assert best.find(tmp_path) == (found, tmp_path / "checkpoint-400")


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 3}', "null"])
def test_a_damaged_mark_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best.json: damaged \(.*\); delete it, and --resume finds the best"):
        best.read(tmp_path)


def test_a_run_without_a_mark_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint is marked as the best; train with run.keep_best, such"):
        best.find(tmp_path)


def test_without_a_metric_nothing_is_kept(tmp_path: Path) -> None:
    best.write(tmp_path, Best(400, "fid", 12.25, "low"))
    keeper = Keeper(tmp_path, "", "low", [{"step": 1, "fid": 1.0}])
    assert (keeper.best, keeper.spared, keeper.better_one(2, {"fid": 0.1})) == (None, None, None)
    assert (tmp_path / "best.json").is_file()  # an earlier run's


ROWS = [{"step": 100, "fid": 9.0}, {"step": 200, "fid": 5.0}, {"step": 250}, {"step": 300, "fid": 7.0}]


def test_a_run_goes_on_with_its_mark(tmp_path: Path) -> None:
    folders(tmp_path, 200, 300)
    marked = Best(200, "fid", 5.0, "low")
    best.write(tmp_path, marked)
    keeper = Keeper(tmp_path, "fid", "low", ROWS, 300)
    assert keeper.best == marked
    assert keeper.spared == tmp_path / "checkpoint-200"
    assert Keeper(tmp_path, "fid", "low", [], 300).best == marked  # its rows may be gone


def test_a_better_checkpoint_that_a_kill_left_unmarked_is_marked(tmp_path: Path) -> None:
    folders(tmp_path, 100, 200)
    best.write(tmp_path, Best(100, "fid", 9.0, "low"))
    assert Keeper(tmp_path, "fid", "low", ROWS[:2], 200).best == Best(200, "fid", 5.0, "low")
    assert best.read(tmp_path) == Best(200, "fid", 5.0, "low")


def test_a_checkpoint_that_has_gone_or_lies_ahead_is_not_the_best(tmp_path: Path) -> None:
    """As after --resume from an older one."""
    folders(tmp_path, 300)
    best.write(tmp_path, Best(200, "fid", 5.0, "low"))
    assert Keeper(tmp_path, "fid", "low", ROWS, 300).best == Best(300, "fid", 7.0, "low")
    best.write(tmp_path, Best(300, "fid", 7.0, "low"))
    assert Keeper(tmp_path, "fid", "low", ROWS[:1], 100).best is None
    assert best.read(tmp_path) is None


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    folders(tmp_path, 200, 300)
    best.write(tmp_path, Best(200, "fid", 5.0, "low"))
    rows = [{**row, "clip_score": row["step"] / 1000} for row in ROWS]
    assert Keeper(tmp_path, "clip_score", "high", rows, 300).best == Best(300, "clip_score", 0.3, "high")


def test_marking_lets_the_one_before_go(tmp_path: Path) -> None:
    folders(tmp_path, 100, 200, 300)
    best.write(tmp_path, Best(100, "fid", 9.0, "low"))
    keeper = Keeper(tmp_path, "fid", "low", [], 200)
    found = keeper.better_one(300, {"fid": 8.123456789})
    assert found == Best(300, "fid", 8.123457, "low")  # as metrics.jsonl has it
    keeper.mark(found, keep=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-200", "checkpoint-300"]
    assert best.read(tmp_path) == keeper.best == found


def test_pruning_spares_the_best_besides_the_newest(tmp_path: Path) -> None:
    folders(tmp_path, 100, 200, 300, 400)
    checkpoint.prune(tmp_path, tmp_path / "checkpoint-400", 2, tmp_path / "checkpoint-100")
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-300",
        "checkpoint-400",
    ]
    checkpoint.prune(tmp_path, tmp_path / "checkpoint-400", 2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-300", "checkpoint-400"]


# Which way


@pytest.mark.parametrize(
    ("value", "better"), [("fid", "low"), ("clip_score", "high"), ("precision", "high"), ("retrieval", "high")]
)
def test_the_direction_is_the_metric_s(value: str, better: str) -> None:
    assert best.direction(value, {"every": 10}) == better
    assert best.direction(value, {"every": 10, "metrics": ["fid", "clip_score", "prdc"]}) == better


@pytest.mark.parametrize(
    ("value", "section", "message"),
    [
        ("fid", {}, r"run.keep_best 'fid' needs quick evaluations; set eval.every, or leave it out"),
        ("fid", {"every": 0}, r"needs quick evaluations"),
        ("fdi", {"every": 9, "metrics": ["fid"]}, r"'fdi': no metric of eval.metrics gives it; did you mean 'fid'\?"),
        ("clip_score", {"every": 9, "metrics": ["fid"]}, r"no metric of eval.metrics gives it; known: fid"),
    ],
)
def test_a_value_that_is_not_measured_is_told(value: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best.direction(value, section)


def test_a_value_without_a_direction_cannot_be_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(ABOUT=SimpleNamespace(values=("hue",), better=""))
    monkeypatch.setattr(registry, "find", lambda kind, name: about)
    with pytest.raises(ValueError, match=r"'hue': its metric does not say which way is better; choose another value"):
        best.direction("hue", {"every": 9, "metrics": ["hue"]})


# In a config

TREE: dict[str, Any] = {
    "model": {"family": "sd", "path": "teacher"},
    "method": {"name": "dmd2"},
    "data": {"source": "prompts", "path": "prompts.txt"},
    "optim": {"student": {}, "fake_score": {}},
}


def test_the_best_cannot_be_exported_where_none_is_kept() -> None:
    with pytest.raises(ConfigError, match=r"run: export best needs keep_best to say by which value, such as fid"):
        recipe.decode({**TREE, "run": {"out": "x", "steps": 3, "export": "best"}}, "run.yaml")
    found = recipe.decode({**TREE, "run": {"out": "x", "steps": 3, "export": "best", "keep_best": "fid"}}, "run.yaml")
    assert (found.run.export, found.run.keep_best) == ("best", "fid")
