"""GenEval's prompts with their records: the official ones, made from the rules of the tasks, or those of a file.

A file has a JSON object a line: ``tag``, ``include``, perhaps ``exclude``, ``prompt``. ``official()`` draws the 553
prompts of Ghosh et al. 2023 (arXiv 2310.11513) in their order, call for call as the authors' script does, and the hash
of what it made is compared with that of their evaluation_metadata.jsonl.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.config import option, suggest
from fastgen.data import Item, Source
from fastgen.geneval import COLOURS, RELATIONS, TAGS
from fastgen.plain import from_json, shown

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's 80 objects in COCO's order, three of them by another name (COCO: mouse, remote, keyboard)."""

SEED = 43
PER_TAG = 100
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the official evaluation_metadata.jsonl."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Options of the source ``geneval``."""

    path: str = option("", "an evaluation_metadata.jsonl; empty: the official 553 prompts")
    images: int = option(4, "of each prompt; all prompts come once, then again", low=1)
    per_tag: int = option(0, "only so many prompts of each tag, the first ones; 0: all", low=0)


class Prompts:
    """The prompts in their order, again and again."""

    has_images = False
    candidates: Sequence[str] = ()

    def __init__(self, config: Config) -> None:
        """Raises ValueError if the file is missing or not of the official format."""
        records = read(Path(config.path)) if config.path else official()
        if config.per_tag:
            records = [r for tag in TAGS for r in [r for r in records if r["tag"] == tag][: config.per_tag]]
        self._records, self._images = records, config.images
        self.number = len(records)

    def concept(self, prompt: str) -> str:
        """The prompt itself: there is nothing to choose among."""
        return prompt

    def __len__(self) -> int:
        """Prompts times images of each."""
        return len(self._records) * self._images

    def item(self, index: int) -> Item:
        """A prompt and its record."""
        record = self._records[index % len(self._records)]
        return Item(record["prompt"], None, record)


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Prompts(config)


_NUMBERS = ("zero", "one", "two", "three", "four")


def generate(rng: np.random.Generator, count: int = PER_TAG) -> list[Record]:
    """Draw prompts of every tag, each kept once: all single objects, and up to `count` of every other tag."""
    drawn = [_single(name) for name in _distinct(rng, CLASSES, len(CLASSES))]
    for draw in (_pair, _counting, _coloured, _placed, _coloured_pair):
        drawn += [draw(rng) for _ in range(count)]
    return list({json.dumps(record): record for record in drawn}.values())


@functools.cache
def _official() -> str:
    text = dumps(generate(np.random.default_rng(SEED)))
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"NumPy {np.__version__} draws other GenEval prompts (SHA-256 {found[:8]}, official {SHA256[:8]}); "
            "name the official evaluation_metadata.jsonl instead"
        )
    return text


def official() -> list[Record]:
    """The official 553 records in their order. Raises ValueError if this NumPy draws others."""
    return [json.loads(line) for line in _official().splitlines()]


def dumps(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as a file of the official format has them."""
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path: Path, classes: Sequence[str] = CLASSES) -> list[Record]:
    """The records of a file. Raises ValueError, naming the line, if one is not of the official format."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file of GenEval's prompts; leave the path empty for the official ones")
    records = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(checked(from_json(line), classes))
        except ValueError as error:  # of json, too
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no prompts; it must have a JSON object a line")
    return records


def checked(record: Any, classes: Sequence[str] = CLASSES) -> Record:
    """The record itself. Raises ValueError if it is none of GenEval's or asks what no verdict could find."""
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f"{json.dumps(record)[:60]} is no object with a prompt")
    if record.get("tag") not in TAGS:
        raise ValueError(f"unknown tag {shown(record.get('tag'))}{suggest(str(record.get('tag')), TAGS)}")
    if not record.get("include"):
        raise ValueError("no include; it must list at least one object")
    for key in ("include", "exclude"):
        if not isinstance(record.get(key, []), list) or not all(isinstance(c, dict) for c in record.get(key, [])):
            raise ValueError(f"{key} must be a list of objects, got {shown(record[key])}")
        for number, clause in enumerate(record.get(key, ())):
            _check_clause(clause, classes, number if key == "include" else 0)
    return record


def _check_clause(clause: Mapping[str, Any], classes: Sequence[str], before: int) -> None:
    name, count, colour = clause.get("class"), clause.get("count"), clause.get("color", COLOURS[0])
    if name not in classes:
        raise ValueError(f"unknown class {shown(name)}{suggest(str(name), classes)}")
    if type(count) is not int or count < 1:
        raise ValueError(f"count of {shown(name)} is {shown(count)}; it must be 1 or more")
    if colour not in COLOURS:
        raise ValueError(f"unknown color {shown(colour)}{suggest(str(colour), COLOURS)}")
    if "position" in clause:
        if not isinstance(clause["position"], list) or len(clause["position"]) != 2:
            raise ValueError(f"position of {shown(name)} must be [relation, object], got {shown(clause['position'])}")
        relation, target = clause["position"]
        if relation not in RELATIONS:
            raise ValueError(f"unknown position {shown(relation)}{suggest(str(relation), RELATIONS)}")
        if type(target) is not int or target not in range(before):
            raise ValueError(
                f"position of {shown(name)} refers to object {shown(target)}; {before} are named before it"
            )


def _distinct(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    return [items[i] for i in rng.choice(len(items), size=count, replace=False)]


def _one(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[rng.choice(len(items))]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _record(
    tag: str, include: list[dict[str, Any]], words: str, exclude: list[dict[str, Any]] | None = None
) -> Record:
    excluded = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **excluded, "prompt": f"a photo of {words}"}


def _single(name: str) -> Record:
    return _record("single_object", [{"class": name, "count": 1}], _article(name))


def _pair(rng: np.random.Generator) -> Record:
    names = _distinct(rng, CLASSES, 2)
    return _record("two_object", [{"class": name, "count": 1} for name in names], " and ".join(map(_article, names)))


def _counting(rng: np.random.Generator) -> Record:
    name, count = _one(rng, CLASSES), int(rng.integers(2, 5))
    plural = f"{name}{'es' if name.endswith('s') else 's'}"
    more = [{"class": name, "count": count + 1}]
    return _record("counting", [{"class": name, "count": count}], f"{_NUMBERS[count]} {plural}", more)


def _coloured(rng: np.random.Generator) -> Record:
    name, colour = _one(rng, CLASSES[1:]), _one(rng, COLOURS)  # no person is coloured
    return _record("colors", [{"class": name, "count": 1, "color": colour}], f"{_article(colour)} {name}")


def _placed(rng: np.random.Generator) -> Record:
    (name, target), relation = _distinct(rng, CLASSES, 2), _one(rng, RELATIONS)
    include = [{"class": target, "count": 1}, {"class": name, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{_article(name)} {relation} {_article(target)}")


def _coloured_pair(rng: np.random.Generator) -> Record:
    pairs = list(zip(_distinct(rng, CLASSES[1:], 2), _distinct(rng, COLOURS, 2), strict=True))
    include = [{"class": name, "count": 1, "color": colour} for name, colour in pairs]
    return _record("color_attr", include, " and ".join(f"{_article(colour)} {name}" for name, colour in pairs))
