"""What a metric is given and what it must offer.

One pass over a set of images keeps a row per image for each *extractor*; a metric is a pure function of rows. So
metrics share extractors, processes gather rows by the images' numbers, and intervals resample rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Features = Literal["clean", "legacy_pytorch", "legacy_tensorflow", "clip"]


def same(prompt: str) -> str:
    """The prompt itself."""
    return prompt


@dataclass(frozen=True)
class About:
    """What a metric says of itself, as ``ABOUT`` of its module.

    Attributes:
        title: of its column.
        needs: what must be given: "features" (the weights of ``Context.features``), "reference", "prompt seeds" (a
            prompt more than once), "records" (GenEval's, of each prompt), "call", or weights by name.
        values: the names of what it computes.
        better: which way is better.
        resampled: whether it has an interval by resampling images; not where images of one prompt are compared,
            among which one that is drawn twice would be no distance away from itself.
        share: whether its values are shares of the images, so that their intervals end at 0 and 1.
    """

    title: str
    needs: tuple[str, ...]
    values: tuple[str, ...]
    better: Literal["low", "high", ""]
    resampled: bool = True
    share: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A pipeline and how it is called, for metrics that run it themselves.

    Attributes:
        pipeline: of Diffusers.
        arguments: of the call, besides prompt and generator.
        repeats: timed calls.
    """

    pipeline: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 5


class Extractor(Protocol):
    """What of an image metrics look at: features, embeddings, detections.

    Attributes:
        key: equal for two extractors only if their rows are equal: name, preparation and hash of the weights.
    """

    key: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W], [B] -> float32 [B, ...] on the CPU.

        A row depends on its own image and prompt alone; what varies in length is padded with NaN.
        """
        ...

    def protocol(self) -> dict[str, Any]:
        """Name (``extractor``), hash of the weights (``sha256``), resize and the like, as JSON."""
        ...


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a set of images, in the order of their numbers.

    Attributes:
        prompts: [N].
        rows: by the key of the extractor, float32 [N, ...].
    """

    prompts: Sequence[str]
    rows: Mapping[str, Tensor]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.prompts)

    def take(self, index: Sequence[int]) -> Seen:
        """A part, a permutation or a resampling: image i of the result is image index[i] of this."""
        return Seen([self.prompts[i] for i in index], {key: rows[list(index)] for key, rows in self.rows.items()})


class Reference(Protocol):
    """The real images that made ones are held against."""

    def rows(self, extractor: Extractor) -> Tensor:
        """What the extractor sees of the real images, made once: float32 [M, ...].

        Raises ValueError if only statistics of them are there.
        """
        ...

    def statistics(self, extractor: Extractor) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64, of the extractor's features, whose rows are [M, D]."""
        ...

    def protocol(self) -> dict[str, Any]:
        """``num_images`` and ``sha256`` of their pixels."""
        ...


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may need; one that lacks what it needs raises ValueError when it is made.

    Attributes:
        weights: of extractors, by name: a file, a folder or a Hub id; what is not named is looked for (``weights``).
        features: the space of fid, kid and others that hold two sets of images against each other: InceptionV3's after
            clean-fid's, pytorch-fid's or TensorFlow's resize, or a CLIP's.
        reference: the real images.
        candidates: captions among which retrieval chooses; empty: no retrieval.
        concept: prompt -> the candidate it stands for.
        device: where features are computed.
        call: the subject's pipeline, where there is one.
        prompts: of all images that the metrics will see, an entry each.
        metadata: GenEval's record of each prompt, where the source of the prompts has them.
        images: number -> that image of the subject, uint8 [3, H, W]; for metrics of pairs of images.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    features: Features = "clean"
    reference: Reference | None = None
    candidates: Sequence[str] = ()
    concept: Callable[[str], str] = same
    device: torch.device | str = "cpu"
    call: Call | None = None
    prompts: Sequence[str] = ()
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: Callable[[int], Tensor] | None = None

    def on(self, prompts: Sequence[str], images: Callable[[int], Tensor], call: Call | None = None) -> Context:
        """The same for a set of images."""
        return replace(self, prompts=prompts, images=images, call=call)


class MetricLike(Protocol):
    """The class ``Metric`` of each metric's module, made by ``Metric(context)``.

    Attributes:
        extractors: whose rows it computes from.
    """

    extractors: Sequence[Extractor]

    def compute(self, seen: Seen) -> dict[str, float]:
        """The values by name. Raises ValueError if there are too few images."""
        ...

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Of the values that are means over images, each image's own: name -> float64 [N], NaN where it has none."""
        ...

    def protocol(self) -> dict[str, Any]:
        """What must be said beside the values, as JSON."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A metric that says of each image what is wrong with it, as GenEval does."""

    def lines(self, seen: Seen, filenames: Sequence[str]) -> list[dict[str, Any]]:
        """A line of ``results.jsonl`` for each image."""
        ...
