"""The best checkpoint of a run by a value of its quick evaluations: kept, marked in ``best.json``, found again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from . import checkpoint, registry
from .checkpoint import CheckpointError
from .config import suggest
from .plain import from_json

FILE = "best.json"
"""Its name in the run folder."""
Direction = Literal["low", "high"]


@dataclass(frozen=True)
class Best:
    """A checkpoint and what makes it the best.

    Attributes:
        step: steps done.
        metric: the value's name, as metrics.jsonl has it.
        value: with as many digits as metrics.jsonl keeps, so that a resumed run compares the same numbers.
        better: which way is better.
    """

    step: int
    metric: str
    value: float
    better: Direction

    def beats(self, other: Best | None) -> bool:
        """Whether its value is strictly better; one that is not finite never is."""
        if not math.isfinite(self.value):
            return False
        sign = 1 if self.better == "high" else -1
        return other is None or sign * self.value > sign * other.value


class Keeper:
    """Knows the best checkpoint so far of a run; of one that keeps none, nothing."""

    def __init__(
        self, run: Path, metric: str, better: Direction, rows: Iterable[Mapping[str, Any]] = (), steps_done: int = 0
    ) -> None:
        """metric: empty: keep none. rows: of metrics.jsonl, up to the step at which the run goes on.

        A checkpoint that has gone does not count, and one whose mark a kill prevented is marked now.
        """
        self.run, self.metric, self.better = run, metric, better
        self.best: Best | None = None
        if not metric:
            return
        marked = read(run)
        candidates = [self._of(int(row["step"]), row[metric]) for row in rows if metric in row]
        if marked and (marked.metric, marked.better) == (metric, better) and marked.step <= steps_done:
            candidates.insert(0, marked)
        for found in candidates:
            if _folder(run, found).is_dir() and found.beats(self.best):
                self.best = found
        if self.best is None:
            (run / FILE).unlink(missing_ok=True)
        elif self.best != marked:
            write(run, self.best)

    def better_one(self, step: int, values: Mapping[str, float]) -> Best | None:
        """The new best, if these values of a quick evaluation are; it is still to be saved and marked.

        Raises ValueError if the metric is not among the values.
        """
        if not self.metric:
            return None
        if self.metric not in values:
            raise ValueError(
                f"run.keep_best {self.metric!r}: the quick evaluation gives {', '.join(values) or 'nothing'}; choose "
                "one of these, or add its metric to eval.metrics"
            )
        found = self._of(step, values[self.metric])
        return found if found.beats(self.best) else None

    def mark(self, found: Best, keep: int) -> None:
        """Say that this checkpoint, which has been saved, is the best, and let the one before go."""
        write(self.run, found)
        self.best = found
        checkpoint.prune(self.run, _folder(self.run, found), keep, self.spared)

    @property
    def spared(self) -> Path | None:
        """The checkpoint that must not be deleted."""
        return _folder(self.run, self.best) if self.best else None

    def _of(self, step: int, value: float) -> Best:
        return Best(step, self.metric, float(f"{value:.7g}"), self.better)


def _folder(run: Path, found: Best) -> Path:
    return run / f"checkpoint-{found.step}"


def read(run: Path) -> Best | None:
    """What ``best.json`` says; None if there is none. Raises CheckpointError if it cannot be read."""
    try:
        return Best(**from_json((run / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{run / FILE}: damaged ({error}); delete it, and --resume finds the best anew"
        ) from None


def write(run: Path, found: Best) -> None:
    """Write ``best.json``, which appears whole or not at all."""
    checkpoint.write_text(run / FILE, json.dumps(asdict(found), indent=1) + "\n")


def find(run: Path) -> tuple[Best, Path]:
    """The best checkpoint of a run and its folder. Raises CheckpointError if none is marked."""
    found = read(run)
    if found is None:
        raise CheckpointError(
            f"{run}: no checkpoint is marked as the best; train with run.keep_best, such as fid, or name a checkpoint"
        )
    return found, _folder(run, found)


def direction(value: str, evaluation: Mapping[str, Any]) -> Direction:
    """Which way a value of quick evaluations is better, as its metric says. evaluation: the ``eval:`` section.

    Raises ValueError if no metric that is measured computes it, if neither way is better, or if nothing is measured.
    """
    if not evaluation.get("every"):
        raise ValueError(f"run.keep_best {value!r} needs quick evaluations; set eval.every, or leave it out")
    known: dict[str, Direction | Literal[""]] = {}
    for name in evaluation.get("metrics") or registry.names("metric"):
        about = vars(registry.find("metric", name)).get("ABOUT")
        known |= dict.fromkeys(about.values if about else (), about.better if about else "")
    if value not in known:
        raise ValueError(f"run.keep_best {value!r}: no metric of eval.metrics gives it{suggest(value, known)}")
    better = known[value]
    if not better:
        raise ValueError(f"run.keep_best {value!r}: its metric does not say which way is better; choose another value")
    return better
