"""What a metric is given and what it must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


def same(prompt: str) -> str:
    """The prompt itself."""
    return prompt


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


@dataclass(frozen=True, eq=False)
class Context:
    """What a metric may need; one that lacks what it needs raises ValueError when it is made.

    Attributes:
        clip: folder or Hub id of a CLIPModel with its processor.
        inception: InceptionV3 weights file, for fid without a CLIP; None: where ``features.inception_file`` looks.
        reference: () -> batches of the real images, uint8 [B, 3, H, W]; called once per process and extractor.
        candidates: captions among which retrieval chooses; empty: no retrieval.
        concept: prompt -> the candidate it stands for.
        device: where features are computed.
        call: the subject's pipeline, where there is one.
        prompts: of all images that the metrics will see, an entry each, over all processes; for diversity.
    """

    clip: str | None = None
    inception: str | None = None
    reference: Callable[[], Iterable[Tensor]] | None = None
    candidates: Sequence[str] = ()
    concept: Callable[[str], str] = same
    device: torch.device | str = "cpu"
    call: Call | None = None
    prompts: Sequence[str] = ()


class MetricLike(Protocol):
    """The class ``Metric`` of each metric's module, made by ``Metric(context)``.

    Its state is sums, so that any split, order or merge of the images gives the same number, and processes reduce by
    adding up ``state`` in place.
    """

    @property
    def state(self) -> dict[str, Tensor]:
        """The sums, by name; changing them in place changes the metric."""
        ...

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """images: uint8 [B, 3, H, W]; prompts: [B]."""
        ...

    def compute(self) -> dict[str, float]:
        """The values by name, over all images so far."""
        ...

    def protocol(self) -> dict[str, Any]:
        """What must be said beside the values, as JSON."""
        ...


def merge(metric: MetricLike, other: MetricLike) -> None:
    """Let ``metric`` count what ``other`` has seen too."""
    for name, value in metric.state.items():
        value += other.state[name].to(value.device)
