"""``fastgen pairs CONFIG``: what a teacher makes of given noise, written once, for methods that train on such pairs.

The teacher is guided and runs DDIM on its trailing grid. Pair i belongs to prompt i of the data and to noise keyed by
the seed and i, whatever the batch size; shards appear whole or not at all, so that what was cut off goes on, and a
larger ``number`` adds to what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import config, parallel, registry
from . import recipe as recipes
from .config import ConfigError, option
from .data import Source
from .data.pairs import CARD, DTYPES, Card, fingerprint, open_shard, prompts_digest, read_card, write_card, write_shard
from .denoiser import Cond, Denoise, guided
from .family import Family
from .progress import progress
from .recipe import Chosen, Model
from .rng import Noise
from .sampling import ddim, ddim_times, sample
from .schedule import Schedule
from .train import at_own_scale, check_guided_once, load_teacher

log = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Options:
    """The section ``pairs``."""

    out: str = option(help="folder of the pairs")
    # raised later, it adds to what is there
    number: int = option(help="pairs; past the end of the data its prompts come again, with other noise", low=1)
    num_steps: int = option(50, "DDIM steps of the teacher", low=1)
    guidance_scale: float = option(7.5, "of the teacher; 1.0 is off", low=1)
    path: list[float] = option([], "falling times at which the teacher's states are kept too, for students of several")
    seed: int = option(0, "of the noise", low=0)
    dtype: Literal["fp32", "fp16"] = option("fp32", "of what is stored; noise is rounded before the teacher sees it")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "what the teacher computes in")
    batch_size: int = option(32, "samples at a time; changes nothing else", low=1)
    shard_size: int = option(512, "pairs in a file: what a run that is cut off loses at most", low=1)


@dataclass(frozen=True)
class Recipe:
    """Which teacher, whose prompts, how many pairs."""

    model: Model
    data: Chosen
    pairs: Options


def decode(tree: Mapping[str, Any], where: str) -> Recipe:
    """From a merged YAML tree; the other sections of a training recipe may stand beside. Raises ConfigError."""
    needed = ("model", "data", "pairs")
    known = dict.fromkeys((*needed, *recipes.SECTIONS))
    for key in tree:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{config.suggest(str(key), known)}")
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{where}: {key} is missing")
    data = recipes.choose("source", "source", tree["data"], where, "data")
    if data.name == "pairs":
        raise ConfigError(f"{where}: data.source pairs is what is made here; name the source of its prompts")
    return Recipe(
        model=config.decode(Model, tree["model"], where, "model"),
        data=data,
        pairs=config.decode(Options, tree["pairs"], where, "pairs"),
    )


@torch.no_grad()
def solve(
    teacher: Denoise, schedule: Schedule, eps: Tensor, cond: Cond, times: Sequence[float], path: Sequence[float] = ()
) -> tuple[Tensor, list[Tensor]]:
    """DDIM from noise eps: [B, ...] at times[0] -> its x0 and its states at ``path``, some of the later times."""
    stops = [0, *(times.index(t) for t in path)]
    x_t, states = eps, []
    for first, last in pairwise(stops):
        x_t = sample(teacher, schedule, x_t, times[first:last], cond, ddim, end=times[last])
        states.append(x_t)
    return sample(teacher, schedule, x_t, times[stops[-1] :], cond, ddim), states


def check_path(schedule: Schedule, num_steps: int, path: Sequence[float]) -> None:
    """Raise ValueError unless the teacher's grid meets these times, in this order, after its start."""
    times = ddim_times(schedule, num_steps)
    if any(a <= b for a, b in pairwise(path)):
        raise ValueError(f"pairs.path must fall, got {list(path)}")
    missed = [t for t in path if t not in times[1:]]
    if missed:
        fits = next((n for n in range(num_steps, 1001) if set(path) <= set(ddim_times(schedule, n)[1:])), None)
        remedy = f"pairs.num_steps={fits} meets all" if fits else "no number of steps meets all: change pairs.path"
        raise ValueError(f"pairs.path: {num_steps} DDIM steps do not meet {missed}; {remedy}")


def make(recipe: Recipe, device: torch.device | None = None) -> int:
    """Make the pairs that are not there yet, and return how many that were. Raises ValueError."""
    device, chosen = device or parallel.device(), recipe.pairs
    check_guided_once(recipe.model, config.encode(chosen), "pairs")
    family, module = load_teacher(recipe.model, chosen.precision, device)
    check_guided_once(at_own_scale(recipe.model, family), config.encode(chosen), "pairs")
    check_path(family.denoiser.schedule, chosen.num_steps, chosen.path)
    source: Source = registry.find("source", recipe.data.name).open(recipe.data.options, family.image_size)
    prompts = [source.item(i).prompt for i in range(chosen.number)]
    folder, card = Path(chosen.out), card_of(recipe, registry.name_of(module), family, prompts)
    if parallel.rank() == 0:
        claim(folder, card, prompts)
    parallel.barrier()
    shards = list(card.shards().items())[parallel.rank() :: parallel.size()]
    for name, numbers in shards:
        if (folder / name).is_file():
            open_shard(folder / name, card, len(numbers))
    missing = [(name, numbers) for name, numbers in shards if not (folder / name).is_file()]
    count = sum(len(numbers) for _, numbers in missing)
    if missing:
        log.info("%s: %d pairs to make, %d steps at scale %g", folder, count, chosen.num_steps, chosen.guidance_scale)
        with progress(count, 0, "teacher", "pair") as advance:
            for name, numbers in missing:
                tensors = shard(recipe, family, prompts, numbers, device, advance)
                if not all(bool(value.isfinite().all()) for value in tensors.values()):
                    raise ValueError(
                        f"{folder / name}: the teacher's output is not finite in {chosen.precision}, stored as "
                        f"{chosen.dtype}; set pairs.precision and pairs.dtype to fp32"
                    )
                save(folder / name, tensors, [prompts[i] for i in numbers])
    parallel.barrier()
    return count


def card_of(recipe: Recipe, name: str, family: Family, prompts: Sequence[str]) -> Card:
    """What these pairs are. name: the family's."""
    chosen = recipe.pairs
    return Card(
        family=name,
        teacher=fingerprint(family),
        latent_shape=tuple(family.latent_shape),
        number=chosen.number,
        num_steps=chosen.num_steps,
        guidance_scale=chosen.guidance_scale,
        path=tuple(chosen.path),
        seed=chosen.seed,
        dtype=chosen.dtype,
        precision=chosen.precision,
        shard_size=chosen.shard_size,
        prompts=prompts_digest(prompts),
        teacher_path=recipe.model.path,
        data={"source": recipe.data.name, **config.encode(recipe.data.options)},
        versions={name: version(name) for name in ("torch", "diffusers")},
    )


def claim(folder: Path, card: Card, prompts: Sequence[str]) -> None:
    """Make the folder these pairs' own. Raises ValueError if it holds others, more of them, or something else.

    Fewer of the same are added to: a last shard that is short goes, to come again whole, and the rest stays as it is.
    """
    if (folder / CARD).is_file():
        there = read_card(folder, "")
        grows, first = there.number < card.number, prompts_digest(prompts[: there.number])
        wanted = replace(card, number=there.number, prompts=first) if grows else card
        if there != wanted:
            raise ValueError(
                f"{folder}: holds other pairs ({there.difference(wanted)}); set another pairs.out, or delete it"
            )
        if grows:
            last, numbers = list(there.shards().items())[-1]
            if len(numbers) < there.shard_size:  # before the card, so that no card ever promises it
                (folder / last).unlink(missing_ok=True)
            write_card(folder, card)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not a folder of pairs; set another pairs.out")
    else:
        write_card(folder, card)
    for leftover in folder.glob(".*.partial-*"):
        leftover.unlink()


def shard(
    recipe: Recipe, family: Family, prompts: Sequence[str], numbers: range, device: torch.device, advance: Any
) -> dict[str, Tensor]:
    """The tensors of the pairs of these numbers, in the dtype to be stored."""
    chosen, dtype = recipe.pairs, DTYPES[recipe.pairs.dtype]
    schedule, parts = family.denoiser.schedule, []
    teacher = guided(family.denoiser, family.uncond(), chosen.guidance_scale)
    times = ddim_times(schedule, chosen.num_steps)
    for first in range(numbers.start, numbers.stop, chosen.batch_size):
        some = range(first, min(first + chosen.batch_size, numbers.stop))
        eps = Noise(some, chosen.seed, 0, "pairs", device).normal(family.latent_shape).to(dtype)
        cond = family.encode_prompts([prompts[i] for i in some])
        x0, states = solve(teacher, schedule, eps.float(), cond, times, chosen.path)
        parts.append({"x0": x0, "eps": eps} | {f"path.{i}": x_t for i, x_t in enumerate(states)})
        for _ in some:
            advance({})
    return {name: torch.cat([part[name].to(dtype).cpu() for part in parts]) for name in parts[0]}


def save(file: Path, tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """Write a shard. Raises OSError that says what would do."""
    try:
        write_shard(file, tensors, prompts)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(
            f"{file}: cannot be written ({reason}); the shards before it are whole: make room, then give the same "
            "command to go on"
        ) from error
