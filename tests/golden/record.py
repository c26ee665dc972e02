"""Ten steps of loss of every method on the toy family, kept as JSON: ``python -m tests.golden.record`` re-records.

A change that is meant to compute nothing new leaves these numbers; one that is not says in its commit why they moved.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastgen.trainers
from fastgen.engine import Engine
from tests.oracle import Samples, conv_family, optims, train

FOLDER = Path(__file__).parent
STEPS = 10
RTOL, ATOL = 2e-4, 1e-6
"""Between machines: convolutions differ in the last bits, and ten steps of Adam enlarge that a little."""

VARIANTS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "dmd2": {
        "default": ({"student_every": 2}, 1),
        "gan": ({"student_every": 2, "gan_weight": 0.1, "gan_blocks": ["down", "mid"], "guidance_scale": 1.0}, 1),
        "few": ({"student_every": 2, "guidance_scale": 3.0}, 4),
        "data": ({"student_every": 2, "rollout": "from_data"}, 2),
    },
}
"""Method -> name -> (options, calls of the student). A method that is not here runs with its defaults, once."""


def methods() -> dict[str, ModuleType]:
    """Every module of ``fastgen.trainers``."""
    names = sorted(info.name for info in pkgutil.iter_modules(fastgen.trainers.__path__))
    return {name: importlib.import_module(f"fastgen.trainers.{name}") for name in names}


def variants(name: str) -> dict[str, tuple[dict[str, Any], int]]:
    return VARIANTS.get(name, {"default": ({}, 1)})


def losses(name: str, options: dict[str, Any], num_steps: int) -> list[dict[str, float]]:
    """The logs of each step."""
    module = methods()[name]
    family = conv_family()
    torch.manual_seed(1)
    method = module.Method(module.Config(**options), family, num_steps)
    engine = Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), batch_size=4, steps=STEPS)
    return train(engine, range(STEPS))


def main() -> None:
    """Write one file a method."""
    for name in methods():
        record = {
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            },
            "tolerance": {"rtol": RTOL, "atol": ATOL},
            "losses": {key: losses(name, *variant) for key, variant in variants(name).items()},
        }
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
