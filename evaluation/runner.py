"""One pass: prompts, a seed each -> images, made once -> every metric -> the rows of ``results.json``."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgen import calls, parallel, registry
from fastgen.checkpoint import write_text
from fastgen.data import Source
from fastgen.export import from_pretrained, read_card
from fastgen.recipe import DTYPES
from fastgen.rng import seed_of

from .config import EvalConfig
from .context import Call, Context, MetricLike, same
from .features import fingerprint

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
    """

    name: str
    role: Literal["teacher", "student"]
    pipeline: Any
    steps: int | None = None
    guidance_scale: float | None = None


def evaluate(
    subjects: Sequence[Subject],
    config: EvalConfig,
    reference: Source,
    *,
    device: torch.device | str = "cpu",
    candidates: Sequence[str] = (),
    concept: Callable[[str], str] = same,
    out: Path | None = None,
    keep: Path | None = None,
    known: Sequence[Row] = (),
) -> list[Row]:
    """Judge every subject on the prompts of the reference's first ``num_images`` items, and real images beside them.

    Under several processes each makes its share of the images; all of them get the rows, the main one writes.

    Args:
        subjects: with distinct names.
        config: of the evaluation; its ``reference`` is not read here.
        reference: gives the prompts and, where it has them, the real images.
        device: of pipelines and features.
        candidates: captions among which retrieval chooses.
        concept: prompt -> the candidate it stands for.
        out: folder for ``results.json``, written anew after each row, and ``comparison/``.
        keep: folder for all images as PNG; those found there are not made again.
        known: rows of this very evaluation: what they are of is not judged again.

    Returns:
        The known rows, then new ones with name, role, steps, guidance_scale, ``VALUES``, further values, protocol;
        real images first.

    Raises:
        ValueError: on anything that cannot be measured, before any image is made where that can be known.
    """
    folders = [slug(s.name) for s in subjects]
    for folder in {f for f in folders if folders.count(f) > 1 or f == slug(DATA)}:
        raise ValueError(f"subjects must have distinct names; {folder!r} is taken twice")
    count = config.num_images
    prompts = [reference.item(i).prompt for i in range(count)]
    has_second_draw = reference.has_images and len(reference) >= 2 * count
    context = Context(
        config.clip,
        config.inception,
        Real(reference, range(min(count, len(reference))), config.batch_size) if reference.has_images else None,
        candidates,
        concept,
        device,
        prompts=prompts,
    )
    metrics(config.metrics, context)  # what cannot be measured is known now
    rows, judged = list(known), {row["name"] for row in known}

    def add(row: Row) -> None:
        rows.append(row)
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in VALUES if row[name] is not None)
        log.info("evaluated %s: %s", row["name"], shown)
        if out is not None and parallel.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")

    if reference.has_images and DATA not in judged:
        start = count if has_second_draw else 0
        add(_real_row(reference, config, context, start, with_fid=has_second_draw))

        def real(i: int) -> Tensor | None:  # every process could make it, so one does
            return _real(reference, range(i, i + 1))[0] if parallel.rank() == 0 else None

        _compare(out, DATA, "data", config, prompts, real)
    loaded: tuple[Any, Any] = (None, None)
    for subject in [s for s in subjects if s.name not in judged]:
        if loaded[0] is None or loaded[0] != subject.pipeline:
            loaded = (subject.pipeline, open_pipeline(subject.pipeline, DTYPES[config.dtype], device))
        add(_subject_row(resolved(subject, loaded[1]), loaded[1], config, context, prompts, out, keep))
    parallel.barrier()  # what the main process writes is there for all
    return rows


def measure_images(
    batches: Iterable[tuple[Tensor, Sequence[str]]], context: Context, names: Sequence[str]
) -> dict[str, float]:
    """The values of the metrics on (uint8 [B, 3, H, W], prompts) batches of this process; the latency has none.

    The context must be the same object each time, or its reference will be gone through again.
    """
    used = metrics(names, context)
    for images, prompts in batches:
        for metric in used.values():
            metric.update(images, prompts)
    return {name: value for metric in used.values() for name, value in metric.compute().items()}


def metrics(names: Sequence[str], context: Context) -> dict[str, MetricLike]:
    """The metrics of these names, made. Raises ValueError for an unknown one or one that lacks what it needs."""
    return {name: registry.find("metric", name).Metric(context) for name in names}


def comes_twice(prompts: Sequence[str]) -> bool:
    """Whether any prompt does, as diversity needs it."""
    return len(set(prompts)) < len(prompts)


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
) -> Iterator[Tensor]:
    """Batches of uint8 [B, 3, H, W], image i from prompts[i] and a CPU generator seeded with seeds[i].

    So an image does not depend on the batch it is in, but for the rounding of the networks' arithmetic; and for
    pipelines that draw noise between steps from torch's global generator (``Family.step_noise``), which is seeded for
    each batch. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("no prompts to make images from; give at least one")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    call = arguments(pipeline, steps, guidance_scale)
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        given = calls.prompted(pipeline, prompts[start : start + batch_size])
        with torch.random.fork_rng():
            torch.manual_seed(seeds[start])
            made = pipeline(**given, generator=generators, **call).images
        yield torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in made])).permute(0, 3, 1, 2)


def arguments(pipeline: Any, steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call; None leaves the pipeline its default. Some take no guidance scale."""
    return calls.settled(pipeline, {"num_inference_steps": steps, "guidance_scale": guidance_scale})


def open_pipeline(pipeline: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A pipeline by folder or Hub id, through plain Diffusers; a loaded one as it is. Raises ValueError."""
    if isinstance(pipeline, str | Path):
        from safetensors import SafetensorError

        unusable = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
        try:
            pipeline = from_pretrained(pipeline, dtype=dtype)
        except unusable as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{pipeline}: not a pipeline that Diffusers can open ({reason})") from None
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
    return replace(subject, steps=first(subject.steps, "num_inference_steps"), guidance_scale=guidance)


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


@dataclass(frozen=True, eq=False)
class Real:
    """The real images of some of a source's items."""

    source: Source
    indices: range
    batch_size: int

    def __call__(self) -> Iterator[Tensor]:
        """Batches of uint8 [B, 3, H, W]."""
        for start in range(0, len(self.indices), self.batch_size):
            yield _real(self.source, self.indices[start : start + self.batch_size])


def _real(source: Source, indices: range) -> Tensor:
    found = [source.item(i).image for i in indices]
    return torch.from_numpy(np.stack([image for image in found if image is not None])).permute(0, 3, 1, 2)


def _real_row(source: Source, config: EvalConfig, context: Context, start: int, with_fid: bool) -> Row:
    """Real images from item ``start``: another draw than the reference, whose distance is the floor, or the same."""
    indices = range(start, start + min(config.num_images, len(source)))
    prompts = [source.item(i).prompt for i in indices]
    left_out = {"fid"} if not with_fid else set()
    if not comes_twice(prompts):
        left_out.add("diversity")
    used = metrics([name for name in config.metrics if name not in left_out], replace(context, prompts=prompts))
    for part in _shares(indices, config.batch_size):
        images = _real(source, part)
        for metric in used.values():
            metric.update(images, [prompts[i - start] for i in part])
    values, details = _reduced(used, context.device)
    note = f"items {indices.start} to {indices.stop - 1} of the reference source"
    if not with_fid:
        note += "; no fid, because the source is too small for a second draw"
    protocol = {"metrics": details, "num_images": len(indices), "images": note, **_common(context.device)}
    return _row(DATA, "data", None, None, values, protocol)


def _subject_row(
    subject: Subject,
    pipeline: Any,
    config: EvalConfig,
    context: Context,
    prompts: Sequence[str],
    out: Path | None,
    keep: Path | None,
) -> Row:
    settings = _settings(subject, pipeline, config, prompts)
    folder = None if keep is None else _opened(keep / slug(subject.name), settings)
    call = arguments(pipeline, subject.steps, subject.guidance_scale)
    used = metrics(config.metrics, replace(context, call=Call(pipeline, call, config.repeats)))
    shown: dict[int, Tensor] = {}
    for part in _shares(range(len(prompts)), config.batch_size):
        images = _images(subject, pipeline, config, prompts, part, folder)
        for metric in used.values():
            metric.update(images, [prompts[i] for i in part])
        shown |= {i: image for i, image in zip(part, images, strict=True) if i < config.comparison}
    _compare(out, subject.name, subject.role, config, prompts, shown.get)
    values, details = _reduced(used, context.device)
    protocol = {"metrics": details, "num_images": len(prompts), **settings, **_common(context.device)}
    return _row(subject.name, subject.role, subject.steps, subject.guidance_scale, values, protocol)


def _row(
    name: str, role: str, steps: int | None, guidance: float | None, values: dict[str, float], protocol: dict[str, Any]
) -> Row:
    row: Row = {"name": name, "role": role, "steps": steps, "guidance_scale": guidance}
    return row | {name: values.get(name) for name in VALUES} | values | {"protocol": protocol}


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


def _shares(indices: range, batch_size: int) -> Iterator[range]:
    """This process's batches of the indices."""
    own = indices[parallel.rank() :: parallel.size()]
    for start in range(0, len(own), batch_size):
        yield own[start : start + batch_size]


def _reduced(used: dict[str, MetricLike], device: torch.device | str) -> tuple[dict[str, float], dict[str, Any]]:
    """Values and protocols over all processes."""
    if parallel.size() > 1:
        for metric in used.values():
            for value in metric.state.values():
                value.copy_(parallel.sum_over_processes(value.to(device)))
    values = {name: value for metric in used.values() for name, value in metric.compute().items()}
    return values, {name: metric.protocol() for name, metric in used.items()}


def _images(
    subject: Subject, pipeline: Any, config: EvalConfig, prompts: Sequence[str], part: range, folder: Path | None
) -> Tensor:
    """The images of ``part``, read from ``folder`` or made and left there: uint8 [B, 3, H, W]."""
    files = {i: folder / f"{i:05d}.png" for i in part} if folder else {}
    found = {i: read_png(file) for i, file in files.items() if file.is_file()}
    missing = [i for i in part if i not in found]
    if missing:
        made = generate(
            pipeline,
            [prompts[i] for i in missing],
            [seed_of(config.seed, i) for i in missing],
            steps=subject.steps,
            guidance_scale=subject.guidance_scale,
            batch_size=config.batch_size,
        )
        for i, image in zip(missing, torch.cat(list(made)), strict=True):
            found[i] = image
            if folder:
                write_png(image, files[i])
    return torch.stack([found[i] for i in part])


def _opened(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of a subject's images. Raises ValueError if it holds those of other settings."""
    path = folder / "settings.json"
    if parallel.rank() == 0 and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")
    parallel.barrier()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: not valid JSON; delete the folder to make its images again") from None
    for name, value in settings.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{folder}: holds images made with {name} {kept.get(name)!r}, now it is {value!r}; "
                "delete it or keep the images elsewhere"
            )
    return folder


def read_png(file: Path) -> Tensor:
    """uint8 [3, H, W]. Raises ValueError, naming the file, if it is damaged."""
    try:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); delete it to have it made again") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def write_png(image: Tensor, file: Path) -> None:
    """image: uint8 [3, H, W] -> a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(partial, "PNG")
    partial.replace(file)


def _compare(
    out: Path | None,
    name: str,
    role: str,
    config: EvalConfig,
    prompts: Sequence[str],
    image: Callable[[int], Tensor | None],
) -> None:
    """Leave the first images of a subject in ``out/comparison``, and what they are in ``prompts.json``."""
    if out is None or not config.comparison:
        return
    chosen = list(prompts[: config.comparison])
    folder = out / "comparison"
    for i in range(len(chosen)):
        made = image(i)
        if made is not None:
            write_png(made, folder / slug(name) / f"{i}.png")
    if parallel.rank() == 0:
        listed = folder / "prompts.json"
        known = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() and role != "data" else {}
        entry = {"name": name, "role": role, "folder": slug(name)}
        kept = known.get("subjects", []) if known.get("prompts") == chosen else []
        others = [s for s in kept if s["folder"] != entry["folder"]]
        write_text(listed, json.dumps({"prompts": chosen, "subjects": [*others, entry]}, indent=1) + "\n")
