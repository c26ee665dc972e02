"""Rows of numbers: what is kept when a run goes on, and what the other trackers are given."""

from __future__ import annotations

import json
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
    monkeypatch.setattr(tracking, "WandB", lambda run, settings: ("wandb", run, settings))
    made = trackers([], tmp_path, 0, {})
    assert [type(t) for t in made] == [JsonLines]
    assert trackers(["wandb", "tensorboard"], tmp_path, 0, {"a": 1})[1:] == [
        ("tensorboard", tmp_path / "tb"),
        ("wandb", tmp_path, {"a": 1}),
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
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)))

    def init(**named: Any) -> Any:
        calls.append(named)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    WandB(tmp_path / "demo", {"run": {"steps": 3}}).log(2, {"fid": 1.0})
    assert calls[0]["name"] == "demo"
    assert calls[0]["config"] == {"run": {"steps": 3}}
    assert not {"key", "api_key", "project", "entity"} & set(calls[0])
    assert calls[1] == (2, {"fid": 1.0})


@pytest.mark.parametrize(
    ("tracker", "package", "message"),
    [
        (lambda folder: TensorBoard(folder), "torch.utils.tensorboard", "tensorboard is not installed; pip install"),
        (
            lambda folder: WandB(folder, {}),
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
