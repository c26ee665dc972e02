"""``fastgen runs``: the runs under a folder, each a row. Needs no torch, so that it answers at once.

A run is a folder with a config.yaml that names a method. Its state is one of

    running     a process holds the lock on its train.log. Locks are seen on the same machine, and on others through
                file systems that pass them on; where one does not, a run elsewhere counts as stopped, and the age of
                its last row tells
    done        its newest checkpoint or row is of the config's last step, and ``pipeline/`` is written
    unhealthy   a health check ended it (``health.stop``)
    failed      an error ended it, of which train.log has the line
    stopped     anything else that is not at its end: a signal, a time limit, a kill, a machine that went off
    damaged     config.yaml or the rows cannot be read

All but the last can go on, or begin anew, by the command that started them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import tracking
from .clock import ago, clock
from .plain import from_json, from_yaml

DEPTH = 6
"""Levels of folders in which runs are looked for."""
LOG, CONFIG, BEST = "train.log", "config.yaml", "best.json"
ENDED = "ended by "
"""So begins the line of train.log that says which error ended a run."""
STOPS = ("Interrupted", "KeyboardInterrupt", "SystemExit")
"""Errors that are requests to stop."""
TAIL = 1 << 14
"""Bytes of train.log that are read."""


# What a training leaves


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Within it ``locked(path)`` is true, where the system has such locks; they end with the process, in any case."""
    with path.open("a", encoding="utf-8") as file:
        _try_lock(file.fileno(), shared=False)
        yield


def locked(path: Path) -> bool:
    """Whether a process holds the file."""
    try:
        with path.open("rb") as file:
            return not _try_lock(file.fileno(), shared=True)
    except OSError:
        return False


def _try_lock(handle: int, shared: bool) -> bool:
    """Lock an open file until it is closed; False if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def ending(error: BaseException) -> str:
    """The line for train.log when an error ends a run: its kind and first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{ENDED}{type(error).__name__}: {first[:300]}"


# What is found


def find(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The run folders in and under ``folder``, by path; what lies in a run is not looked at."""
    if (folder / CONFIG).is_file() and ((folder / tracking.FILE).exists() or (folder / LOG).exists()):
        return [folder]
    if not depth:
        return []
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []
    return [run for path in inside if not path.name.startswith(".") for run in find(path, depth - 1)]


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each run under a folder. Raises ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name one that holds runs")
    return [row(run) for run in find(folder)]


def row(run: Path) -> dict[str, Any]:
    """What can be told of a run.

    run, state, method, step, steps, best (name, value and step; null without quick evaluations), seconds (trained),
    age (seconds since metrics.jsonl was last written; null if it never was), note (why it failed or is damaged).
    """
    found: dict[str, Any] = {"run": str(run), "state": "damaged", "method": None, "step": None, "steps": None}
    found |= {"best": None, "seconds": None, "age": None, "note": ""}
    try:
        tree = _mapping(from_yaml((run / CONFIG).read_text(encoding="utf-8")), CONFIG)
        settings = _mapping(tree.get("run"), f"{CONFIG}: run")
        found["method"] = str(_mapping(tree.get("method"), f"{CONFIG}: method").get("name"))
        found["steps"] = int(settings["steps"])
        values = [r for r in tracking.read(run / tracking.FILE) if isinstance(r.get("step"), int)]
        saved = checkpoints(run)
        found["step"] = max([*saved, *(r["step"] for r in values[-1:])], default=0)
        spent = [r["train_seconds"] for r in values if isinstance(r.get("train_seconds"), int | float)]
        found["seconds"] = max(spent, default=None)
        found["age"] = _age(run / tracking.FILE)
        found["best"] = best(run, str(settings.get("keep_best") or ""), values)
        found["state"], found["note"] = state(run, found["step"], found["steps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        found["note"] = f"no {told}" if isinstance(error, KeyError) else told[:200]
    return found


def state(run: Path, step: int, steps: int) -> tuple[str, str]:
    """The state of a run at ``step`` of ``steps``, and the error that ended it, if one did."""
    if locked(run / LOG):
        return "running", ""
    if step >= steps and (run / "pipeline").is_dir():
        return "done", ""
    last = last_line(run / LOG)
    _, mark, told = last.partition(f" {ENDED}")
    kind, _, text = (part.strip() for part in told.partition(":"))
    if not mark or kind in STOPS:
        return "stopped", ""
    return ("unhealthy" if kind == "Unhealthy" else "failed"), (text or kind)


def last_line(path: Path) -> str:
    """The last line of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def checkpoints(run: Path) -> list[int]:
    """The steps of its checkpoints."""
    names = (path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def best(run: Path, asked: str, values: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Name, value and step of the best quick evaluation: what ``best.json`` says, else of the rows.

    asked: the value that ``run.keep_best`` names; empty: the first that knows which way it is better.
    """
    if (run / BEST).is_file():
        marked = _mapping(from_json((run / BEST).read_text(encoding="utf-8")), BEST)
        return {"name": marked["metric"], "value": float(marked["value"]), "step": int(marked["step"])}
    known = directions()
    names = [asked] if asked else [name for r in values for name in r if quick(name)]
    name = next((name for name in names if known.get(name)), "")
    judged = [r for r in values if isinstance(r.get(name), int | float)]
    if not judged:
        return None
    sign = 1 if known[name] == "high" else -1
    top = max(judged, key=lambda r: sign * r[name])  # the first of equals, as the run itself would keep
    return {"name": name, "value": float(top[name]), "step": top["step"]}


def quick(name: str) -> bool:
    """Whether a value of metrics.jsonl is of a quick evaluation: a plain name that says nothing of the machine."""
    return "/" not in name and name not in ("step", "images_seen", *tracking.MEASURED)


@functools.lru_cache
def directions() -> dict[str, str]:
    """Value of a metric -> "low" or "high", which is better, as the metrics' own ABOUT says; nothing is imported.

    Left out are values that are not written out there, as GenEval's of its tasks.
    """
    spec = importlib.util.find_spec("fastgen.evaluation")
    found: dict[str, str] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ABOUT":
                    given = {k.arg: k.value for k in getattr(node.value, "keywords", [])}
                    try:
                        found |= dict.fromkeys(ast.literal_eval(given["values"]), ast.literal_eval(given["better"]))
                    except (KeyError, ValueError):  # neither way is better, or names that are not written out
                        continue
    return found


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no mapping")
    return value


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


# What is shown


def table(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each row."""
    lines = []
    for r in found:
        best = r["best"]
        of = f"{'?' if r['step'] is None else r['step']}/{'?' if r['steps'] is None else r['steps']}"
        told = f"{best['name']} {best['value']:.4g} at {best['step']}" if best else ""
        spent = "" if r["seconds"] is None else clock(r["seconds"])
        age = "" if r["age"] is None else ago(r["age"])
        lines.append([r["run"], r["state"], r["method"] or "", of, told, spent, age])
    return ["run", "state", "method", "step", "best", "trained", "last row"], lines


WORDS = 3
"""Columns of the table that are words."""


def told(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each run that failed or is damaged: why."""
    return [f"{r['run']}: {r['state']}, {r['note']}" for r in found if r["note"]]
