"""How far a long piece of work is: a few lines on a terminal, drawn anew; elsewhere a line a minute in the log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from . import parallel, process
from .clock import clock

log = logging.getLogger("fastgen")

Advance = Callable[[Mapping[str, Any]], None]
"""Called after each unit of the work with its losses, numbers or tensors of one element."""
EVERY = 60.0
"""Seconds between two lines in the log."""


class Course:
    """Where a piece of work stands."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        """total: units of the work, ``done`` of which were done before."""
        self.total, self.done, self.unit = total, done, unit
        self.values: dict[str, Any] = {}
        self._began, self._before = time.monotonic(), done

    def advance(self, values: Mapping[str, Any]) -> None:
        """One unit more. A phase that does not come every step keeps the terms of its last one."""
        self.done += 1
        self.values |= values

    @property
    def rate(self) -> float:
        """Units a second since this process began with them, pauses between them and all; 0 before the first."""
        return (self.done - self._before) / max(time.monotonic() - self._began, 1e-9)

    def pace(self) -> str:
        """The rate, the time left and the memory, as text."""
        rate = self.rate
        if not rate:
            return memory()
        speed = f"{rate:.2f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.2f} s/{self.unit}"
        return f"{speed}, {clock((self.total - self.done) / rate)} left, {memory()}"

    def terms(self) -> list[str]:
        """Name and newest value of each term; norms of gradients are for metrics.jsonl."""
        return [f"{k} {float(v):.3g}" for k, v in self.values.items() if not k.endswith("grad_norm")]


@contextlib.contextmanager
def progress(total: int, done: int, title: str = "training", unit: str = "step") -> Iterator[Advance]:
    """Show the course of a piece of work: rate, time left, memory and losses.

    On the main process of a terminal a bar, which log lines go past; elsewhere a line a minute, and one at the end;
    nothing in other processes.
    """
    from rich.console import Console

    if parallel.rank() != 0:
        yield lambda values: None
        return
    course, console = Course(total, done, unit), Console(stderr=True)
    if console.is_terminal:
        with shown(course, title, console):
            yield course.advance
        return
    last = [time.monotonic()]

    def line(values: Mapping[str, Any]) -> None:
        course.advance(values)
        now = time.monotonic()
        if now - last[0] >= EVERY or course.done == total:
            last[0] = now
            log.info("%s %d/%d %s %s", unit, course.done, total, course.pace(), " ".join(course.terms()))

    yield line


@contextlib.contextmanager
def shown(course: Course, title: str, console: Any) -> Iterator[None]:
    """Within it a terminal shows the course; what is logged meanwhile appears above it."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def picture() -> Group:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1, max_width=40)
        head.add_column(no_wrap=True)
        bar = ProgressBar(max(course.total, 1), course.done)
        head.add_row(title, bar, f"{course.done}/{course.total} {course.pace()}")
        rows = fitted(course.terms(), console.width - 2)
        return Group(head, *(Text(f"  {row}", style="dim", no_wrap=True, overflow="ellipsis") for row in rows))

    handlers = [h for h in log.handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr]
    with Live(get_renderable=picture, console=console, refresh_per_second=4):
        kept = [(handler, handler.setStream(sys.stderr)) for handler in handlers]  # now rich's, who draws it above
        try:
            yield
        finally:
            for handler, stream in kept:
                handler.setStream(stream or sys.__stderr__)


def fitted(terms: list[str], width: int, most: int = 2) -> list[str]:
    """Terms on at most ``most`` lines of ``width`` columns, none broken; how many more there are at the end."""
    lines: list[str] = [""] if terms else []
    for number, term in enumerate(terms):
        longer = f"{lines[-1]}  {term}" if lines[-1] else term
        rest = len(terms) - number
        room = width - (len(f"  +{rest - 1} more") if len(lines) == most and rest > 1 else 0)
        if len(longer) <= room or (not lines[-1] and len(lines) < most):
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(term)
        else:
            lines[-1] = f"{lines[-1]}  +{rest} more".strip()
            break
    return lines


def memory() -> str:
    """What this process holds now, on its GPU if it has used one, else of the machine's memory."""
    used = torch.cuda.is_initialized()
    held = torch.cuda.memory_reserved() if used else process.resident("VmRSS")
    return f"{held / 1e9:.1f} GB"
