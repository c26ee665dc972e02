"""What metrics are tested on: extractors of known rows, a reference of known rows, and what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.evaluation.context import Extractor, MetricLike, Seen


class Known:
    """An extractor of a name; nothing is asked of it but its name and its texts."""

    def __init__(self, key: str = "known", texts: Callable[[Sequence[str]], Tensor] | None = None) -> None:
        self.key, self._texts = key, texts

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise AssertionError("its rows are given")

    def texts(self, texts: Sequence[str]) -> Tensor:
        assert self._texts is not None
        return self._texts(texts)

    def protocol(self) -> dict[str, Any]:
        return {"extractor": self.key}


@dataclass(eq=False)
class Real:
    """A reference whose rows are known; ``asked`` counts how often they were."""

    known: Tensor
    asked: list[str] = field(default_factory=list)

    def rows(self, extractor: Extractor) -> Tensor:
        self.asked.append(extractor.key)
        return self.known

    def statistics(self, extractor: Extractor) -> tuple[Tensor, Tensor]:
        rows = self.known.double()
        return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], -1)

    def protocol(self) -> dict[str, Any]:
        return {"num_images": len(self.known), "sha256": "0"}


def seen(rows: Tensor | Sequence[Sequence[float]], prompts: Sequence[str] | None = None, key: str = "known") -> Seen:
    """These rows [N, D] of images of these prompts."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    return Seen(list(prompts) if prompts is not None else [""] * len(rows), {key: rows})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, height: int = 20, width: int = 20, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def shuffled(what: Seen, seed: int = 3) -> tuple[Seen, list[int]]:
    """The images in another order, and which is where."""
    order = torch.randperm(len(what), generator=torch.Generator().manual_seed(seed)).tolist()
    return what.take(order), order


def merged(what: Seen, at: int) -> Seen:
    """The rows as two processes have seen them, put together."""
    parts = what.take(range(at)), what.take(range(at, len(what)))
    rows = {key: torch.cat([part.rows[key] for part in parts]) for key in what.rows}
    return Seen([prompt for part in parts for prompt in part.prompts], rows)


def same_however_seen(metric: MetricLike, what: Seen, rel: float = 1e-9) -> dict[str, float]:
    """The values, after they were found to be the same in any order, and other than those of fewer images."""
    want = metric.compute(what)
    other, order = shuffled(what)
    for got in (metric.compute(other), metric.compute(merged(what, 3))):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert abs(got[name] - value) <= rel * max(1, abs(value)), name
    each, moved = metric.per_image(what), metric.per_image(other)
    assert each.keys() == moved.keys()
    for name, values in each.items():
        assert values.dtype == torch.float64
        assert values.shape == (len(what),)
        torch.testing.assert_close(moved[name], values[order], rtol=rel, atol=rel)
        assert abs(float(values.mean()) - want[name]) <= rel * max(1, abs(want[name])), name
    return want
