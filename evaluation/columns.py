"""The columns of a table of results: what each is called, which way is better, how a value is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen import registry

Row = Mapping[str, Any]

TASKS = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}
"""GenEval's tags, in the official order, in words; values by task are called METRIC_TAG."""


@dataclass(frozen=True)
class Column:
    """A column of the results: key, titles, which way is better ("low", "high", "") and how a value is written."""

    key: str
    title: str
    narrow: str
    better: str
    write: Callable[[Any], str]


COLUMNS = (
    Column("steps", "Steps", "Steps", "", str),
    Column("guidance_scale", "Guidance", "Guid", "", lambda v: f"{v:g}"),
    Column("fid", "FID", "FID", "low", lambda v: f"{v:.2f}"),
    Column("clip_score", "CLIP score", "CLIP", "high", lambda v: f"{v:.1f}"),
    Column("retrieval", "Retrieval", "Retr", "high", lambda v: f"{100 * v:.1f}%"),
    # neither way: a student that draws fog is diverse, too; to be read beside the real images and the teacher
    Column("diversity", "Diversity", "Div", "", lambda v: f"{v:.3f}"),
    Column("seconds_per_image", "Seconds per image", "s/img", "low", lambda v: f"{v:.3g}"),
    Column("network_evaluations", "Network evaluations", "NFE", "low", lambda v: f"{v:g}"),
)
"""Those that come first and last, and those with a notation of their own; others are as their metrics' ABOUT says."""
LATENCY = "latency"
"""The metric whose values are costs; of these the table shows those among COLUMNS."""
COSTS = ("seconds_per_image", "network_evaluations")
ARROWS = {"low": " ↓", "high": " ↑", "": ""}


def columns(rows: Sequence[Row]) -> list[Column]:
    """COLUMNS and those of the metrics in the rows' protocols, costs last, whether or not a row has a value."""
    found = {column.key: column for column in COLUMNS if column.key not in COSTS}
    names = dict.fromkeys(name for row in rows for name in (row.get("protocol") or {}).get("metrics", {}))
    for column in (column for name in names if name != LATENCY for column in of_metric(name)):
        found.setdefault(column.key, column)
    return [*found.values(), *(column for column in COLUMNS if column.key in COSTS)]


def of_metric(name: str) -> list[Column]:
    """The columns of a metric's values, without GenEval's by task; none if its module is not installed here."""
    about = None
    with contextlib.suppress(ValueError):  # a report is read on machines without the metric's module, too
        about = vars(registry.find("metric", name)).get("ABOUT")
    if about is None:
        return []
    own = {column.key: column for column in COLUMNS}
    found = []
    for value in about.values:
        if value.removeprefix(f"{name}_") in TASKS:
            continue
        alone = len(about.values) == 1 or value == name.rpartition(".")[2]
        title = about.title if alone else words(value)
        found.append(own.get(value) or Column(value, title, title, about.better, number))
    return found


def words(key: str) -> str:
    """A value's key as a title: peak_memory -> Peak memory."""
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]


def number(value: float) -> str:
    """Three significant digits without an exponent for what metrics give; thousands whole."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"


def used_columns(rows: Sequence[Row], chosen: Sequence[Column] | None = None) -> list[Column]:
    """The columns, if not given all, in which at least one row has a value."""
    return [
        c for c in (columns(rows) if chosen is None else chosen) if any(row.get(c.key) is not None for row in rows)
    ]


def cell(row: Row, column: Column) -> str:
    """A value as it is shown; a dash where there is none."""
    value = row.get(column.key)
    return "–" if value is None else column.write(value)


def interval(row: Row, column: Column) -> str:
    """The value's 95 % interval as it is shown, [low, high]; empty where there is none."""
    ends = (row.get("intervals") or {}).get(column.key)
    return "" if ends is None or row.get(column.key) is None else f"[{', '.join(map(column.write, ends))}]"


def best(rows: Sequence[Row], column: Column) -> set[int]:
    """Positions of the rows that share the best value as shown, real images left out; none if only one has a value."""
    values = {
        i: row[column.key] for i, row in enumerate(rows) if row["role"] != "data" and row.get(column.key) is not None
    }
    if not column.better or len(values) < 2:
        return set()
    top = column.write((min if column.better == "low" else max)(values.values()))
    return {i for i, value in values.items() if column.write(value) == top}


def counted(steps: int) -> str:
    """1 step, 2 steps."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def series(row: Row) -> str:
    """A row's name without its steps."""
    return str(row["name"]).partition(",")[0]
