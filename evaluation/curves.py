"""``fastgen plot``: the curves of runs as one PNG of small charts, one for each value, the runs over each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

from .. import runs, tracking
from .chart import COLOURS, DOTS, LOG_RATIO, SMOOTHING, Axis, Points, short, smoothed, thinned
from .chart import MARGIN as FREE

SCALE, FINE = 2, 2
"""Pixels of the picture for a unit of length, and how many times finer it is drawn."""
COLUMNS, WIDTH, HEIGHT, GAP = 3, 330, 190, 26
"""Charts in a row, the size of one and the room between two."""
EDGE, HEAD, LINE = 28, 34, 20
"""About the picture, of a heading, of a line of the legend."""
LEFT, TOP, BOTTOM = 48, 26, 22
"""Within a chart, for what stands beside its lines."""
MARKED = 12
"""So many points or fewer are marked."""
MOST = 600
"""Points of a line; of more, neighbours are averaged."""
INK, FAINT, GRID, GROUND = "#1d2530", "#5d6672", "#e3e7ec", "#ffffff"
HEALTH = "health/"
"""``fastgen.health.PREFIX``, written again since that module loads torch."""
GROUPS = ("Quick evaluations", "Losses", "Gradient norms", "Health", "The machine")
"""Headings, in their order; the last only where it is asked for."""

Curves = Mapping[str, Mapping[str, Points]]
"""Name of a value -> name of a run -> its points (step, value)."""


def group(name: str) -> str:
    """The heading under which a value of metrics.jsonl stands."""
    if name.startswith(HEALTH):
        return "Health"
    if name.endswith("grad_norm"):
        return "Gradient norms"
    if "/" in name:
        return "Losses"
    return "Quick evaluations" if runs.quick(name) else "The machine"


def read(folders: Sequence[Path], wanted: Sequence[str] = ()) -> Curves:
    """The curves of runs, by heading and then in the order in which they come.

    wanted: names, or patterns as ``student/*``; empty: all but what is of the machine. Raises ValueError if a folder
    is no run or has no rows yet, or if no run has one of the names.
    """
    found: dict[str, dict[str, Points]] = {}
    for name, folder in zip(short_names(folders), folders, strict=True):
        file = folder / tracking.FILE
        rows = [row for row in tracking.read(file) if isinstance(row.get("step"), int)]
        if not rows:
            why = "has no rows yet" if file.is_file() else "is no run folder: it holds no metrics.jsonl"
            raise ValueError(f"{folder}: {why}; `fastgen runs` lists runs")
        for value in dict.fromkeys(key for row in rows for key in row if key != "step"):
            points = [
                (float(row["step"]), float(row[value])) for row in rows if isinstance(row.get(value), int | float)
            ]
            if points:
                found.setdefault(value, {})[name] = points
    chosen = [name for name in found if not wanted and group(name) != GROUPS[-1]]
    for pattern in wanted:
        matching = fnmatch.filter(found, pattern)
        if not matching:
            known = ", ".join(sorted(found, key=lambda name: GROUPS.index(group(name))))
            raise ValueError(f"--metrics {pattern!r}: no run has it; there are {known}")
        chosen += [name for name in matching if name not in chosen]
    return {name: found[name] for name in sorted(chosen, key=lambda name: GROUPS.index(group(name)))}


def short_names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others; with a number where that is all of it."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({number})" for number, folder in enumerate(folders, 1)]


def picture(curves: Curves, title: str, reach: int | None = None) -> Image.Image:
    """Small charts under their headings, and a legend if there are several runs.

    reach: rows averaged to either side, over the faint line of what they were; 0: none; None: a 25th of the rows where
    they are many.
    """
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    headings = [heading for heading in GROUPS if any(group(value) == heading for value in curves)]
    panels = {heading: [value for value in curves if group(value) == heading] for heading in headings}
    columns = min(COLUMNS, max(map(len, panels.values())))
    width = 2 * EDGE + columns * WIDTH + (columns - 1) * GAP
    legend = placed(names, width - 2 * EDGE) if len(names) > 1 else []
    key = (legend[-1][1] + 1) * LINE + 8 if legend else 0
    height = EDGE + HEAD + key
    for values in panels.values():
        height += HEAD + -(-len(values) // columns) * (HEIGHT + GAP)
    canvas = Canvas(width, height + EDGE - GAP)
    canvas.text((EDGE, EDGE), fit(title, 19, width - 2 * EDGE - 110), 19, INK)
    canvas.text((width - EDGE, EDGE + 6), "by steps done", 11, FAINT, "rt")
    for number, (x, line) in enumerate(legend):
        y = EDGE + HEAD + line * LINE + LINE / 2 - 4
        canvas.line([(EDGE + x, y), (EDGE + x + 20, y)], colour(number), 2.6)
        canvas.text((EDGE + x + 27, y), names[number], 13, INK, "lm")
    y = EDGE + HEAD + key
    steps = [x for lines_of in curves.values() for points in lines_of.values() for x, _ in points]
    for heading, values in panels.items():
        canvas.text((EDGE, y + 6), heading, 15, FAINT)
        y += HEAD
        for place, value in enumerate(values):
            corner = (EDGE + place % columns * (WIDTH + GAP), y + place // columns * (HEIGHT + GAP))
            _chart(canvas, corner, value, {names.index(run): p for run, p in curves[value].items()}, steps, reach)
        y += -(-len(values) // columns) * (HEIGHT + GAP)
    return canvas.image.reduce(FINE)


def placed(names: Sequence[str], width: float) -> list[tuple[float, int]]:
    """Where each name of a legend stands: distance from the left, and line."""
    found, x, line = [], 0.0, 0
    for name in names:
        wide = 27 + _font(13).getlength(name) / (SCALE * FINE) + 24
        if x and x + wide > width:
            x, line = 0.0, line + 1
        found.append((x, line))
        x += wide
    return found


def colour(number: int) -> str:
    """Of the run of this number; those after the seventh have the same, paler."""
    return paler(COLOURS[number % len(COLOURS)], 0.5 ** (number // len(COLOURS)))


class Canvas:
    """A picture on which one draws in units, ``SCALE`` pixels each."""

    def __init__(self, width: float, height: float) -> None:
        """Empty."""
        self._fine = SCALE * FINE
        self.image = Image.new("RGB", (round(width * self._fine), round(height * self._fine)), GROUND)
        self._draw = ImageDraw.Draw(self.image)

    def line(self, points: Iterable[tuple[float, float]], ink: str, wide: float) -> None:
        """A line through points, with round corners and ends."""
        fine = [(x * self._fine, y * self._fine) for x, y in points]
        across = max(1, round(wide * self._fine))
        self._draw.line(fine, fill=ink, width=across, joint="curve")
        if across > self._fine:
            for x, y in (fine[0], fine[-1]):
                self._draw.circle((x, y), across / 2, fill=ink)

    def dot(self, x: float, y: float, ink: str, radius: float) -> None:
        """A disc with a white rim."""
        centre = (x * self._fine, y * self._fine)
        self._draw.circle(centre, (radius + 0.8) * self._fine, fill=GROUND)
        self._draw.circle(centre, radius * self._fine, fill=ink)

    def text(self, at: tuple[float, float], text: str, size: float, ink: str, anchor: str = "lt") -> None:
        """anchor: as Pillow's, left or middle or right, then top or middle or baseline."""
        self._draw.text((at[0] * self._fine, at[1] * self._fine), text, ink, _font(size), anchor)


def _font(size: float) -> Any:
    return ImageFont.load_default(size * SCALE * FINE)


def fit(text: str, size: float, width: float) -> str:
    """A text, its middle left out as far as it would be wider."""
    font, kept = _font(size), len(text)
    shown = text
    while font.getlength(shown) / (SCALE * FINE) > width and kept > 6:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return shown


def _chart(
    canvas: Canvas,
    corner: tuple[float, float],
    value: str,
    lines: Mapping[int, Points],
    steps: Sequence[float],
    reach: int | None,
) -> None:
    """One chart. lines: by the number of the run. steps: of all charts, which share their x axis."""
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH, corner[1] + HEIGHT - BOTTOM
    shown = {number: thinned(points, MOST) for number, points in lines.items()}
    ys = [y for points in shown.values() for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) >= LOG_RATIO
    x_axis, y_axis = Axis([0, *steps], False), Axis(ys, log, (), FREE)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + x_axis.place(point[0]) * (right - left), bottom - y_axis.place(point[1]) * (bottom - top)

    canvas.text((corner[0], corner[1] + 4), fit(value, 13, WIDTH - (62 if log else 0)), 13, INK)
    if log:
        canvas.text((right, corner[1] + 5), "log scale", 10.5, FAINT, "rt")
    for tick in y_axis.ticks:
        y = place((steps[0], tick))[1]
        canvas.line([(left, y), (right, y)], GRID, 0.75)
        canvas.text((left - 7, y), short(tick), 11, FAINT, "rm")
    for tick in x_axis.ticks:
        x = place((tick, ys[0]))[0]
        canvas.line([(x, bottom), (x, bottom + 4)], FAINT, 0.75)
        canvas.text((x, bottom + 8), short(tick), 11, FAINT, "mt")
    canvas.line([(left, bottom), (right, bottom)], FAINT, 0.75)
    for number, points in shown.items():
        near = round(SMOOTHING * len(points)) if reach is None and len(points) > DOTS else reach or 0
        if near:
            canvas.line(map(place, points), paler(colour(number), 0.28), 1)
    for number, points in shown.items():
        near = round(SMOOTHING * len(points)) if reach is None and len(points) > DOTS else reach or 0
        line = [place(point) for point in (smoothed(points, near) if near else points)]
        if len(line) > 1:
            canvas.line(line, colour(number), 1.6)
        for x, y in line if len(line) <= MARKED and not near else ():
            canvas.dot(x, y, colour(number), 1.9)


def paler(ink: str, share: float) -> str:
    """The colour as thin paint on the ground."""
    red, green, blue = (round(255 - share * (255 - part)) for part in ImageColor.getrgb(ink)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


def write(image: Image.Image, path: Path) -> None:
    """Write a PNG, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, "PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
