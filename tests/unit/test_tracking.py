"""Rows of numbers: what is kept when a run goes on, and what the other trackers are given."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgen import parallel, tracking
from fastgen.tracking import JsonLines, TensorBoard, WandB, read, trackers


def rows(path: Path, *steps: int) -> Path:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps))
    return path


def test_a_row_is_one_line_of_json(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl", 0)
    tracker.log(1, {"critic/denoising": 0.25, "student/dmd": 3})
    tracker.log(2, {"fid": 12.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "critic/denoising": 0.25, "student/dmd": 3.0},
        {"step": 2, "fid": 12.0},
    ]
    assert read(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_small_numbers_keep_their_digits(tmp_path: Path) -> None:
    """A loss of 1e-8 is not 0, and a large gradient norm loses nothing that matters either."""
    JsonLines(tmp_path / "metrics.jsonl", 0).log(1, {"small": 1.2345678e-8, "large": 123456.78, "third": 1 / 3})
    row = read(tmp_path / "metrics.jsonl")[0]
    assert row["small"] == pytest.approx(1.2345678e-8, rel=1e-6)
    assert row["large"] == pytest.approx(123456.78, rel=1e-6)
    assert len(str(row["third"])) < 12


def strict(line: str) -> Any:
    """As a reader that knows only the standard takes it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_what_is_not_finite_is_null_in_the_file_and_not_there_for_who_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {"loss": 1.0, "norm": math.inf, "other": math.nan, "third": -math.inf})
    tracker.log(2, {"loss": 2.0, "norm": 3.0})
    lines = path.read_text().splitlines()
    assert strict(lines[0]) == {"step": 1, "loss": 1.0, "norm": None, "other": None, "third": None}
    assert read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0, "norm": 3.0}]
    JsonLines(path, 2)
    assert path.read_text().splitlines() == lines


def test_rows_from_before_there_was_null_become_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "norm": Infinity, "loss": NaN, "other": 2.0}\n')
    assert read(path) == [{"step": 1, "other": 2.0}]
    JsonLines(path, 1)
    assert strict(path.read_text()) == {"step": 1, "norm": None, "loss": None, "other": 2.0}


def test_rows_of_later_steps_are_dropped_when_a_run_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    path = rows(tmp_path / "metrics.jsonl", 2, 4, 5, 6)
    tracker = JsonLines(path, 4)
    assert [row["step"] for row in read(path)] == [2, 4]
    tracker.log(5, {"loss": 0.0})
    assert [row["step"] for row in read(path)] == [2, 4, 5]


def test_a_new_run_begins_with_no_row(tmp_path: Path) -> None:
    path = rows(tmp_path / "metrics.jsonl", 2, 4)
    JsonLines(path, 0)
    assert path.read_text() == ""
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", ['{"step": 6, "lo', '{"step"', "{", '{"step": 6, "loss": 3.0}'])
def test_a_last_line_that_a_kill_cut_short_does_no_harm(tmp_path: Path, cut: str) -> None:
    path = rows(tmp_path / "metrics.jsonl", 2, 4)
    path.write_text(path.read_text() + cut)
    tracker = JsonLines(path, 4)
    tracker.log(6, {"loss": 3.0})
    assert [row["step"] for row in read(path)] == [2, 4, 6]


def test_the_rows_stay_whole_if_the_disk_is_full_as_they_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "metrics.jsonl", 2, 4)

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        JsonLines(path, 2)
    assert [row["step"] for row in read(path)] == [2, 4]


def test_metrics_jsonl_is_always_kept_and_others_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "TensorBoard", lambda folder: ("tensorboard", folder))
    monkeypatch.setattr(tracking, "WandB", lambda run, steps_done, settings: ("wandb", run, steps_done, settings))
    made = trackers([], tmp_path, 0, {})
    assert [type(t) for t in made] == [JsonLines]
    assert trackers(["wandb", "tensorboard"], tmp_path, 7, {"a": 1})[1:] == [
        ("tensorboard", tmp_path / "tb"),
        ("wandb", tmp_path, 7, {"a": 1}),
    ]


def test_only_the_main_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert trackers(["tensorboard"], tmp_path, 0, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_each_value_as_a_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path / "tb")
    tracker.log(3, {"critic/denoising": 0.5, "fid": 8.0})
    tracker.log(4, {"fid": 7.0})
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("fid")] == [(3, 8.0), (4, 7.0)]
    assert [(e.step, e.value) for e in found.Scalars("critic/denoising")] == [(3, 0.5)]


def test_wandb_gets_rows_and_the_whole_config_but_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), id="abc")

    def init(**named: Any) -> Any:
        calls.append(named)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tmp_path / "demo").mkdir()
    WandB(tmp_path / "demo", 0, {"run": {"steps": 3}}).log(2, {"fid": 1.0})
    assert calls[0]["name"] == "demo"
    assert calls[0]["config"] == {"run": {"steps": 3}}
    assert not {"key", "api_key", "project", "entity"} & set(calls[0])
    assert calls[1] == (2, {"fid": 1.0})


def test_a_run_that_goes_on_keeps_its_wandb_id_and_a_new_one_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def init(**named: Any) -> Any:
        asked.append(named["id"])
        assert named["resume"] == "allow"
        return SimpleNamespace(id=named["id"] or f"new{len(asked)}")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for steps_done in (0, 4, 6):
        WandB(tmp_path, steps_done, {})
    assert asked == [None, "new1", "new1"]
    WandB(tmp_path, 0, {})  # the folder's checkpoints were removed
    WandB(tmp_path, 2, {})
    assert asked[3:] == [None, "new4"]
    (tmp_path / "wandb_id").unlink()
    WandB(tmp_path, 2, {})  # the first part had no W&B
    assert asked[5] is None


@pytest.mark.parametrize(
    ("tracker", "package", "message"),
    [
        (lambda folder: TensorBoard(folder), "torch.utils.tensorboard", "tensorboard is not installed; pip install"),
        (
            lambda folder: WandB(folder, 0, {}),
            "wandb",
            r"wandb is not installed; pip install 'fastgen-diffusion\[wandb\]'",
        ),
    ],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Any, package: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"run.trackers: {message}"):
        tracker(tmp_path)
