"""What a comparison of methods came to: Markdown tables and a chart, from the rows of its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import protocol, report
from .chart import chart_file
from .report import Column, Row

PLACE = "methods"
"""The tables' place in a document: between ``<!-- methods -->`` and ``<!-- /methods -->``."""
WORSE = "†"
"""Marks a student that is worse than its teacher in the same table."""
AXES = {"images_seen": "images", "train_seconds": "s of training"}
"""By what the courses of runs are compared."""

FID = next(column for column in report.COLUMNS if column.key == "fid")
QUALITY = (
    Column("trained_steps", "Made for", "", "", report.counted),
    *(column for column in report.COLUMNS if column.key != "steps"),
)
COST = (
    Column("trained_steps", "Made for", "", "", report.counted),
    Column("iterations", "Iterations", "", "", lambda v: f"{v:,.0f}"),
    Column("seconds_per_iteration", "Seconds per iteration", "", "", lambda v: f"{v:.3g}"),
    Column("train_seconds", "Seconds of training", "", "", lambda v: f"{v:,.0f}"),
    Column("images_seen", "Images seen", "", "", lambda v: f"{v:,.0f}"),
    Column("peak_memory_mb", "Peak memory, MB", "", "low", lambda v: f"{v:,.0f}"),
)


NOTE = """\
Made for: the steps that the student was trained for; with fewer it is called at some of its times. Students that are
sampled as their teacher is, with one pass for two, stand beside the teacher of as many network evaluations. The best
of a column is bold, real images and the teacher's most steps aside."""


def tables(rows: Sequence[Row], chart: str) -> str:
    """All of it in Markdown: quality by steps, the same budgets, cost. chart: the link to it, or empty.

    Raises ValueError if the rows were not all measured in one way.
    """
    rows = protocol.joined(rows)
    students = [row for row in rows if row["role"] == "student"]
    alike = {(by, row[by]) for row in students if (by := compared_by(row))}
    # those of few steps first
    parts = [_at(*found, rows) for found in sorted(alike, key=lambda found: (found[0] != "steps", found[1]))]
    if any(worse_than_teacher(row, rows) for row in students):
        parts.append(f"{WORSE} A larger FID than the undistilled teacher's in the same table.")
    parts += [NOTE, report.said(rows), _budgets(rows, chart), _cost(rows)]
    return "\n\n".join(part.strip() for part in parts if part)


def compared_by(row: Row) -> str:
    """What a student and its teacher must have alike: "steps", or "network_evaluations" if sampled as that is."""
    return "steps" if row["trained_steps"] or row["network_evaluations"] is None else "network_evaluations"


def worse_than_teacher(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a student's FID is above that of the undistilled teacher that it is compared with."""
    if row["role"] != "student" or row.get("fid") is None:
        return False
    by = compared_by(row)
    teachers = [other for other in rows if other["role"] == "teacher" and other[by] == row[by]]
    return any(other.get("fid") is not None and row["fid"] > other["fid"] for other in teachers)


def own(rows: Sequence[Row]) -> list[Row]:
    """The row of each run's student at its own number of steps, which alone holds the run's course."""
    return [row for row in rows if row.get("curve") is not None]


def last_before(course: Sequence[Row], axis: str, limit: float) -> Row | None:
    """The last of a run's quick evaluations at or before the limit; None before the first."""
    return next((point for point in reversed(course) if point[axis] <= limit), None)


def chart(rows: Sequence[Row]) -> str:
    """FID over images seen and over seconds, a whole .svg file; empty if nothing was measured during training."""
    found = _few_steps(rows)
    panels = {
        label: {str(row["name"]): [(point[axis], point["fid"]) for point in row["curve"]] for row in found}
        for axis, label in AXES.items()
    }
    return chart_file(panels, "FID") if found else ""


def label(row: Row) -> str:
    """A row's name without its steps."""
    return str(row["name"]).partition(",")[0]


def _at(by: str, count: int, rows: Sequence[Row]) -> str:
    """Students and teacher alike in this, the best FID first; real images and the teacher's most steps above."""
    teachers = [row for row in rows if row["role"] == "teacher"]
    most = max((row["steps"] for row in teachers), default=None)
    beside = [row for row in teachers if row[by] == count]
    above = [row for row in rows if row["role"] == "data" or (row in teachers and row["steps"] == most)]
    students = [row for row in rows if row["role"] == "student" and compared_by(row) == by and row[by] == count]
    students = sorted(students, key=lambda row: (row["fid"] is None, row["fid"] or 0.0))
    shown: list[dict[str, Any]] = [
        # as the others of this role they are not in the running
        *({**row, "role": "data"} for row in above if row not in beside),
        *(dict(row) for row in beside),
        *({**row, "name": label(row) + f" {WORSE}" * worse_than_teacher(row, rows)} for row in students),
    ]
    if by == "steps":
        return f"### {report.counted(count)}\n\n{report.markdown_table(shown, QUALITY)}"
    return f"### {count:g} network evaluation{'s' * (count != 1)}\n\n{report.markdown_table(shown)}"


def _few_steps(rows: Sequence[Row]) -> list[Row]:
    """The runs whose course can be compared: students of few steps that were measured on the way."""
    return [row for row in own(rows) if row["curve"] and row["trained_steps"]]


def _budgets(rows: Sequence[Row], chart: str) -> str:
    """FID on few images where every run still was at the smallest of their totals."""
    found = _few_steps(rows)
    if not found:
        return ""
    shown: list[dict[str, Any]] = [{"name": row["name"], "role": row["role"]} for row in found]
    columns = []
    for axis, unit in AXES.items():
        limit = min(row["curve"][-1][axis] for row in found)
        for entry, row in zip(shown, found, strict=True):
            point = last_before(row["curve"], axis, limit) or {}
            entry |= {f"{axis} fid": point.get("fid"), axis: point.get(axis)}
        columns.append(Column(f"{axis} fid", f"FID at {limit:,.0f} {unit}", "", "low", FID.write))
        columns.append(Column(axis, f"taken at {unit.partition(' ')[0]}", "", "", lambda v: f"{v:,.0f}"))
    text = (
        "By the trainer's own sampler on fewer images, so not to be compared with the tables above. Taken is the last "
        "measurement not after the budget, which is the smallest total of any run; nothing is interpolated."
    )
    picture = f"\n\n![FID over images seen and over seconds of training]({chart})" if chart else ""
    return f"### The same budget\n\n{text}\n\n{report.markdown_table(shown, columns).strip()}{picture}"


def _cost(rows: Sequence[Row]) -> str:
    """What each training took."""
    found = own(rows)
    if not found:
        return ""
    shown = [
        {**row, "name": label(row), "seconds_per_iteration": row["train_seconds"] / row["iterations"]} for row in found
    ]
    notes = [
        f"{label(row)}: and before it {p['number']:,} pairs of {p['num_steps']} guided steps of the teacher each."
        for row in found
        if (p := row.get("pairs"))
    ]
    text = (
        "Seconds are those of training alone, without quick evaluations, samples and checkpoints; the memory is the "
        "whole process's, and these included."
    )
    return f"### Cost\n\n{text}\n\n{report.markdown_table(shown, COST)}\n{' '.join(notes)}"
