"""``fastgen prefetch``: everything from outside that a recipe needs, made local before a run.

What a recipe names is a path, which must be there, or a Hub id, which is downloaded into the Hub's cache, where a run
finds it also with HF_HUB_OFFLINE=1. Weights that no config names (LPIPS, InceptionV3) must be where a run looks.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from . import lpips
from . import recipe as recipes
from .recipe import Chosen, Recipe

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that say, set to 1, that nothing is to be downloaded."""


@dataclass(frozen=True)
class Need:
    """Something from outside.

    Attributes:
        key: where the config says so.
        path: a file or a folder, or a Hub id where ``hub`` is not empty.
        remedy: what would do if it is not there.
        hub: "model" or "dataset", if it may come from the Hub.
        weights: the name of an evaluation's weights, which have a source of their own.
    """

    key: str
    path: str
    remedy: str
    hub: str = ""
    weights: str = ""

    @property
    def there(self) -> bool:
        """Whether it lies on this machine, the Hub's cache apart."""
        return Path(self.path).exists()

    @property
    def downloads(self) -> bool:
        """Whether it can only come from elsewhere."""
        if self.weights:
            return not self.there
        beside = Path(self.path).parent.is_dir()
        return bool(self.hub and HUB_ID.fullmatch(self.path)) and not self.there and not beside


def needs(recipe: Recipe) -> list[Need]:
    """All that a recipe names, in the order of its sections; what ships with the package is left out."""
    found = [Need("model.path", recipe.model.path, "put the teacher's pipeline there, or name a Hub id", "model")]
    if recipe.student.init:
        remedy = "run the config that makes it first, or name a Hub id"
        found.append(Need("student.init", recipe.student.init, remedy, "model"))
    found += of_source("data", recipe.data)
    options = vars(recipe.method.options)
    if options.get("distance") == "lpips":
        file = str(lpips.locate(options["lpips"].weights))
        found.append(Need("method.lpips", file, f"`python -m fastgen.lpips {file}` writes it"))
    found += of_eval(recipe.eval, recipe.where)
    kept = {need.path: need for need in reversed(found) if not need.path.startswith(recipes.ASSETS)}
    return list(reversed(kept.values()))


def of_source(key: str, chosen: Chosen) -> Iterator[Need]:
    """What a data source reads."""
    options = chosen.options
    path = vars(options).get("path", "") if is_dataclass(options) else ""
    if not path:
        return
    remedy = next(f.metadata.get("help", "") for f in fields(options) if f.name == "path")
    made_by = vars(options).get("made_by", "")
    if made_by:
        remedy = f"`fastgen pairs {made_by} pairs.out={path}` makes them"
    first = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", path)  # of shards that are given by a range
    yield Need(f"{key}.path", first, remedy, "dataset" if chosen.name == "hf" else "")


def of_eval(tree: Mapping[str, Any], where: str) -> Iterator[Need]:
    """What an ``eval:`` section asks for, if there is one."""
    if not tree:
        return
    judge: Any = importlib.import_module("fastgen.evaluation.judge")
    weights: Any = importlib.import_module("fastgen.evaluation.weights")
    decoded = judge.settings(tree, where)
    for name in judge.wanted(decoded):
        key, entry, given = f"eval.weights.{name}", weights.known(name), decoded.weights.get(name)
        remedy = f"it comes from {entry.source}"
        if given:
            yield Need(key, given, remedy, "model" if entry.is_folder else "")
            continue
        try:
            path = weights.find(name)
        except ValueError:
            path = weights.home() / entry.files[0]
        yield Need(key, str(path), remedy, weights=name)
    for key, given in (("eval.reference", decoded.reference), ("eval.geneval", decoded.geneval)):
        if given:
            yield from of_source(key, recipes.choose("source", "source", given, where, key))


def fetch(need: Need) -> str:
    """Where something is, after it was downloaded if it has to be. Raises ValueError if it cannot be had."""
    if not need.downloads:
        if need.there:
            return need.path
        raise ValueError(f"{need.path}: {need.key} is not there; {need.remedy}")
    if need.weights:
        weights: Any = importlib.import_module("fastgen.evaluation.weights")
        return str(weights.fetch(need.weights))
    hub: Any = importlib.import_module("huggingface_hub")
    offline = any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in OFFLINE)
    try:
        found: str = hub.snapshot_download(
            need.path,
            repo_type=need.hub,
            local_files_only=offline,
            ignore_patterns=IGNORED if need.hub == "model" else None,
        )
    except Exception as error:  # of several libraries, for a missing repository, a licence, no network, a full disk
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        told = (
            "HF_HUB_OFFLINE is set and it is not in the Hub's cache" if offline else f"cannot be downloaded ({reason})"
        )
        raise ValueError(
            f"{need.path}: {need.key} {told}; where there is a network, `hf download {need.path} --local-dir FOLDER` "
            f"makes a folder: copy it here and set {need.key}=FOLDER"
        ) from error
    return found


IGNORED = ("*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx*", "*.gguf", "*.xml", "*.png", "*.jpg", "*.mp4")
"""Files of a model's repository that a pipeline does not read: pickled weights, other frameworks', pictures."""
