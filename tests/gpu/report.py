"""What was measured on a GPU, in one JSON file that several processes write to in turn.

FASTGEN_GPU_REPORT names the file; without it nothing is kept. Each figure is written as it comes, so that what was
measured before a crash is there after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastgen.evaluation import runner

ROOT = Path(__file__).parents[2]
VARIABLE = "FASTGEN_GPU_REPORT"
DEFAULT = ROOT / "docs" / "gpu.json"
PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy"),
    *("xformers", "flash-attn", "sageattention", "bitsandbytes", "torchao"),
)


def target() -> Path | None:
    """The file, if one is wanted."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def about() -> dict[str, Any]:
    """The machine, the versions, and the commit if git knows it."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": runner.commit(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    """The tree in the file, to be changed; no other process has it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(tempfile.gettempdir(), f"fastgen-{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        yield tree
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(tree, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
        partial.replace(path)


def note(section: str, key: str, value: Any) -> None:
    """Keep a figure; of the same key the last."""
    if path := target():
        with changed(path) as tree:
            tree.setdefault("figures", {}).setdefault(section, {})[key] = rounded(value)


def outcome(test: str, found: dict[str, Any]) -> None:
    """Keep how a test ended."""
    if path := target():
        with changed(path) as tree:
            tree.setdefault("tests", {})[test] = found


def rounded(value: Any) -> Any:
    """With five digits."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return str(value)
