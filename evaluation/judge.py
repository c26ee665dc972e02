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
from fastgen.export import check_pipeline, from_pretrained, opening, read_card

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
    """Judges a training run's exported network on a few images of the trainer's own sampler.

    Latency is left out, and diversity where no prompt of these few comes twice.
    """

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        """tree: the ``eval:`` section, decoded now so that a mistake in it shows before the first step."""
        self._settings, self._where = settings(tree, where), where
        self._context: Context | None = None

    def __call__(self, session: Session) -> dict[str, float]:
        """The values by name. The reference is gone through the first time only."""
        decoded = self._settings
        context = self._context = self._context or self._open(session)
        # few images may show no prompt twice
        left_out = {"latency"} if runner.comes_twice(context.prompts) else {"latency", "diversity"}
        names = [name for name in decoded.metrics if name not in left_out]

        def batches() -> Iterator[tuple[Tensor, Sequence[str]]]:
            for start in range(0, decoded.num_images_training, decoded.batch_size):
                samples = range(start, min(start + decoded.batch_size, decoded.num_images_training))
                prompts = [context.prompts[i] for i in samples]
                yield session.images(prompts, samples), prompts

        return runner.measure_images(batches(), context, names)

    def _open(self, session: Session) -> Context:
        decoded = self._settings
        source = reference(decoded, session.family.image_size, self._where)
        return Context(
            recipes.locate(decoded.clip) if decoded.clip else None,
            decoded.inception,
            runner.Real(source, range(min(decoded.num_images, len(source))), decoded.batch_size),
            source.candidates,
            source.concept,
            session.device,
            prompts=[source.item(i).prompt for i in range(decoded.num_images_training)],
        )


def judge(
    target: Path, tree: Mapping[str, Any], where: str, teacher: str | None, student: bool, out: Path
) -> list[dict[str, Any]]:
    """Judge a pipeline folder, and the teacher beside it, and write ``results.json`` and ``report.html`` to ``out``.

    teacher: path or None. student: whether ``target`` is a student's pipeline or itself a teacher's.
    """
    decoded = settings(tree, where)
    for path in [p for p in (teacher, str(target)) if p]:
        check_pipeline(path)
    teaching = teacher if student else str(target)
    subjects = teachers(teaching, decoded) if teaching else []
    if student:
        subjects += students(target, decoded)
    rows = measure(subjects, decoded, where, image_size(target), out)
    report.write_report(out)
    return rows


def teachers(path: str, decoded: EvalConfig) -> list[Subject]:
    """The teacher's pipeline at each of ``eval.teacher_steps``."""
    return [
        Subject(f"teacher, {report.counted(n)}", "teacher", path, n, decoded.teacher_guidance)
        for n in decoded.teacher_steps
    ]


def students(folder: Path, decoded: EvalConfig, name: str = "") -> list[Subject]:
    """A student's pipeline at its own number of steps, then at those of ``eval.student_steps`` that it takes.

    A student of N steps takes as many or fewer: its scheduler then calls it at some of the times it was trained at.
    One without steps of its own is sampled as its teacher is and takes any number. name: for its rows; empty: its
    method's.
    """
    card = read_card(folder)
    own, name = card.get("num_inference_steps"), name or card.get("method", "student")
    subjects = [Subject(f"{name}, {report.counted(own)}" if own else name, "student", str(folder))]
    fewer = [n for n in decoded.student_steps if own is None or n < own]
    return subjects + [Subject(f"{name}, {report.counted(n)}", "student", str(folder), n) for n in fewer]


def measure(
    subjects: Sequence[Subject],
    decoded: EvalConfig,
    where: str,
    size: tuple[int, int],
    out: Path,
    known: Sequence[runner.Row] = (),
) -> list[runner.Row]:
    """The rows of these subjects, whose images are (height, width) = size. known: rows of earlier calls, kept."""
    from accelerate import PartialState

    source = reference(decoded, size, where)
    clip = recipes.locate(decoded.clip) if decoded.clip else None
    return runner.evaluate(
        subjects,
        replace(decoded, clip=clip),
        source,
        device=PartialState().device,
        candidates=source.candidates,
        concept=source.concept,
        out=out,
        known=known,
    )


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels that a pipeline makes by default."""
    with opening(folder):
        pipeline = from_pretrained(folder, dtype=torch.float32)
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    side: int | Sequence[int] = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    vae, factor = pipeline.components.get("vae"), vars(pipeline).get("vae_scale_factor")
    if factor is None:  # in pixel space, and DiTPipeline
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    return height * factor, width * factor
