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
    "consistency": {
        "default": ({"guidance_scale": 2.0}, 1),
        "ct": ({"variant": "ct", "curriculum_steps": 10, "distance": "l2"}, 2),
        "ict": ({"variant": "ict", "curriculum_steps": 10, "solver": "euler", "guidance_scale": 2.0}, 4),
        "ect": ({"variant": "ect", "curriculum_steps": 10}, 2),
        "gan": ({"solver": "euler", "adversarial": {**GAN, "features": "teacher"}}, 1),
    },
    "adversarial": {
        "default": ({}, 1),
        "r1": ({"student_every": 2, "rollout": "simulate", "adversarial": {"loss": "non_saturating", "r1": 0.1}}, 2),
        "add": (
            {
                "distillation": 2.5,
                "guidance_scale": 2.0,
                "adversarial": {"blocks": ["mid"], "levels": "uniform", "r1": 0.1, "r1_kind": "difference"},
            },
            4,
        ),
    },
    "dmd2": {
        "default": ({"student_every": 2}, 1),
        "gan": ({"student_every": 2, "guidance_scale": 1.0, "adversarial": GAN}, 1),
        "few": ({"student_every": 2, "guidance_scale": 3.0}, 4),
        "data": ({"student_every": 2, "rollout": "data"}, 2),
        "noise": ({"student_every": 2, "rollout": "noise", "adversarial": {**GAN, "features": "teacher"}}, 1),
        "reuse": ({"student_every": 2, "reuse": True, "adversarial": GAN}, 4),
    },
    "decoupled_dmd": {
        "default": ({"student_every": 2}, 1),
        "few": ({"student_every": 2, "guidance_scale": 3.0, "ca": {"weight": 0.5, "t_low": 0.1}}, 4),
        "gan": ({"student_every": 2, "schedules": "constrained", "normaliser": "apart", "adversarial": GAN}, 2),
        "shared": ({"student_every": 2, "guidance_scale": 3.0, "schedules": "shared"}, 4),
    },
    "phased_dmd": {
        "default": ({"student_every": 2}, 2),
        "few": ({"student_every": 2, "guidance_scale": 3.0, "weighting": "kl"}, 4),
        "one": ({"student_every": 2, "guidance_scale": 1.0, "phases": 1}, 1),
        "each": ({"student_every": 2, "guidance_scale": 2.0, "phases": 3}, 3),
    },
    "sid": {
        "default": ({}, 1),
        "few": ({"correction": 1.2, "guidance_scale": 1.0, "t_low": 0.0, "student_every": 2}, 4),
        "zero": ({"guidance_scale": 1.0, "fake_guidance_scale": 0.0, "adversarial": GAN}, 2),
        "anti": ({"guidance_scale": 1.0, "fake_guidance_scale": -1.0, "critic_guidance_scale": 1.0}, 1),
    },
    "vsd": {
        "default": ({"lora": {"rank": 4, "alpha": 6}}, 1),
        "range": ({"guidance_range": [0.5, 4.0], "lora": {"rank": 2}}, 2),
        "copy": ({"fake_score": "copy", "guidance_scale": 1.0}, 1),
    },
    "kd": {
        "default": ({}, 1),
        "path": ({}, 4),
        "x0": ({"target": "x0", "distance": "pseudo_huber"}, 2),
    },
    "agd": {
        "default": ({"states": 3, "lora": {"rank": 4}}, 1),
        "fixed": ({"states": 4, "guidance": {"low": 2.5, "high": 2.5, "embed": False}, "lora": {"rank": 2}}, 1),
    },
    "guidance": {
        "default": ({}, 1),
        "embedded": ({"guidance": {"low": 1.0, "high": 8.0, "default": 2.5}}, 1),
        "fixed": ({"guidance": {"low": 2.5, "high": 2.5, "embed": False}}, 1),
    },
    "lcm": {
        "default": ({}, 1),
        "few": ({"guidance": {"low": 1.0, "high": 8.0, "default": 2.5}, "solver_steps": 20}, 4),
        "baked": ({"guidance": {"low": 2.0, "high": 4.0, "embed": False}, "target_decay": 0.0, "metric": "l2"}, 2),
    },
    "pcm": {
        "default": ({}, 1),
        "few": ({"guidance": {"low": 1.0, "high": 8.0, "default": 2.5, "embed": True}, "metric": "l2"}, 4),
        # not hinge: within its margin a head's last bias stays, as real and fake pull it apart alike
        "gan": ({"adversarial": {"weight": 0.1, "blocks": ["down", "mid"], "loss": "non_saturating"}}, 2),
    },
    "scm": {
        "default": ({"warmup": 4}, 1),
        "average": ({"warmup": 2, "target_decay": 0.8}, 2),
        # not by finite differences: they enlarge rounding, and so the difference between batch sizes, by 1 / step
        "data": ({"velocity": "data", "guidance": {"low": 1, "high": 1}, "warmup": 0}, 2),
        "gan": (
            {
                "guidance": {"low": 4.0, "high": 8.0, "embed": True},
                "warmup": 0,
                "sigma_data": 0.5,
                "adversarial": {"weight": 0.5, "blocks": ["down", "mid"]},
            },
            4,
        ),
    },
    "meanflow": {
        "default": ({}, 1),
        "few": ({"guidance_scale": 1.0, "warmup": 4, "power": 0.75}, 4),
        "average": ({"guidance_scale": 2.0, "target_decay": 0.8}, 1),
        "data": ({"velocity": "data", "guidance_scale": 1.0, "derivative": "finite_differences", "span": 0.05}, 2),
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
    # a difference of two calls enlarges their roundings, and AdamW makes whole steps of gradients of which little else
    # is left: with a larger eps it does not, and other processors give the same losses
    kinds = options.get("derivative"), options.get("adversarial", {}).get("r1_kind")
    eps = 1e-3 if {"finite_differences", "difference"} & set(kinds) else 1e-8
    engine = Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3, eps=eps), batch_size=4, steps=STEPS)
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
