"""The sections of the page that are charts: quality by steps and latency, GenEval by task, the training's course."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.tracking import MEASURED

from .chart import Mark, line_chart, scatter, shares
from .columns import (
    ARROWS,
    COLUMNS,
    COSTS,
    TASKS,
    Column,
    Row,
    cell,
    counted,
    interval,
    of_metric,
    series,
    used_columns,
    words,
)
from .markup import arrowed, legend, table, text, title_of
from .pictures import failures

CHARTED = 4
"""So many metrics have their charts open; those of further ones unfold."""
COMPARED = 6
"""Most students in the chart of GenEval's tasks; the table below it has all rows."""


def by_series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The pipelines' rows by name without steps, teachers first."""
    found: dict[str, list[Row]] = {}
    for row in sorted((r for r in rows if r["role"] != "data"), key=lambda r: r["role"] != "teacher"):
        found.setdefault(series(row), []).append(row)
    return found


def quality(rows: Sequence[Row]) -> str:
    """A chart by steps and one by latency for each metric that has a better way."""
    subjects = by_series(rows)
    figures = []
    for column in used_columns(rows):
        if column.better and column.key not in COSTS:
            made = "".join(_against(column, axis, subjects, rows) for axis in ("steps", "seconds_per_image"))
            figures += [made] if made else []
    if not figures:
        return ""
    note = "Numbers beside the marks are steps. The dotted line is real images; where it is far off it is left out."
    if any(row.get("intervals") for row in rows):
        note += " Whiskers are 95 % intervals."
    further = "".join(figures[CHARTED:])
    return (
        f'{legend(list(subjects))}<div class="charts twos">{"".join(figures[:CHARTED])}</div>'
        f'<p class="note">{note}</p>'
        + (
            f'<details><summary>Further metrics</summary><div class="charts twos">{further}</div></details>'
            * bool(further)
        )
    )


def _against(column: Column, axis: str, subjects: Mapping[str, Sequence[Row]], rows: Sequence[Row]) -> str:
    """A metric by steps or by seconds of all series; empty if that would be one mark."""
    marks = {
        name: [_mark(row, column, axis) for row in found if row.get(axis) and finite(row.get(column.key))]
        for name, found in subjects.items()
    }
    values = [mark.y for found in marks.values() for mark in found]
    if len(values) < 2:
        return ""
    real = [row for row in rows if row["role"] == "data" and finite(row.get(column.key))]
    level = next(((str(row["name"]), row[column.key]) for row in real if _near(row[column.key], values)), None)
    ticks = _apart(sorted({mark.x for found in marks.values() for mark in found})) if axis == "steps" else []
    label = "steps" if axis == "steps" else "seconds per image"
    # a series without marks keeps its number, and so its look
    chart = scatter(marks, label, column.title, x_ticks=ticks, level=level)
    return f"<figure><figcaption>{arrowed(column)} by {label}</figcaption>{chart}</figure>"


def _near(floor: float, values: Sequence[float]) -> bool:
    """Whether a chart of these values need not be more than half empty to show the floor, too."""
    low, high = min(values), max(values)
    return max(low - floor, floor - high) <= high - low


def finite(value: Any) -> bool:
    """Whether it is a number that a chart can show."""
    return isinstance(value, int | float) and math.isfinite(value)


def _mark(row: Row, column: Column, axis: str) -> Mark:
    ends = (row.get("intervals") or {}).get(column.key)
    told = f"{column.write(row[column.key])} {interval(row, column)}".strip()
    times = f", {row['seconds_per_image']:.3g} s an image" if finite(row.get("seconds_per_image")) else ""
    steps = counted(row["steps"]) if row.get("steps") else "steps of its own"
    return Mark(
        row[axis],
        row[column.key],
        (ends[0], ends[1]) if ends and all(map(finite, ends)) else None,
        str(row.get("steps") or ""),
        f"{column.title} {told} in {steps}{times}",
    )


def _apart(counts: Sequence[float]) -> list[float]:
    """Of numbers of steps those whose ticks do not touch on their axis: the first, the last, and what fits."""
    log = counts[-1] >= 8 * counts[0]
    place = [math.log(c) if log else c for c in counts]
    least = 0.08 * (place[-1] - place[0])
    kept = [0]
    for i in range(1, len(counts) - 1):
        if place[i] - place[kept[-1]] >= least and place[-1] - place[i] >= least:
            kept.append(i)
    return [counts[i] for i in dict.fromkeys([*kept, len(counts) - 1])]


def tasks(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The metrics that have values by GenEval's tasks, each with the tags that it has, in the official order."""
    keys = dict.fromkeys(key for row in rows for key in row if row.get(key) is not None)
    names = dict.fromkeys(key.removesuffix(f"_{tag}") for key in keys for tag in TASKS if key.endswith(f"_{tag}"))
    return {name: [tag for tag in TASKS if f"{name}_{tag}" in keys] for name in names}


def task_columns(name: str, tags: Sequence[str]) -> list[Column]:
    """Overall and by task, in percent."""
    return [
        Column(key, title, title, "high", lambda v: f"{100 * v:.1f}%")
        for key, title in [(name, "Overall"), *((f"{name}_{tag}", words(TASKS[tag])) for tag in tags)]
    ]


def by_task(rows: Sequence[Row], run: Path) -> str:
    """Shares of right images by task as a chart and a table, and images that failed, with the reason."""
    parts = []
    found = tasks(rows)
    for name, tags in found.items():
        scored = [row for row in rows if any(row.get(f"{name}_{tag}") is not None for tag in tags)]
        shown = [c for c in task_columns(name, tags) if any(row.get(c.key) is not None for row in scored)]
        of = foremost(scored, name)
        marks = {
            str(row["name"]): {
                c.title: Mark(
                    row[c.key],
                    0.0,
                    tuple(ends) if (ends := (row.get("intervals") or {}).get(c.key)) else None,
                    "",
                    f"{c.title} {cell(row, c)} {interval(row, c)}".strip(),
                )
                for c in shown
                if row.get(c.key) is not None
            }
            for row in of
        }
        heading = f"<h3>{text(title_of(name))}</h3>" if len(found) > 1 else ""
        note = (
            "Share of images that are right by every rule of their prompt; overall is the mean of the tasks. "
            "The chart shows the teacher at its most steps and students at their best, the table all."
        )
        chart = shares(marks, [c.title for c in shown])
        parts.append(
            f'{heading}<p class="note">{note}</p>{legend(list(marks))}<figure class="tasks">{chart}</figure>'
            f"{table(scored, shown)}{failures(scored, verdicts(run, name))}"
        )
    return "".join(parts)


def foremost(rows: Sequence[Row], name: str) -> list[Row]:
    """What the chart has room for: the teacher at its most steps, and each student at its best, if they are too many.

    In the order, and so with the looks, that the series have in the other charts where none is left out.
    """
    chosen = [
        max(found, key=lambda r: (r.get("steps") or 0) if r["role"] == "teacher" else r.get(name) or 0.0)
        for found in by_series(rows).values()
    ]
    students = sorted((r for r in chosen if r["role"] != "teacher"), key=lambda r: -(r.get(name) or 0.0))[:COMPARED]
    return [row for row in chosen if row["role"] == "teacher" or row in students]


def verdicts(run: Path, name: str) -> Path:
    """The folder of a metric's verdicts by image: its own, or geneval/."""
    return run / name if (run / name).is_dir() else run / "geneval"


def curves(logged: Sequence[Row]) -> str:
    """A chart for each value that was logged: quick evaluations, health, losses, then gradient norms."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in logged:
        for name, value in row.items():
            if name not in ("step", "images_seen", *MEASURED) and finite(value):
                lines.setdefault(name, []).append((row["step"], value))
    # measured quality before the losses, gradient norms last
    measured = sorted(name for name in lines if "/" not in name)
    health = sorted(name for name in lines if name.startswith("health/"))
    others = (name for name in lines if "/" in name and name not in health)
    losses = sorted(others, key=lambda n: (n.endswith("grad_norm"), n))
    parts = []
    course = "On few images by the trainer's own sampler: not to be compared with the table."
    watched = "What losses do not say; shares of the teacher's on the same prompts and seeds, gradients by phase."
    terms = "Each phase's terms; the faint line is as logged, the strong one smoothed."
    for names, heading, note in (
        (measured, "Quality", course),
        (health, "Health", watched),
        (losses, "Losses", terms),
    ):
        charts = "".join(_figure(name, lines[name]) for name in names)
        if charts:
            parts.append(f'<h3>{heading}</h3><p class="note">{note}</p><div class="charts">{charts}</div>')
    return "".join(parts)


def _figure(name: str, points: Sequence[tuple[float, float]]) -> str:
    column = next((c for c in COLUMNS if c.key == name), None)
    column = column or next((c for c in (of_metric(name) if name.isidentifier() else []) if c.key == name), None)
    title = column.title + ARROWS[column.better] if column else _named(name)
    y_label = column.title if column else "gradient norm" if name.endswith("grad_norm") else name.split("/")[-1]
    chart = line_chart(points, "training step", y_label.replace("_", " "))
    return f"<figure><figcaption>{text(title)}</figcaption>{chart}</figure>"


def _named(name: str) -> str:
    """In words: critic/grad_norm -> critic: grad norm."""
    return name.replace("/", ": ").replace("_", " ").replace(".", " ")
