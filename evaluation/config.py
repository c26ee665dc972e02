"""Options of an evaluation: the ``eval:`` section of a run, and what ``fastgen evaluate`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastgen.config import option

from .context import Features


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, on what, against what."""

    metrics: list[str] = option(["fid", "clip_score", "latency"], "as `fastgen list metrics` names them")
    features: Features = option(
        "clean", "space of fid and the like: InceptionV3's after a resize of that name, or the CLIP's"
    )
    weights: dict[str, str] = option(
        {}, "of what metrics see by (clip, inception, dinov2, ...): a file, a folder or a Hub id each"
    )
    reference: dict[str, Any] = option({}, "data source whose captions are the prompts and whose images are real")
    statistics: str | None = option(None, "an .npz of reference statistics, in the place of the source's images")
    geneval: dict[str, Any] = option(
        {}, "data source of the prompts of geneval; the reference's own where they are for it"
    )
    num_images: int = option(1000, "images per subject; image i belongs to the reference's item i", low=2)
    batch_size: int = option(32, "images per call of a pipeline", low=1)
    seed: int = option(0, "image i starts from noise keyed by this and i", low=0)
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the pipelines' weights")
    bootstrap: int = option(100, "resamplings of the images for the 95 % intervals; 0: none", low=0)
    keep_images: bool = option(True, "as PNG, so that an evaluation that was cut off goes on with them")
    comparison: int = option(12, "first images of each subject kept for the report", low=0)
    repeats: int = option(5, "timed calls of latency", low=1)
    teacher_steps: list[int] = option([50], "the teacher is judged at each of these step counts")
    # at more steps than a student was made for its scheduler refuses the call
    student_steps: list[int] = option([], "besides its own: those of these step counts that a student takes", low=1)
    teacher_guidance: float = option(7.5, "guidance scale of the teacher's images", low=1)
    every: int = option(0, "steps between quick evaluations during training; 0 is never", low=0)
    num_images_training: int = option(256, "images of a quick evaluation", low=2)
