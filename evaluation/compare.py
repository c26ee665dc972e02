"""Two subjects image by image: the same prompts and seeds, so what differs is the pipeline.

For a value that is a mean over images: the mean of the differences d_i = b_i - a_i with a 95 % percentile interval by
the paired bootstrap, and a test of "neither is better". Means: the sign-flip test (under the hypothesis that a and b
may change places in each image, d_i and -d_i are equally likely; exact where all 2^N flips are fewer than the
resamples, else by random ones with (1 + hits) / (1 + flips), Phipson and Smyth 2010, arXiv 1603.05766). Right or
wrong: McNemar's test (1947) in its exact form, the binomial test on the images that only one gets right. The p of all
values compared at once are adjusted after Holm (1979). Images are taken as independent draws, those of one prompt too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.config import suggest

from . import per_image, protocol, report
from .columns import COSTS, TASKS, Column, Row, cell, columns, interval, number, words
from .markup import title_of

RESAMPLES = 10_000
LEVEL = 0.05
"""Adjusted p below this is called a difference."""
_CHUNK = 2**22
"""Most numbers drawn at once."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: its row, and its images' scores, those of each set of prompts, where they were kept."""

    row: Row
    scores: Sequence[per_image.PerImage] = ()

    @property
    def name(self) -> str:
        """Of its row."""
        return str(self.row["name"])

    @property
    def scored(self) -> dict[str, per_image.PerImage]:
        """The names of values with scores by image, and where these are."""
        return {name: scores for scores in self.scores for name in scores.values}


def sides(a: str, b: str, out: Path | None = None) -> tuple[Side, Side]:
    """The two that are meant by folders of results, or by names of rows.

    Args:
        a: a folder that holds one pipeline, or one student; or FOLDER:NAME; or the NAME of a row in ``out``.
        b: likewise; a bare name is also looked for in ``a``'s folder.
        out: folder of results in which bare names are rows.

    Raises:
        ValueError: if one is neither, or if a folder holds several.
    """
    first = out or next((found[0] for found in map(_folder, (a, b)) if found), None)
    return _side(a, first), _side(b, first)


def _folder(text: str) -> tuple[Path, str] | None:
    """The folder of results that a text begins with, and what row of it is meant."""
    if (Path(text) / "results.json").is_file():
        return Path(text), ""
    folder, colon, name = text.rpartition(":")
    return (Path(folder), name) if colon and (Path(folder) / "results.json").is_file() else None


def _side(text: str, out: Path | None) -> Side:
    found = _folder(text) or (out and (out, text))
    if not found:
        raise ValueError(f"{text}: neither a folder with a results.json nor FOLDER:NAME of a row in one")
    folder, name = found
    rows = report.read_results(folder / "results.json")
    named = {str(row["name"]): row for row in rows if row["role"] != "data"}
    students = [str(row["name"]) for row in rows if row["role"] == "student"]
    if not name:
        name = next((names[0] for names in (list(named), students) if len(names) == 1), "")
        if not name:
            raise ValueError(f"{folder}: holds several pipelines; say {folder}:NAME with one of {', '.join(named)}")
    if name not in named:
        raise ValueError(f"{folder}: has no pipeline {name!r}{suggest(name, named)}")
    return Side(named[name], per_image.load_all(folder).get(name, ()))


def compare(a: Side, b: Side, *, resamples: int = RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """What differs between b and a, a row for each value that both have; differences are b - a.

    Of each: ``value`` (its name), ``title``, ``a``, ``b``, ``test`` ("sign flips", "McNemar" or None). Of values with
    scores by image also ``num_images``, ``difference``, ``interval`` [low, high], ``p``, ``p_adjusted`` and, for right
    or wrong, ``only_a`` and ``only_b``; of others ``interval_a`` and ``interval_b``, where the rows have them.

    Raises ValueError if prompts, seeds or the rest of the protocol differ, or if neither has anything to compare.
    """
    _check(a, b)
    found: list[dict[str, Any]] = []
    ours, theirs = a.scored, b.scored
    known = {column.key: column for column in columns([a.row, b.row]) if column.key not in ("steps", "guidance_scale")}
    for name in [*known, *(name for name in ours if name not in known)]:
        column = known.get(name) or _column(name)
        entry: dict[str, Any] = {"value": name, "title": column.title, "better": column.better}
        if name in ours and name in theirs:
            tested = paired(ours[name].values[name], theirs[name].values[name], resamples=resamples, seed=seed)
            found += [entry | tested] if tested else []
        elif name in known and all(side.row.get(name) is not None for side in (a, b)):
            ends = {f"interval_{k}": (s.row.get("intervals") or {}).get(name) for k, s in (("a", a), ("b", b))}
            found.append(entry | {"a": a.row[name], "b": b.row[name], "test": None, **ends})
    if not found:
        raise ValueError(f"{a.name!r} and {b.name!r} have no value in common; evaluate both by the same metrics")
    with_p = [entry for entry in found if entry["test"]]
    for entry, adjusted in zip(with_p, holm([entry["p"] for entry in with_p]), strict=True):
        entry["p_adjusted"] = adjusted
    return found


def _column(name: str) -> Column:
    """Of a value that no metric's columns name: GenEval's by task, say."""
    task = next((tag for tag in TASKS if name.endswith(f"_{tag}")), None)
    title = f"{title_of(name.removesuffix(f'_{task}'))}, {TASKS[task]}" if task else words(name)
    return Column(name, title, title, "high" if task else "", number)


def _check(a: Side, b: Side) -> None:
    """Raises ValueError unless image i is of the same prompt and seed on both sides and was measured alike."""
    found = protocol.differences(a.row, b.row)
    ours, theirs = a.scored, b.scored
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        found |= {"prompts": (one.prompts, other.prompts)} if one.prompts != other.prompts else {}
        found |= {"seed": (one.seed, other.seed)} if one.seed != other.seed else {}
        found |= {"num_images": (len(one), len(other))} if len(one) != len(other) else {}
    # a difference of machines says nothing of the images
    found = {name: value for name, value in found.items() if name != "device" and not name.startswith("latency ")}
    if found:
        raise ValueError(
            f"{a.name!r} and {b.name!r} cannot be compared in pairs: they differ in {protocol.told(found)}"
        )


def paired(a: Tensor, b: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """a, b: float64 [N], NaN where there is none -> means over the images that both have, and the test; {} if none."""
    both = ~(a.isnan() | b.isnan())
    a, b = a[both].double(), b[both].double()
    if not len(a):
        return {}
    d = b - a
    entry: dict[str, Any] = {"a": float(a.mean()), "b": float(b.mean()), "num_images": len(d)}
    entry |= {"difference": float(d.mean()), "interval": list(bootstrap(d, resamples, seed))}
    if bool(((a == 0) | (a == 1)).all() and ((b == 0) | (b == 1)).all()):
        only_a, only_b = int((d < 0).sum()), int((d > 0).sum())
        return entry | {"test": "McNemar", "p": mcnemar(only_a, only_b), "only_a": only_a, "only_b": only_b}
    return entry | {"test": "sign flips", "p": sign_flips(d, resamples, seed)}


def bootstrap(d: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """d: float64 [N] -> the 2.5 and 97.5 % quantiles of the mean over resamplings."""
    rng = torch.Generator().manual_seed(seed)
    means = [d[torch.randint(len(d), (n, len(d)), generator=rng)].mean(1) for n in _parts(resamples, len(d))]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def sign_flips(d: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """d: float64 [N] -> two-sided p of "its mean is 0", exact if 2^N <= resamples."""
    # a sum that ties with the observed one must count, whatever rounding says
    bound = float(d.sum().abs()) - 1e-12 * float(d.abs().sum())
    if 2 ** min(len(d), 63) <= resamples:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(d)).view(-1, len(d))
        return float((signs @ d).abs().ge(bound).double().mean())
    rng = torch.Generator().manual_seed(seed)
    hits = 0
    for n in _parts(resamples, len(d)):
        signs = torch.randint(2, (n, len(d)), generator=rng, dtype=torch.int8)
        hits += int((2 * (signs.double() @ d) - d.sum()).abs().ge(bound).sum())
    return (1 + hits) / (1 + resamples)


def _parts(resamples: int, size: int) -> Iterator[int]:
    most = max(1, _CHUNK // size)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p that of the images only one gets right, either gets as many: 2 P(X <= min), X ~ B(n, 1/2)."""
    n, less = only_a + only_b, min(only_a, only_b)
    term = total = 1
    for k in range(less):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """p of several tests, adjusted so that one false alarm among all is as rare as each p says: Holm's step-down."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def text(a: Side, b: Side, rows: Sequence[Mapping[str, Any]]) -> str:
    """What ``compare`` found, in words: the tested values, then those that have no scores by image."""
    tested, others = [r for r in rows if r["test"]], [r for r in rows if not r["test"]]
    lines = [f"{b.name} against {a.name}", ""]
    if tested:
        several = f"; p adjusted for {len(tested)} values after Holm" if len(tested) > 1 else ""
        lines.append(f"Images of the same prompts and seeds in pairs, with 95 % intervals{several}:")
        lines += [_statement(row, a, b) for row in tested]
    distances = [row for row in others if row["value"] not in COSTS]
    if distances:
        lines += [""] * bool(tested)
        lines.append("Of sets of images, not of single ones, so without a paired test; 95 % intervals where known:")
        lines += [_beside(row, a, b) for row in distances]
    costs = [row for row in others if row["value"] in COSTS]
    if costs:
        lines += ["", "Costs, as each was measured:", *(_beside(row, a, b) for row in costs)]
    if not tested:
        lines += ["", "No scores by image are kept for both; `fastgen evaluate` keeps them in per_image/."]
    return "\n".join(lines) + "\n"


def _statement(row: Mapping[str, Any], a: Side, b: Side) -> str:
    column = next((c for c in columns([a.row, b.row]) if c.key == row["value"]), None) or _column(row["value"])
    values = f"{column.write(row['b'])} against {column.write(row['a'])}"
    low, high = row["interval"]
    if row["p_adjusted"] >= LEVEL:
        verdict = "no difference shown"
    elif not column.better:
        verdict = f"{(b if row['difference'] > 0 else a).name} is higher"
    else:
        verdict = f"{(b if (row['difference'] > 0) == (column.better == 'high') else a).name} is better"
    only = (
        f"; {row['only_b']} images only the first gets right, {row['only_a']} only the second"
        if "only_a" in row
        else ""
    )
    p = f"p = {row['p']:.2g}" + (f", adjusted {row['p_adjusted']:.2g}" if row["p_adjusted"] != row["p"] else "")
    return (
        f"{column.title}: {values}, difference {row['difference']:+.3g} [{low:+.3g}, {high:+.3g}] "
        f"on {row['num_images']} images; "
        f"{p} ({row['test']}{only}): {verdict}."
    )


def _beside(row: Mapping[str, Any], a: Side, b: Side) -> str:
    column = next(c for c in columns([a.row, b.row]) if c.key == row["value"])
    shown = [f"{cell(side.row, column)} {interval(side.row, column)}".strip() for side in (b, a)]
    told = f"{column.title}: {shown[0]} against {shown[1]}"
    if row["interval_a"] and row["interval_b"]:
        apart = row["interval_a"][1] < row["interval_b"][0] or row["interval_b"][1] < row["interval_a"][0]
        told += "; the intervals " + ("do not overlap" if apart else "overlap")
    elif row["value"] == "seconds_per_image" and math.isfinite(row["a"] / row["b"] if row["b"] else math.inf):
        told += f"; {row['a'] / row['b']:.3g} times as fast"
    return told + "."
