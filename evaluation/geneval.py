"""GenEval: the share of images that show what their prompt asks, by task: objects, counts, colours, positions.

Ghosh et al. 2023, arXiv 2310.11513, without MMDetection: Mask2Former from Transformers (`mask2former`; OpenMMLab's own
weights, which the published scores are of, are converted by `openmmlab`) finds the objects, a CLIP ViT-L/14 tells
their colours, `verdict` decides. `geneval` is the mean of the tags' shares of correct images, not that over images.

Departures from the official evaluator: all in float32 on any device, where it has CLIP in half precision on CUDA; the
CLIP's own image processor prepares the crops, not open_clip's, which resizes with PIL.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.checkpoint import write_text
from fastgen.data.geneval import CLASSES, checked, official
from fastgen.plain import from_json

from . import features, mask2former, weights
from .context import About, Context, Extractor, Seen
from .images import write_png
from .mask2former import Detections
from .verdict import COLOURS, OFFICIAL, Found, Options, Verdict, keep, row, summary
from .verdicts import Record, Verdicts, found, padded, values

ABOUT = About(
    title="GenEval", needs=("records", "mask2former", "clip"), values=values("geneval"), better="high", share=True
)

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 0x99
"""Of every channel outside an object's mask."""


class Detector(Protocol):
    """Finds objects.

    Attributes:
        key: as an extractor's.
    """

    key: str

    def __call__(self, images: Tensor, above: float) -> Iterable[Detections]:
        """uint8 [B, 3, H, W] -> of each image the objects of a score over `above`, best first, 100 at most."""
        ...

    def protocol(self) -> dict[str, Any]:
        """As an extractor's."""
        ...


class Towers(Protocol):
    """A CLIP: `features.Clip`."""

    key: str

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D]."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N] -> float32 [N, D]."""
        ...

    def protocol(self) -> dict[str, Any]:
        """As an extractor's."""
        ...


class Colours:
    """Tells an object's colour: the CLIP's zero-shot choice among ten, of the object cut out on grey."""

    def __init__(self, clip: Towers) -> None:
        """clip: OpenAI's ViT-L/14 is the official one."""
        self._clip = clip
        self._heads: dict[str, Tensor] = {}
        self.key = clip.key

    def __call__(self, image: Tensor, mask: Tensor, box: Sequence[float], name: str) -> int:
        """The colour's number; image: uint8 [3, H, W]; mask: bool [H, W]; box: whole pixels; name: of the class."""
        x0, y0, x1, y1 = map(int, box)
        cut = torch.where(mask, image, GREY)[:, y0:y1, x0:x1]
        return int((normalize(self._clip(cut[None])) @ self._head(name).T).argmax())

    def _head(self, name: str) -> Tensor:
        """Each colour's mean direction over the templates: [10, D]."""
        if name not in self._heads:
            words = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            directions = normalize(self._clip.texts(words)).view(len(COLOURS), len(TEMPLATES), -1)
            self._heads[name] = normalize(directions.mean(1))
        return self._heads[name]

    def protocol(self) -> dict[str, Any]:
        """The CLIP's."""
        return self._clip.protocol()


class Objects:
    """The extractor: what of an image the verdict on it looks at, as a row of `verdicts.COLUMNS`.

    A colour is told only of objects whose prompt asks for one, and only of those the verdict looks at.
    """

    def __init__(
        self,
        detector: Detector,
        colours: Colours | None,
        records: Mapping[str, Record],
        options: Options = OFFICIAL,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        """colours: may be missing if no prompt asks for one; records: GenEval's, by prompt."""
        self._detector, self._colours, self._records = detector, colours, records
        self._options, self._classes = options, classes
        words = json.dumps([detector.key, colours.key if colours else "", asdict(options), [*records.items()]])
        self.key = f"objects-{hashlib.sha256(words.encode()).hexdigest()[:16]}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W], [B] -> float32 [B, 100, 7]."""
        return self.rows(images, [self._records[prompt] for prompt in prompts])

    def rows(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """The same by the prompts' records."""
        floor = min(self._options.threshold, self._options.counting_threshold)
        detected = self._detector(images, floor)  # what scores less can change no verdict
        made = [self._row(*one) for one in zip(images.cpu(), detected, records, strict=True)]
        return torch.stack(made) if made else torch.empty(0, *padded(torch.empty(0, 7)).shape)

    def _row(self, image: Tensor, detected: Detections, record: Record) -> Tensor:
        columns = [detected.classes[:, None], detected.scores[:, None], detected.boxes]
        objects = torch.cat([*(c.float().cpu() for c in columns), torch.full((len(detected.scores), 1), -1.0)], dim=1)
        for number, name in self._asked(objects, record):
            if self._colours is None:
                raise ValueError(f"prompt {record['prompt']!r} asks for a colour, which no CLIP was given to tell")
            mask, box = detected.masks[number].cpu(), objects[number, 2:6].tolist()
            objects[number, 6] = self._colours(image, mask, box, name)
        return padded(objects)

    def _asked(self, objects: Tensor, record: Record) -> Iterator[tuple[int, str]]:
        """Number and class of each object whose colour the verdict will ask for."""
        for clause in record["include"]:
            if "color" in clause:
                name = clause["class"]
                numbers = torch.nonzero(objects[:, 0] == self._classes.index(name)).flatten().tolist()
                own = {number: _plain(objects[number]) for number in numbers}
                kept = keep(record, {name: list(own.values())}, self._options).get(name, [])[: clause["count"]]
                if len(kept) == clause["count"]:
                    yield from ((number, name) for number, one in own.items() if any(one is k for k in kept))

    def protocol(self) -> dict[str, Any]:
        """The detector's, the CLIP's as ``colours``, and the thresholds."""
        colours = {"colours": self._colours.protocol()} if self._colours else {}
        return {**self._detector.protocol(), **colours, "options": asdict(self._options)}


def _plain(values: Tensor) -> Found:
    """An object [7] as the verdict takes it, without its colour."""
    _, score, x0, y0, x1, y1, _ = values.tolist()
    return Found(score, (x0, y0, x1, y1))


def needs_colours(records: Iterable[Record]) -> bool:
    """Whether any of them asks for a colour."""
    return any("color" in clause for record in records for clause in record["include"])


def open_detector(context: Context) -> mask2former.Mask2Former:
    """Mask2Former with the context's weights. Raises ValueError if they are missing."""
    return mask2former.load(weights.find("mask2former", context.weights.get("mask2former")), str(context.device))


def open_colours(context: Context) -> Colours:
    """The context's CLIP, to tell colours. Raises ValueError if it is missing."""
    return Colours(features.clip(context, "geneval"))


class Metric:
    """``geneval``, 0 to 1, and each tag's share of correct images."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if a prompt has no record or weights are missing."""
        self._records = records_of(context)
        colours = open_colours(context) if needs_colours(self._records.values()) else None
        self._objects = Objects(open_detector(context), colours, self._records)
        self.extractors: tuple[Extractor, ...] = (self._objects,)
        self._verdicts = Verdicts("geneval", self._objects.key, self._records, CLASSES)

    def compute(self, seen: Seen) -> dict[str, float]:
        """The values by name. Raises ValueError without images."""
        return self._verdicts.compute(seen)

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """By tag, 1 for a correct image, 0 for a wrong one, NaN for one of another tag."""
        return self._verdicts.per_image(seen)

    def verdicts(self, seen: Seen) -> list[Verdict]:
        """Of each image, with the reason."""
        return self._verdicts.of(seen)

    def lines(self, seen: Seen, filenames: Sequence[str]) -> list[dict[str, Any]]:
        """Of each image its line in a results.jsonl of the official form."""
        return self._verdicts.lines(seen, filenames)

    def protocol(self) -> dict[str, Any]:
        """Detector, CLIP, thresholds, the number of prompts and the hash of their records."""
        return {**self._objects.protocol(), **prompts_protocol(self._records)}


def records_of(context: Context) -> dict[str, Record]:
    """The record of each of the context's prompts, GenEval's official ones where it has none. Raises ValueError."""
    known: dict[str, Record] = dict(context.metadata)
    wanted = list(dict.fromkeys(context.prompts))
    if any(prompt not in known for prompt in wanted):
        known = {record["prompt"]: record for record in official()} | known
    for prompt in wanted:
        if prompt not in known:
            raise ValueError(f"geneval has no record of prompt {prompt!r}; set eval.geneval to the source geneval")
        try:
            checked(known[prompt])
        except ValueError as error:
            raise ValueError(f"geneval cannot judge prompt {prompt!r}: {error}") from None
    return {prompt: known[prompt] for prompt in wanted}


def prompts_protocol(records: Mapping[str, Record]) -> dict[str, Any]:
    """Number and hash of the records, which say whether two scores are of the same prompts."""
    words = json.dumps([records[prompt] for prompt in sorted(records)], sort_keys=True)
    return {"num_prompts": len(records), "prompts_sha256": hashlib.sha256(words.encode()).hexdigest()}


# the official layout: FOLDER/00000/metadata.jsonl and FOLDER/00000/samples/0000.png


@dataclass(frozen=True)
class Sample:
    """An image of the official layout: its file and its prompt's record."""

    file: Path
    record: Record


def place(folder: Path, number: int, sample: int) -> Path:
    """The file of an image. number: of the prompt, sample: of the image of it."""
    return folder / f"{number:05}" / "samples" / f"{sample:04}.png"


def write_sample(folder: Path, number: int, sample: int, record: Record, image: Tensor) -> Path:
    """Write an image, uint8 [3, H, W], and its prompt's record; number: of the prompt, sample: of the image of it."""
    file = place(folder, number, sample)
    beside = file.parents[1] / "metadata.jsonl"
    beside.parent.mkdir(parents=True, exist_ok=True)
    if not beside.is_file():
        write_text(beside, json.dumps(record))
    write_png(image, file)
    return file


def read_folder(folder: Path) -> list[Sample]:
    """The images of a folder of the official layout, in the order of their numbers.

    Raises ValueError if there is none, or a record is missing or malformed.
    """
    samples = []
    numbered = [p for p in folder.glob("*/") if p.name.isdigit()]
    for one in sorted(numbered, key=lambda p: int(p.name)):
        file = one / "metadata.jsonl"
        try:
            record = checked(from_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: no record of a GenEval prompt ({error})") from None
        images = [p for p in (one / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", p.name)]
        samples += [Sample(p, record) for p in sorted(images, key=lambda p: int(p.stem))]
    if not samples:
        raise ValueError(f"{folder}: no images of GenEval's layout; they are at 00000/samples/0000.png and so on")
    return samples


def read_image(file: Path) -> Tensor:
    """A picture file, turned as it says it is to be: uint8 [3, H, W]."""
    with Image.open(file) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def judge_folder(
    folder: Path,
    detector: Detector,
    colours: Colours | None,
    out: Path,
    *,
    options: Options = OFFICIAL,
    batch_size: int = 4,
) -> list[dict[str, Any]]:
    """Judge the images of a folder of the official layout as the official evaluator does.

    What is in `out` already of the same image, detector and thresholds is not judged again, so that a run that was cut
    off goes on.

    Args:
        folder: with 00000/metadata.jsonl, 00000/samples/0000.png and so on.
        detector: finds the objects.
        colours: tells colours; None if no prompt asks for one.
        out: the results.jsonl to write; ``OUT.protocol.json`` beside it says how it was made.
        options: thresholds.
        batch_size: images of one size at a time.

    Returns:
        The lines of `out`; `verdict.summary` adds them up.

    Raises:
        ValueError: if the folder is not of that layout, or `out` was made otherwise.
    """
    samples = read_folder(folder)
    objects = Objects(detector, colours, {}, options)
    if colours is None and needs_colours(sample.record for sample in samples):
        raise ValueError(f"{folder}: there are prompts that ask for a colour; give the CLIP that tells them")
    lines = _known(out, samples, objects.protocol())
    left = [sample for sample in samples if str(sample.file) not in lines]
    with out.open("a", encoding="utf-8") as file:
        for part in _batches(left, batch_size):
            images = torch.stack([image for _, image in part])
            rows = objects.rows(images, [sample.record for sample, _ in part])
            for (sample, _), one in zip(part, rows, strict=True):
                line = row(str(sample.file), sample.record, found(one, CLASSES), options)
                lines[line["filename"]] = line
                file.write(json.dumps(line) + "\n")
            file.flush()
    ordered = [lines[str(sample.file)] for sample in samples]
    write_lines(out, ordered)
    return ordered


def write_lines(out: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a results.jsonl."""
    write_text(out, "".join(json.dumps(line) + "\n" for line in lines))


def _known(out: Path, samples: Sequence[Sample], protocol: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of `out` that still hold, which it is left with. Raises ValueError if it was made otherwise."""
    beside = out.with_name(f"{out.name}.protocol.json")
    words = json.dumps(protocol, indent=1) + "\n"
    kept = {}
    if out.is_file():
        if not beside.is_file() or beside.read_text(encoding="utf-8") != words:
            raise ValueError(f"{out}: was made by another detector or with other thresholds; remove it")
        made, now = out.stat().st_mtime, {str(sample.file): sample for sample in samples}
        for text in out.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):  # a cut line is not
                try:
                    line = from_json(text)
                    sample = now.get(line["filename"])
                    same = sample is not None and line["metadata"] == json.dumps(sample.record)
                except (ValueError, KeyError, TypeError):
                    continue  # damaged, so that its image is judged again
                if same and sample is not None and sample.file.stat().st_mtime <= made:
                    kept[line["filename"]] = line
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(beside, words)
    write_lines(out, kept.values())
    return kept


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[tuple[Sample, Tensor]]]:
    """Images with their samples, in order, at most so many at a time and all of one size."""
    part: list[tuple[Sample, Tensor]] = []
    for sample in samples:
        image = read_image(sample.file)
        if part and (len(part) == batch_size or part[0][1].shape != image.shape):
            yield part
            part = []
        part.append((sample, image))
    if part:
        yield part


def told(lines: Sequence[Mapping[str, Any]]) -> str:
    """The official summary in words."""
    found = summary(lines)
    tags = list(dict.fromkeys(line["tag"] for line in lines))
    head = (
        f"{found['images']} images of {found['prompts']} prompts; correct: {found['correct_images']:.2%} of the "
        f"images, {found['correct_prompts']:.2%} of the prompts at least once"
    )
    counts = {tag: [line["correct"] for line in lines if line["tag"] == tag] for tag in tags}
    shares = [f"{tag:<16}{found[tag]:8.2%}  ({sum(counts[tag])} of {len(counts[tag])})" for tag in tags]
    return "\n".join([head, *shares, f"{'overall':<16}{found['overall']:8.5f}  (mean of the tasks)"])
