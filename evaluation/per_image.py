"""What single images of a subject scored, on disk, for paired comparisons: a JSON file a subject and set of prompts.

``OUT/per_image/FOLDER.json``, FOLDER as in ``comparison/``, or ``OUT/per_image/SET/FOLDER.json`` of a set of prompts
besides the reference's: ``{"version": 1, "subject": its row's name, "prompts": SHA-256 of the set's prompts, as in the
row's protocol, "seed": of the evaluation (image i's own is keyed by it and i), "num_images": N, "values": {name: [N
numbers or null]}}``. Numbers are written so that reading gives the same float64; null stands where an image has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint import write_text
from fastgen.plain import from_json

FOLDER = "per_image"
"""Below the results."""
VERSION = 1


@dataclass(frozen=True, eq=False)
class PerImage:
    """The scores of a subject's images.

    Attributes:
        subject: the name of its row.
        prompts: SHA-256 of the prompts, as the row's protocol gives it.
        seed: of the evaluation; None for real images.
        values: by name, float64 [N]; NaN where an image has none.
    """

    subject: str
    prompts: str
    seed: int | None
    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        """The number of images."""
        return max((len(value) for value in self.values.values()), default=0)


def save(path: Path, scores: PerImage) -> None:
    """Write the file, whole or not at all. Raises ValueError on values of unequal length or an infinite one."""
    listed = {}
    for name, value in scores.values.items():
        if value.ndim != 1 or len(value) != len(scores):
            raise ValueError(f"per-image values must be [N] of one N: {name} is {list(value.shape)}, N {len(scores)}")
        if value.isinf().any():
            raise ValueError(f"per-image value {name} of {scores.subject!r} is infinite; give NaN where there is none")
        listed[name] = [None if math.isnan(v) else v for v in value.double().tolist()]
    kept = {"version": VERSION, "subject": scores.subject, "prompts": scores.prompts, "seed": scores.seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(kept | {"num_images": len(scores), "values": listed}, allow_nan=False) + "\n")


def load(path: Path) -> PerImage:
    """Read one file. Raises ValueError, naming it, if it is damaged or of another version."""
    try:
        kept = from_json(path.read_text(encoding="utf-8"))
        if kept["version"] != VERSION:
            raise ValueError(f"version {kept['version']}, not {VERSION}")
        values = {
            name: torch.tensor([math.nan if v is None else v for v in listed], dtype=torch.float64)
            for name, listed in kept["values"].items()
        }
        if any(len(value) != kept["num_images"] for value in values.values()):
            raise ValueError(f"not {kept['num_images']} values each")
        return PerImage(str(kept["subject"]), str(kept["prompts"]), kept["seed"], values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not per-image values ({error}); run `fastgen evaluate` again") from None


def load_all(out: Path) -> dict[str, list[PerImage]]:
    """By the subject's name, all there is below a folder of results."""
    found: dict[str, list[PerImage]] = {}
    for path in sorted((out / FOLDER).rglob("*.json")):
        scores = load(path)
        found.setdefault(scores.subject, []).append(scores)
    return found
