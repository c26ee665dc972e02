"""GenEval's verdict on one image: from what a detector found to right or wrong, and why.

Ghosh et al. 2023, arXiv 2310.11513. Pure: no image, no network. Decisions, the order of the checks and the wording of
reasons are those of the official evaluator (djghosh13/geneval, evaluate_images.py), the sums those of its
summary_scores.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.geneval import COLOURS, POSITION_THRESHOLD, RELATIONS, TAGS, relations

__all__ = ["COLOURS", "RELATIONS", "TAGS", "Found", "Options", "Verdict", "judge", "keep", "row", "summary"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """A detected object.

    Attributes:
        score: the detector's confidence, 0 to 1.
        box: x0, y0, x1, y1 in pixels.
        colour: one of `COLOURS`, a function that finds it (called only if the prompt asks), or None: none of them.
    """

    score: float
    box: Box
    colour: str | Callable[[], str | None] | None = None


@dataclass(frozen=True)
class Options:
    """Thresholds, the official ones by default.

    Attributes:
        threshold: detections count above this score, 0 to 1.
        counting_threshold: the same for prompts of the tag "counting".
        max_objects: of a class, best first; 1 or more.
        max_overlap: a detection is dropped if its IoU with a better one of its class is this or more; 1 drops none.
        position_threshold: share of both sizes by which centres must differ (`fastgen.geneval.relations`).
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = POSITION_THRESHOLD


OFFICIAL = Options()


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks.

    Attributes:
        correct: it does.
        reason: what is wrong, a line per failed clause; "" if nothing is.
    """

    correct: bool
    reason: str


def overlap(a: Box, b: Box) -> float:
    """Intersection over union by the older convention of pixels: a side counts x1 - x0 + 1."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if union else 0.0


def keep(
    metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Found]], options: Options = OFFICIAL
) -> dict[str, list[Found]]:
    """The detections that count for this prompt, best first; classes of which none is left are left out."""
    threshold = options.counting_threshold if metadata["tag"] == "counting" else options.threshold
    kept = {}
    for name, found in detections.items():
        rest = sorted((f for f in found if f.score > threshold), key=lambda f: -f.score)[: options.max_objects]
        chosen: list[Found] = []
        for one in rest:
            if options.max_overlap == 1 or all(overlap(best.box, one.box) < options.max_overlap for best in chosen):
                chosen.append(one)
        if chosen:
            kept[name] = chosen
    return kept


def judge(
    metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Found]], options: Options = OFFICIAL
) -> Verdict:
    """Whether the detections satisfy every clause of `include` and none of `exclude`.

    A clause of `include` looks at the `count` best of its class: they must be there, then all have its colour, then
    each lie in its relation to each object of the clause named as target, if that one was satisfied itself.

    Args:
        metadata: GenEval's record of the prompt: `tag`, `include`, perhaps `exclude`.
        detections: by class, in any order; `keep` is applied here.
        options: thresholds.
    """
    kept = keep(metadata, detections, options)
    reasons: list[str] = []
    groups: list[list[Found]] = []  # of each clause so far: its objects, none if it failed
    for clause in metadata.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        wrong = _count(clause, found) or _colour(clause, found) or _position(clause, found, groups, options)
        if wrong:
            reasons.append(wrong)
        groups.append([] if wrong else found)
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _count(clause: Mapping[str, Any], found: Sequence[Found]) -> str:
    enough = len(found) >= clause["count"]
    return "" if enough else f"expected {clause['class']}>={clause['count']}, found {len(found)}"


def _colour(clause: Mapping[str, Any], found: Sequence[Found]) -> str:
    if "color" not in clause:
        return ""
    colours = [one.colour() if callable(one.colour) else one.colour for one in found]
    wanted, count = clause["color"], clause["count"]
    if colours.count(wanted) >= count:
        return ""
    seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
    number = colours.count(wanted)
    return f"expected {wanted} {clause['class']}>={count}, found {number} {wanted}; and {seen}"


def _position(
    clause: Mapping[str, Any], found: Sequence[Found], groups: Sequence[Sequence[Found]], options: Options
) -> str:
    if "position" not in clause:
        return ""
    name, (relation, number) = clause["class"], clause["position"]
    if not groups[number]:
        return f"no target for {name} to be {relation}"
    for one in found:
        for target in groups[number]:
            held = relations(one.box, target.box, options.position_threshold)
            if relation not in held:
                words = " and ".join(word for word in RELATIONS if word in held)
                return f"expected {name} {relation} target, found {words} target"
    return ""


def row(
    filename: str,
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Found]],
    options: Options = OFFICIAL,
) -> dict[str, Any]:
    """A line of the official results.jsonl: the verdict, and the detections that counted."""
    verdict = judge(metadata, detections, options)
    kept = keep(metadata, detections, options)
    details = {name: [[*one.box, one.score] for one in found] for name, found in kept.items()}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the official summary prints, from lines of results.jsonl.

    Returns:
        "images" and "prompts" (counts), "correct_images" (share), "correct_prompts" (share with a correct image), the
        share of correct images by tag in the order of their first rows, and "overall", the mean over those tags.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("GenEval's summary needs at least 1 judged image, got 0")
    prompts: dict[str, bool] = {}
    tags: dict[str, list[bool]] = {}
    for one in rows:
        prompts[one["metadata"]] = prompts.get(one["metadata"], False) or one["correct"]
        tags.setdefault(one["tag"], []).append(one["correct"])
    shares = {tag: sum(correct) / len(correct) for tag, correct in tags.items()}
    return {
        "images": len(rows),
        "prompts": len(prompts),
        "correct_images": sum(one["correct"] for one in rows) / len(rows),
        "correct_prompts": sum(prompts.values()) / len(prompts),
        **shares,
        "overall": sum(shares.values()) / len(shares),
    }
