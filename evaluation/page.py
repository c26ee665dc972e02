"""The report as one HTML page that carries everything in itself: pictures, charts, style and script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastgen

from . import protocol
from .columns import (
    COLUMNS,
    COSTS,
    LATENCY,
    Column,
    Row,
    cell,
    counted,
    number,
    of_metric,
    series,
    used_columns,
    words,
)
from .markup import headed, table, text, title_of
from .pictures import comparison, diversity, grids
from .plots import by_task, curves, quality
from .style import CSS, SCRIPT

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""The browser itself is told to fetch nothing and to run no other script."""
SPEED = (
    Column("seconds_to_first_image", "Seconds to first image", "", "low", number),
    Column("seconds_per_image", "Seconds per image", "", "low", number),
    Column("seconds_min", "fastest", "", "", number),
    Column("seconds_max", "slowest", "", "", number),
    Column("images_per_second", "Images per second", "", "high", number),
    Column("peak_memory_mib", "Peak memory, MiB", "", "low", lambda v: f"{v:,.0f}"),
    Column("network_evaluations", "Network evaluations", "", "low", lambda v: f"{v:g}"),
)


def page(title: str, run: Path, rows: Sequence[Row], logged: Sequence[Row]) -> str:
    """All of it. rows: of results.json; logged: of metrics.jsonl. Raises ValueError if something is damaged."""
    groups = protocol.tables(rows)
    several = [(f" {i}" if len(groups) > 1 else "", group) for i, group in enumerate(groups, 1)]
    sections = [
        ("results", "Results", _separate(groups) + "".join(_results(group, title) for title, group in several)),
        ("pictures", "Pictures", comparison(run / "comparison")),
        ("quality", "Quality against steps and latency", "".join(headed(t, quality(g)) for t, g in several)),
        ("geneval", "GenEval by task", "".join(headed(t, by_task(g, run)) for t, g in several)),
        ("diversity", "Diversity across seeds", diversity(rows, run / "comparison")),
        ("speed", "Speed and memory", "".join(headed(t, speed(g)) for t, g in several)),
        ("training", "Training", curves(logged)),
        ("samples", "Samples during training", grids(run / "samples")),
        ("protocol", "Protocol", "".join(headed(t, _protocol(g)) for t, g in several)),
        ("config", "Config", _config(run / "config.yaml")),
    ]
    there = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading.partition(" against")[0]}</a>' for name, heading, _ in there)
    body = [
        f"<header><h1>{text(title)}</h1>{_verdict(groups[0] if groups else [])}<nav>{links}</nav></header>",
        *(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in there),
        f"<footer>Written by fastgen {fastgen.__version__}.</footer>",
        f"<script>{SCRIPT}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}: fastgen report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def verdict(rows: Sequence[Row]) -> str:
    """The outcome in a sentence or two, where there is a student and a teacher of more steps; else empty."""
    students = [r for r in rows if r["role"] == "student" and r.get("fid") is not None]
    teachers = [r for r in rows if r["role"] == "teacher" and r.get("fid") is not None and r["steps"]]
    if not students or not teachers:
        return ""
    student, teacher = min(students, key=lambda r: r["fid"]), max(teachers, key=lambda r: r["steps"])
    fid = next(column for column in COLUMNS if column.key == "fid")
    who = "The student" if len({series(r) for r in students}) == 1 else f"The best student, {series(student)},"
    told = [
        f"{who} reaches FID {cell(student, fid)} in {counted(student['steps'])}",
        f"the teacher {cell(teacher, fid)} in {counted(teacher['steps'])}",
    ]
    told += [
        f"{cell(r, fid)} in {counted(r['steps'])}"
        for r in teachers
        if r is not teacher and r["steps"] == student["steps"]
    ][:1]
    said = f"{told[0]}; {' and '.join(told[1:])}."
    times = [r.get("seconds_per_image") for r in (student, teacher)]
    if times[0] and times[1] and times[1] > times[0]:
        ratio = times[1] / times[0]
        faster = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
        said += f" An image takes {times[0]:.2g} s instead of {times[1]:.2g} s: {faster} times faster."
    return said


def _verdict(rows: Sequence[Row]) -> str:
    said = verdict(rows)
    return f'<p class="verdict">{text(said)}</p>' if said else ""


def separated(groups: Sequence[Sequence[Row]]) -> str:
    """Why there are several tables; empty if there is one."""
    if len(groups) < 2:
        return ""
    found = (protocol.differences(one, other) for one in groups[0] for other in groups[1])
    reason = protocol.told(next(filter(None, found), {}))
    return (
        f"These rows were not measured in the same way, so they stand in {len(groups)} tables, whose values do not "
        f"compare. The first two differ in {reason}."
    )


def _separate(groups: Sequence[Sequence[Row]]) -> str:
    why = separated(groups)
    return f'<p class="separate">{text(why)}</p>' if why else ""


def _results(rows: Sequence[Row], title: str) -> str:
    notes = "Arrows say which way is better; the best pipeline of each column is bold."
    if any(row.get("intervals") for row in rows):
        notes += " Brackets: 95 % interval, by bootstrap over the images."
    if any(row["role"] == "data" and row.get("fid") is not None for row in rows):
        notes += " The first row is real images: their FID, of another draw against the reference, is the floor."
    return headed(title, f'{table(rows, used_columns(rows))}<p class="note">{notes}</p>')


def speed(rows: Sequence[Row]) -> str:
    """All that was timed, where it is more than the first table shows."""
    own = {column.key for column in SPEED}
    chosen = used_columns(rows, [*SPEED, *(column for column in of_metric(LATENCY) if column.key not in own)])
    if not {column.key for column in chosen} - set(COSTS):
        return ""
    timed = [row for row in rows if any(row.get(c.key) is not None for c in chosen)]
    how = dict(protocol.flat(next((row["protocol"]["metrics"].get(LATENCY) for row in timed if _timed(row)), {})))
    told = ", ".join(f"{' '.join(names).replace('_', ' ')} {protocol.brief(value)}" for names, value in how.items())
    note = f'<p class="note">{text(words(told))}.</p>' if told else ""
    return table(timed, chosen) + note


def _timed(row: Row) -> bool:
    return bool(((row.get("protocol") or {}).get("metrics") or {}).get(LATENCY))


def _protocol(rows: Sequence[Row]) -> str:
    """What all rows share as lists, by metric; what differs as a table."""
    flat = [dict(protocol.flat(row.get("protocol") or {})) for row in rows]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    shared: dict[tuple[str, ...], list[str]] = {}
    varied = []
    for name in names:
        values = [entry[name] for entry in flat if name in entry]
        if all(v == values[0] for v in values) and (len(values) > 1 or len(rows) == 1):
            part = 2 if name[0] == "metrics" else 1 if name[0] == "versions" else 0
            named = " ".join(name[part:]).replace("_", " ")
            shared.setdefault(name[:part], []).append(f"<dt>{text(named)}</dt><dd>{_brief(values[0])}</dd>")
        else:
            varied.append(name)
    # what holds for all metrics before what holds for each
    lists = [
        f"<div><h3>{text(title_of(of[-1])) if of else 'Every row'}</h3><dl>{''.join(items)}</dl></div>"
        for of, items in sorted(shared.items(), key=lambda pair: len(pair[0]))
    ]
    parts = [f'<div class="facts">{"".join(lists)}</div>'] if lists else []
    if varied:
        head = "".join(f'<th scope="col">{text(row["name"])}</th>' for row in rows)
        lines = "".join(
            f'<tr><th scope="row">{text(" ".join(name).replace("_", " ").removeprefix("metrics "))}</th>'
            + "".join(f"<td>{_brief(entry[name]) if name in entry else ''}</td>" for entry in flat)
            + "</tr>"
            for name in varied
        )
        parts.append(
            '<details><summary>What differs between the rows</summary><div class="wide"><table class="protocol">'
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
        )
    return "".join(parts)


def _brief(value: Any) -> str:
    """A protocol's value; of a long hash the beginning, with the rest on pointing at it."""
    shown = protocol.brief(value)
    return f'<code title="{text(value)}">{text(shown)}</code>' if "…" in shown else text(shown)


def _config(path: Path) -> str:
    if not path.is_file():
        return ""
    content = text(path.read_text(encoding="utf-8"))
    return f"<details><summary>config.yaml, with every default written out</summary><pre>{content}</pre></details>"
