"""Verdicts on many images, from rows of what a detector found: the values of geneval and of its relatives.

A row holds the objects of an image, best first, as `COLUMNS`: float32 [MOST, 7], NaN beyond the last object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import Seen
from .verdict import COLOURS, OFFICIAL, TAGS, Found, Options, Verdict, judge, row

COLUMNS = ("class", "score", "x0", "y0", "x1", "y1", "colour")
"""The number of its class, 0 to 1, pixels, and the number of its colour or -1 if that is not known."""
MOST = 100
"""Objects of an image."""

Record = Mapping[str, Any]


def found(row: Tensor, classes: Sequence[str]) -> dict[str, list[Found]]:
    """The objects of a row [MOST, 7], by the name of their class."""
    objects: dict[str, list[Found]] = {}
    for number, score, x0, y0, x1, y1, colour in row[~row[:, 0].isnan()].tolist():
        word = COLOURS[int(colour)] if colour >= 0 else None
        objects.setdefault(classes[int(number)], []).append(Found(score, (x0, y0, x1, y1), word))
    return objects


def padded(objects: Tensor) -> Tensor:
    """Objects [K, 7], K at most MOST -> a row."""
    out = torch.full((MOST, len(COLUMNS)), torch.nan)
    out[: len(objects)] = objects
    return out


class Verdicts:
    """The verdict on each image; those of rows met before are remembered, for resampling."""

    def __init__(
        self,
        name: str,
        key: str,
        records: Mapping[str, Record],
        classes: Sequence[str],
        options: Options = OFFICIAL,
    ) -> None:
        """name: of the values; key: of the extractor that makes the rows; records: GenEval's, by prompt."""
        self._name, self._key, self._options = name, key, options
        self._records, self._classes = records, classes
        self._made: dict[tuple[str, bytes], Verdict] = {}

    def of(self, seen: Seen) -> list[Verdict]:
        """Of each image."""
        return [self._of(prompt, one) for prompt, one in zip(seen.prompts, seen.rows[self._key], strict=True)]

    def _of(self, prompt: str, one: Tensor) -> Verdict:
        at = prompt, one.numpy().tobytes()
        if at not in self._made:
            self._made[at] = judge(self._records[prompt], found(one, self._classes), self._options)
        return self._made[at]

    def compute(self, seen: Seen) -> dict[str, float]:
        """NAME, the mean of the tags' shares of correct images, and NAME_TAG for each tag among the images."""
        if not len(seen):
            raise ValueError(f"{self._name} needs at least 1 image, got 0")
        shares = {
            name: float(values[~values.isnan()].mean())
            for name, values in self.per_image(seen).items()
            if not values.isnan().all()
        }
        return {self._name: sum(shares.values()) / len(shares), **shares}

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """NAME_TAG: 1 or 0 for each image of the tag, NaN for others; NAME itself is no mean over images."""
        tags = [self._records[prompt]["tag"] for prompt in seen.prompts]
        correct = [float(verdict.correct) for verdict in self.of(seen)]
        return {
            f"{self._name}_{tag}": torch.tensor(
                [value if own == tag else torch.nan for own, value in zip(tags, correct, strict=True)],
                dtype=torch.float64,
            )
            for tag in TAGS
            if tag in tags
        }

    def lines(self, seen: Seen, filenames: Sequence[str]) -> list[dict[str, Any]]:
        """Of each image its line in a results.jsonl of the official form; filenames: theirs."""
        return [
            row(filename, self._records[prompt], found(one, self._classes), self._options)
            for filename, prompt, one in zip(filenames, seen.prompts, seen.rows[self._key], strict=True)
        ]


def values(name: str) -> tuple[str, ...]:
    """The names of what is computed, for ``About``."""
    return (name, *(f"{name}_{tag}" for tag in TAGS))
