"""Ten steps of loss of every method on the toy family, kept as JSON.

``python -m tests.golden.record [NAME ...]`` re-records.

A change that is meant to compute nothing new leaves these numbers; one that is not says in its commit why they moved.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastgen.trainers
from fastgen import config
from fastgen.engine import Engine
from fastgen.family import Family
from tests.oracle import Samples, conv_family, optims, train

FOLDER = Path(__file__).parent
STEPS = 10
RTOL, ATOL = 2e-4, 1e-6
"""Between machines: convolutions differ in the last bits, and ten steps of Adam enlarge that a little."""

GAN = {"weight": 0.1, "critic_weight": 0.01, "features": "fake_score", "blocks": ["down", "mid"]}

VARIANTS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "dmd2": {
        "default": ({"student_every": 2}, 1),
        "gan": ({"student_every": 2, "guidance_scale": 1.0, "adversarial": GAN}, 1),
        "few": ({"student_every": 2, "guidance_scale": 3.0}, 4),
        "data": ({"student_every": 2, "rollout": "from_data"}, 2),
    },
}
"""Method -> name -> (options as in YAML, calls of the student). One that is not here runs with its defaults, once."""


def methods() -> dict[str, ModuleType]:
    """Every module of ``fastgen.trainers``."""
    names = sorted(info.name for info in pkgutil.iter_modules(fastgen.trainers.__path__))
    return {name: importlib.import_module(f"fastgen.trainers.{name}") for name in names}


def variants(name: str) -> dict[str, tuple[dict[str, Any], int]]:
    return VARIANTS.get(name, {"default": ({}, 1)})


def make(name: str, options: dict[str, Any], family: Family, num_steps: int) -> Any:
    """The method with these options on this family; its heads start as seed 1 says."""
    module = methods()[name]
    torch.manual_seed(1)
    return module.Method(config.decode(module.Config, options, "variant"), family, num_steps)


def losses(name: str, options: dict[str, Any], num_steps: int) -> list[dict[str, float]]:
    """The logs of each step."""
    method = make(name, options, conv_family(), num_steps)
    engine = Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), batch_size=4, steps=STEPS)
    return train(engine, range(STEPS))


def main() -> None:
    """Write one file a method, of those named as arguments or of all."""
    for name in sys.argv[1:] or methods():
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
