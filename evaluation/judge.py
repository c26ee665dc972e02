"""``fastgen evaluate``, and the quick evaluations of a training run: which images, by what, against what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen import config, parallel, registry
from fastgen import recipe as recipes
from fastgen.checkpoint import write_text
from fastgen.config import ConfigError
from fastgen.data import Source
from fastgen.export import check_pipeline, from_pretrained, opening, read_card
from fastgen.family import Family
from fastgen.plain import from_json, from_yaml
from fastgen.train import family_of

from . import features, report, runner, stats, weights
from .config import EvalConfig
from .context import Context, Features
from .runner import Subject

if TYPE_CHECKING:
    from fastgen.train import Session

STATE = "evaluation.json"
"""Of an evaluation that goes on: it is gone when all is measured."""


def settings(tree: Mapping[str, Any], where: str) -> EvalConfig:
    """The ``eval:`` section, decoded. Raises ConfigError."""
    decoded = config.decode(EvalConfig, tree, where, "eval")
    for name in decoded.metrics:
        try:
            registry.find("metric", name)
        except ValueError as error:
            raise ConfigError(f"{where}: eval.metrics: {error}") from None
    for name in decoded.weights:
        try:
            weights.known(name)
        except ValueError as error:
            raise ConfigError(f"{where}: eval.weights: {error}") from None
    if not decoded.reference:
        raise ConfigError(
            f"{where}: eval.reference is missing; name a data source, such as {{source: images, path: ...}}"
        )
    return decoded


def wanted(decoded: EvalConfig) -> list[str]:
    """The names of all weights that the metrics see by."""
    space = {"clip": "clip", "legacy_pytorch": "inception_pytorch"}.get(decoded.features, "inception")
    needs = [need for name in decoded.metrics for need in registry.find("metric", name).ABOUT.needs]
    named = [space if need == "features" else need for need in needs]
    return [name for name in dict.fromkeys(named) if name in weights.TABLE]


def reference(decoded: EvalConfig, image_size: tuple[int, int], where: str) -> Source:
    """The data source of ``eval.reference``, opened."""
    return _opened(decoded.reference, image_size, where, "eval.reference")


def _opened(tree: Mapping[str, Any], image_size: tuple[int, int], where: str, key: str) -> Source:
    chosen = recipes.choose("source", "source", tree, where, key)
    if chosen.name == "cached":
        raise ConfigError(f"{where}: {key}: a cache has latents and no pictures; name the source that it was made of")
    source: Source = registry.find("source", chosen.name).open(chosen.options, image_size)
    return source


def located(decoded: EvalConfig) -> EvalConfig:
    """With paths in the place of what begins with ``assets:``."""
    statistics = recipes.locate(decoded.statistics) if decoded.statistics else None
    paths = {name: recipes.locate(path) for name, path in decoded.weights.items()}
    return replace(decoded, weights=paths, statistics=statistics)


class Quick:
    """Judges a training run's exported network on a few images of the trainer's own sampler.

    Latency is left out, and what compares images of one prompt where no prompt of these few comes twice.
    """

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        """tree: the ``eval:`` section, decoded now so that a mistake in it shows before the first step."""
        self._settings, self._where = settings(tree, where), where
        self._prompts: runner.Prompts | None = None

    def __call__(self, session: Session) -> dict[str, float]:
        """The values by name. The reference is gone through the first time only."""
        given = self._prompts = self._prompts or self._open(session)

        def images(part: Sequence[int]) -> Tensor:
            return session.images([given.prompts[i] for i in part], part)

        names = runner.measurable(given.metrics, given.prompts, {"latency"})
        return runner.measure_images(images, given.context, names, self._settings.batch_size)

    def _open(self, session: Session) -> runner.Prompts:
        decoded = replace(located(self._settings), geneval={})
        source = reference(decoded, session.family.image_size, self._where)
        [given] = runner.prompt_sets(decoded, source, None, session.device, True, decoded.num_images_training)
        return given


@dataclass(frozen=True)
class Target:
    """A pipeline folder to be judged.

    Attributes:
        folder: of the pipeline.
        student: whether it is a student's; else it is judged as teachers are.
        name: of its rows; empty: its method's.
    """

    folder: Path
    student: bool
    name: str = ""


def judge(
    targets: Sequence[Target],
    decoded: EvalConfig,
    where: str,
    teacher: str | None,
    out: Path,
) -> list[runner.Row]:
    """Judge pipeline folders, and the teacher beside them, and write results and report to ``out``.

    If it is cut off, the same call goes on where it stopped. teacher: path or None. Raises ValueError if two targets
    have one name, or their images are of several sizes.
    """
    folders = [*([Path(teacher)] if teacher else []), *(target.folder for target in targets)]
    for folder in folders:
        check_pipeline(str(folder))
    sizes = {folder: image_size(folder) for folder in folders}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{folder} {width}x{height}" for folder, (height, width) in sizes.items())
        raise ValueError(f"pipelines that make images of several sizes do not compare ({told}); judge them one by one")
    subjects = teachers(teacher, decoded) if teacher else []
    for target in targets:
        of = students if target.student else teachers
        subjects += of(target.folder, decoded, target.name)
    state = _state(subjects, decoded)
    known = report.read_results(out / "results.json") if _read(out / STATE) == {"of": state} else []
    new = not out.exists()
    if parallel.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / STATE, json.dumps({"of": state}) + "\n")
    try:
        rows = measure(subjects, decoded, where, sizes[folders[0]], out, [dict(row) for row in known])
    except ValueError:
        if parallel.rank() == 0 and new and [file.name for file in out.iterdir()] == [STATE]:
            (out / STATE).unlink()  # refused before anything was measured
            out.rmdir()
        raise
    if parallel.rank() == 0:
        report.write_report(out)
        (out / STATE).unlink()
    return rows


def _state(subjects: Sequence[Subject], decoded: EvalConfig) -> str:
    """What an evaluation's rows depend on."""
    told = [[s.name, s.role, str(s.pipeline), s.steps, s.guidance_scale] for s in subjects]
    folders = sorted({str(s.pipeline) for s in subjects})
    return runner.digest(json.dumps([told, config.encode(decoded), [files_digest(Path(f)) for f in folders]]))


def _read(path: Path) -> Any:
    """What a JSON file holds; None if there is none, or it is damaged."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def files_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of a folder's files."""
    found = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def said(metrics: str | None, reference: str | None) -> dict[str, Any]:
    """What a command line says of an ``eval:`` section. Raises ValueError on a reference that is none."""
    tree: dict[str, Any] = {}
    if metrics is not None:
        tree["metrics"] = [name.strip() for name in metrics.split(",") if name.strip()]
    if reference is None:
        return tree
    if reference.endswith(".npz"):
        return tree | {"statistics": reference}
    if Path(reference).is_dir():
        return tree | {"reference": {"source": "images", "path": reference}}
    try:
        given = from_yaml(reference)
    except ValueError:
        given = None
    if isinstance(given, str) and given in registry.names("source"):
        given = {"source": given}
    if not isinstance(given, dict):
        raise ValueError(
            f"{reference}: no reference; give a folder of images, an .npz, the name of a data source "
            f"({', '.join(registry.names('source'))}), or one in braces with its options"
        )
    return tree | {"reference": given}


def statistics(
    given: str, out: Path, space: Features, given_weights: Mapping[str, str], side: int, rows: bool, batch_size: int
) -> dict[str, Any]:
    """Write the statistics of a source's images, scaled to ``side`` pixels, to ``out``; what was written.

    Raises ValueError on what is no source, or without the weights.
    """
    tree = said(None, given).get("reference")
    if tree is None:
        raise ValueError(f"{given}: holds statistics already; give a source of images")
    where = "the command line"
    decoded = located(settings({"reference": tree, "features": space, "weights": dict(given_weights)}, where))
    context = Context(weights=decoded.weights, features=space, device=parallel.device())
    source = reference(decoded, (side, side), where)
    return stats.make(source, features.extractor(context), out, batch_size, rows)


def targets(places: Mapping[str, Path], runs: Mapping[str, str], taught: bool) -> list[Target]:
    """Pipelines to judge, named by their methods, or by their folders where several have one.

    places: by what they were called. runs: of those that are runs, the method. taught: whether a teacher is given,
    without which a pipeline that says nothing of itself is one.
    """
    found = []
    for text, place in places.items():
        folder = place / "pipeline" if text in runs else place
        card = read_card(folder)
        student = runs.get(text, card.get("method", "student" if taught else "pretrain")) != "pretrain"
        found.append(Target(folder, student, str(card.get("method", "student")) if student else ""))
    names = [target.name for target in found]
    return [
        replace(target, name=place.resolve().name) if names.count(target.name) > 1 else target
        for target, place in zip(found, places.values(), strict=True)
    ]


def teachers(path: str | Path, decoded: EvalConfig, name: str = "") -> list[Subject]:
    """The teacher's pipeline at each of ``eval.teacher_steps``. name: for its rows; empty: teacher."""
    return [
        Subject(f"{name or 'teacher'}, {report.counted(n)}", "teacher", str(path), n, decoded.teacher_guidance)
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
    source = reference(decoded, size, where)
    geneval = _opened(decoded.geneval, size, where, "eval.geneval") if decoded.geneval else None
    device = parallel.device()
    return runner.evaluate(subjects, located(decoded), source, geneval=geneval, device=device, out=out, known=known)


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels that a pipeline makes by default: as its card says, its network, or its family."""
    card = read_card(folder)
    if card.get("height") and card.get("width"):
        return card["height"], card["width"]
    with opening(folder):
        pipeline = from_pretrained(folder, dtype=torch.float32)
        network = pipeline.components.get("unet") or pipeline.components["transformer"]
        side: int | Sequence[int] | None = network.config.get("sample_size")
        if side is None:
            family: Family = family_of(str(folder)).load(str(folder), torch.device("cpu"), None, 1.0, None, None)
            return family.image_size
        height, width = (side, side) if isinstance(side, int) else side
        vae, factor = pipeline.components.get("vae"), vars(pipeline).get("vae_scale_factor")
        if factor is None:  # in pixel space, and DiTPipeline
            factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        return height * factor, width * factor
