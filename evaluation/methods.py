"""``fastgen bench methods``: train every config given, judge every student by one measure, write it all down.

Each training is a process of its own, so that its memory is its own and a failure ends no other. What is done stays
done: a run folder that holds the finished run of its config is not trained again, and a row whose pipeline and
settings are still the same is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen import checkpoint, tracking
from fastgen import config as configs
from fastgen import recipe as recipes
from fastgen.checkpoint import write_text
from fastgen.data.pairs import CARD
from fastgen.data.pairs import read_card as read_pairs_card
from fastgen.export import check_pipeline, read_card
from fastgen.recipe import Recipe

from . import judge, methods_report, report, runner
from .config import EvalConfig
from .runner import Row, Subject

log = logging.getLogger("fastgen")

CURVE = ("step", "images_seen", "train_seconds", "fid", "clip_score", "retrieval", "diversity")
"""What is kept of the quick evaluations of a run."""
TOLD = (
    "method",
    "config",
    "trained_steps",
    "iterations",
    "images_seen",
    "train_seconds",
    "peak_memory_mb",
    "pairs",
    "curve",
)
"""What a row says of a training, None of the teacher and of real images."""
UNMEASURED = (
    *("every", "num_images_training", "teacher_steps", "student_steps", "comparison"),
    *("bootstrap", "keep_images"),
)
"""Options of ``eval:`` that change no row."""


@dataclass(frozen=True)
class Entry:
    """A config to be compared. name: as it is given or listed."""

    name: str
    path: Path
    recipe: Recipe

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.path.stem

    @property
    def run(self) -> Path:
        """Its run folder."""
        return Path(self.recipe.run.out)

    @property
    def pipeline(self) -> Path:
        """What its run leaves."""
        return self.run / "pipeline"

    @property
    def judged_by(self) -> EvalConfig:
        """Its ``eval:`` section."""
        return judge.settings(self.recipe.eval, str(self.path))


@dataclass(frozen=True)
class Places:
    """Where the comparison is written.

    Attributes:
        results: its rows, JSON; beside it, with the ending .svg, a chart.
        document: Markdown whose place ``<!-- methods -->`` holds the tables.
        folder: results.json, pictures and report.html of all subjects together.
    """

    results: Path
    document: Path
    folder: Path

    @property
    def chart(self) -> Path:
        """The chart's file."""
        return self.results.with_suffix(".svg")


def entries(given: Mapping[str, Path]) -> list[Entry]:
    """The configs by name, decoded. Raises ValueError if they cannot be compared."""
    found = [Entry(name, path, recipes.decode(configs.read(path), str(path))) for name, path in given.items()]
    if not found:
        raise ValueError("no config to compare; give at least one")
    for entry in found:
        if entry.recipe.method.name == "pretrain":
            raise ValueError(f"{entry.path}: pretrains a teacher, which is no method to compare")
        difference = _difference(_common(found[0]), _common(entry))
        if difference:
            raise ValueError(f"{found[0].path} and {entry.path}: have no common measure ({difference}); set it alike")
    for what, values in (("file name", [e.label for e in found]), ("run.out", [str(e.run) for e in found])):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"two configs have the {what} {twice[0]!r}; give each its own")
    return found


def _common(entry: Entry) -> dict[str, Any]:
    """What configs that are compared must share: the teacher, and the measure but for how often it is taken."""
    model, measure = entry.recipe.model, configs.encode(entry.judged_by)
    return {"model": {"family": model.family, "path": model.path}, "eval": measure | {"every": None}}


def bench(found: Sequence[Entry], places: Places) -> tuple[list[Row], list[str]]:
    """Train and judge what is not done yet; all rows, and the names of the configs whose training failed.

    Raises ValueError before anything is trained if a run folder holds another run, or the document has no place.
    """
    report.around(places.document, methods_report.PLACE)
    state = {entry.name: standing(entry) for entry in found}
    comparison = Comparison(found[0], places)
    failed: list[str] = []
    for entry in found:
        log.info("%s: %s", entry.run, state[entry.name])
        if state[entry.name] != "finished":
            train(entry)
            if standing(entry) != "finished":
                log.error("%s: the training failed; the same command goes on with it", entry.name)
                failed.append(entry.name)
                continue
        comparison.add(judge.students(entry.pipeline, comparison.config, entry.label), entry.pipeline, told(entry))
    return comparison.rows, failed


class Comparison:
    """The rows so far, the teacher's and those of real images first; each addition is written down at once."""

    def __init__(self, first: Entry, places: Places) -> None:
        """first: whose teacher and ``eval:`` section are everybody's."""
        teacher = recipes.locate(first.recipe.model.path)
        check_pipeline(teacher)
        self.config, self.places, self._where = first.judged_by, places, str(first.path)
        measured = {k: v for k, v in configs.encode(self.config).items() if k not in UNMEASURED}
        text = json.dumps([measured, judge.files_digest(Path(teacher))], sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        self._size = judge.image_size(Path(teacher))
        there = report.read_results(places.results)
        self.rows = [dict(row) for row in there if row.get("settings") == self._settings]
        if len(self.rows) < len(there):
            log.info("%s: %d rows of another measure go", places.results, len(there) - len(self.rows))
        self.add(judge.teachers(teacher, self.config), Path(teacher), dict.fromkeys(TOLD))

    def add(self, subjects: Sequence[Subject], pipeline: Path, about: Mapping[str, Any]) -> None:
        """Measure those of a config's subjects, all of one pipeline folder, that have not been. about: ``TOLD``."""
        files, names = judge.files_digest(pipeline), {subject.name for subject in subjects}

        def stays(row: Row) -> bool:
            if row["config"] != about["config"]:
                return row["name"] not in names
            return row["files"] == files and row["name"] in {*names, runner.DATA}

        kept = [row for row in self.rows if stays(row)]
        measured = judge.measure(subjects, self.config, self._where, self._size, self.places.folder, kept)
        digests = {"settings": self._settings, "files": files}
        new = [{**about, "commit": row["protocol"]["commit"], **digests, **row} for row in measured[len(kept) :]]
        for row in new:
            if row["name"] != subjects[0].name:  # a run's course is that of its student at its own number of steps
                row["curve"] = None
        rank = {"data": 0, "teacher": 1, "student": 2}
        self.rows = sorted([*kept, *new], key=lambda row: (rank[row["role"]], row["config"] or ""))
        write(self.rows, self.places)


def write(rows: Sequence[Row], places: Places) -> None:
    """The rows, and from them the chart, the tables and the page."""
    text = json.dumps(rows, indent=1) + "\n"
    for path in (places.results, places.folder / "results.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    chart = methods_report.chart(rows)
    if chart:
        write_text(places.chart, chart)
    link = os.path.relpath(places.chart, places.document.parent) if chart else ""
    report.place(methods_report.tables(rows, link), places.document, methods_report.PLACE)
    report.write_report(places.folder)


def standing(entry: Entry) -> str:
    """How far an entry's run is: finished, cut off or not begun. Raises ValueError if it is a run of another config.

    What is measured during training does not make another run.
    """
    run, kept = entry.run, entry.run / "config.yaml"
    if not kept.is_file() or not (checkpoint.all_checkpoints(run) or entry.pipeline.is_dir()):
        return "not begun"
    there, here = (_training(recipe) for recipe in (recipes.decode(configs.read(kept), str(kept)), entry.recipe))
    if there != here:
        raise ValueError(
            f"{run}: holds a run of another config ({_difference(there, here)}); move it away, or set another run.out"
        )
    rows = tracking.read(run / "metrics.jsonl")
    if not (entry.pipeline / "model_index.json").is_file() or not rows or rows[-1]["step"] < entry.recipe.run.steps:
        return "cut off"
    for name in ("images_seen", "train_seconds"):
        if name not in rows[-1]:
            raise ValueError(f"{run}: was trained before {name} was counted; move it away to have it trained anew")
    return "finished"


def train(entry: Entry) -> None:
    """Run ``fastgen train``, and before it ``fastgen pairs`` where the config needs some."""
    data = entry.recipe.data
    if data.name == "pairs" and data.options.made_by:
        run_fastgen("pairs", data.options.made_by, f"pairs.out={data.options.path}")
    run_fastgen("train", str(entry.path))


def run_fastgen(*words: str) -> None:
    """``fastgen WORDS`` in a process of its own, which says itself what goes wrong."""
    subprocess.run([sys.executable, "-m", "fastgen", *words], check=False)


def told(entry: Entry) -> dict[str, Any]:
    """``TOLD`` of a finished run."""
    rows, data = tracking.read(entry.run / "metrics.jsonl"), entry.recipe.data
    last, pairs = rows[-1], None
    if data.name == "pairs" and (Path(data.options.path) / CARD).is_file():
        card = read_pairs_card(Path(data.options.path), "")
        pairs = {name: getattr(card, name) for name in ("number", "num_steps", "guidance_scale")}
    return {
        "method": entry.recipe.method.name,
        "config": entry.name,
        "trained_steps": read_card(entry.pipeline).get("num_inference_steps"),
        "iterations": last["step"],
        "images_seen": last["images_seen"],
        "train_seconds": last["train_seconds"],
        "peak_memory_mb": last.get("peak_memory_mb"),
        "pairs": pairs,
        # those that fell on a logged step
        "curve": [{k: row[k] for k in CURVE if k in row} for row in rows if {"fid", "train_seconds"} <= row.keys()],
    }


def _training(recipe: Recipe) -> dict[str, Any]:
    """All that a run's weights depend on, and where and how often it writes."""
    return {key: value for key, value in recipes.encode(recipe).items() if key != "eval"}


def _difference(one: Mapping[str, Any], two: Mapping[str, Any], before: str = "") -> str:
    """The first key in which two trees differ, with both values."""
    for key in [*one, *(key for key in two if key not in one)]:
        mine, its = one.get(key), two.get(key)
        if mine != its:
            if isinstance(mine, Mapping) and isinstance(its, Mapping):
                return _difference(mine, its, f"{before}{key}.")
            return f"{before}{key} {mine!r}, not {its!r}"
    return ""
