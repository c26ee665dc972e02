"""GenEval's images in the official layout, made by a pipeline, for this evaluator or another's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastgen.data import geneval as prompts
from fastgen.recipe import DTYPES

from . import geneval
from .images import Made
from .runner import Subject, open_pipeline, resolved
from .seen import shares


def make(
    subject: Subject,
    out: Path,
    source: prompts.Prompts,
    *,
    seed: int = 0,
    batch_size: int = 4,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
) -> int:
    """Make the images that are not there yet, each process its share, and return their number.

    Image i of the source is sample i // P of prompt i % P, P being the number of prompts, and has a seed of its own.
    The official generator gives all prompts the same four noises. Raises ValueError on anything unusable.
    """
    pipeline = open_pipeline(subject.pipeline, DTYPES[dtype], device)
    told = resolved(subject, pipeline)
    items = [source.item(i) for i in range(len(source))]
    count = source.number
    made = Made(
        pipeline,
        [item.prompt for item in items],
        seed,
        None,
        steps=told.steps,
        guidance_scale=told.guidance_scale,
        call=told.call,
        batch_size=batch_size,
    )
    missing = [i for i in range(len(items)) if not geneval.place(out, i % count, i // count).is_file()]
    for part in shares(range(len(missing)), batch_size) if missing else ():
        numbers = [missing[i] for i in part]
        for i, image in zip(numbers, made(numbers), strict=True):
            record = items[i].metadata
            assert record is not None
            geneval.write_sample(out, i % count, i // count, dict(record), image)
    return len(missing)
