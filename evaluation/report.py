"""What a run came to: a table for the terminal, for documents, a Markdown report, and the HTML page (``page``)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

import fastgen
from fastgen.checkpoint import atomic_file, write_text
from fastgen.plain import from_json
from fastgen.tracking import read as read_metrics

from . import protocol
from .columns import ARROWS, best, cell, interval, used_columns
from .columns import COLUMNS as COLUMNS
from .columns import Column as Column
from .columns import Row as Row
from .columns import counted as counted
from .page import page, separated
from .page import verdict as verdict
from .pictures import GRIDS as GRIDS
from .pictures import inline as inline
from .pictures import listed
from .plots import task_columns, tasks

if TYPE_CHECKING:
    from rich.table import Table

PICTURED = 6
"""Prompts whose pictures stand in report.md."""


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> str:
    """The results in Markdown, in those of the columns that have a value; the best of each is bold.

    columns: of the metrics in the rows' protocols if not given.
    """
    columns = used_columns(rows, columns)
    lines = [
        "| | " + " | ".join(c.title + ARROWS[c.better] for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    tops = {c.key: best(rows, c) for c in columns}
    for i, row in enumerate(rows):
        cells = [f"**{cell(row, c)}**" if i in tops[c.key] else cell(row, c) for c in columns]
        cells = [f"{value} {interval(row, c)}".strip() for value, c in zip(cells, columns, strict=True)]
        lines.append(f"| {plain(str(row['name']))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def insert(rows: Sequence[Row], document: Path, name: str) -> None:
    """Put the table, with what it was measured on, and that of GenEval's tasks, into its place in a document.

    Raises ValueError as ``place``, and if the rows' protocols differ.
    """
    parts = [f"{markdown_table(protocol.joined(rows))}\n{said(rows)}", *(table for _, table in by_task(rows))]
    place("\n\n".join(part.strip() for part in parts), document, name)


def place(made: str, document: Path, name: str) -> None:
    """Put Markdown between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a document, for what was there.

    Raises ValueError if the document has no such place.
    """
    before, after = around(document, name)
    write_text(document, f"{before}\n\n{made}\n\n{after}")


def around(document: Path, name: str) -> tuple[str, str]:
    """A document up to and with ``<!-- NAME -->``, and from ``<!-- /NAME -->`` on. Raises ValueError."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{document}: has no place for the results; write {begin} and {end} on lines of their own")
    before, _, rest = text.partition(begin)
    return before + begin, end + rest.partition(end)[2]


def said(rows: Sequence[Row]) -> str:
    """One paragraph of protocol in Markdown, for below a table."""
    commits = dict.fromkeys(_short(str(row["protocol"].get("commit"))) for row in rows if row.get("protocol"))
    protocol: Row = next((row["protocol"] for row in reversed(rows) if row.get("protocol")), {})
    versions = protocol.get("versions", {})
    names = ", ".join(f"{k} {versions[k]}" for k in ("torch", "diffusers", "transformers") if k in versions)
    parts = [
        f"{protocol.get('num_images')} images a row, one seed each ({protocol.get('seeds')})",
        f"{protocol.get('dtype')} on {protocol.get('device')}",
        names,
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
    ]
    return plain("; ".join(part for part in parts if part) + ".")


def _short(commit: str) -> str:
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def picture(run: Path, file: Path, side: int = 96) -> None:
    """Write the run's comparison as one PNG: a row for each subject, a column for each prompt.

    side: of each image in pixels. Raises ValueError if the run has no comparison.
    """
    prompts, rows = listed(run / "comparison")
    if not prompts:
        raise ValueError(f"{run}: has no comparison; `fastgen evaluate {run}` makes it")
    label, gap, font = 150, 4, ImageFont.load_default(14)
    columns = len(prompts)
    canvas = Image.new("RGB", (label + columns * (side + gap), len(rows) * (side + gap) + 3 * gap + 34), "white")
    draw = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 14)[:2]
        draw.multiline_text((label + i * (side + gap), gap), "\n".join(lines), "black", font)
    for j, subject in enumerate(rows):
        top = 34 + 3 * gap + j * (side + gap)
        draw.multiline_text((gap, top + side // 3), "\n".join(textwrap.wrap(subject["name"], 18)), "black", font)
        for i in range(columns):
            source = run / "comparison" / subject["folder"] / f"{i}.png"
            if source.is_file():
                with Image.open(source) as opened:
                    tile = opened.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (label + i * (side + gap), top))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        canvas.save(partial, "PNG", optimize=True)


def print_table(rows: Sequence[Row]) -> None:
    """The results on the terminal, without intervals, for which it is too narrow; a table for each protocol.

    Columns that do not fit beside each other stand in further tables.
    """
    from rich.console import Console
    from rich.text import Text

    console, groups = Console(), protocol.tables(rows)
    for group in groups:
        names = max(len(str(row["name"])) for row in group)
        for columns in _fitting(group, used_columns(group), console.width - names - 4):
            console.print(_terminal(group, columns))
    if len(groups) > 1:
        console.print(Text(separated(groups)))


def _fitting(rows: Sequence[Row], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns in parts, each of at most ``width`` characters, or of one column."""
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        needed = 2 + max(len(column.narrow + ARROWS[column.better]), *(len(cell(row, column)) for row in rows))
        if not parts or needed > left:
            parts.append([])
            left = width
        parts[-1].append(column)
        left -= needed
    return parts or [[]]


def _terminal(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for c in columns:
        table.add_column(c.narrow + ARROWS[c.better], justify="right", no_wrap=True)
    tops = {c.key: best(rows, c) for c in columns}
    shade = {"data": "dim", "teacher": "", "student": "cyan"}
    for i, row in enumerate(rows):
        cells = [Text(cell(row, c), style="bold" if i in tops[c.key] else "") for c in columns]
        table.add_row(Text(str(row["name"])), *cells, style=shade.get(row["role"], ""))
    return table


def write_report(run: Path) -> Path:
    """Write ``report.html`` and, where there are results, ``report.md``, and return the former's path.

    Read are results.json, metrics.jsonl, comparison/, geneval/, samples/ and config.yaml, each if it is there.
    Raises ValueError if there is neither of the first two, or if one is damaged.
    """
    rows, logged = read_results(run / "results.json"), read_metrics(run / "metrics.jsonl")
    if not rows and not logged:
        raise ValueError(
            f"{run}: holds neither results.json nor metrics.jsonl; `fastgen evaluate {run}` makes the first"
        )
    # a pipeline folder by itself may be called "pipeline"
    title = run.resolve().name
    made = page(title, run, rows, logged)
    if rows:
        write_text(run / "report.md", markdown(title, run, rows))
    path = run / "report.html"
    write_text(path, made)
    return path


def markdown(title: str, run: Path, rows: Sequence[Row]) -> str:
    """The report without charts: a table for each protocol, tasks, the protocol, pictures as links into the folder."""
    groups = protocol.tables(rows)
    parts = [f"# {plain(title)}", plain(verdict(groups[0])), plain(separated(groups))]
    for number, group in enumerate(groups, 1):
        parts += [f"## Table {number}" if len(groups) > 1 else "## Results", markdown_table(group)]
        parts.append(said(group))
        if any(row.get("intervals") for row in group):
            parts.append("Brackets: 95 % interval, by bootstrap over the images.")
        for name, table in by_task(group):
            parts += [f"### By task: {name}", table]
        parts.append("### Protocol\n\n" + _shared(group))
    parts += [_pictures(run / "comparison"), f"Written by fastgen {fastgen.__version__}."]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def by_task(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each GenEval that rows were judged by, and its tasks as a table in Markdown."""
    scored = {name: [row for row in rows if row.get(name) is not None] for name in tasks(rows)}
    return [(name, markdown_table(scored[name], task_columns(name, tags))) for name, tags in tasks(rows).items()]


def _shared(rows: Sequence[Row]) -> str:
    """What the rows' protocols have in common, a line for each name."""
    flat = [dict(protocol.flat(row.get("protocol") or {})) for row in rows]
    lines = []
    for name in dict.fromkeys(name for entry in flat for name in entry):
        values = [entry[name] for entry in flat if name in entry]
        if all(value == values[0] for value in values):
            value = "none" if values[0] is None else plain(str(values[0]))
            lines.append(f"- {plain(' '.join(name).replace('_', ' ').removeprefix('metrics '))}: {value}")
    return "\n".join(lines)


def _pictures(folder: Path) -> str:
    """The first pictures of the comparison, which lie beside the report."""
    prompts, subjects = listed(folder)
    if not prompts:
        return ""
    lines = [
        "## Pictures",
        "",
        "| | " + " | ".join(plain(str(s["name"])) for s in subjects) + " |",
        "|---|" + "---|" * len(subjects),
    ]
    for i, prompt in enumerate(prompts[:PICTURED]):
        files = [f"comparison/{s['folder']}/{i}.png" for s in subjects]
        cells = [f"![]({file})" if (folder.parent / file).is_file() else "" for file in files]
        lines.append(f"| {plain(prompt)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    marked = "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in " ".join(text.split()))
    return marked.replace("&", "&amp;").replace("<", "&lt;")


ROW: dict[str, Any] = {
    **{name: str for name in ("name", "role")},
    **{name: int | float | None for name in ("steps", "guidance_scale", "fid", "seconds_per_image")},
    **{name: dict | None for name in ("protocol", "intervals")},
}
"""What a row must hold, and of what kind, for a report to be made of it."""


def read_results(path: Path) -> list[Row]:
    """The rows of a results.json; none if there is no such file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return []
    try:
        rows: list[Row] = from_json(path.read_text(encoding="utf-8"))
        for row in rows:
            for name, kinds in ROW.items():
                if not isinstance(row[name] if name in ("name", "role") else row.get(name), kinds):
                    raise TypeError(f"{name} is {row[name]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of results ({error}); run `fastgen evaluate` again") from None
    return rows
