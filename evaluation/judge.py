"""``fastgen evaluate``, and the quick evaluations of a training run: which images, by what, against what."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgen import config, registry
from fastgen import recipe as recipes
from fastgen.config import ConfigError
from fastgen.data import Source
from fastgen.export import check_pipeline, read_card

from . import report, runner
from .config import EvalConfig
from .context import Context
from .runner import Subject

if TYPE_CHECKING:
    from fastgen.train import Session

_contexts: weakref.WeakKeyDictionary[Any, tuple[EvalConfig, Source, Context]] = weakref.WeakKeyDictionary()


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


def quick(session: Session) -> dict[str, float]:
    """The recipe's metrics on ``num_images_training`` images of the trainer's own sampler."""
    known = _contexts.get(session.method)
    if known is None:
        decoded = settings(session.recipe.eval, "config")
        source = reference(decoded, session.family.image_size, "config")
        clip = recipes.locate(decoded.clip) if decoded.clip else None
        real = _Real(source, decoded.num_images)
        context = Context(clip, decoded.inception, real, source.candidates, source.concept, session.device)
        known = _contexts[session.method] = (decoded, source, context)
    decoded, source, context = known
    names = [name for name in decoded.metrics if name != "latency"]

    def batches() -> Any:
        for start in range(0, decoded.num_images_training, decoded.batch_size):
            samples = range(start, min(start + decoded.batch_size, decoded.num_images_training))
            prompts = [source.item(i).prompt for i in samples]
            yield session.images(prompts, samples), prompts

    return runner.measure_images(batches(), context, names)


class _Real:
    """() -> the source's first images, as uint8 batches."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))

    def __call__(self) -> Any:
        for start in range(0, self.count, 64):
            images = [self.source.item(i).image for i in range(start, min(start + 64, self.count))]
            yield torch.stack([torch.from_numpy(image) for image in images if image is not None]).permute(0, 3, 1, 2)


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
        if Path(path).is_absolute() or Path(path).exists():
            check_pipeline(Path(path))
    teaching = teacher if student else str(target)
    if teaching:
        subjects += [
            Subject(f"teacher, {n} step{'s' * (n > 1)}", "teacher", teaching, n, decoded.teacher_guidance)
            for n in decoded.teacher_steps
        ]
    if student:
        card = read_card(target)
        steps = card.get("num_inference_steps")
        label = f"{card.get('method', 'student')}, {steps} step{'s' * (steps != 1)}" if steps else "student"
        subjects.append(Subject(label, "student", str(target)))
    size = image_size(target)
    source = reference(decoded, size, where)
    clip = recipes.locate(decoded.clip) if decoded.clip else None
    rows = runner.evaluate(
        subjects,
        config.decode(type(decoded), {**config.encode(decoded), "clip": clip}, where, "eval"),
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

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    side: int | Sequence[int] = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor
