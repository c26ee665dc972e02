"""The sections of the page that show pictures: side by side, of several seeds, with what GenEval found wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastgen import registry
from fastgen.plain import from_json, shown

from . import protocol
from .columns import Row, columns, of_metric, used_columns
from .markup import table, text

LARGEST = 256
"""Pictures wider or higher than this many pixels are scaled down for the page."""
ENLARGED = 128
"""Smaller ones are shown enlarged by a whole factor up to this many pixels; larger ones are stored as WebP."""
GRIDS = 6
"""Most sample grids shown."""
FAILURES = 18
"""Most failing images shown of a subject,"""
FAILURES_IN_ALL = 108
"""and of all."""
SEEDS = (3, 8)
"""Most prompts shown with several seeds, and most seeds of each."""


def listed(folder: Path) -> tuple[list[str], list[Row]]:
    """Prompts and subjects of the comparison, as they were judged; nothing where there is none. Raises ValueError."""
    path = folder / "prompts.json"
    if not path.is_file():
        return [], []
    try:
        known = from_json(path.read_text(encoding="utf-8"))
        for subject in known["subjects"]:
            _ = subject["name"], subject["role"]
            if Path(str(subject["folder"])).name != subject["folder"]:  # which would lead out of the comparison
                raise ValueError(f"folder {shown(subject['folder'])} is no name")
        return [str(prompt) for prompt in known["prompts"]], [*known["subjects"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); run `fastgen evaluate` again") from None


def comparison(folder: Path) -> str:
    """Pictures of the same prompts and seeds: a line per prompt, a column per subject; the script adds sliders."""
    prompts, subjects = listed(folder)
    if not prompts:
        return ""
    subjects = _side_by_side(subjects)
    head = "".join(f'<th scope="col" class="{text(s["role"])}">{text(s["name"])}</th>' for s in subjects)
    lines = []
    for i, prompt in enumerate(prompts):
        cells = "".join(cell_of(folder / s["folder"] / f"{i}.png", f"{s['name']}: {prompt}") for s in subjects)
        lines.append(f'<tr><th scope="row">{text(prompt)}</th>{cells}</tr>')
    note = (
        "Each picture is of one prompt and, for the pipelines, one seed: the first ones measured, none picked by hand."
    )
    return (
        f'<p class="note">{note}</p><div class="compare"></div><h3>Side by side</h3>'
        f'<div class="wide"><table class="pictures"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _side_by_side(subjects: Sequence[Row]) -> list[Row]:
    """Real images, the first teacher and the students; after these the other teachers."""
    teachers = [s for s in subjects if s["role"] == "teacher"]
    rank = {"data": 0, "teacher": 1, "student": 2}
    return sorted(subjects, key=lambda s: 3 if s in teachers[1:] else rank[s["role"]])


def cell_of(file: Path, told: str) -> str:
    """A cell with the picture; empty if there is no such file."""
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
    kind = "png" if max(image.size) <= ENLARGED else "webp"
    if kind == "png":
        image.save(data, "PNG", optimize=True)
    else:
        image.save(data, "WEBP", quality=90)
    factor = max(1, ENLARGED // max(image.size))
    style = ' class="pixels"' if factor > 1 else ""
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img{style} {size} alt="{text(told)}" title="{text(told)}" src="data:image/{kind};base64,{code}">'


def grids(folder: Path) -> str:
    """The trainer's sample sheets, at most GRIDS of them, evenly spread over the training."""
    files = sorted(folder.glob("step_*.png"))
    if len(files) > GRIDS:
        files = [files[round(i * (len(files) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    figures = [
        f"<figure>{inline(file, f'samples at {step}', 2 * LARGEST)}<figcaption>{step}</figcaption></figure>"
        for file in files
        for step in [f"step {file.stem.removeprefix('step_').lstrip('0') or '0'}"]
    ]
    return f'<div class="grids">{"".join(figures)}</div>' if figures else ""


def _of_seeds(name: str) -> bool:
    """Whether a metric compares images of one prompt."""
    try:
        about = vars(registry.find("metric", name)).get("ABOUT")
    except ValueError:
        return False
    return about is not None and "prompt seeds" in about.needs


def diversity(rows: Sequence[Row], folder: Path) -> str:
    """What metrics of several seeds say, and pictures of prompts that come more than once."""
    names = dict.fromkeys(name for row in rows for name in (row.get("protocol") or {}).get("metrics", {}))
    keys = {"diversity"} | {column.key for name in names if _of_seeds(name) for column in of_metric(name)}
    parts = []
    for group in protocol.tables(rows):
        chosen = used_columns(group, [column for column in columns(group) if column.key in keys])
        if chosen:
            parts.append(table([row for row in group if any(row.get(c.key) is not None for c in chosen)], chosen))
    prompts, subjects = listed(folder)
    subjects = _side_by_side(subjects)
    repeated = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) > 1][: SEEDS[0]]
    for prompt in repeated:
        places = [i for i, other in enumerate(prompts) if other == prompt][: SEEDS[1]]
        lines = "".join(
            f'<tr class="{text(s["role"])}"><th scope="row">{text(s["name"])}</th>'
            + "".join(cell_of(folder / s["folder"] / f"{i}.png", f"{s['name']}: {prompt}, image {i}") for i in places)
            + "</tr>"
            for s in subjects
        )
        head = "".join(f'<th scope="col">image {i}</th>' for i in places)
        parts.append(
            f'<h3>{text(prompt)}</h3><div class="wide"><table class="pictures seeds"><thead><tr><td></td>'
            f"{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    note = "How much the images of one prompt differ, to be read beside the teacher and the real images."
    return f'<p class="note">{note}</p>{"".join(parts)}' if parts else ""


def failures(rows: Sequence[Row], folder: Path) -> str:
    """Of each subject some images that failed, from each task in turn, whose files are there."""
    if not folder.is_dir():
        return ""
    from .runner import slug

    parts: list[str] = []
    left = FAILURES_IN_ALL
    for row in sorted(rows, key=lambda row: row["role"] != "student"):
        verdicts = list(_read_verdicts(folder / f"{slug(str(row['name']))}.jsonl"))
        wrong = [entry for entry in verdicts if not entry["correct"]]
        shown: list[str] = []
        for entry in _in_turn(wrong):
            file = folder.parent / str(entry["filename"])
            if len(shown) < min(FAILURES, left) and file.is_file():
                shown.append(
                    f"<figure>{inline(file, entry['prompt'], LARGEST)}<figcaption><q>{text(entry['prompt'])}</q>"
                    f'<span class="why">{text(entry["reason"] or "wrong")}</span></figcaption></figure>'
                )
        left -= len(shown)
        if shown:
            told = f"{row['name']}: {len(wrong)} of {len(verdicts)} images failed"
            told += f"; {len(shown)} of them" if len(shown) < len(wrong) else ""
            opened = "" if parts else " open"
            parts.append(
                f"<details{opened}><summary>{text(told)}</summary>"
                f'<div class="failures">{"".join(shown)}</div></details>'
            )
    return "".join(parts)


def _read_verdicts(path: Path) -> Iterator[Row]:
    """The rows of a results.jsonl in the official form; none if there is no such file."""
    if not path.is_file():
        return
    for line, entry in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = from_json(entry)
            yield {name: row[name] for name in ("filename", "tag", "prompt", "correct", "reason")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {line} is no verdict ({error}); run `fastgen evaluate` again") from None


def _in_turn(verdicts: Sequence[Row]) -> list[Row]:
    """First of each task one, then of each a second, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for entry in verdicts:
        seen[entry["tag"]] = turn = seen.get(entry["tag"], 0) + 1
        turns.append((turn, entry))
    return [entry for _, entry in sorted(turns, key=lambda pair: pair[0])]
