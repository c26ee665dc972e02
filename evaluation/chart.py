"""Charts as SVG: of a page, coloured by its CSS (a line, marks of several series, shares by task), or a whole file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42
MOST_POINTS = 400
"""More than these are averaged in neighbourhoods."""
DOTS = 40
"""So many points or fewer are marked, each with its value; more get a smoothed line over a faint one."""
SMOOTHING = 1 / 25
"""Share of the points that a smoothed one averages to either side."""
LOG_RATIO = 8
"""A series of positive values whose largest is so many times its smallest gets a logarithmic axis."""
COLOURS = ("#0b6e77", "#c0392b", "#2f5fb3", "#b07d0a", "#7a3fa8", "#3d8b37", "#c2417f")
DASHES = ("", "6 3", "1.5 2.5")
"""Of the lines of one file: each colour is used again with the next dash."""
LEGEND, LINE = 175, 17
"""Width of the legend and height of its lines."""
SHAPES = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z",
    "M-3.7-3.7h7.4v7.4h-7.4z",
    "M0-4.9L4.6 3.4h-9.2z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.9L4.6-3.4h-9.2z",
)
"""Outlines of the marks of one chart, round the origin: each round of colours has the next shape."""
LABELLED = 24
"""With so many marks or fewer each has its label beside it."""
MARGIN = 0.05
"""Share of a chart's width and height kept free about marks."""
_STYLE = """
text { fill: #5d6672; font: 11.5px system-ui, sans-serif; }
.grid { stroke: #d9dee4; } .axis { stroke: #5d6672; } .series { fill: none; stroke-width: 1.6; }
"""


def line_chart(points: Points, x_label: str, y_label: str) -> str:
    """points: (x, y), x rising; at least one. -> <svg>."""
    shown = thinned(points, MOST_POINTS)
    ys = [y for _, y in shown]
    parts, place = _frame(shown, x_label, y_label)
    if len(shown) > DOTS:
        parts.append(_line("raw", [place(*p) for p in shown]))
        parts.append(_line("line", [place(*p) for p in smoothed(shown, round(SMOOTHING * len(shown)))]))
    else:
        parts.append(_line("line", [place(*p) for p in shown]))
        for x, y in shown:
            across, down = place(x, y)
            told = f"{x_label} {x:g}: {y:.4g}"
            parts.append(f'<circle class="dot" cx="{across:.1f}" cy="{down:.1f}" r="3"><title>{told}</title></circle>')
    name = escape(f"{y_label} by {x_label}, from {ys[0]:.4g} to {ys[-1]:.4g}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def chart_file(panels: Mapping[str, Mapping[str, Points]], y_label: str) -> str:
    """Charts side by side that share a legend -> a whole .svg file.

    panels: by the label of its x axis, each chart's lines by name: (x, y), x rising, at least one each; the first
    panel names them all.
    """
    names = list(next(iter(panels.values())))
    height = max(HEIGHT, LINE * len(names) + TOP)
    width = WIDTH * len(panels) + LEGEND
    told = escape(f"{y_label} of {', '.join(names)} by {' and by '.join(panels)}", quote=True)
    body = [
        f"<title>{told}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (x_label, series) in enumerate(panels.items()):
        parts, place = _frame([point for points in series.values() for point in points], x_label, y_label)
        for name, points in series.items():
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))
            parts.append(f'<path class="series" {_ink(names.index(name))} d="M{line}"/>')
            for x, y in points:
                across, down = place(x, y)
                hint = escape(f"{name}: {y:.4g} at {x:g} {x_label}")
                dot = f'cx="{across:.1f}" cy="{down:.1f}" r="2" fill="{COLOURS[names.index(name) % len(COLOURS)]}"'
                parts.append(f"<circle {dot}><title>{hint}</title></circle>")
        body.append(f'<g transform="translate({number * WIDTH} 0)">{"".join(parts)}</g>')
    for i, name in enumerate(names):
        y = TOP + LINE * i + LINE / 2
        body.append(f'<path class="series" {_ink(i)} d="M{width - LEGEND} {y}h22"/>')
        body.append(f'<text x="{width - LEGEND + 28}" y="{y + 4}">{escape(name)}</text>')
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
    return f"<svg {head}>{''.join(body)}</svg>\n"


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: where it stands.
        y: likewise.
        interval: (low, high) of what the chart shows, y or a share; None: not known.
        label: beside it.
        told: on pointing at it.
    """

    x: float
    y: float
    interval: tuple[float, float] | None = None
    label: str = ""
    told: str = ""


def scatter(
    series: Mapping[str, Sequence[Mark]],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] = (),
    level: tuple[str, float] | None = None,
) -> str:
    """Marks joined within each series, in the order of x -> <svg>.

    series: by name, each with at least one mark; the first is drawn as ``look(0)``, and so on. x_ticks: if given, the
    only ones. level: name and height of a line across, what can be reached at best, say.
    """
    marks = [mark for found in series.values() for mark in found]
    heights = [y for mark in marks for y in mark.interval or ()] + ([level[1]] if level else [])
    spread = [(mark.x, mark.y) for mark in marks] + [(marks[0].x, y) for y in heights]
    parts, place = _frame(spread, x_label, y_label, x_ticks, MARGIN)
    if level:
        _, down = place(marks[0].x, level[1])
        parts.append(f'<path class="level" d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}"/>')
        inside = down - 5 if down > TOP + 16 else down + 13
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{inside:.1f}" text-anchor="end">{escape(level[0])}</text>')
    for number, found in enumerate(series.values()):
        found = sorted(found, key=lambda mark: mark.x)
        if len(found) > 1:
            path = "L".join("{:.1f} {:.1f}".format(*place(mark.x, mark.y)) for mark in found)
            parts.append(f'<path class="link {look(number)[0]}" d="M{path}"/>')
    for number, (name, found) in enumerate(series.items()):
        for mark in found:
            ends = [place(mark.x, y) for y in mark.interval or ()]
            parts.append(_mark(number, mark, place(mark.x, mark.y), ends, name))
    if len(marks) <= LABELLED:
        parts += _beside([(mark.label, *place(mark.x, mark.y)) for mark in marks if mark.label])
    told = escape(f"{y_label} by {x_label} of {', '.join(series)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def shares(series: Mapping[str, Mapping[str, Mark]], tasks: Sequence[str]) -> str:
    """A line for each task, and on it a mark for each series at its share, 0 to 1 -> <svg>.

    series: by name, of marks by task, whose x is the share and whose interval is of it.
    """
    left, right, high, step = 118, WIDTH - 20, 30 + 34 * len(tasks), 34
    axis = Axis([0.0, 1.0], log=False)

    def across(x: float) -> float:
        return left + axis.place(x) * (right - left)

    parts = []
    for tick in axis.ticks:
        parts.append(f'<path class="grid" d="M{across(tick):.1f} 8V{high - 18}"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{high - 3}" text-anchor="middle">{round(100 * tick)}%</text>')
    for line, task in enumerate(tasks):
        down = 8 + step * (line + 0.5)
        parts.append(f'<text class="task" x="{left - 10}" y="{down + 4:.1f}" text-anchor="end">{escape(task)}</text>')
        parts.append(f'<path class="grid" d="M{left} {down:.1f}H{right}"/>')
        for number, (name, marks) in enumerate(series.items()):
            if task in marks:
                # the series side by side about the line, so that equal ones are seen
                off = down + (number - (len(series) - 1) / 2) * min(6, 24 / len(series))
                ends = [(across(x), off) for x in marks[task].interval or ()]
                parts.append(_mark(number, marks[task], (across(marks[task].x), off), ends, name))
    told = escape(f"Share of right images by task of {', '.join(series)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {high}" role="img" aria-label="{told}">{"".join(parts)}</svg>'


def look(number: int) -> tuple[str, str]:
    """The CSS class of a series' colour and the outline of its marks."""
    return f"c{number % len(COLOURS)}", SHAPES[number // len(COLOURS) % len(SHAPES)]


def swatch(number: int) -> str:
    """A series' mark for a legend -> <svg>."""
    colour, shape = look(number)
    mark = f'<path class="mark {colour}" d="{shape}"/>'
    return f'<svg class="swatch" viewBox="-7 -7 14 14" aria-hidden="true">{mark}</svg>'


def _mark(number: int, mark: Mark, at: tuple[float, float], ends: Points, name: str) -> str:
    """A mark of a series at (x, y), over the line between its interval's ends, if it has one."""
    colour, shape = look(number)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
    whisker = f'<path class="whisker {colour}" d="M{path}"/>' if path else ""
    told = escape(f"{name}: {mark.told}" if mark.told else name)
    outline = f'<path class="mark {colour}" transform="translate({at[0]:.1f} {at[1]:.1f})" d="{shape}"/>'
    return f"<g><title>{told}</title>{whisker}{outline}</g>"


def _beside(labels: Sequence[tuple[str, float, float]]) -> list[str]:
    """Labels by their places, at the first corner that is in the frame and covers no mark or label, if any."""
    taken = [(x, y) for _, x, y in labels]
    parts = []
    for text, x, y in labels:
        wide = 3.4 * len(text)
        for across, down in ((1, -7), (-1, -7), (1, 9), (-1, 9)):
            left, top = x + across * (6 + wide), y + down
            inside = LEFT + wide < left < WIDTH - wide and TOP < top < HEIGHT - BOTTOM - 2
            if inside and all(abs(left - a) > wide + 5 or abs(top - b) > 8 for a, b in taken):
                taken.append((left, top))
                at = f'x="{left:.1f}" y="{top + 4:.1f}"'
                parts.append(f'<text class="name" {at} text-anchor="middle">{escape(text)}</text>')
                break
    return parts


def _ink(number: int) -> str:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _frame(
    points: Points, x_label: str, y_label: str, x_ticks: Sequence[float] = (), margin: float = 0.0
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """Grid and labels that fit these points, and where in the chart a point lies.

    x_ticks: those of the x axis, if not round ones. margin: share of width and height left free at each side; with one
    the x axis is logarithmic where the y axis would be.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log, x_log = (min(values) > 0 and max(values) / min(values) >= LOG_RATIO for values in (ys, xs))
    x_axis, y_axis = Axis(xs, x_log and margin > 0, x_ticks, margin), Axis(ys, log, (), margin)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (1 - y_axis.place(y)) * (HEIGHT - TOP - BOTTOM)

    return [*_grid(x_axis, y_axis), *_labels(x_label, f"{y_label}, log scale" if log else y_label)], place


class Axis:
    """Values to [0, 1], linear or logarithmic, and where the ticks stand."""

    def __init__(self, values: Sequence[float], log: bool, ticks: Sequence[float] = (), margin: float = 0.0) -> None:
        """values: finite, and positive for a logarithmic axis. ticks: if not round ones. margin: free at the ends."""
        self.log, self._margin = log, margin
        low, high = min(values), max(values)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        self.ticks = list(ticks) or (log_ticks(low, high) if log else linear_ticks(low, high))
        self._low, self._high = self._scale(min(low, self.ticks[0])), self._scale(max(high, self.ticks[-1]))

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return self._margin + (1 - 2 * self._margin) * share


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` + 1 round numbers within [low, high], evenly spaced; at least two, beyond it if need be."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < 1:
        first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within [low, high] or, where these are few, 1, 2 and 5 times them; thinned to ``most``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // most)]
    return ticks if len(ticks) > 1 else [low, high]


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """Means over neighbours, so that at most ``most`` points remain; the last x stays."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(points: Points, reach: int) -> list[tuple[float, float]]:
    """Each y the mean over ``reach`` neighbours on either side, fewer where there are fewer."""
    result = []
    for i, (x, _) in enumerate(points):
        part = points[max(0, i - reach) : i + reach + 1]
        result.append((x, sum(y for _, y in part) / len(part)))
    return result


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = TOP + (1 - y_axis.place(tick)) * (bottom - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_axis.ticks:
        x = LEFT + x_axis.place(tick) * (right - LEFT)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    return parts


def _labels(x_label: str, y_label: str) -> list[str]:
    x, y = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    return [
        f'<text class="label" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(13 {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _line(kind: str, places: Sequence[tuple[float, float]]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" d="M{path}"/>'


def short(value: float) -> str:
    """A tick's number: 20000 as 20k."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size and value % (size / 100) == 0:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"
