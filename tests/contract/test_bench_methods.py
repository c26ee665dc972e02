"""``fastgen bench methods``: trains what is not trained, judges what is not judged, and says what came out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgen import cli, config, tracking
from fastgen.evaluation import methods, report, runner
from tests import command
from tests.command import Result, fastgen

PAIRS = {"number": 4, "num_steps": 4, "path": [499], "guidance_scale": 2.0, "batch_size": 4}
LR = {"lr": 1e-3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two.yaml: DMD2 for two steps; paired.yaml: regression on pairs that pairs.yaml makes, one step."""
    folder = command.world(tmp_path_factory.mktemp("world"))
    section = {
        "metrics": ["fid", "clip_score", "diversity", "latency"],
        "features": "clip",
        "weights": {"clip": str(command.clip(folder / "clip"))},
        "reference": {"source": "images", "path": str(folder / "images")},
        "num_images": 8,
        "batch_size": 4,
        "repeats": 1,
        "comparison": 2,
        "teacher_steps": [3, 2, 1],
        "student_steps": [2, 1],
        "every": 2,
        "num_images_training": 8,
    }
    base = yaml.safe_load((folder / "run.yaml").read_text())
    base["run"] |= {"checkpoint_every": 2, "sample_every": 0}
    two = base | {"eval": section, "student": {"steps": 2}, "run": base["run"] | {"out": str(folder / "two")}}
    paired = two | {
        "method": {"name": "kd"},
        "student": {"steps": 1},
        "data": {"source": "pairs", "path": str(folder / "pairs"), "made_by": str(folder / "pairs.yaml")},
        "optim": {"student": LR},
        "run": base["run"] | {"out": str(folder / "paired")},
    }
    made_by = {"model": base["model"], "data": base["data"], "pairs": PAIRS | {"out": "elsewhere"}}
    for name, tree in (("two", two), ("paired", paired), ("pairs", made_by)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    (folder / "docs").mkdir()
    (folder / "docs" / "results.md").write_text("# Results\n\n<!-- methods -->\n<!-- /methods -->\n\nthe rest\n")
    return folder


def bench(world: Path, *names: str) -> Result:
    configs = [world / f"{name}.yaml" for name in names]
    return fastgen("bench", "methods", *configs, "--out", world / "docs/results.json", "--folder", world / "all")


@pytest.fixture(scope="module")
def benched(world: Path) -> Result:
    """The command as a user gives it, each training in a process of its own."""
    result = bench(world, "two", "paired")
    assert result.code == 0, result.err
    return result


@pytest.fixture
def copy(benched: Result, world: Path, tmp_path: Path) -> Path:
    """What the command left, to be changed, with configs that say so."""
    folder = Path(shutil.copytree(world, tmp_path / "copy"))
    for file in (*folder.rglob("*.yaml"), *folder.rglob("*.json")):
        file.write_text(file.read_text().replace(str(world), str(folder)))
    done(folder)  # cards and configs name other paths now
    return folder


def done(folder: Path) -> list[dict[str, Any]]:
    result = bench(folder, "two", "paired")
    assert result.code == 0, result.err
    return results(folder)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "docs/results.json").read_text())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the subjects that are measured from now on."""
    found: list[str] = []
    whole = runner._subject_row
    monkeypatch.setattr(runner, "_subject_row", lambda s, *rest: found.append(s.name) or whole(s, *rest))
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that are started from now on, in this process."""
    found: list[tuple[str, ...]] = []
    monkeypatch.setattr(methods, "run_fastgen", lambda *words: found.append(words) or command.done(*words))
    return found


def test_every_subject_has_its_row_in_order(benched: Result, world: Path) -> None:
    rows = results(world)
    assert [(row["name"], row["role"], row["steps"]) for row in rows] == [
        ("real images", "data", None),
        ("teacher, 3 steps", "teacher", 3),
        ("teacher, 2 steps", "teacher", 2),
        ("teacher, 1 step", "teacher", 1),
        ("paired, 1 step", "student", 1),
        ("two, 2 steps", "student", 2),
        ("two, 1 step", "student", 1),
    ]
    for row in rows:
        assert {"method", "config", "commit", "images_seen", "train_seconds", "peak_memory_mb"} <= row.keys()
        assert row["diversity"] is not None
        assert row["commit"] == row["protocol"]["commit"]
        assert row["role"] == "data" or row["network_evaluations"] == row["steps"] * (1 + (row["role"] == "teacher"))


def test_a_student_s_row_says_what_its_training_was(benched: Result, world: Path) -> None:
    rows = {row["name"]: row for row in results(world)}
    for name, method, steps in (("paired, 1 step", "kd", 1), ("two, 2 steps", "dmd2", 2)):
        row, run = rows[name], world / name.partition(",")[0]
        last = tracking.read(run / "metrics.jsonl")[-1]
        assert (row["method"], row["trained_steps"]) == (method, steps)
        assert row["config"] == str(world / f"{run.name}.yaml")
        assert (row["iterations"], row["images_seen"]) == (4, 8)
        assert row["train_seconds"] == last["train_seconds"] > 0
        assert row["peak_memory_mb"] == last["peak_memory_mb"] > 100
        assert [(point["step"], point["images_seen"]) for point in row["curve"]] == [(2, 4), (4, 8)]
        assert row["curve"][-1]["fid"] == last["fid"]
    assert rows["two, 1 step"]["curve"] is None
    assert rows["two, 1 step"]["train_seconds"] == rows["two, 2 steps"]["train_seconds"]
    assert rows["paired, 1 step"]["pairs"] == {"number": 4, "num_steps": 4, "guidance_scale": 2.0}
    assert rows["two, 2 steps"]["pairs"] is None
    assert {rows[f"teacher, {n}"][k] for n in ("1 step", "3 steps") for k in methods.TOLD} == {None}


def test_it_says_what_it_did_and_writes_tables_chart_and_page(benched: Result, world: Path) -> None:
    assert f"{world / 'two'}: not begun" in benched.err
    assert f"{world / 'docs/results.json'}, {world / 'docs/results.md'}, {world / 'all/report.html'}" in benched.out
    text = (world / "docs/results.md").read_text()
    assert text.startswith("# Results\n\n<!-- methods -->\n\n### 1 step\n\n| | Made for |")
    assert text.endswith("<!-- /methods -->\n\nthe rest\n")
    assert "![FID over images seen and over seconds of training](results.svg)" in text
    assert (world / "docs/results.svg").read_text().startswith("<svg xmlns=")
    rows = results(world)
    worse = [row["name"] for row in rows if methods.methods_report.worse_than_teacher(row, rows)]
    told = [line for line in benched.out.splitlines() if "worse than the undistilled teacher at as many" in line]
    assert [line.partition(":")[0] for line in told] == worse
    assert text.count(" † |") == len(worse)
    page = (world / "all/report.html").read_text()
    assert all(row["name"] in page for row in rows)
    shown = json.loads((world / "all/comparison/prompts.json").read_text())
    assert {subject["name"] for subject in shown["subjects"]} == {row["name"] for row in rows}


def test_given_again_it_trains_and_measures_nothing(
    copy: Path, measured: list[str], started: list[tuple[str, ...]]
) -> None:
    before = {name: (copy / "docs" / name).read_bytes() for name in ("results.json", "results.md", "results.svg")}
    done(copy)
    assert (measured, started) == ([], [])
    assert before == {name: (copy / "docs" / name).read_bytes() for name in before}


def test_a_cut_off_comparison_goes_on(copy: Path, measured: list[str], started: list[tuple[str, ...]]) -> None:
    """The last run was cut off after its first checkpoint, so neither trained nor judged to the end."""
    before = results(copy)
    shutil.rmtree(copy / "two/pipeline")
    shutil.rmtree(copy / "two/checkpoint-4")
    result = bench(copy, "paired", "two")
    assert result.code == 0, result.err
    assert f"{copy / 'two'}: cut off" in result.err
    assert f"{copy / 'paired'}: finished" in result.err
    assert started == [("train", str(copy / "two.yaml"))]
    assert measured == [], "the same weights come out, so the rows stand"
    rows = [row for row in before if not row["name"].startswith("two")]
    (copy / "docs/results.json").write_text(json.dumps(rows))
    assert [row["fid"] for row in done(copy)] == pytest.approx([row["fid"] for row in before])
    assert measured == ["two, 2 steps", "two, 1 step"]


def test_another_pipeline_or_another_measure_is_measured_anew(copy: Path, measured: list[str]) -> None:
    card = copy / "two/pipeline/fastgen.json"
    card.write_text(card.read_text() + "\n")
    done(copy)
    assert measured == ["two, 2 steps", "two, 1 step"]
    measured.clear()
    for name in ("two", "paired"):
        file = copy / f"{name}.yaml"
        file.write_text(file.read_text().replace("num_images: 8", "seed: 1\n  num_images: 8"))
    result = bench(copy, "two", "paired")
    assert result.code == 0, result.err
    assert f"{copy / 'docs/results.json'}: 7 rows of another measure go" in result.err
    assert len(measured) == 6
    assert len(results(copy)) == 7


def test_rows_of_other_configs_stay_but_one_of_the_same_name_gives_way(copy: Path, measured: list[str]) -> None:
    (copy / "more").mkdir()
    moved = shutil.move(copy / "two.yaml", copy / "more" / "two.yaml")
    result = bench(copy, "more/two")
    assert result.code == 0, result.err
    assert [row["name"] for row in results(copy)].count("two, 2 steps") == 1
    assert {row["config"] for row in results(copy)} == {None, str(copy / "paired.yaml"), str(moved)}
    assert measured == ["two, 2 steps", "two, 1 step"]


def test_a_training_that_fails_stops_no_other(
    copy: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "two")
    monkeypatch.setattr(methods, "run_fastgen", lambda *words: None)
    card = copy / "paired/pipeline/fastgen.json"
    card.write_text(card.read_text() + "\n")
    result = bench(copy, "two", "paired")
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        f"fastgen: the training of {copy / 'two.yaml'} failed; the same command goes on"
    )
    assert f"{copy / 'two.yaml'}: the training failed; the same command goes on with it" in result.err
    assert measured == ["paired, 1 step"]


# Errors


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return apply


def another_teacher(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "other")
    change("two.yaml", f"path: {folder}/teacher", f"path: {folder}/other")(folder)


def same_folder(folder: Path) -> None:
    change("two.yaml", f"out: {folder}/two", f"out: {folder}/paired")(folder)


def pretraining(folder: Path) -> None:
    tree = yaml.safe_load((folder / "two.yaml").read_text())
    tree |= {"method": {"name": "pretrain"}, "optim": {"teacher": LR}}
    (folder / "two.yaml").write_text(yaml.safe_dump(tree))


def uncounted(folder: Path) -> None:
    file = folder / "two/metrics.jsonl"
    file.write_text(re.sub(r', "train_seconds": [\d.e-]+', "", file.read_text()))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another run": (
        change("two.yaml", "lr: 0.001", "lr: 0.002"),
        r"two: holds a run of another config \(optim\.\w+\.lr 0\.001, not 0\.002\); move it away, or set another",
    ),
    "a longer run": (
        change("two.yaml", "steps: 4", "steps: 6"),
        r"two: holds a run of another config \(run\.steps 4, not 6\)",
    ),
    "another teacher": (
        another_teacher,
        r"paired\.yaml and \S+two\.yaml: have no common measure \(model\.path '.*teacher', not '.*other'\); set it",
    ),
    "another measure": (
        change("two.yaml", "num_images: 8", "num_images: 7"),
        r"have no common measure \(eval\.num_images 8, not 7\)",
    ),
    "one run folder": (same_folder, r"two configs have the run\.out '\S+paired'; give each its own"),
    "a teacher's training": (pretraining, r"two\.yaml: pretrains a teacher, which is no method to compare"),
    "no place": (
        change("docs/results.md", "<!-- methods -->", ""),
        r"results\.md: has no place for the results; write <!-- methods --> and <!-- /methods -->",
    ),
    "an old run": (uncounted, r"two: was trained before train_seconds was counted; move it away to have it trained"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_one_line_before_anything_is_trained(
    copy: Path, name: str, measured: list[str], started: list[tuple[str, ...]]
) -> None:
    harm, message = BAD[name]
    harm(copy)
    before = (copy / "docs/results.json").read_bytes()
    result = bench(copy, "paired", "two")
    assert (result.code, result.out) == (2, "")
    assert re.search(rf"^fastgen: .*{message}", result.err), result.err
    assert (measured, started) == ([], [])
    assert (copy / "docs/results.json").read_bytes() == before


def test_two_configs_of_one_name_or_none_cannot_be_compared(world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "two.yaml", tmp_path / "two.yaml")
    with pytest.raises(ValueError, match=r"two configs have the file name 'two'; give each its own"):
        methods.entries({"a": world / "two.yaml", "b": tmp_path / "two.yaml"})
    with pytest.raises(ValueError, match="no config to compare; give at least one"):
        methods.entries({})


def test_how_often_a_run_is_measured_may_differ(world: Path, tmp_path: Path) -> None:
    (tmp_path / "often.yaml").write_text(f"base: {world}/two.yaml\nrun: {{out: x}}\neval: {{every: 1}}\n")
    found = methods.entries({"a": world / "two.yaml", "b": tmp_path / "often.yaml"})
    assert [entry.label for entry in found] == ["two", "often"]


def test_the_shipped_configs_of_all_methods_can_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a config given it is these; a shipped one given by its path goes by its listed name."""
    given: list[methods.Entry] = []
    monkeypatch.setattr(methods, "bench", lambda found, places: (given.extend(found), ([], []))[1])
    monkeypatch.setattr(report, "print_table", lambda rows: None)
    assert fastgen("bench", "methods").code == 0
    names = [entry.name for entry in given]
    assert {"emoji/dmd2", "emoji/kd", "emoji/lcm", "emoji/scm"} <= set(names)
    assert [name.removeprefix("emoji/") for name in names] == [entry.recipe.method.name for entry in given]
    given.clear()
    assert fastgen("bench", "methods", cli.find_config(Path("emoji/sana_sprint")), "emoji/dmd2").code == 0
    assert [entry.name for entry in given] == ["emoji/sana_sprint", "emoji/dmd2"]
    assert config.read(given[0].path)["method"]["name"] == "scm"
