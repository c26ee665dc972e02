"""Items of a source that cannot be read: a few are passed over, counted and listed, more end the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from fastgen import parallel

log = logging.getLogger("fastgen")

SKIPPED = "skipped.txt"
"""The list of them in the folder of a run or a cache: name, tab, reason."""


class Unreadable(ValueError):
    """An image that cannot be read.

    Attributes:
        name: what the user knows it by, a path.
        reason: a library's words.
    """

    def __init__(self, name: str, reason: str, told: str = "") -> None:
        super().__init__(f"{name}: not a readable image ({reason}); remove or replace it{told}")
        self.name, self.reason = name, reason


class Skipped:
    """The items of a source that could not be read. A few are passed over, more end the run."""

    def __init__(self, total: int, limit: float) -> None:
        """total: items there are; limit: as the option ``unreadable`` has it."""
        self._total, self._allowed = total, int(limit if limit >= 1 else limit * total)
        self._numbers: set[int] = set()
        self._lines: dict[str, str] = {}
        self._file: Path | None = None

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def keep(self, file: Path) -> None:
        """Write the list to ``file``, too, anew; all processes write to the same, and count what it lists."""
        if parallel.rank() == 0:
            file.unlink(missing_ok=True)
        parallel.barrier()
        self._file = file
        for name, reason in self._lines.items():
            self._append(name, reason)

    def add(self, number: int, error: Unreadable) -> None:
        """Count an item. Raises Unreadable if there are more than allowed."""
        self._numbers.add(number)
        if error.name in self._lines:
            return
        self._lines[error.name] = error.reason
        self._append(error.name, error.reason)
        count = len(self._listed() | self._lines.keys())
        if count > self._allowed:
            told = f"{count} of {self._total} cannot be read, {self._allowed} may be, by the data's `unreadable`"
            where = f" ({self._file} lists them)" if self._file else ""
            raise Unreadable(error.name, error.reason, f"; {told}{where}")
        log.warning("%s; skipped, as %d of %d so far", error, count, self._total)

    def _append(self, name: str, reason: str) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as opened:
                opened.write(f"{name}\t{' '.join(reason.split())}\n")

    def _listed(self) -> set[str]:
        """The names that this and other processes have found."""
        if self._file is None or not self._file.is_file():
            return set()
        return {line.partition("\t")[0] for line in self._file.read_text(encoding="utf-8").splitlines()}
