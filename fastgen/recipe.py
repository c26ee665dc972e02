"""A training run as one config: which teacher, which method, which data, for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from . import config, registry
from .config import ConfigError, option
from .health import Health
from .lora import Lora
from .optimizers import Optim
from .plain import shown
from .students import Route

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of dtypes in configs and on the command line."""
SECTIONS = ("model", "method", "data", "run", "optim", "student", "eval", "health")
"""Of a training run's config."""
ASSETS = "assets:"
"""A path that begins so lies in the package: ``assets:emoji/teacher``."""


@dataclass(frozen=True)
class Model:
    """The teacher."""

    path: str = option(help="a pipeline folder, `assets:...`, or a Hub id")
    family: str = option("", "as `fastgen list families` names them; empty: the one of the pipeline's class")
    image_size: tuple[int, int] | None = option(None, "height and width in pixels; null: the pipeline's own", low=1)
    num_frames: int | None = option(None, "of a video; null: the pipeline's own", low=1)
    attention: Literal["auto", "eager", "sdpa", "flex", "xformers", "flash", "sage"] = option(
        "auto", "kernel of the attention layers; flex is fast with compile alone"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "what frozen networks are held in, run.precision or fp32; what learns stays fp32"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    compile: bool = option(False, "torch.compile the networks; slow to start, faster after")
    guidance_scale: float | None = option(
        None, "at which a network that takes the scale as an input teaches; set the method's own to 1", low=1
    )


@dataclass(frozen=True)
class Student:
    """What comes out."""

    steps: int = option(1, "calls of the student when sampling; 1, 2 and 4 are usual", low=1, high=8)
    init: str = option("", "pipeline whose network the student starts from, as the run before it; empty: the teacher")
    # DMD2's one-step SDXL student: 0.4, which is time 399 of 1000
    start: float = option(1.0, "share of the times at which it is called first, on pure noise", above=0, high=1)
    lora: Lora | None = option(None, "train adapters on the frozen network; null: all of its weights")
    share_backbone: bool = option(
        False, "with lora: teacher, student and fake score are one network, adapters switched"
    )
    route: Route | None = option(None, "one of several students that share the prompts; null: it takes all of them")

    def __post_init__(self) -> None:
        """Raise ValueError if adapters are to share a network and there are none."""
        if self.share_backbone and self.lora is None:
            raise ValueError("share_backbone needs adapters; add lora: {rank: 64}, or leave share_backbone out")


@dataclass(frozen=True)
class Run:
    """How long, how and where to."""

    out: str = option(help="run folder")
    steps: int = option(help="training steps; a method's phases say what each does", low=1)
    batch_size: int = option(8, "samples per process and micro-batch", low=1)
    accumulate: int = option(1, "micro-batches per update", low=1)
    seed: int = option(0, "of everything random", low=0)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "what the networks compute in; weights stay fp32")
    ema: float = option(0.0, "decay of the averaged weights, which are then exported; 0 is off", low=0, below=1)
    log_every: int = option(10, "steps between rows of metrics.jsonl", low=1)
    sample_every: int = option(0, "steps between sample grids; 0 is never", low=0)
    sample_prompts: list[str] = option([], "prompts of the sample grid; empty: the data's first")
    sample_guidance: float = option(4.0, "guidance scale of the grid, where a teacher is trained", low=1)
    checkpoint_every: int = option(500, "steps between checkpoints", low=1)
    keep: int = option(2, "checkpoints that stay", low=1)
    keep_best: str = option("", "value of quick evaluations, as fid, whose best checkpoint stays, too; empty: none")
    export: Literal["last", "best"] = option("last", "checkpoint that becomes the pipeline at the end of the run")
    cache_latents: bool = option(False, "keep encoded images in memory")
    save_dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", "dtype of the exported weights")
    trackers: list[Literal["jsonl", "tensorboard", "trackio", "wandb"]] = option(
        [], "besides metrics.jsonl, which is always written"
    )
    shard: Literal["auto", "none", "full", "zero2"] = option(
        "auto", "split networks over processes; zero2: not their weights; auto: as `accelerate launch` is told"
    )
    offload: bool = option(
        False,
        "let optimizer states of roles that do not learn in the phase at hand, and weights that never change, wait in "
        "host memory; slower; nothing on a CPU",
    )
    max_hours: float = option(
        0.0, "hours of one call, which then saves and ends with exit code 75; 0: no limit", low=0
    )

    def __post_init__(self) -> None:
        """Raise ValueError if the best is to be exported and no value says which it is."""
        if self.export == "best" and not self.keep_best:
            raise ValueError("export best needs keep_best to say by which value, such as fid")


@dataclass(frozen=True)
class Chosen:
    """A module chosen by name, and its own options."""

    name: str
    options: Any


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    model: Model
    method: Chosen
    data: Chosen
    run: Run
    optim: dict[str, Optim]
    student: Student = field(default_factory=Student)
    eval: dict[str, Any] = field(default_factory=dict)
    health: Health = field(default_factory=Health)
    where: str = field(default="", compare=False)  # the config it was read from, for messages


def decode(tree: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from a merged YAML tree. Raises ConfigError."""
    for key in tree:
        if key not in SECTIONS:
            raise ConfigError(f"{where}: unknown key {key!r}{config.suggest(str(key), SECTIONS)}")
    for key in ("model", "method", "data", "run", "optim"):
        if key not in tree:
            raise ConfigError(f"{where}: {key} is missing")
    if not isinstance(tree["optim"], Mapping):
        raise ConfigError(f"{where}: optim must map roles to optimizers, got {shown(tree['optim'])}")
    evaluation = tree.get("eval", {})
    if not isinstance(evaluation, Mapping):
        raise ConfigError(f"{where}: eval must be a mapping, got {shown(evaluation)}")
    return Recipe(
        model=config.decode(Model, tree["model"], where, "model"),
        method=choose("method", "name", tree["method"], where, "method"),
        data=choose("source", "source", tree["data"], where, "data"),
        run=config.decode(Run, tree["run"], where, "run"),
        optim={str(k): config.decode(Optim, v, where, f"optim.{k}") for k, v in tree["optim"].items()},
        student=config.decode(Student, tree.get("student", {}), where, "student"),
        eval=dict(evaluation),
        health=config.decode(Health, tree.get("health", {}), where, "health"),
        where=where,
    )


def choose(kind: str, word: str, tree: Any, where: str, key: str) -> Chosen:
    """``{word: NAME, **options}`` -> the options decoded by the module of that name. Raises ConfigError."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get(word), str):
        raise ConfigError(f"{where}: {key} must be a mapping with {word!r}, got {shown(tree)}")
    try:
        module = registry.find(kind, tree[word])
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{where}: {key}.{word}: {error}") from None
    rest = {k: v for k, v in tree.items() if k != word}
    return Chosen(tree[word], config.decode(module.Config, rest, where, key))


def encode(recipe: Recipe) -> dict[str, Any]:
    """The tree that ``decode`` reads back to an equal recipe, every default written out."""
    return {
        "model": config.encode(recipe.model),
        "method": {"name": recipe.method.name, **config.encode(recipe.method.options)},
        "student": config.encode(recipe.student),
        "data": {"source": recipe.data.name, **config.encode(recipe.data.options)},
        "optim": {role: config.encode(optim) for role, optim in recipe.optim.items()},
        "run": config.encode(recipe.run),
        "eval": config.encode(recipe.eval),
        "health": config.encode(recipe.health),
    }


def locate(path: str) -> str:
    """A path as the config gives it -> where it is: ``assets:`` stands for the package's own assets."""
    if not path.startswith(ASSETS):
        return path
    world, _, rest = path[len(ASSETS) :].partition("/")
    return str(Path(__file__).parent / world / "assets" / rest)
