"""GenEval on the emoji world: its verdicts on what the world's own detector finds.

The verdicts are `geneval`'s (Ghosh et al. 2023, arXiv 2310.11513); objects and colours are told by
`fastgen.emoji.detector`, a small network of this project that knows all drawings of the world, so scores compare with
each other and with no published ones. How far it can be trusted is in docs/emoji/detector.md: of composed scenes,
whose truth is known, how many true captions it calls true and how many false ones. The threshold is GenEval's
own 0.3, for counting too: its 0.9 there is for a detector that finds an object several times, as this one does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.emoji import names
from fastgen.emoji.compose import MAX_COUNT, Scene

from . import verdicts, weights
from .context import About, Context, Extractor, Seen
from .verdict import COLOURS, RELATIONS, Found, Options, judge
from .verdicts import Record, Verdicts

ABOUT = About(
    title="GenEval on emoji", needs=("records",), values=verdicts.values("geneval_emoji"), better="high", share=True
)

OPTIONS = Options(counting_threshold=0.3)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Drawings:
    """The extractor: the drawings found in an image, as a row of `verdicts.COLUMNS`."""

    def __init__(self, folder: str | None = None, device: torch.device | str = "cpu") -> None:
        """folder: of another detector than the shipped one."""
        from fastgen.emoji import detector

        place = folder or detector.ASSETS
        self._network = detector.load(place).to(device)
        self._sha256 = weights.sha256(detector.weights_file(place))
        self.classes = detector.NOUNS
        self.key = f"drawings-{self._sha256[:16]}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, S, S], [B] -> float32 [B, 16, 7]. Raises ValueError if the images are not square."""
        from fastgen.emoji import detector

        rows = detector.detect(self._network, images)
        rows[..., 6] = torch.where(rows[..., 6] == detector.COLOURS.index("none"), -1.0, rows[..., 6])
        return rows

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights, resize and thresholds."""
        return {
            "extractor": "emoji detector",
            "sha256": self._sha256,
            "resize": "bilinear, antialiased, to 32",
            "options": asdict(OPTIONS),
        }


class Metric:
    """``geneval_emoji``, 0 to 1: the mean of the tags' shares of correct images, and those shares."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if a prompt has no record or asks for what the world has not."""
        self._drawings = Drawings(context.weights.get("emoji_detector"), context.device)
        self.extractors: tuple[Extractor, ...] = (self._drawings,)
        records = {prompt: _known(prompt, context.metadata, self._drawings.classes) for prompt in context.prompts}
        self._verdicts = Verdicts("geneval_emoji", self._drawings.key, records, self._drawings.classes, OPTIONS)

    def compute(self, seen: Seen) -> dict[str, float]:
        """The values by name. Raises ValueError without images."""
        return self._verdicts.compute(seen)

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """By tag, 1 for a correct image, 0 for a wrong one, NaN for one of another tag."""
        return self._verdicts.per_image(seen)

    def protocol(self) -> dict[str, Any]:
        """The extractor's."""
        return self._drawings.protocol()


def _known(prompt: str, records: Mapping[str, Record], classes: Sequence[str]) -> Record:
    """The record of a prompt. Raises ValueError."""
    if prompt not in records:
        raise ValueError(f"geneval_emoji has no record of prompt {prompt!r}; take the prompts from the source scenes")
    for clause in (*records[prompt]["include"], *records[prompt].get("exclude", ())):
        if clause["class"] not in classes:
            raise ValueError(f"geneval_emoji cannot judge prompt {prompt!r}: no emoji is a {clause['class']!r}")
    return records[prompt]


# what the evaluator is worth, on scenes whose truth is known


def truth(scene: Scene) -> dict[str, list[Found]]:
    """What there is to find in a scene, by noun."""
    objects: dict[str, list[Found]] = {}
    for box in scene.boxes:
        x0, y0, x1, y1 = box.xyxy
        objects.setdefault(box.noun, []).append(Found(1.0, (x0, y0, x1, y1), box.colour))
    return objects


def untrue(record: Record, rng: np.random.Generator) -> dict[str, Any]:
    """The record of a caption made false by one change of the kind that its task tests.

    Another object, another number, another colour or the two colours exchanged, the opposite relation.
    """
    tag = record["tag"]
    include = [dict(clause) for clause in record["include"]]
    changed: dict[str, Any] = {"tag": tag, "include": include}
    chosen = include[int(rng.integers(len(include)))]
    if tag == "counting":
        include[0]["count"] = int(rng.choice([n for n in range(2, MAX_COUNT + 1) if n != include[0]["count"]]))
        changed["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    elif tag == "position":
        include[1]["position"] = [OPPOSITE[include[1]["position"][0]], 0]
    elif "color" in chosen:
        if len(include) == 2 and rng.integers(2):
            include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
        else:
            chosen["color"] = str(rng.choice([colour for colour in COLOURS if colour != chosen["color"]]))
    else:
        there = {clause["class"] for clause in include}
        chosen["class"] = str(rng.choice([noun for noun in names.by_noun() if noun not in there]))
    return {**changed, "prompt": caption(changed)}


def caption(record: Record) -> str:
    """The words of a record, as `fastgen.emoji.compose.scene` writes them."""
    phrases = []
    for clause in record["include"]:
        core = names.by_noun()[clause["class"]][0]
        if record["tag"] == "counting":
            return f"{names.NUMBERS[clause['count']]} {core.noun_plural}"
        words = f"{clause['color']} {core.noun}" if "color" in clause else core.noun
        phrases.append(names.with_article(words) if core.countable else words)
    if record["tag"] == "position":
        relation = record["include"][1]["position"][0]
        assert relation in RELATIONS
        return f"{phrases[1]} {relation} {phrases[0]}"
    return " and ".join(phrases)


def agreement(drawings: Drawings, scenes: Sequence[Scene], seed: int) -> dict[str, dict[str, float]]:
    """By tag, the share of captions that the evaluator calls true.

    Args:
        drawings: the extractor.
        scenes: composed ones, of GenEval's tags.
        seed: of the false captions.

    Returns:
        By tag and as "overall", the tags' mean: "true" of the scenes' own captions; "changed" of those made false by
        ``untrue``; "others" of captions of the next scenes of the tag, leaving out those that happen to be true.
    """
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    rows = drawings(images, [scene.prompt for scene in scenes])
    shares: dict[str, dict[str, list[bool]]] = {}
    for i, (scene, one) in enumerate(zip(scenes, rows, strict=True)):
        tag, objects = scene.metadata["tag"], verdicts.found(one, drawings.classes)
        judged = shares.setdefault(tag, {"true": [], "changed": [], "others": []})
        others = [other.metadata for other in scenes[i + 1 : i + 60] if other.metadata["tag"] == tag][:3]
        asked = {
            "true": [scene.metadata],
            "changed": [untrue(scene.metadata, np.random.default_rng([seed, i]))],
            "others": [record for record in others if not judge(record, truth(scene)).correct],
        }
        for kind, records in asked.items():
            judged[kind] += [judge(record, objects, OPTIONS).correct for record in records]
    means = {tag: {kind: float(np.mean(v)) for kind, v in judged.items() if v} for tag, judged in shares.items()}
    kinds = ("true", "changed", "others")
    return {**means, "overall": {k: float(np.mean([m[k] for m in means.values() if k in m])) for k in kinds}}
