"""One pass: prompts, a seed each -> images, made once -> every metric -> the rows of ``results.json``."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import calls, parallel, registry
from fastgen.checkpoint import write_text
from fastgen.data import Source
from fastgen.export import from_pretrained, opening, read_card
from fastgen.plain import from_json
from fastgen.recipe import DTYPES

from . import per_image, stats
from .config import EvalConfig
from .context import Call, Context, Judges, MetricLike, Reference, Seen
from .features import fingerprint
from .images import Made, arguments, opened, write_png
from .seen import Images, Real, intervals, real_images, see, told

log = logging.getLogger("fastgen")

Row = dict[str, Any]
VALUES = ("fid", "clip_score", "retrieval", "diversity", "seconds_per_image", "network_evaluations")
"""The values every row has, None where they do not apply; others follow."""
DATA = "real images"
"""Name of the row of real images."""
_PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "clean-fid", "fastgen-diffusion")


@dataclass(frozen=True)
class Subject:
    """A pipeline to be judged.

    Attributes:
        name: of its row.
        role: how it is shown.
        pipeline: folder, Hub id, or a loaded Diffusers pipeline.
        steps: of each call; None: what ``fastgen.json`` in the folder says, else the pipeline's own default.
        guidance_scale: likewise.
        call: further arguments of the call; what ``fastgen.json`` says is added.
    """

    name: str
    role: Literal["teacher", "student"]
    pipeline: Any
    steps: int | None = None
    guidance_scale: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prompts:
    """What every subject is called with, and the metrics that see what it makes.

    Attributes:
        name: of the set; empty: the reference's.
        source: of the prompts.
        prompts: [N].
        metrics: by name.
        context: for them, but for the subject's own.
    """

    name: str
    source: Source
    prompts: Sequence[str]
    metrics: Sequence[str]
    context: Context


def evaluate(
    subjects: Sequence[Subject],
    config: EvalConfig,
    reference: Source,
    *,
    geneval: Source | None = None,
    device: torch.device | str = "cpu",
    out: Path | None = None,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Judge every subject on the prompts of the reference's first ``num_images`` items, and real images beside them.

    Under several processes each makes its share of the images; all of them get the rows, the main one writes.

    Args:
        subjects: with distinct names.
        config: of the evaluation; its ``reference`` and ``geneval`` are not read here.
        reference: gives the prompts and, where it has them, the real images.
        geneval: prompts of the metrics that need GenEval's records, all of them; None: the reference's own.
        device: of pipelines and features.
        out: folder for ``results.json``, written anew after each row, ``per_image/``, ``comparison/`` and ``images/``.
        known: rows of this very evaluation: what they are of is not judged again.

    Returns:
        The known rows, then new ones with name, role, steps, guidance_scale, ``VALUES``, further values, intervals,
        protocol; real images first.

    Raises:
        ValueError: on anything that cannot be measured, before any image is made where that can be known.
    """
    folders = [slug(s.name) for s in subjects]
    for folder in {f for f in folders if folders.count(f) > 1 or f == slug(DATA)}:
        raise ValueError(f"subjects must have distinct names; {folder!r} is taken twice")
    sets = prompt_sets(config, reference, geneval, device)
    for one in sets:
        metrics(one.metrics, one.context)  # what cannot be measured is known now
    rows, judged = list(known), {row["name"] for row in known}

    def add(row: Row) -> None:
        rows.append(row)
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in VALUES if row[name] is not None)
        log.info("evaluated %s: %s", row["name"], shown)
        if out is not None and parallel.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")

    if reference.has_images and DATA not in judged:
        add(_real_row(sets[0], config, out))
    loaded: tuple[Any, Any] = (None, None)
    for subject in [s for s in subjects if s.name not in judged]:
        if loaded[0] is None or loaded[0] != subject.pipeline:
            loaded = (subject.pipeline, open_pipeline(subject.pipeline, DTYPES[config.dtype], device))
        add(_subject_row(resolved(subject, loaded[1]), loaded[1], config, sets, out))
    parallel.barrier()  # what the main process writes is there for all
    return rows


def prompt_sets(
    config: EvalConfig,
    reference: Source,
    geneval: Source | None,
    device: torch.device | str,
    alone: bool = False,
    number: int | None = None,
) -> list[Prompts]:
    """The reference's prompts with their metrics, and those of ``geneval`` with theirs.

    alone: as ``see`` takes it. number: of the reference's prompts; None: ``num_images``.
    """
    special = [name for name in config.metrics if geneval and "records" in registry.find("metric", name).ABOUT.needs]

    def one(name: str, source: Source, count: int, images: int, chosen: Sequence[str]) -> Prompts:
        """images: how many of the source's stand for the real ones; 0: none, or their statistics do."""
        prompts, records = told(source, range(max(count, images)))
        real: Reference | None = None
        if images:
            real = Real(source, range(images), config.batch_size, alone, prompts[:images])
        elif not name and config.statistics:
            real = stats.load(Path(config.statistics))
        context = Context(
            weights=config.weights,
            features=config.features,
            reference=real,
            candidates=source.candidates,
            concept=source.concept,
            device=device,
            prompts=prompts[:count],
            metadata=records,
        )
        return Prompts(name, source, context.prompts, chosen, context)

    by_images = reference.has_images and not config.statistics
    images = min(config.num_images, len(reference)) if by_images else 0
    own = [name for name in config.metrics if name not in special]
    sets = [one("", reference, config.num_images if number is None else number, images, own)]
    return sets + ([one("geneval", geneval, len(geneval), 0, special)] if geneval and special else [])


def measure(seen: Seen, used: Mapping[str, MetricLike]) -> dict[str, float]:
    """The values of these metrics on rows that hold what their extractors saw."""
    return {name: value for metric in used.values() for name, value in metric.compute(seen).items()}


def measure_images(images: Images, context: Context, names: Sequence[str], batch_size: int) -> dict[str, float]:
    """The values of the metrics on images of the context's prompts that this process alone sees."""
    used = metrics(names, replace(context, images=lambda i: images([i])[0]))
    return measure(see(images, context.prompts, _extractors(used), batch_size, alone=True), used)


def metrics(names: Sequence[str], context: Context) -> dict[str, MetricLike]:
    """The metrics of these names, made. Raises ValueError for an unknown one or one that lacks what it needs."""
    modules = {name: registry.find("metric", name) for name in names}
    for name, module in modules.items():  # before any weights are looked for
        if "reference" in module.ABOUT.needs and context.reference is None:
            raise ValueError(f"{name} needs real images; set eval.reference to a source that has them")
    return {name: module.Metric(context) for name, module in modules.items()}


def _extractors(used: Mapping[str, MetricLike]) -> list[Any]:
    return [extractor for metric in used.values() for extractor in metric.extractors]


def comes_twice(prompts: Sequence[str]) -> bool:
    """Whether any prompt does, as diversity needs it."""
    return len(set(prompts)) < len(prompts)


def measurable(names: Sequence[str], prompts: Sequence[str], left_out: Iterable[str] = ()) -> list[str]:
    """The names without those left out, and without those that compare images of one prompt if none comes twice."""
    return [
        name
        for name in names
        if name not in left_out
        and (comes_twice(prompts) or "prompt seeds" not in registry.find("metric", name).ABOUT.needs)
    ]


def open_pipeline(pipeline: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A pipeline by folder or Hub id, through plain Diffusers; a loaded one as it is. Raises ValueError."""
    if isinstance(pipeline, str | Path):
        with opening(pipeline):
            pipeline = from_pretrained(pipeline, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def resolved(subject: Subject, pipeline: Any) -> Subject:
    """The subject with steps and guidance filled in: its own, else the student's card, else the call's defaults.

    A pipeline whose call takes no guidance scale has none, whatever they say.
    """
    import inspect

    is_folder = isinstance(subject.pipeline, str | Path)
    card = read_card(Path(subject.pipeline)) if is_folder else {}
    defaults = {name: p.default for name, p in inspect.signature(type(pipeline).__call__).parameters.items()}

    def first(own: Any, name: str) -> Any:
        return own if own is not None else card.get(name, defaults.get(name))

    guidance = first(subject.guidance_scale, "guidance_scale") if calls.takes(pipeline, "guidance_scale") else None
    return replace(
        subject,
        steps=first(subject.steps, "num_inference_steps"),
        guidance_scale=guidance,
        call=card.get("call", {}) | dict(subject.call),
    )


def slug(name: str) -> str:
    """A name as a folder's: letters, digits, dot, dash and underscore."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of this code where it lies in its own repository, "-dirty" if changed; else None.

    Asked once: what a process writes into the repository later does not change the code that it runs.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here.parent, *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # site-packages may lie inside somebody else's repository, which does not track this file
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else head


@dataclass(eq=False)
class Found:
    """What was measured of a subject: values, their intervals, protocols and what single images scored, by name."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    protocols: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def add(self, used: Mapping[str, MetricLike], seen: Seen, config: EvalConfig) -> None:
        """What these metrics say of what was seen."""
        for name, metric in used.items():
            values = metric.compute(seen)
            self.values |= values
            about = registry.find("metric", name).ABOUT
            if about.resampled:
                self.intervals |= intervals(metric, seen, values, config.bootstrap, config.seed, about.share)
            self.protocols[name] = metric.protocol()
            self.scores |= metric.per_image(seen)

    def join(self, other: Found) -> None:
        """What was measured of the same subject on other prompts; its single images are others."""
        self.values |= other.values
        self.intervals |= other.intervals
        self.protocols |= other.protocols


def _real_row(given: Prompts, config: EvalConfig, out: Path | None) -> Row:
    """Real images of items after those of the reference: another draw, whose distance is the floor; or the same."""
    source, count = given.source, config.num_images
    second = len(source) >= 2 * count
    start = count if second else 0
    indices = range(start, start + min(count, len(source)))
    prompts, records = told(source, indices)
    real = Real(source, indices, config.batch_size, prompts=prompts)
    of_sets = {name for name in given.metrics if "reference" in registry.find("metric", name).ABOUT.needs}
    names = measurable(given.metrics, prompts, set() if second else of_sets)
    context = given.context.on(prompts, lambda i: real.images([i])[0])
    used = metrics(names, replace(context, metadata=records))
    found = Found()
    seen = see(real.images, real.prompts, _extractors(used), config.batch_size)
    found.add(used, seen, config)
    note = f"items {start} to {start + len(seen) - 1} of the reference source"
    if of_sets and not second:
        note += f"; no {', '.join(sorted(of_sets))}, because the source is too small for a second draw"
    if out is not None and parallel.rank() == 0:
        _leave_scores(out, "", DATA, {"prompts": digest("\n".join(real.prompts))}, found.scores)
    # of the first draw, whose prompts the pipelines' pictures have
    _leave_pictures(out, DATA, "data", config, given, lambda part: real_images(source, part))
    protocol = {"num_images": len(seen), "images": note, **_common(given.context.device)}
    return _row(DATA, "data", None, None, found, protocol)


def _subject_row(
    subject: Subject, pipeline: Any, config: EvalConfig, sets: Sequence[Prompts], out: Path | None
) -> Row:
    call = {"steps": subject.steps, "guidance_scale": subject.guidance_scale, "call": subject.call}
    timed = Call(
        pipeline, arguments(pipeline, subject.steps, subject.guidance_scale) | dict(subject.call), config.repeats
    )
    found = Found()
    protocol: dict[str, Any] = {}
    for given in sets:
        settings = _settings(subject, pipeline, config, given.prompts)
        folder = None
        if out is not None and config.keep_images:
            folder = opened(out / "images" / Path(given.name) / slug(subject.name), settings)
        made = Made(pipeline, given.prompts, config.seed, folder, batch_size=config.batch_size, **call)
        used = metrics(given.metrics, given.context.on(given.prompts, made.one, timed))
        wanted = _extractors(used)
        seen = see(made, given.prompts, wanted, config.batch_size) if wanted else Seen(given.prompts, {})
        one = Found()
        one.add(used, seen, config)
        found.join(one)
        if out is not None and parallel.rank() == 0:
            _leave_scores(out, given.name, subject.name, settings, one.scores)
            _leave_lines(out, Path("images", given.name, slug(subject.name)), used, seen)
        if given.name:
            protocol["sets"] = {given.name: {"num_images": len(seen), "prompts": settings["prompts"]}}
            continue
        protocol |= {"num_images": len(seen), **settings, **_common(given.context.device)}
        if wanted:
            _leave_pictures(out, subject.name, subject.role, config, given, made)
    return _row(subject.name, subject.role, subject.steps, subject.guidance_scale, found, protocol)


def _leave_scores(out: Path, of: str, name: str, settings: Mapping[str, Any], scores: Mapping[str, Tensor]) -> None:
    """Write what single images scored. of: the set of prompts."""
    if scores:
        kept = per_image.PerImage(name, settings["prompts"], settings.get("seed"), scores)
        per_image.save(out / per_image.FOLDER / of / f"{slug(name)}.json", kept)


def _leave_lines(out: Path, folder: Path, used: Mapping[str, MetricLike], seen: Seen) -> None:
    """Write what is wrong with each image, beside where it is kept."""
    for name, metric in used.items():
        if isinstance(metric, Judges):
            lines = metric.lines(seen, [(folder / f"{i:05d}.png").as_posix() for i in range(len(seen))])
            (out / name).mkdir(parents=True, exist_ok=True)
            write_text(out / name / f"{folder.name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _leave_pictures(
    out: Path | None, name: str, role: str, config: EvalConfig, given: Prompts, images: Images
) -> None:
    """Write the first images for the report."""
    if out is None or not config.comparison or parallel.rank() != 0:
        return
    chosen, folder = list(given.prompts[: config.comparison]), out / "comparison"
    for i, image in enumerate(images(range(len(chosen)))):
        write_png(image, folder / slug(name) / f"{i}.png")
    listed = folder / "prompts.json"
    known = from_json(listed.read_text(encoding="utf-8")) if listed.is_file() and role != "data" else {}
    entry = {"name": name, "role": role, "folder": slug(name)}
    kept = known.get("subjects", []) if known.get("prompts") == chosen else []
    others = [s for s in kept if s["folder"] != entry["folder"]]
    write_text(listed, json.dumps({"prompts": chosen, "subjects": [*others, entry]}, indent=1) + "\n")


def _row(
    name: str, role: str, steps: int | None, guidance: float | None, found: Found, protocol: dict[str, Any]
) -> Row:
    row: Row = {"name": name, "role": role, "steps": steps, "guidance_scale": guidance}
    told = {"intervals": found.intervals, "protocol": {"metrics": found.protocols, **protocol}}
    return row | {name: found.values.get(name) for name in VALUES} | found.values | told


def _settings(subject: Subject, pipeline: Any, config: EvalConfig, prompts: Sequence[str]) -> dict[str, Any]:
    """Everything the subject's images depend on."""
    scheduler = pipeline.scheduler
    # names with an underscore are Diffusers' own and list what was left at its default, in no fixed order
    noise = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "pipeline": type(pipeline).__name__,
        "weights": fingerprint(modules),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": digest(json.dumps(noise, sort_keys=True, default=str)),
        "steps": subject.steps,
        "guidance_scale": subject.guidance_scale,
        **({"call": dict(subject.call)} if subject.call else {}),
        "seed": config.seed,
        "seeds": f"image i: blake2b of ({config.seed}, i), a CPU generator each",
        "prompts": digest("\n".join(prompts)),
        "dtype": config.dtype,
    }


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _common(device: torch.device | str) -> dict[str, Any]:
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "processes": parallel.size(),
        "versions": versions(),
        "commit": commit(),
    }
