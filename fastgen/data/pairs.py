"""Pairs of noise and what a teacher made of it, as ``fastgen pairs`` writes them; for methods that train on pairs.

A folder holds ``card.json``, which says how the pairs were made, and ``shard-NNNNN.safetensors``: ``x0`` and ``eps``
[n, ...] and ``path.I``, the states at the card's time number I; the prompts and a digest of it all are its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgen import checkpoint, config
from fastgen.config import option
from fastgen.data import Item, Source
from fastgen.data.prompts import shuffled
from fastgen.family import Family
from fastgen.plain import from_json

CARD = "card.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""What pairs may be stored in."""


@dataclass(frozen=True)
class Config:
    """Options of the source ``pairs``."""

    path: str = option(help="a folder that `fastgen pairs` wrote")
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)
    as_images: bool = option(
        False, "the teacher's x0 serve where a method needs images: no real data, as in LADD (arXiv 2403.12015)"
    )
    made_by: str = option("", "the config that `fastgen pairs` makes them by; said where they are missing")


@dataclass(frozen=True)
class Card:
    """How pairs were made. Two that compare equal stand for the same pairs; ``teacher`` is its ``fingerprint``."""

    family: str
    teacher: str
    latent_shape: tuple[int, ...]
    number: int
    num_steps: int
    guidance_scale: float
    path: tuple[float, ...]
    seed: int
    dtype: Literal["fp32", "fp16"]
    precision: Literal["fp32", "bf16", "fp16"]
    shard_size: int
    prompts: str
    teacher_path: str = field(default="", compare=False)
    data: dict[str, Any] = field(default_factory=dict, compare=False)
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    def shards(self) -> dict[str, range]:
        """The numbers of the pairs of each file."""
        starts = range(0, self.number, self.shard_size)
        return {
            f"shard-{k:05d}.safetensors": range(first, min(first + self.shard_size, self.number))
            for k, first in enumerate(starts)
        }

    def difference(self, other: Card) -> str:
        """The first of the names in which two cards differ, with both values."""
        named = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)
        return next(f"{name} {mine!r}, not {theirs!r}" for name, mine, theirs in named if mine != theirs)


def read_card(folder: Path, remedy: str) -> Card:
    """The card of a folder of pairs. remedy: what to say if there is none. Raises ValueError."""
    path = folder / CARD
    try:
        tree = from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: holds no teacher pairs; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder and make the pairs again") from None
    return config.decode(Card, tree, str(path))


def write_card(folder: Path, card: Card) -> None:
    """Write ``card.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / CARD, json.dumps(config.encode(card), indent=1) + "\n")


def fingerprint(family: Family) -> str:
    """A digest of what decides a teacher's output: weights, kind of prediction and schedule."""
    digest, denoiser = blake2b(digest_size=16), family.denoiser
    at = denoiser.schedule(torch.linspace(denoiser.schedule.t_min, denoiser.schedule.t_max, 11, dtype=torch.float64))
    levels = " ".join(f"{x:.6g}" for x in torch.cat([at.alpha, at.sigma]).tolist())
    digest.update(f"{denoiser.kind} {levels}".encode())
    for name, value in sorted(denoiser.network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def prompts_digest(prompts: Sequence[str]) -> str:
    """A digest of the prompts in their order."""
    return blake2b(json.dumps(list(prompts)).encode(), digest_size=16).hexdigest()


def write_shard(file: Path, tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """Write a shard that appears whole or not at all."""
    stored = {name: value.cpu().contiguous() for name, value in sorted(tensors.items())}
    texts = {"prompts": list(prompts), "digest": _digest(stored, prompts)}
    with checkpoint.atomic_file(file) as partial:
        # one key: the file's bytes follow no order of several
        save_file(stored, partial, {"pairs": json.dumps(texts)})


def open_shard(file: Path, card: Card, rows: int) -> tuple[Any, list[str], str]:
    """An opened shard, its header found as the card has it; its prompts and digest. Raises ValueError naming it."""
    try:
        opened: Any = safe_open(file, framework="pt")
        texts = from_json((opened.metadata() or {})["pairs"])
        prompts, digest = list(texts["prompts"]), str(texts["digest"])
        found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it and give `fastgen pairs` again") from None
    names = ["x0", "eps", *(f"path.{i}" for i in range(len(card.path)))]
    if found != dict.fromkeys(names, (rows, *card.latent_shape)) or len(prompts) != rows:
        raise ValueError(f"{file}: is not as {CARD} says; delete it and give `fastgen pairs` again")
    return opened, prompts, digest


def _digest(tensors: Mapping[str, Tensor], prompts: Sequence[str]) -> str:
    digest = blake2b(json.dumps(list(prompts)).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class Pairs:
    """A folder of pairs, shuffled."""

    def __init__(self, settings: Config) -> None:
        """Open the folder. Raises ValueError if it is missing, unfinished or damaged."""
        self.has_images = settings.as_images
        self._folder, self._seed = Path(settings.path), settings.seed
        remedy = f"`fastgen pairs {settings.made_by or 'CONFIG'} pairs.out={settings.path}` makes "
        self.card = read_card(self._folder, remedy + "them")
        self._shards = list(self.card.shards().items())
        gone = [name for name, _ in self._shards if not (self._folder / name).is_file()]
        if gone:
            raise ValueError(f"{self._folder}: lacks {len(gone)} of {len(self._shards)} shards; {remedy}the rest")
        self._prompts: list[str] = []
        for name, numbers in self._shards:
            self._prompts += open_shard(self._folder / name, self.card, len(numbers))[1]
        self._whole: set[int] = set()
        self._tensors = lru_cache(maxsize=64)(self._open)
        self.candidates = list(dict.fromkeys(self._prompts))

    def concept(self, prompt: str) -> str:
        """The prompt itself."""
        return prompt

    def __len__(self) -> int:
        """The number of pairs."""
        return self.card.number

    def item(self, index: int) -> Item:
        """A prompt; its pair is read by ``pairs``."""
        return Item(self._prompts[shuffled(index, len(self), self._seed)])

    def check(self, family: str, teacher: Family) -> None:
        """Raise ValueError, naming what is wrong, unless this teacher made the pairs."""
        if self.card.family != family:
            raise ValueError(
                f"{self._folder}: pairs of a teacher of family {self.card.family!r}, this one is {family!r}"
            )
        if self.card.latent_shape != tuple(teacher.latent_shape):
            raise ValueError(
                f"{self._folder}: latents of shape {self.card.latent_shape}, this teacher's are {teacher.latent_shape}"
            )
        if self.card.teacher != fingerprint(teacher):
            raise ValueError(
                f"{self._folder}: pairs of another teacher ({self.card.teacher_path}); set model.path to it, or make "
                "pairs with this one by `fastgen pairs`"
            )

    def check_path(self, times: Sequence[float]) -> None:
        """Raise ValueError, naming both, unless the states at these times are kept."""
        if not set(times) <= set(self.card.path):
            wanted, kept = list(times), list(self.card.path)
            raise ValueError(
                f"{self._folder}: this student needs the teacher's states at {wanted}, kept are those at {kept}; make "
                f"pairs with pairs.path={wanted}"
            )

    def check_guidance(self, scale: float | None) -> None:
        """Raise ValueError, naming both, if a method guides the same teacher by another scale than the pairs'."""
        if scale not in (None, self.card.guidance_scale):
            own = f"{self.card.guidance_scale:g}"
            raise ValueError(
                f"{self._folder}: pairs made at guidance scale {own}, while this method guides the same teacher by "
                f"{scale:g}, which pulls the student elsewhere; set method.guidance_scale={own}, or make pairs with "
                f"pairs.guidance_scale={scale:g}"
            )

    def pairs(self, indices: Sequence[int], times: Sequence[float]) -> tuple[Tensor, Tensor, dict[float, Tensor]]:
        """x0, eps and, by time, the states between: [B, ...] each, float32."""
        names = {"x0": "x0", "eps": "eps"} | {t: f"path.{self.card.path.index(t)}" for t in times}
        rows: dict[str | float, list[Tensor]] = {key: [] for key in names}
        for index in indices:
            shard, row = divmod(shuffled(index, len(self), self._seed), self.card.shard_size)
            tensors = self._tensors(shard)
            for key, name in names.items():
                rows[key].append(tensors[name][row])
        stacked = {key: torch.stack(found).float() for key, found in rows.items()}
        return stacked["x0"], stacked["eps"], {t: stacked[t] for t in times}

    def _open(self, shard: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped rather than read, its bytes checked the first time. Raises ValueError."""
        name, numbers = self._shards[shard]
        opened, prompts, digest = open_shard(self._folder / name, self.card, len(numbers))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        if shard not in self._whole:
            if _digest(tensors, prompts) != digest:
                raise ValueError(
                    f"{self._folder / name}: damaged (its digest differs); delete it and give `fastgen pairs` again"
                )
            self._whole.add(shard)
        return tensors


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Pairs(config)
