"""What can be told of run folders: where they are, how far they came and how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen import registry, runs, train
from fastgen.health import Unhealthy
from fastgen.interrupt import Interrupted
from tests.command import done, fastgen


def made(run: Path, step: int = 4, steps: int = 4, pipeline: bool = True, **settings: Any) -> Path:
    """A run folder with a row every two steps."""
    run.mkdir(parents=True)
    tree = {"method": {"name": "dmd2"}, "run": {"out": str(run), "steps": steps, **settings}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [
        {"step": n, "student/dmd": 1.0 / n, "train_seconds": 10.0 * n, "fid": 20.0 - abs(n - 2), "clip_score": 1.0 * n}
        for n in range(2, step + 1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "train.log").write_text("2026-01-01 00:00:00,000 INFO begun\n")
    if pipeline:
        (run / "pipeline").mkdir()
    return run


def ended(run: Path, error: BaseException) -> None:
    """As a training that this error ends leaves its log."""
    with pytest.raises(type(error)), train.logging_to(run / "train.log"):
        raise error


def test_runs_are_found_at_any_depth_and_nothing_within_them(tmp_path: Path) -> None:
    for name in ("b/deep/er", "a", "a/samples/no_run", ".hidden", "c"):
        made(tmp_path / name)
    (tmp_path / "c" / "config.yaml").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [r["run"] for r in runs.rows(tmp_path)] == [str(tmp_path / "a"), str(tmp_path / "b/deep/er")]
    assert [r["run"] for r in runs.rows(tmp_path / "a")] == [str(tmp_path / "a")]


def test_a_row_says_method_step_best_time_and_age(tmp_path: Path) -> None:
    run = made(tmp_path / "run", step=4, steps=10, pipeline=False)
    (run / "checkpoint-5").mkdir()
    os.utime(run / "metrics.jsonl", (time.time() - 100, time.time() - 100))
    row = runs.row(run)
    assert (row["method"], row["step"], row["steps"], row["seconds"]) == ("dmd2", 5, 10, 40.0)
    assert 99 < row["age"] < 200
    assert row["best"] == {"name": "fid", "value": 18.0, "step": 4}


@pytest.mark.parametrize(
    ("error", "state", "note"),
    [
        (None, "stopped", ""),
        (Interrupted("SIGTERM"), "stopped", ""),
        (KeyboardInterrupt(), "stopped", ""),
        (
            Unhealthy("ended at step 3, since students collapse"),
            "unhealthy",
            "ended at step 3, since students collapse",
        ),
        (OSError("No space left\non device"), "failed", "No space left"),
    ],
)
def test_the_state_is_what_ended_it(tmp_path: Path, error: BaseException | None, state: str, note: str) -> None:
    run = made(tmp_path / "run", steps=10)
    if error:
        ended(run, error)
    assert (runs.row(run)["state"], runs.row(run)["note"]) == (state, note)


def test_a_run_is_done_at_its_last_step_with_a_pipeline(tmp_path: Path) -> None:
    assert runs.row(made(tmp_path / "a"))["state"] == "done"
    assert runs.row(made(tmp_path / "b", pipeline=False))["state"] == "stopped"  # before it was written
    assert runs.row(made(tmp_path / "c", steps=5))["state"] == "stopped"  # the config was given more steps since


def test_a_run_is_running_while_a_process_holds_its_log_and_no_longer(tmp_path: Path) -> None:
    run = made(tmp_path / "run", steps=10)
    with train.logging_to(run / "train.log"):
        assert runs.row(run)["state"] == "running"
    assert runs.row(run)["state"] == "stopped"
    code = "import sys, time; from fastgen import runs; from pathlib import Path\n"
    code += "with runs.held(Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, run / "train.log"], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert runs.row(run)["state"] == "running"
        child.kill()
        child.wait()
    assert runs.row(run)["state"] == "stopped"


@pytest.mark.parametrize(
    ("file", "text", "note"),
    [
        ("config.yaml", "a: [", "not valid YAML"),
        ("config.yaml", "[1, 2]", "config.yaml is no mapping"),
        ("config.yaml", "method: {name: x}", "config.yaml: run is no mapping"),
        ("config.yaml", "method: {name: x}\nrun: {out: o}", "no 'steps'"),
        ("best.json", '{"step": 2}', "no 'metric'"),
        ("best.json", "{", "delimiter|Expecting"),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so(tmp_path: Path, file: str, text: str, note: str) -> None:
    run = made(tmp_path / "run")
    (run / file).write_bytes(text.encode("latin-1"))
    row = runs.row(run)
    assert row["state"] == "damaged"
    assert any(part in row["note"] for part in note.split("|")), row["note"]


def test_a_last_row_that_a_kill_cut_short_is_no_damage(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "fid')
    assert (runs.row(run)["state"], runs.row(run)["step"]) == ("done", 4)


def test_the_best_is_the_marked_one_or_that_of_the_named_value(tmp_path: Path) -> None:
    assert runs.row(made(tmp_path / "a", keep_best="clip_score"))["best"] == {
        "name": "clip_score",
        "value": 4.0,
        "step": 4,
    }
    run = made(tmp_path / "b")
    (run / "best.json").write_text('{"step": 2, "metric": "retrieval", "value": 0.5, "better": "high"}')
    assert runs.row(run)["best"] == {"name": "retrieval", "value": 0.5, "step": 2}
    run = made(tmp_path / "c")
    (run / "metrics.jsonl").write_text('{"step": 1, "student/dmd": 0.5, "images_seen": 3}\n')
    assert runs.row(run)["best"] is None


def test_which_way_is_better_is_what_the_metrics_say() -> None:
    told = {}
    for name in registry.names("metric"):
        about = vars(registry.find("metric", name)).get("ABOUT")
        told |= dict.fromkeys(about.values, about.better) if about else {}
    found = runs.directions()
    assert {"fid": "low", "clip_score": "high", "retrieval": "high"}.items() <= found.items()
    assert {name: told[name] for name in found} == found


def test_the_command_shows_a_table_or_json(tmp_path: Path) -> None:
    made(tmp_path / "one")
    ended(made(tmp_path / "two", steps=10), OSError("No space left"))
    shown = done("runs", tmp_path).out.splitlines()
    assert shown[0].split() == ["run", "state", "method", "step", "best", "trained", "last", "row"]
    assert shown[1].split()[:9] == [str(tmp_path / "one"), "done", "dmd2", "4/4", "fid", "18", "at", "4", "40"]
    assert shown[-1] == f"{tmp_path / 'two'}: failed, No space left"
    rows = json.loads(done("runs", tmp_path, "--json").out)
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert done("runs", tmp_path / "one" / "pipeline").out == f"{tmp_path / 'one' / 'pipeline'} holds no runs\n"
    result = fastgen("runs", tmp_path / "none")
    assert (result.code, result.err) == (
        2,
        f"fastgen: {tmp_path / 'none'}: no such folder; name one that holds runs\n",
    )


def test_it_needs_no_torch() -> None:
    code = "import sys; from fastgen import cli, runs; from fastgen.evaluation import curves; "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
