"""Rows of text as a table: on a terminal, or in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def show(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table. left: so many columns, from the first on, are words; the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    for line in lines:
        table.add_row(*map(Text, line))  # a name may have brackets, which Rich would read as its own
    Console(width=None if sys.stdout.isatty() else 200).print(table)  # a file has no edge to break lines at


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same in Markdown. Cells are Markdown already: what could be read as its signs is escaped by the caller."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *lines))
