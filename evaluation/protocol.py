"""Which rows may stand in one table: those that were measured in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .columns import LATENCY, Row

OWN = {"pipeline", "weights", "scheduler", "scheduler_config", "steps", "guidance_scale", "call", "images"}
"""Of the subject itself."""
WHERE = {"processes", "batch_size", "versions", "torchmetrics", "commit"}
"""Where it was measured: shown, as it may matter, but of no more weight than rounding is."""
DRAWN = {"num_images", "num_prompts", "pairs"}
"""A metric's counts; those of real images are of their own draw, which need not show the same prompts twice."""


def flat(tree: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A protocol's leaves by the names that lead to them."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*before, name))
        else:
            yield (*before, name), value


def differences(one: Row, other: Row) -> dict[str, tuple[Any, Any]]:
    """What was measured in another way, in words -> both values; empty if the rows may stand in one table.

    A name that only one of them has is no difference: real images have no seed, and not every metric was asked for.
    """
    timed = all(row.get("seconds_per_image") is not None for row in (one, other))
    drawn = any(row["role"] == "data" for row in (one, other))
    theirs = _compared(other, timed)
    return {
        " ".join(names).removeprefix("metrics "): (value, theirs[names])
        for names, value in _compared(one, timed).items()
        if names in theirs and theirs[names] != value and not (drawn and len(names) == 3 and names[2] in DRAWN)
    }


def _compared(row: Row, timed: bool) -> dict[tuple[str, ...], Any]:
    found = {}
    for names, value in flat(row.get("protocol") or {}):
        if names == ("device",) or names[:2] == ("metrics", LATENCY):
            if timed:  # how a call was timed, its batch and threads included
                found[names] = value
        elif not (OWN | WHERE) & set(names):
            found[names] = value
    return found


def tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in groups that may stand in one table each, in their order; real images in every one that they fit."""
    groups: list[list[Row]] = []
    # real images last: they lack a seed and the like, and so fit groups that do not fit each other
    for row in sorted(rows, key=lambda row: row["role"] == "data"):
        taking = [group for group in groups if not any(differences(row, other) for other in group)]
        if not taking:
            groups.append([row])
        for group in taking if row["role"] == "data" else taking[:1]:
            group.append(row)
    place = {id(row): i for i, row in enumerate(rows)}
    return [sorted(group, key=lambda row: place[id(row)]) for group in groups]


def joined(rows: Sequence[Row]) -> list[Row]:
    """The rows for one table. Raises ValueError, naming two rows and what differs, if they may not stand in one."""
    for i, row in enumerate(rows):
        for other in rows[:i]:
            found = differences(other, row)
            if found:
                raise ValueError(
                    f"rows {other['name']!r} and {row['name']!r} differ in {told(found)}; "
                    "their values do not compare, so they do not stand in one table"
                )
    return list(rows)


def told(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in words: fid sha256: 1; 2."""
    return ", in ".join(f"{name}: {brief(one)}; {brief(other)}" for name, (one, other) in found.items())


def brief(value: Any) -> str:
    """A protocol's value as text; of a long hash the beginning."""
    text = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    hashed = len(text) >= 40 and text.removesuffix("-dirty").isalnum()
    return text[:12] + "…" + "-dirty" * text.endswith("-dirty") if hashed else text
