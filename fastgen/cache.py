"""``fastgen cache``: a source's latents and prompt embeddings, made once, so that training needs no encoder.

Images are encoded first, by the VAE alone, then the prompts that they came with, by the text encoders alone, and the
network is never loaded. Shards appear whole or not at all, so that what was cut off goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import config, export, parallel, registry
from . import recipe as recipes
from .config import ConfigError
from .data import Item, Listed, PairSource, Skips, Source, Unreadable, cached
from .data.batches import filled, pixels
from .data.cached import CARD, DTYPES, EXTRA, UNCOND, Card, Shard, distinct, parts, read_card, write_shard
from .data.pictures import digest
from .data.prompts import read as read_prompts
from .data.skipped import SKIPPED
from .denoiser import Cond
from .family import Family
from .progress import progress
from .recipe import Chosen, Model
from .train import family_of

log = logging.getLogger("fastgen")

More = Callable[[tuple[int, int]], Sequence[str]]
"""(height, width) -> further prompts to have."""


@dataclass(frozen=True)
class Recipe:
    """Whose encoders, of what, where to."""

    model: Model
    options: cached.Config
    of: Chosen
    prompts: Sequence[str] = ()


def decode(tree: Mapping[str, Any], where: str) -> Recipe:
    """From the tree of a training run whose data.source is cached and says what it is made of. Raises ConfigError."""
    for key in tree:
        if key not in recipes.SECTIONS:
            raise ConfigError(f"{where}: unknown key {key!r}{config.suggest(str(key), recipes.SECTIONS)}")
    for key in ("model", "data"):
        if key not in tree:
            raise ConfigError(f"{where}: {key} is missing")
    data = recipes.choose("source", "source", tree["data"], where, "data")
    if not isinstance(data.options, cached.Config):
        raise ConfigError(
            f"{where}: data.source is {data.name!r}; write data: {{source: cached, path: FOLDER, of: {{source: "
            f"{data.name}, ...}}}} to cache it"
        )
    if not data.options.of:
        raise ConfigError(f"{where}: data.of is missing; it names the source that the cache is made of")
    of = recipes.choose("source", "source", data.options.of, where, "data.of")
    run = tree.get("run")
    prompts = run.get("sample_prompts", []) if isinstance(run, Mapping) else []
    return Recipe(config.decode(Model, tree["model"], where, "model"), data.options, of, [str(p) for p in prompts])


def make(recipe: Recipe, more: More = lambda size: (), device: torch.device | None = None) -> tuple[int, int]:
    """Make what is not there yet; how many items and prompts that were. more: prompts besides. Raises ValueError."""
    device, options = device or parallel.device(), recipe.options
    family, name = opened(recipe.model, device, ("network", "text", "vae"))
    source: Source = registry.find("source", recipe.of.name).open(recipe.of.options, family.image_size)
    if isinstance(source, PairSource | cached.Cached):
        raise ValueError(f"data.of: source {recipe.of.name} needs no cache; name another")
    extra = [*recipe.prompts, *more(family.image_size)]
    extra += read_prompts(Path(options.prompts)) if options.prompts else []
    folder, card = Path(options.path), card_of(recipe, name, family, source)
    if parallel.rank() == 0:
        claim(folder, card)
    parallel.barrier()
    if isinstance(source, Skips):
        source.skipped.keep(folder / SKIPPED)
        for name in filter(lambda name: (folder / name).is_file(), card.items()):
            for number, what, reason in Shard(folder / name).said["missing"]:
                source.skipped.add(number, Unreadable(what, reason))
    made_items = make_items(recipe, card, source, folder, device)
    parallel.barrier()
    shards = [Shard(folder / name) for name in card.items()]
    missing = {number for shard in shards for number, _, _ in shard.said["missing"]}
    prompts = distinct([prompt for shard in shards for prompt in shard.prompts], missing)
    made_prompts = make_prompts(recipe, prompts, extra, folder, device)
    parallel.barrier()
    return made_items, made_prompts


def opened(model: Model, device: torch.device, without: Sequence[str]) -> tuple[Family, str]:
    """The family of a pipeline without these parts, and its name. Raises ValueError."""
    path = recipes.locate(model.path)
    module = family_of(path, model.family)
    export.check_pipeline(path, *module.ABOUT.pipelines)
    with export.opening(path):
        family: Family = module.load(path, device, None, 1.0, model.image_size, model.num_frames, without)
    return family, registry.name_of(module)


def card_of(recipe: Recipe, name: str, family: Family, source: Source) -> Card:
    """What this cache is. name: the family's."""
    data = cached.described(recipe.of.name, recipe.of.options)
    return Card(
        family=name,
        encoders=cached.encoders_of(recipes.locate(recipe.model.path)),
        latent_shape=tuple(family.latent_shape),
        image_size=family.image_size,
        data=data,
        source=source.digest() if isinstance(source, Listed) else digest(sorted(data.items())),
        images=source.has_images,
        number=len(source),
        seed=source.seed if isinstance(source, Listed) else None,
        dtype=recipe.options.dtype,
        shard_size=recipe.options.shard_size,
        teacher_path=recipe.model.path,
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
    )


def claim(folder: Path, card: Card) -> None:
    """Make the folder this cache's own. Raises ValueError if it holds another, or something else."""
    if (folder / CARD).is_file():
        differs = read_card(folder).difference(card)
        if differs:
            raise ValueError(f"{folder}: stale, holds a cache with {differs}; set another data.path, or delete it")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not a folder of a cache; set another data.path")
    cached.write_card(folder, card)
    for leftover in folder.glob(".*.partial-*"):
        leftover.unlink()


def make_items(recipe: Recipe, card: Card, source: Source, folder: Path, device: torch.device) -> int:
    """Make the missing shards of items; how many items they have."""
    shards = {name: numbers for name, numbers in mine(card.items()).items() if not (folder / name).is_file()}
    count = sum(map(len, shards.values()))
    if not count:
        return 0
    family = opened(recipe.model, device, ("network", "text"))[0] if card.images else None
    with progress(count, 0, "images" if family else "items", "item") as advance:
        for name, numbers in shards.items():
            items, missing = read(source, numbers)
            tensors = {"x0": latents(family, items, card, recipe.options.batch_size)} if family else {}
            prompts = [item.prompt if item else "" for item in items]
            save(folder / name, tensors, prompts, recipe, missing=missing)
            for _ in numbers:
                advance({})
    return count


def read(source: Source, numbers: range) -> tuple[list[Item | None], list[tuple[int, str, str]]]:
    """The items of these numbers, None what cannot be read, and that with names and reasons."""
    if not isinstance(source, Listed):
        return [source.item(number) for number in numbers], []
    items: list[Item | None] = []
    missing = []
    for number in numbers:
        try:
            items.append(source.read(number))
        except Unreadable as error:
            if isinstance(source, Skips):
                source.skipped.add(number, error)
            missing.append((number, error.name, error.reason))
            items.append(None)
    return items, missing


def latents(family: Family, items: Sequence[Item | None], card: Card, batch_size: int) -> Tensor:
    """Of the items, zeros of what could not be read: [n, ...]."""
    x0 = torch.zeros(len(items), *card.latent_shape)
    there = [i for i, item in enumerate(items) if item is not None]
    for first in range(0, len(there), batch_size):
        some = there[first : first + batch_size]
        images = [item.image for i in some if (item := items[i])]
        x0[some] = family.encode(pixels(filled(images, batch_size)))[: len(some)].cpu().float()
    return x0


def make_prompts(
    recipe: Recipe, prompts: Sequence[str], extra: Sequence[str], folder: Path, device: torch.device
) -> int:
    """Make the missing shards of prompts, and the further ones where they are others; how many prompts they have."""
    wanted = {
        name: [prompts[i] for i in rows]
        for name, rows in mine(parts("prompts", len(prompts), recipe.options.shard_size)).items()
    }
    if parallel.rank() == 0:
        known = set(prompts)
        wanted |= {EXTRA: [p for p in dict.fromkeys(extra) if p not in known]}
    missing = {name: some for name, some in wanted.items() if not holds(folder / name, some)}
    unconditional = parallel.rank() == 0 and not (folder / UNCOND).is_file()
    if not missing and not unconditional:
        return 0
    family, _ = opened(recipe.model, device, ("network", "vae"))
    count = sum(map(len, missing.values()))
    with progress(count, 0, "prompts", "prompt") as advance:
        for name, some in missing.items():
            save(folder / name, embeddings(family, some, recipe.options.batch_size), some, recipe)
            for _ in some:
                advance({})
    if unconditional:
        save(folder / UNCOND, family.uncond(), [""], recipe)
    return count


def holds(file: Path, prompts: Sequence[str]) -> bool:
    """Whether a shard of these prompts is there. Raises ValueError if it is damaged."""
    return file.is_file() and Shard(file).prompts == list(prompts)


@torch.no_grad()
def embeddings(family: Family, prompts: Sequence[str], batch_size: int) -> Cond:
    """The conditions of all prompts: [n, ...] each."""
    some = [
        family.encode_prompts(filled(prompts[i : i + batch_size], batch_size))
        for i in range(0, len(prompts), batch_size)
    ]
    return {name: torch.cat([cond[name].cpu() for cond in some])[: len(prompts)] for name in (some[0] if some else {})}


def mine(shards: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this process makes."""
    return dict(list(shards.items())[parallel.rank() :: parallel.size()])


def save(file: Path, tensors: Mapping[str, Tensor], prompts: Sequence[str], recipe: Recipe, **said: Any) -> None:
    """Write a shard. Raises OSError that says what would do."""
    try:
        write_shard(file, tensors, prompts, DTYPES[recipe.options.dtype], **said)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(
            f"{file}: cannot be written ({reason}); the shards before it are whole: make room, then give the same "
            "command to go on"
        ) from error
