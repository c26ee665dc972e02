"""Rows of numbers: what is kept when a run goes on, and what the other trackers are given."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image

from fastgen import parallel, recipe, tracking
from fastgen.tracking import JsonLines, TensorBoard, Trackio, WandB, closing, read, trackers


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


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, run: Path, steps_done: int, settings: Any) -> None:
        self.made, self.told = (run, steps_done, settings), []

    def log(self, step: int, values: Any) -> None:
        self.told.append((step, dict(values)))

    def picture(self, step: int, path: Path) -> None:
        self.told.append((step, path))

    def close(self, failed: bool) -> None:
        self.told.append(failed)


def test_metrics_jsonl_is_always_kept_and_others_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.NAMES, "tensorboard", Kept)
    monkeypatch.setitem(tracking.NAMES, "wandb", Kept)
    assert [type(t) for t in trackers([], tmp_path, 0, {})] == [JsonLines]
    assert [type(t) for t in trackers(["jsonl"], tmp_path, 0, {})] == [JsonLines]
    made = trackers(["wandb", "tensorboard", "wandb"], tmp_path, 7, {"a": 1})
    assert [type(t) for t in made] == [JsonLines, Kept, Kept]
    assert {t.made == (tmp_path, 7, {"a": 1}) for t in made if isinstance(t, Kept)} == {True}


def test_configs_know_the_trackers_that_there_are() -> None:
    known = get_args(get_args(get_type_hints(recipe.Run)["trackers"])[0])
    assert sorted(known) == sorted(tracking.NAMES)
    assert tracking.PACKAGES.keys() == tracking.NAMES.keys() - {"jsonl"}


def test_an_unknown_tracker_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown tracker 'mlflow'.*jsonl, tensorboard, trackio, wandb"):
        trackers(["mlflow"], tmp_path, 0, {})
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    assert trackers(["tensorboard"], tmp_path, 0, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_none_is_imported_that_is_not_asked_for() -> None:
    code = (
        "import sys; from pathlib import Path; from fastgen import tracking; early = 'torch' in sys.modules;"
        "tracking.trackers([], Path(sys.argv[1]), 0, {}); "
        "print(early, {'wandb', 'trackio', 'tensorboard'} & {*sys.modules})"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "False set()\n"


def test_trackers_are_closed_however_the_training_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    well, ill, last = (Kept(tmp_path, 0, {}) for _ in range(3))

    def fails(failed: bool) -> None:
        raise ConnectionError("no network")

    ill.close = fails  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "fastgen"), closing([well, ill, last]):
        pass
    assert (well.told, last.told) == ([False], [False])
    assert caplog.messages == ["run.trackers: Kept did not finish (no network)"]
    with pytest.raises(KeyboardInterrupt), closing([well]):
        raise KeyboardInterrupt
    assert well.told == [False, True]


def test_those_that_were_made_are_closed_if_another_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Kept(tmp_path, 0, {})
    monkeypatch.setitem(tracking.NAMES, "wandb", lambda *_: one)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="trackio is not installed"):
        trackers(["wandb", "trackio"], tmp_path, 0, {})
    assert one.told == [True]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A sample grid of one colour."""
    Image.new("RGB", (8, 4), (10, 200, 30)).save(tmp_path / "grid.png")
    return tmp_path / "grid.png"


# TensorBoard


def accumulated(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_scalars_sample_grids_and_the_config(tmp_path: Path, grid: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path, 0, {"run": {"steps": 4}})
    tracker.log(3, {"critic/denoising": 0.5, "fid": 8.0})
    tracker.log(4, {"fid": 7.0})
    tracker.picture(4, grid)
    tracker.close(failed=False)
    found = accumulated(tmp_path / "tb")
    assert [(e.step, e.value) for e in found.Scalars("fid")] == [(3, 8.0), (4, 7.0)]
    assert [(e.step, e.value) for e in found.Scalars("critic/denoising")] == [(3, 0.5)]
    (image,) = found.Images("samples")
    assert (image.step, image.width, image.height) == (4, 8, 4)
    with Image.open(io.BytesIO(image.encoded_image_string)) as shown:
        assert shown.getpixel((0, 0)) == (10, 200, 30)
    assert '"steps": 4' in str(found.Tensors("config/text_summary")[0].tensor_proto.string_val[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_goes_on_in_the_same_curves_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for begin, end, value in ((0, 5, 1.0), (3, 6, 2.0)):  # killed after 5 steps, with a checkpoint at 3
        tracker = TensorBoard(tmp_path, begin, {})
        for step in range(begin + 1, end + 1):
            tracker.log(step, {"loss": value})
        tracker.close(failed=end == 5)
        time.sleep(1.1)  # its files are named by the second, and read in that order
    found = accumulated(tmp_path / "tb").Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


# W&B


class Called:
    """What a stand-in of a package was asked for."""

    def __init__(self) -> None:
        self.init: list[dict[str, Any]] = []
        self.rows: list[Any] = []
        self.ends: list[Any] = []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Called:
    """A stand-in with the signatures of wandb 0.31 that are used."""
    called = Called()

    def log(data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        called.rows.append((step, data))

    def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
        called.ends.append(exit_code)

    def init(
        *, name: str, dir: str, config: dict[str, Any], resume: str, id: str | None = None, project: str | None = None
    ) -> Any:
        called.init.append({"name": name, "dir": dir, "config": config, "resume": resume, "id": id})
        assert project is None  # which its environment says
        return SimpleNamespace(id=id or f"new{len(called.init)}", log=log, finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: ("image", path)))
    return called


def test_wandb_gets_rows_grids_and_the_whole_config_but_no_key(tmp_path: Path, wandb: Called, grid: Path) -> None:
    (tmp_path / "demo").mkdir()
    tracker = WandB(tmp_path / "demo", 0, {"run": {"steps": 3}})
    tracker.log(2, {"fid": 1.0})
    tracker.picture(2, grid)
    tracker.close(failed=True)
    assert wandb.init[0]["name"] == "demo"
    assert wandb.init[0]["config"] == {"run": {"steps": 3}}
    assert wandb.rows == [(2, {"fid": 1.0}), (2, {"samples": ("image", str(grid))})]
    assert wandb.ends == [1]


def test_a_run_that_goes_on_keeps_its_wandb_id_and_a_new_one_gets_its_own(tmp_path: Path, wandb: Called) -> None:
    for steps_done in (0, 4, 6):
        WandB(tmp_path, steps_done, {})
    WandB(tmp_path, 0, {})  # the folder's checkpoints were removed
    WandB(tmp_path, 2, {})
    (tmp_path / "wandb_id").unlink()
    WandB(tmp_path, 2, {})  # the first part had no W&B
    assert [asked["id"] for asked in wandb.init] == [None, "new1", "new1", None, "new4", None]
    assert {asked["resume"] for asked in wandb.init} == {"allow"}


@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_offline_keeps_both_parts_of_a_run_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for begin in (0, 2):
        tracker = WandB(tmp_path, begin, {"run": {"steps": 4}})
        for step in (begin + 1, begin + 2):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.picture(begin + 2, grid)
        tracker.close(failed=not begin)
        time.sleep(1.1)  # its folders are named by the second
    kept = (tmp_path / "wandb_id").read_text().strip()
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert {part.name.rpartition("-")[2] for part in parts} == {kept}
    assert all(list(part.glob("*.wandb")) and list(part.rglob("*.png")) for part in parts)


# Trackio


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Called:
    """A stand-in with the signatures of trackio 0.43 that are used."""
    called = Called()

    def log(metrics: dict[str, Any], step: int | None = None) -> None:
        called.rows.append((step, metrics))

    def init(
        project: str, name: str | None = None, config: dict[str, Any] | None = None, resume: str = "never"
    ) -> Any:
        called.init.append({"project": project, "name": name, "config": config, "resume": resume})
        print("* Trackio project initialized")
        return SimpleNamespace(log=log)

    def finish() -> None:
        called.ends.append(None)
        print("* Run finished")

    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(init=init, finish=finish, Image=lambda path: ("image", path))
    )
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return called


def test_trackio_gets_rows_grids_and_config_and_says_nothing_on_stdout(
    tmp_path: Path, trackio: Called, grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    tracker = Trackio(tmp_path / "demo", 0, {"run": {"steps": 3}})
    tracker.log(2, {"fid": 1.0})
    tracker.picture(2, grid)
    tracker.close(failed=True)
    assert trackio.init[0]["project"] == "fastgen"
    assert re.fullmatch(r"demo-[0-9a-f]{6}", trackio.init[0]["name"])
    assert trackio.init[0]["config"] == {"run": {"steps": 3}}
    assert trackio.rows == [(2, {"fid": 1.0}), (2, {"samples": ("image", str(grid))})]
    assert trackio.ends == [None]
    assert capsys.readouterr().out == ""


def test_a_run_goes_on_in_its_own_trackio_run_and_in_no_other_of_the_folder_s_name(
    tmp_path: Path, trackio: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "a" / "demo", tmp_path / "b" / "demo"
    for run in (one, two):
        run.mkdir(parents=True)
        Trackio(run, 0, {})
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    Trackio(one, 4, {})
    Trackio(one, 0, {})
    first, other, again, anew = trackio.init
    assert (again["name"], again["resume"], again["project"]) == (first["name"], "allow", "mine")
    assert len({first["name"], other["name"], anew["name"]}) == 3
    assert {asked["resume"] for asked in (first, other, anew)} == {"never"}


@pytest.mark.filterwarnings("ignore")
def test_the_real_trackio_has_one_run_of_both_parts(tmp_path: Path, grid: Path) -> None:
    """In a process of its own, since it reads where to write when it is imported."""
    pytest.importorskip("trackio")
    code = """
import sys; from pathlib import Path; from fastgen.tracking import Trackio
run, begin = Path(sys.argv[1]), int(sys.argv[2])
tracker = Trackio(run, begin, {"run": {"steps": 4}})
for step in (begin + 1, begin + 2): tracker.log(step, {"loss": 1.0 / step})
tracker.picture(begin + 2, Path(sys.argv[3])); tracker.close(False)
"""
    (tmp_path / "demo").mkdir()
    told = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "db"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    for begin in ("0", "2"):
        words = [sys.executable, "-c", code, str(tmp_path / "demo"), begin, str(grid)]
        done = subprocess.run(words, capture_output=True, text=True, env=told, check=True)
        assert done.stdout == ""
    (base,) = (tmp_path / "db").glob("*.db")
    with contextlib.closing(sqlite3.connect(base)) as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in found} == {(tmp_path / "demo" / "trackio_name").read_text().strip()}
    assert [(step, b"loss" in row or b"samples" in row) for _, step, row in found] == [
        (step, True) for step in (1, 2, 2, 3, 4, 4)
    ]


@pytest.mark.parametrize(
    ("tracker", "package", "message"),
    [
        (TensorBoard, "torch.utils.tensorboard", "tensorboard is not installed; pip install"),
        (WandB, "wandb", r"wandb is not installed; pip install 'fastgen-diffusion\[wandb\]'"),
        (Trackio, "trackio", r"trackio is not installed; pip install 'fastgen-diffusion\[trackio\]'"),
    ],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Any, package: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"run.trackers: {message}"):
        tracker(tmp_path, 0, {})
