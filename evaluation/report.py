"""What a run came to: a table for the terminal, for Markdown, and one self-contained HTML page with pictures."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

import fastgen
from fastgen.checkpoint import write_text
from fastgen.tracking import MEASURED
from fastgen.tracking import read as read_metrics

from .chart import line_chart

Row = Mapping[str, Any]

LARGEST = 256
"""Pictures wider or higher than this many pixels are scaled down for the page."""
ENLARGED = 128
"""Smaller ones are shown enlarged by a whole factor up to this many pixels."""
GRIDS = 6
"""Most sample grids shown."""


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
_ARROWS = {"low": " ↓", "high": " ↑", "": ""}


def used_columns(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns in which at least one row has a value."""
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def cell(row: Row, column: Column) -> str:
    """A value as it is shown; a dash where there is none."""
    value = row.get(column.key)
    return "–" if value is None else column.write(value)


def best(rows: Sequence[Row], column: Column) -> set[int]:
    """Positions of the rows that share the best value as shown, real images left out; none if only one has a value."""
    values = {
        i: row[column.key] for i, row in enumerate(rows) if row["role"] != "data" and row.get(column.key) is not None
    }
    if not column.better or len(values) < 2:
        return set()
    top = column.write((min if column.better == "low" else max)(values.values()))
    return {i for i, value in values.items() if column.write(value) == top}


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """The results in Markdown, in those of the columns that have a value; the best of each is bold."""
    columns = used_columns(rows, columns)
    lines = [
        "| | " + " | ".join(c.title + _ARROWS[c.better] for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    tops = {c.key: best(rows, c) for c in columns}
    for i, row in enumerate(rows):
        cells = [f"**{cell(row, c)}**" if i in tops[c.key] else cell(row, c) for c in columns]
        name = str(row["name"]).replace("|", "\\|")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def insert(rows: Sequence[Row], document: Path, name: str) -> None:
    """Put the table, with what it was measured on, into its place in a document. Raises ValueError as ``place``."""
    place(f"{markdown_table(rows)}\n{said(rows)}", document, name)


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
    """One paragraph of protocol, for below a table."""
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
    return "; ".join(part for part in parts if part) + "."


def _short(commit: str) -> str:
    return commit[:12] + "-dirty" * commit.endswith("-dirty")


def picture(run: Path, file: Path, side: int = 96) -> None:
    """Write the run's comparison as one PNG: a row for each subject, a column for each prompt.

    side: of each image in pixels. Raises ValueError if the run has no comparison.
    """
    listed = run / "comparison" / "prompts.json"
    if not listed.is_file():
        raise ValueError(f"{run}: has no comparison; `fastgen evaluate {run}` makes it")
    kept = json.loads(listed.read_text(encoding="utf-8"))
    label, gap, font = 150, 4, ImageFont.load_default(14)
    columns, rows = len(kept["prompts"]), kept["subjects"]
    canvas = Image.new("RGB", (label + columns * (side + gap), len(rows) * (side + gap) + 3 * gap + 34), "white")
    draw = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(kept["prompts"]):
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
    partial = file.with_name(f".{file.name}")
    canvas.save(partial, "PNG", optimize=True)
    partial.replace(file)


def print_table(rows: Sequence[Row]) -> None:
    """The results on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = used_columns(rows)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("")
    for c in columns:
        table.add_column(c.narrow + _ARROWS[c.better], justify="right", no_wrap=True)
    tops = {c.key: best(rows, c) for c in columns}
    shade = {"data": "dim", "teacher": "", "student": "cyan"}
    for i, row in enumerate(rows):
        cells = [Text(cell(row, c), style="bold" if i in tops[c.key] else "") for c in columns]
        table.add_row(Text(str(row["name"])), *cells, style=shade.get(row["role"], ""))
    Console().print(table)


def write_report(run: Path) -> Path:
    """Write ``report.html`` from what the folder holds and return its path.

    Read are results.json, metrics.jsonl, comparison/, samples/ and config.yaml, each if it is there.
    Raises ValueError if there is neither of the first two, or if one is damaged.
    """
    rows, logged = read_results(run / "results.json"), read_metrics(run / "metrics.jsonl")
    if not rows and not logged:
        raise ValueError(
            f"{run}: holds neither results.json nor metrics.jsonl; `fastgen evaluate {run}` makes the first"
        )
    # a pipeline folder by itself may be called "pipeline"
    title = run.resolve().name
    body = [
        f"<header><h1>{_text(title)}</h1>{_verdict(rows)}</header>",
        _section("Results", _table(rows), "results"),
        _section("Pictures", _comparison(run / "comparison"), "pictures"),
        _section("Training", _curves(logged), "training"),
        _section("Samples during training", _grids(run / "samples"), "samples"),
        _section("Protocol", _protocol(rows), "protocol"),
        _section("Config", _config(run / "config.yaml"), "config"),
        f"<footer>Written by fastgen {fastgen.__version__}.</footer>",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: fastgen report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def read_results(path: Path) -> list[Row]:
    """The rows of a results.json; none if there is no such file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _ = row["name"], row["role"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a list of results ({error}); run `fastgen evaluate` again") from None
    return rows


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, content: str, name: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>' if content else ""


def _verdict(rows: Sequence[Row]) -> str:
    """The outcome in a sentence or two, where there is a student and a teacher of more steps."""
    students = [r for r in rows if r["role"] == "student" and r.get("fid") is not None]
    teachers = [r for r in rows if r["role"] == "teacher" and r.get("fid") is not None and r["steps"]]
    if not students or not teachers:
        return ""
    student, teacher = min(students, key=lambda r: r["fid"]), max(teachers, key=lambda r: r["steps"])
    fid = COLUMNS[2]
    named = {str(r["name"]).partition(",")[0] for r in students}
    who = "The student" if len(named) == 1 else f"The best student, {str(student['name']).partition(',')[0]},"
    words = [
        f"{who} reaches FID {cell(student, fid)} in {counted(student['steps'])}",
        f"the teacher {cell(teacher, fid)} in {counted(teacher['steps'])}",
    ]
    words += [
        f"{cell(r, fid)} in {counted(r['steps'])}"
        for r in teachers
        if r is not teacher and r["steps"] == student["steps"]
    ][:1]
    told = f"{words[0]}; {' and '.join(words[1:])}."
    times = [r.get("seconds_per_image") for r in (student, teacher)]
    if times[0] and times[1] and times[1] > times[0]:
        ratio = times[1] / times[0]
        faster = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
        told += f" An image takes {times[0]:.2g} s instead of {times[1]:.2g} s: {faster} times faster."
    return f'<p class="verdict">{_text(told)}</p>'


def counted(steps: int) -> str:
    """1 step, 2 steps."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    columns = used_columns(rows)
    tops = {c.key: best(rows, c) for c in columns}
    head = "".join(f'<th scope="col">{c.title}{_ARROWS[c.better]}</th>' for c in columns)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(
            f"<td><strong>{cell(row, c)}</strong></td>" if i in tops[c.key] else f"<td>{cell(row, c)}</td>"
            for c in columns
        )
        lines.append(f'<tr class="{_text(row["role"])}"><th scope="row">{_text(row["name"])}</th>{cells}</tr>')
    notes = "Arrows say which way is better; the best pipeline of each column is bold."
    if any(row["role"] == "data" for row in rows):
        notes += " The first row is real images: their FID, of another draw against the reference, is the floor."
    return (
        f'<div class="wide"><table class="results"><thead><tr><td></td>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{notes}</p>'
    )


def _comparison(folder: Path) -> str:
    """Pictures of the same prompts and seeds: a line per prompt, a column per subject."""
    listed = folder / "prompts.json"
    if not listed.is_file():
        return ""
    try:
        known = json.loads(listed.read_text(encoding="utf-8"))
        prompts, subjects = known["prompts"], _side_by_side(known["subjects"])
        head = "".join(f'<th scope="col" class="{_text(s["role"])}">{_text(s["name"])}</th>' for s in subjects)
        lines = []
        for i, prompt in enumerate(prompts):
            cells = "".join(_picture(folder / s["folder"] / f"{i}.png", f"{s['name']}: {prompt}") for s in subjects)
            lines.append(f'<tr><th scope="row">{_text(prompt)}</th>{cells}</tr>')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listed}: damaged ({error}); run `fastgen evaluate` again") from None
    note = "Each line is one prompt and, for the pipelines, one seed: the first ones measured, none picked by hand."
    return (
        f'<p class="note">{note}</p><div class="wide"><table class="pictures"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _side_by_side(subjects: Sequence[Row]) -> list[Row]:
    """Real images, the first teacher and the students; after these the other teachers."""
    teachers = [s for s in subjects if s["role"] == "teacher"]
    rank = {"data": 0, "teacher": 1, "student": 2}
    return sorted(subjects, key=lambda s: 3 if s in teachers[1:] else rank[s["role"]])


def _picture(file: Path, told: str) -> str:
    if not file.is_file():
        return "<td></td>"
    return f"<td>{inline(file, told, LARGEST)}</td>"


def inline(file: Path, told: str, largest: int) -> str:
    """An <img> that carries the picture, scaled down to ``largest`` pixels, or marked to be shown enlarged.

    Raises ValueError, naming the file, if it is damaged.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); run `fastgen evaluate` again") from None
    if max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    factor = max(1, ENLARGED // max(image.size))
    kind = ' class="pixels"' if factor > 1 else ""
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img{kind} {size} alt="{_text(told)}" title="{_text(told)}" src="data:image/png;base64,{code}">'


def _curves(logged: Sequence[Row]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in logged:
        for name, value in row.items():
            if (
                name not in ("step", "images_seen", *MEASURED)
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                series.setdefault(name, []).append((row["step"], value))
    # measured quality before the losses, gradient norms last
    measured = sorted(name for name in series if "/" not in name)
    losses = sorted((name for name in series if "/" in name), key=lambda n: (n.endswith("grad_norm"), n))
    parts = []
    quality = "On few images by the trainer's own sampler: not to be compared with the table."
    terms = "Each phase's terms; the faint line is as logged, the strong one smoothed."
    for names, heading, note in ((measured, "Quality", quality), (losses, "Losses", terms)):
        charts = "".join(_figure(name, series[name]) for name in names)
        if charts:
            parts.append(f'<h3>{heading}</h3><p class="note">{note}</p><div class="charts">{charts}</div>')
    return "".join(parts)


def _figure(name: str, points: Sequence[tuple[float, float]]) -> str:
    column = next((c for c in COLUMNS if c.key == name), None)
    title = column.title + _ARROWS[column.better] if column else _named(name)
    y_label = column.title if column else "gradient norm" if name.endswith("grad_norm") else name.split("/")[-1]
    chart = line_chart(points, "training step", y_label.replace("_", " "))
    return f"<figure><figcaption>{_text(title)}</figcaption>{chart}</figure>"


def _named(name: str) -> str:
    """In words: critic/grad_norm -> critic: grad norm."""
    return name.replace("/", ": ").replace("_", " ").replace(".", " ")


def _grids(folder: Path) -> str:
    files = sorted(folder.glob("step_*.png"))
    if len(files) > GRIDS:
        files = [files[round(i * (len(files) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    figures = [
        f"<figure>{inline(file, f'samples at {step}', 2 * LARGEST)}<figcaption>{step}</figcaption></figure>"
        for file in files
        for step in [f"step {file.stem.removeprefix('step_').lstrip('0') or '0'}"]
    ]
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def _protocol(rows: Sequence[Row]) -> str:
    """What all rows share as a list, what differs as a table."""
    flat = [dict(_flat(row.get("protocol", {}))) for row in rows]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    shared: list[str] = []
    varied: list[str] = []
    for name in names:
        values = [entry[name] for entry in flat if name in entry]
        (shared if all(v == values[0] for v in values) and len(values) > 1 else varied).append(name)
    parts = []
    if shared:
        first = {name: next(entry[name] for entry in flat if name in entry) for name in shared}
        items = "".join(f"<dt>{_text(name)}</dt><dd>{_brief(value)}</dd>" for name, value in first.items())
        parts.append(f"<dl>{items}</dl>")
    if varied:
        head = "".join(f'<th scope="col">{_text(row["name"])}</th>' for row in rows)
        lines = "".join(
            f'<tr><th scope="row">{_text(name)}</th>'
            + "".join(f"<td>{_brief(entry[name]) if name in entry else ''}</td>" for entry in flat)
            + "</tr>"
            for name in varied
        )
        parts.append(
            '<details><summary>What differs between the rows</summary><div class="wide"><table class="protocol">'
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
        )
    return "".join(parts)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        words = f"{before} {name}".strip().replace("_", " ").removeprefix("metrics ")
        if isinstance(value, Mapping):
            yield from _flat(value, words)
        else:
            yield words, value


def _brief(value: Any) -> str:
    """A protocol's value; of a long hash the beginning, with the rest on pointing at it."""
    text = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if len(text) >= 40 and text.removesuffix("-dirty").isalnum():
        tail = "-dirty" if text.endswith("-dirty") else ""
        return f'<code title="{_text(text)}">{_text(text[:12])}…{tail}</code>'
    return _text(text)


def _config(path: Path) -> str:
    if not path.is_file():
        return ""
    text = _text(path.read_text(encoding="utf-8"))
    return f"<details><summary>config.yaml, with every default written out</summary><pre>{text}</pre></details>"


CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --soft: #5d6672; --rule: #d9dee4; --tint: #f4f6f8;
  --student: #0b6e77; --student-tint: #e6f3f3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181c; --ink: #e3e7eb; --soft: #97a1ac; --rule: #323a42; --tint: #1c2227;
    --student: #5cc4cc; --student-tint: #143034;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 3rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p { max-width: 44rem; }
.verdict { font-size: 1.15rem; margin: 0.75rem 0 0; }
.note, figcaption, footer { color: var(--soft); font-size: 0.875rem; }
.note { margin: 0.5rem 0 0.75rem; }
footer { margin-top: 3rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
.results { width: 100%; }
.results th, .results td { padding: 0.5rem 0.75rem; text-align: right; white-space: nowrap; }
.results thead th {
  color: var(--soft); font-size: 0.8125rem; vertical-align: bottom; white-space: normal; min-width: 4.5rem;
}
.results tbody th { text-align: left; }
.results tbody tr { border-top: 1px solid var(--rule); }
.results thead { border-bottom: 1px solid var(--soft); }
.results .data { color: var(--soft); font-style: italic; }
.results .student { background: var(--student-tint); }
.results .teacher + .student, .results .data + .teacher { border-top: 1px solid var(--soft); }
.results .student th { color: var(--student); font-weight: 650; box-shadow: inset 3px 0 var(--student); }
strong { font-weight: 700; }
.pictures th, .pictures td { padding: 0.25rem 0.375rem; }
.pictures thead th { color: var(--soft); font-size: 0.8125rem; line-height: 1.3; vertical-align: bottom; }
.pictures thead .student { color: var(--student); font-weight: 650; }
.pictures tbody th {
  position: sticky; left: 0; background: var(--page); font-size: 0.875rem; font-weight: 400; line-height: 1.35;
  width: 11rem; min-width: 7rem; padding-left: 0;
}
img { display: block; max-width: none; }
.pixels { image-rendering: pixelated; }
.charts, .grids {
  display: grid; gap: 1.25rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
}
figure { margin: 0; }
.charts figcaption { color: var(--ink); font-weight: 500; margin-bottom: 0.25rem; }
.grids img { width: 100%; height: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line, .raw { fill: none; stroke: var(--student); stroke-width: 1.75; stroke-linejoin: round; }
.raw { opacity: 0.3; stroke-width: 1; }
.dot { fill: var(--student); }
dl {
  display: grid; grid-template-columns: minmax(8rem, 17rem) 1fr; gap: 0.25rem 1.25rem; margin: 0 0 1rem;
  font-size: 0.875rem;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 0.9375rem; padding: 0.25rem 0; }
.protocol { font-size: 0.8125rem; margin-top: 0.5rem; }
.protocol th, .protocol td { padding: 0.25rem 1rem 0.25rem 0; vertical-align: top; border-top: 1px solid var(--rule); }
.protocol tbody th { color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; font-size: 0.8125rem; }
pre { background: var(--tint); padding: 1rem; overflow-x: auto; line-height: 1.45; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 2rem; }
  h1 { font-size: 1.5rem; }
  .verdict { font-size: 1.05rem; }
  .results th, .results td { padding: 0.5rem 0.5rem; font-size: 0.875rem; }
  .results tbody th { position: sticky; left: 0; background: var(--page); white-space: normal; min-width: 6.5rem; }
  .results .student th { background: var(--student-tint); }
  .pictures .pixels { width: 64px; height: auto; }
  .pictures tbody th { min-width: 5.5rem; width: 5.5rem; }
  .pictures th { font-size: 0.75rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
@media print { body { max-width: none; } details { display: block; } }
"""
