"""``fastgen evaluate``, and the quick evaluations of a training run: which images, by what, against what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import config, registry
from fastgen import recipe as recipes
from fastgen.config import ConfigError
from fastgen.data import Source
from fastgen.export import check_pipeline, opening, read_card

from . import report, runner
from .config import EvalConfig
from .context import Context
from .runner import Subject

if TYPE_CHECKING:
    from fastgen.train import Session


def settings(tree: Mapping[str, Any], where: str) -> EvalConfig:
    """The ``eval:`` section, decoded. Raises ConfigError."""
    decoded = config.decode(EvalConfig, tree, where, "eval")
    for name in decoded.metrics:
        try:
            registry.find("metric", name)
        except ValueError as error:
            raise ConfigError(f"{where}: eval.metrics: {error}") from None
    if not decoded.reference:
        raise ConfigError(
            f"{where}: eval.reference is missing; name a data source, such as {{source: images, path: ...}}"
        )
    return decoded


def reference(decoded: EvalConfig, image_size: tuple[int, int], where: str) -> Source:
    """The data source of ``eval.reference``, opened."""
    chosen = recipes.choose("source", "source", decoded.reference, where, "eval.reference")
    source: Source = registry.find("source", chosen.name).open(chosen.options, image_size)
    return source


class Quick:
    """Judges a training run's exported network on a few images of the trainer's own sampler, latency left out."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        """tree: the ``eval:`` section, decoded now so that a mistake in it shows before the first step."""
        self._settings, self._where = settings(tree, where), where
        self._known: tuple[Source, Context] | None = None

    def __call__(self, session: Session) -> dict[str, float]:
        """The values by name. The reference is gone through the first time only."""
        decoded = self._settings
        source, context = self._known = self._known or self._open(session)
        names = [name for name in decoded.metrics if name != "latency"]

        def batches() -> Iterator[tuple[Tensor, Sequence[str]]]:
            for start in range(0, decoded.num_images_training, decoded.batch_size):
                samples = range(start, min(start + decoded.batch_size, decoded.num_images_training))
                prompts = [source.item(i).prompt for i in samples]
                yield session.images(prompts, samples), prompts

        return runner.measure_images(batches(), context, names)

    def _open(self, session: Session) -> tuple[Source, Context]:
        source = reference(self._settings, session.family.image_size, self._where)
        real = runner.Real(source, range(min(self._settings.num_images, len(source))), self._settings.batch_size)
        clip = recipes.locate(self._settings.clip) if self._settings.clip else None
        inception = self._settings.inception
        return source, Context(clip, inception, real, source.candidates, source.concept, session.device)


def judge(
    target: Path, tree: Mapping[str, Any], where: str, teacher: str | None, student: bool, out: Path
) -> list[dict[str, Any]]:
    """Judge a pipeline folder, and the teacher beside it, and write ``results.json`` and ``report.html`` to ``out``.

    teacher: path or None. student: whether ``target`` is a student's pipeline or itself a teacher's.
    """
    from accelerate import PartialState

    decoded = settings(tree, where)
    subjects: list[Subject] = []
    for path in [p for p in (teacher, str(target)) if p]:
        check_pipeline(path)
    teaching = teacher if student else str(target)
    if teaching:
        subjects += [
            Subject(f"teacher, {n} step{'s' * (n > 1)}", "teacher", teaching, n, decoded.teacher_guidance)
            for n in decoded.teacher_steps
        ]
    if student:
        card = read_card(target)
        steps = card.get("num_inference_steps")
        name = card.get("method", "student")  # one without steps of its own is sampled as its teacher is
        label = f"{name}, {steps} step{'s' * (steps != 1)}" if steps else name
        subjects.append(Subject(label, "student", str(target)))
    size = image_size(target)
    source = reference(decoded, size, where)
    clip = recipes.locate(decoded.clip) if decoded.clip else None
    rows = runner.evaluate(
        subjects,
        replace(decoded, clip=clip),
        source,
        device=PartialState().device,
        candidates=source.candidates,
        concept=source.concept,
        out=out,
    )
    report.write_report(out)
    return rows


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels that a pipeline makes by default."""
    from diffusers import DiffusionPipeline

    with opening(folder):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    side: int | Sequence[int] = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor
