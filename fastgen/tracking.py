"""Where a run's numbers go: metrics.jsonl always, TensorBoard or W&B if asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import parallel
from .checkpoint import write_text

MEASURED = ("seconds_per_step", "train_seconds", "peak_memory_mb")
"""What a run says of the machine's work, which no two runs share; train_seconds and the peak go on over resumes."""


class Tracker(Protocol):
    """Something that takes rows of numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` at ``step`` steps done."""
        ...


class JsonLines:
    """One JSON object a line: {"step": N, name: value, ...}; null where a value is not finite, as a norm in fp16."""

    def __init__(self, path: Path, steps_done: int) -> None:
        """Go on after ``steps_done``: rows of later steps, left by a run that was cut off, are dropped."""
        self.path = path
        rows = [row for row in _rows(path) if row["step"] <= steps_done]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        row = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without what was not finite; a last line that a kill cut short is left out."""
    return [{name: value for name, value in row.items() if value is not None} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line, parse_constant=lambda _: None))  # NaN, in files from before there was null
        except ValueError:
            continue
    return rows


class TensorBoard:
    """Scalars for TensorBoard under ``tb/``."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("run.trackers: tensorboard is not installed; pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandB:
    """Weights & Biases; key and project come from its own environment variables, never from a config.

    A run that goes on from a checkpoint goes on there, too, by the id that ``wandb_id`` in its folder keeps; rows that
    had been logged already are given again, and W&B leaves them out.
    """

    def __init__(self, run: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the package is missing."""
        try:
            import wandb
        except ImportError:
            raise ValueError("run.trackers: wandb is not installed; pip install 'fastgen-diffusion[wandb]'") from None
        kept = run / "wandb_id"
        known = kept.read_text(encoding="utf-8").strip() if steps_done and kept.is_file() else None
        self._run = wandb.init(id=known, name=run.name, dir=str(run), config=dict(settings), resume="allow")
        write_text(kept, f"{self._run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log(dict(values), step=step)


def trackers(names: Sequence[str], run: Path, steps_done: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run, on the main process; none on the others."""
    if parallel.rank() != 0:
        return []
    made: list[Tracker] = [JsonLines(run / "metrics.jsonl", steps_done)]
    if "tensorboard" in names:
        made.append(TensorBoard(run / "tb"))
    if "wandb" in names:
        made.append(WandB(run, steps_done, settings))
    return made
