"""Where a run's numbers and sample grids go: metrics.jsonl always, others by name if asked (``run.trackers``).

None of their packages is imported unless it is asked for, nor is torch by who only reads rows. A tracker is given the
rows of metrics.jsonl, the sample grids and the config; its keys, servers and projects are what its own environment
variables say (WANDB_API_KEY, WANDB_MODE=offline, TRACKIO_DIR, ...), never a config.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .config import suggest
from .plain import from_json

log = logging.getLogger("fastgen")

MEASURED = ("seconds_per_step", "train_seconds", "peak_memory_mb")
"""What a run says of the machine's work, which no two runs share; train_seconds and the peak go on over resumes."""


FILE = "metrics.jsonl"
"""Of the rows in a run folder."""
GRIDS = "samples"
"""What trackers call the sample grids."""


class Tracker(Protocol):
    """Something that takes rows of numbers, and pictures if it can show them."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` at ``step`` steps done."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """Take the sample grid of ``step``, a PNG; what shows none takes nothing."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left, and say how the run ended; the last call."""
        ...


class JsonLines:
    """One JSON object a line: {"step": N, name: value, ...}; null where a value is not finite, as a norm in fp16."""

    def __init__(self, path: Path, steps_done: int) -> None:
        """Go on after ``steps_done``: rows of later steps, left by a run that was cut off, are dropped."""
        self.path = path
        from .checkpoint import write_text  # which needs torch

        rows = [row for row in _rows(path) if row["step"] <= steps_done]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        row = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")

    def picture(self, step: int, path: Path) -> None:
        """Nothing: it lies in the run folder already."""

    def close(self, failed: bool) -> None:
        """Nothing: each row is written when it comes."""


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without what was not finite; a last line that a kill cut short is left out."""
    return [{name: value for name, value in row.items() if value is not None} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # errors: bytes that are no text make their own row none, not the others
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = from_json(line, parse_constant=lambda _: None)  # NaN, in files from before there was null
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class TensorBoard:
    """Scalars and images for TensorBoard under ``tb/``.

    A run that goes on from a checkpoint goes on there; what was written before of later steps is not shown.
    """

    def __init__(self, run: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("run.trackers: tensorboard is not installed; pip install tensorboard") from None
        self._writer = SummaryWriter(str(run / "tb"), purge_step=steps_done + 1)
        if not steps_done:
            self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=1)}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        """Add it as an image."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(GRIDS, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """Weights & Biases, offline with WANDB_MODE=offline (``wandb sync`` sends it later); WANDB_PROJECT is the project.

    A run that goes on from a checkpoint goes on there, too, by the id that ``wandb_id`` in its folder keeps; rows that
    had been logged already are given again, and W&B leaves them out. Offline each part has a folder of its own under
    the one id, which ``wandb sync`` joins.
    """

    def __init__(self, run: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the package is missing."""
        try:
            import wandb
        except ImportError:
            raise ValueError("run.trackers: wandb is not installed; pip install 'fastgen-diffusion[wandb]'") from None
        known = kept(run, "wandb_id", steps_done)
        self._wandb = wandb
        self._run = wandb.init(id=known, name=run.name, dir=str(run), config=dict(settings), resume="allow")
        keep(run, "wandb_id", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log it with the step's row."""
        self._run.log({GRIDS: self._wandb.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        """Send what is left; a run that was not finished is marked as failed until it goes on."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """Trackio: a database on this machine (TRACKIO_DIR), or a Space that TRACKIO_SPACE_ID names.

    TRACKIO_PROJECT is the project, else "fastgen". The run is called as its folder with a few random letters, which
    ``trackio_name`` in the folder keeps, so that a run that goes on from a checkpoint goes on in its own and not in
    that of another folder of the name. Rows that had been logged already lie there twice, the same.
    """

    def __init__(self, run: Path, steps_done: int, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the package is missing."""
        try:
            import trackio
        except ImportError:
            raise ValueError(
                "run.trackers: trackio is not installed; pip install 'fastgen-diffusion[trackio]'"
            ) from None
        known = kept(run, "trackio_name", steps_done)
        name = known or f"{run.name}-{secrets.token_hex(3)}"
        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):  # it tells where it writes; stdout is for results
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "fastgen"),
                name=name,
                config=dict(settings),
                resume="allow" if known else "never",
            )
        keep(run, "trackio_name", name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log it as a row of its own."""
        self._run.log({GRIDS: self._trackio.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        """Write what is left; it knows no failed runs."""
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()  # not the run's own, which is called again, and told again, when Python ends


def kept(run: Path, name: str, steps_done: int) -> str | None:
    """By which name a tracker knows a run that goes on; None for one that begins."""
    file = run / name
    return (file.read_text(encoding="utf-8").strip() or None) if steps_done and file.is_file() else None


def keep(run: Path, name: str, text: str) -> None:
    """Write what ``kept`` reads."""
    from .checkpoint import write_text

    write_text(run / name, f"{text}\n")


NAMES: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "jsonl": lambda run, steps_done, _: JsonLines(run / FILE, steps_done),
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}
"""Name in ``run.trackers`` -> a tracker of a run folder that goes on after so many steps, and is given its config."""
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""What is to be installed for those that need something."""


def trackers(names: Sequence[str], run: Path, steps_done: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run, on the main process; none on the others. Raises ValueError for an unknown name."""
    from . import parallel  # which needs torch

    for name in names:
        if name not in NAMES:
            raise ValueError(f"run.trackers: unknown tracker {name!r}{suggest(name, NAMES)}")
    if parallel.rank() != 0:
        return []
    made: list[Tracker] = []
    try:
        for name in dict.fromkeys(["jsonl", *names]):
            made.append(NAMES[name](run, steps_done, settings))
    except BaseException:
        _close(made, failed=True)
        raise
    return made


@contextlib.contextmanager
def closing(made: Sequence[Tracker]) -> Iterator[None]:
    """Close trackers on leaving, however that is. One that cannot be closed, as without network, is a warning."""
    failed = True
    try:
        yield
        failed = False
    finally:
        _close(made, failed)


def _close(made: Sequence[Tracker], failed: bool) -> None:
    for tracker in made:
        try:
            tracker.close(failed)
        except Exception as error:  # of several libraries, for whatever reason; the training is done and must not end
            log.warning("run.trackers: %s did not finish (%s)", type(tracker).__name__, error)
