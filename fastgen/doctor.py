"""What this machine has that fastgen needs or can use, and what a training would lack here."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import attention, lpips, prefetch, tracking
from .recipe import Recipe

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "PyYAML")
OPTIONAL = {
    "torchmetrics": "eval",
    "clean-fid": "eval",
    "torchvision": "eval",
    "xformers": "xformers",
    "wandb": "wandb",
    "trackio": "trackio",
    "bitsandbytes": "8bit",
    "datasets": "hf",
}
"""Package -> the extra of fastgen-diffusion that brings it."""


def findings() -> list[dict[str, Any]]:
    """Rows of ``what``, ``found``, ``ok`` and ``needed``."""
    rows = [_row("python", platform.python_version(), True, True)]
    for name in NEEDED:
        version = _version(name)
        rows.append(_row(name, version or f"missing; pip install {name}", version is not None, True))
    for name, extra in OPTIONAL.items():
        version = _version(name)
        hint = f"not installed; pip install 'fastgen-diffusion[{extra}]'"
        rows.append(_row(name, version or hint, version is not None, False))
    rows.append(_row("cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}", True, False))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            rows.append(_row(f"cuda:{i}", found, True, False))
    else:
        rows.append(_row("cuda", "no device; everything runs on the CPU", False, False))
    if torch.backends.mps.is_available():
        rows.append(_row("mps", "Apple's GPU", True, False))
    rows.append(_row("bfloat16 products", _bfloat16(), True, False))
    rows += kernels()
    for part in ("sprites/index.jsonl", "teacher/model_index.json", "clip/config.json"):
        path = Path(__file__).parent / "emoji" / "assets" / part
        found = str(path) if path.is_file() else f"{path} is missing; reinstall fastgen"
        rows.append(_row(f"emoji {part.split('/')[0]}", found, path.is_file(), False))
    file = lpips.locate("")
    found = str(file) if file.is_file() else f"{file} is missing; `python -m fastgen.lpips` writes it"
    rows.append(_row("LPIPS's weights", found, file.is_file(), False))
    weights: Any = importlib.import_module("fastgen.evaluation.weights")
    hub: Any = importlib.import_module("huggingface_hub.constants")
    rows.append(_row("Hub's cache", _folder(Path(hub.HF_HUB_CACHE)), True, False))
    rows.append(_row("metrics' weights", _folder(weights.home()), True, False))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "FASTGEN_WEIGHTS_DIR"):
        rows.append(_row(name, os.environ.get(name, "not set"), True, False))
    return rows


def kernels() -> list[dict[str, Any]]:
    """Whether each attention kernel works here, tried on a small input."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        _row(
            f"attention {name}", f"does not work: {reason}" if reason else f"works on {device.type}", not reason, False
        )
        for name, reason in attention.available(device).items()
    ]


# What a training needs


def missing(recipe: Recipe, config: str) -> list[dict[str, Any]]:
    """Rows for what a recipe names: pipelines, data, weights, packages, kernels, room for checkpoints.

    config: as it was given, for remedies.
    """
    rows = [of_need(need, config) for need in prefetch.needs(recipe)]
    names = [(f"run.trackers {name}", tracking.PACKAGES[name]) for name in recipe.run.trackers if name != "jsonl"]
    if recipe.data.name == "hf":
        names.append(("data.source hf", "datasets"))
    for key, package in dict(names).items():
        version = _version(package)
        extra = f"'fastgen-diffusion[{OPTIONAL[package]}]'" if package in OPTIONAL else package
        found = f"{package} {version}" if version else f"{package} is not installed; pip install {extra}"
        rows.append(_row(key, found, version is not None, True))
    rows += [of_optimizer(role, optim.name) for role, optim in recipe.optim.items()]
    if recipe.model.attention != "auto":
        name = f"attention {recipe.model.attention}"
        rows += [{**row, "what": "model.attention", "needed": True} for row in kernels() if row["what"] == name]
    return [*rows, *of_disk(recipe)]


def of_need(need: prefetch.Need, config: str) -> dict[str, Any]:
    """A file, folder or Hub id that is named."""
    if need.there:
        return _row(need.key, need.path, True, True)
    if need.hub and need.downloads:
        hub: Any = importlib.import_module("huggingface_hub")
        try:
            return _row(
                need.key, hub.snapshot_download(need.path, repo_type=need.hub, local_files_only=True), True, True
            )
        except Exception:  # of several kinds: it is not in the cache
            pass
    remedy = f"`fastgen prefetch {config}` downloads it" if need.downloads else need.remedy
    return _row(need.key, f"{need.path} is missing; {remedy}", False, True)


def of_optimizer(role: str, name: str) -> dict[str, Any]:
    """Whether an optimizer is there, made once for one number."""
    from . import optimizers

    kind = optimizers.KINDS[name]
    try:
        kind.make([nn.Parameter(torch.zeros(1, 1))], {"lr": 1e-3, **kind.defaults})
    except Exception as error:  # of several libraries
        reason = " ".join((str(error) or type(error).__name__).split())[:120]
        return _row(f"optim.{role}", f"{name} does not work ({reason}); it needs {kind.needs}", False, True)
    return _row(f"optim.{role}", name, True, True)


def of_disk(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Whether the run folder can be written, and has room for the checkpoints and the pipeline.

    A checkpoint holds what learns or is moved, adapters and discriminators too, with what optimizers and averages
    keep; ``run.keep`` stay, the one that is being written and the best.
    """
    from . import estimate

    run, out = recipe.run, Path(recipe.run.out).absolute()
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield _row("run.out", f"{place} cannot be written; set another run.out", False, True)
        return
    free = shutil.disk_usage(place).free
    try:
        each, pipeline = estimate.written(recipe)
    except Exception as error:  # of several libraries
        reason = " ".join((str(error) or type(error).__name__).split())[:120]
        yield _row("disk", f"{_size(free)} free in {place}; what is needed cannot be counted ({reason})", True, False)
        return
    kept = run.keep + 1 + bool(run.keep_best)
    need = kept * each + pipeline
    told = (
        f"{_size(free)} free in {place}, about {_size(need)} needed: {kept} checkpoints of {_size(each)}, a "
        f"pipeline of {_size(pipeline)}"
    )
    remedy = "" if free > need else "; make room, or set run.out or run.keep"
    yield _row("disk", told + remedy, free > need, True)


def _folder(path: Path) -> str:
    """A folder with its size, links within it counted once."""
    if not path.is_dir():
        return f"{path}, empty"
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            if not file.is_symlink():
                size += file.stat().st_size
    return f"{path}, {_size(size)}"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _row(what: str, found: str, ok: bool, needed: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "ok": ok, "needed": needed}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bfloat16() -> str:
    if torch.cuda.is_available():
        return "native" if torch.cuda.is_bf16_supported() else "emulated on this GPU; use fp16"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "AMX" if amx else ("AVX-512" if avx else "emulated on this CPU; fp32 may be faster")
