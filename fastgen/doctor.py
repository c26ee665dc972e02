"""What this machine has that fastgen needs or can use."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import lpips

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "PyYAML")
OPTIONAL = {
    "torchmetrics": "eval",
    "clean-fid": "eval",
    "torchvision": "eval",
    "xformers": "xformers",
    "wandb": "wandb",
    "bitsandbytes": "8bit",
}


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
    rows.append(_row("bfloat16 products", _bfloat16(), True, False))
    for part in ("sprites/index.jsonl", "teacher/model_index.json", "clip/config.json"):
        path = Path(__file__).parent / "emoji" / "assets" / part
        found = str(path) if path.is_file() else f"{path} is missing; reinstall fastgen"
        rows.append(_row(f"emoji {part.split('/')[0]}", found, path.is_file(), False))
    file = lpips.locate("")
    found = str(file) if file.is_file() else f"{file} is missing; `python -m fastgen.lpips` writes it"
    rows.append(_row("LPIPS's weights", found, file.is_file(), False))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        rows.append(_row(name, os.environ.get(name, "not set"), True, False))
    return rows


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
