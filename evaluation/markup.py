"""Parts of the page that several sections use."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from .chart import swatch
from .columns import ARROWS, Column, Row, best, cell, interval, of_metric, words


def text(value: Any) -> str:
    """As it stands in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


NARROW = 3
"""Tables of so many columns are not stretched over the page."""


def arrowed(column: Column) -> str:
    """A column's title with its arrow, which stays on the line of the last word."""
    return text(column.title + ARROWS[column.better].replace(" ", "\N{NO-BREAK SPACE}"))


def headed(title: str, content: str) -> str:
    """Content of one of several tables under its number."""
    return f"<h3>Table{title}</h3>{content}" if title and content else content


def table(rows: Sequence[Row], chosen: Sequence[Column]) -> str:
    """Rows in these columns, the best of each bold, intervals below their values."""
    tops = {c.key: best(rows, c) for c in chosen}
    head = "".join(f'<th scope="col">{arrowed(c)}</th>' for c in chosen)
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for c in chosen:
            value, ends = cell(row, c), interval(row, c)
            value = f"<strong>{value}</strong>" if i in tops[c.key] else value
            cells.append(f"<td>{value}{f'<small>{ends}</small>' if ends else ''}</td>")
        name = f'<th scope="row">{text(row["name"])}</th>'
        lines.append(f'<tr class="{text(row["role"])}">{name}{"".join(cells)}</tr>')
    kind = "results" if len(chosen) > NARROW else "results narrow"
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def legend(names: Sequence[str]) -> str:
    """The series of a chart, in its order, with their marks."""
    items = "".join(f"<li>{swatch(i)}{text(name)}</li>" for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def title_of(name: str) -> str:
    """A metric's title: of the value that is called as it is, else of itself in words."""
    return next((column.title for column in of_metric(name) if column.key == name), words(name))
