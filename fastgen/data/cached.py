"""What `fastgen cache` made of another source: latents and prompt embeddings, so that no encoder is in memory.

A folder holds ``card.json``, which says what made it, and shards in safetensors. ``items-NNNNN`` has the latents
``x0`` [n, ...] of items by number, and their prompts; ``prompts-NNNNN`` has each distinct prompt's condition, one
tensor a name; ``extra`` has those of further prompts, of sample grids and evaluations, and ``uncond`` what guidance
subtracts. What a shard says besides, a digest of each row too, is its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
from fastgen.data.pictures import Captions, turn
from fastgen.denoiser import Cond
from fastgen.family import Family
from fastgen.plain import from_json
from fastgen.transfer import to_device

CARD = "card.json"
EXTRA, UNCOND = "extra.safetensors", "uncond.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What latents and embeddings may be stored in."""
REMEDY = "`fastgen cache CONFIG` goes on"
_CHUNK = 1 << 24
# what says only who saved a part, and how a tokenizer was last called, which it keeps when it is saved
_OF_SAVING = {"transformers_version", "name_or_path", "is_local", "local_files_only", "truncation", "padding"}
_OF_SAVING |= {"truncation_strategy", "max_length", "stride", "pad_token_type_id", "pad_to_multiple_of"}
_OF_SAVING |= {"processor_class", "tokenizer_file", "backend"}
_DEFAULTS = {"truncation_side": "right", "padding_side": "right"}  # said or not


@dataclass(frozen=True)
class Config:
    """Options of the source ``cached``."""

    path: str = option(help="a folder that `fastgen cache` writes")
    of: dict[str, Any] = option(
        {}, "the source that it is made of, as data: would have it; training only checks that it was"
    )
    decoder: bool = option(
        False, "keep the VAE in memory, for sample grids, quick evaluations and losses on pixels; else there are none"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "of what is stored; read as float32")
    prompts: str = option("", "file of further prompts to have, as of source prompts; those of grids are anyway")
    seed: int | None = option(None, "of the order; null: that of what it is made of", low=0)
    batch_size: int = option(
        8, "images, or prompts, encoded at a time; as run.batch_size, training on it is the same to the bit", low=1
    )
    shard_size: int = option(256, "rows in a file: what a run that is cut off loses at most", low=1)


@dataclass(frozen=True)
class Card:
    """What made a cache. Two that compare equal stand for the same.

    Attributes:
        encoders: part of the pipeline -> digest of its files: text encoders, tokenizers, VAE.
        source: digest of what the source lists.
        seed: of its order; None: it goes round in one.
    """

    family: str
    encoders: dict[str, str]
    latent_shape: tuple[int, ...]
    image_size: tuple[int, int]
    data: dict[str, Any]
    source: str
    images: bool
    number: int
    seed: int | None
    dtype: Literal["fp32", "bf16", "fp16"]
    shard_size: int
    teacher_path: str = field(default="", compare=False)
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    def difference(self, other: Card) -> str:
        """The first of the names in which two cards differ, with both values."""
        for name in (f.name for f in fields(self) if f.compare):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict) and mine != theirs:
                key = next(k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k))
                return f"{name}.{key} {mine.get(key)!r}, not {theirs.get(key)!r}"
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        return ""

    def items(self) -> dict[str, range]:
        """The numbers of the items of each file."""
        return parts("items", self.number, self.shard_size)


def described(name: str, options: Any) -> dict[str, Any]:
    """A source of this name and its own options as a card has it."""
    return {"source": name, **config.encode(options)}


def parts(kind: str, number: int, size: int) -> dict[str, range]:
    """File -> its rows, of so many in files of a size."""
    starts = range(0, number, size)
    return {f"{kind}-{k:05d}.safetensors": range(first, min(first + size, number)) for k, first in enumerate(starts)}


def read_card(folder: Path) -> Card:
    """The card of a cache. Raises ValueError."""
    path = folder / CARD
    try:
        tree = from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: holds no cache; `fastgen cache CONFIG` makes it, where data.of names its source"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder and make the cache again") from None
    return config.decode(Card, tree, str(path))


def write_card(folder: Path, card: Card) -> None:
    """Write ``card.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / CARD, json.dumps(config.encode(card), indent=1) + "\n")


def kind_of(name: str) -> Literal["text", "vae", "network"]:
    """What sort of part a pipeline's component of this name is; "network" is all that has to do with no encoder."""
    if name.startswith(("text_encoder", "tokenizer")):
        return "text"
    return "vae" if "vae" in name else "network"


def encoders_of(path: str) -> dict[str, str]:
    """Of a pipeline's folder or Hub id: part -> digest of the files of each text encoder, tokenizer and VAE.

    What only says who saved them, or how they were last called, is left out. Nothing is loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        from diffusers import DiffusionPipeline

        folder = Path(DiffusionPipeline.download(path))
    index = from_json((folder / "model_index.json").read_text(encoding="utf-8"))
    settings = {k: v for k, v in index.items() if not isinstance(v, list) and not k.startswith("_")}
    found = {"model_index": blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()}
    for name, value in sorted(index.items()):
        if isinstance(value, list) and value[0] is not None and kind_of(name) != "network":
            digest = blake2b(digest_size=16)
            for file in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
                digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
                _hash(file, digest)
            found[name] = digest.hexdigest()
    return found


def _hash(file: Path, digest: Any) -> None:
    if file.suffix == ".json":
        tree = from_json(file.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            kept = {k: v for k, v in tree.items() if not k.startswith("_") and k not in _OF_SAVING}
            tree = {k: v for k, v in kept.items() if _DEFAULTS.get(k) != v}
        digest.update(json.dumps(tree, sort_keys=True).encode())
        return
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)


def write_shard(
    file: Path, tensors: Mapping[str, Tensor], prompts: Sequence[str], dtype: torch.dtype, **said: Any
) -> None:
    """Write rows, [n, ...] each, with their prompts, whole or not at all. dtype: what floats are stored in.

    Raises ValueError if they are not finite in it.
    """
    stored = {}
    for name, value in sorted(tensors.items()):
        made = value.detach().to(dtype) if value.is_floating_point() else value
        if made.is_floating_point() and not made.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {name} is not finite as {kind}; set data.dtype=fp32, and another data.path")
        stored[name] = made.cpu().contiguous()
    told = {
        "prompts": list(prompts),
        "digests": [_digest({name: value[i] for name, value in stored.items()}) for i in range(len(prompts))],
        "dtypes": {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()},
        **said,
    }
    with checkpoint.atomic_file(file) as partial:
        save_file(stored, partial, {"cache": json.dumps(told)})  # one key: the bytes follow no order of several


def _digest(row: Mapping[str, Tensor]) -> str:
    digest = blake2b(digest_size=8)
    for name, value in sorted(row.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Shard:
    """A shard, opened.

    Attributes:
        prompts: of its rows.
        said: what else was written with it.
    """

    def __init__(self, file: Path) -> None:
        """Read its header. Raises ValueError if it is missing or damaged."""
        if not file.is_file():
            raise ValueError(f"{file.parent}: lacks {file.name}, the cache is not finished; {REMEDY}")
        self._file = file
        try:
            self._opened: Any = safe_open(file, framework="pt")
            self.said: dict[str, Any] = from_json((self._opened.metadata() or {})["cache"])
            self.prompts = [str(p) for p in self.said["prompts"]]
            self._digests, self._dtypes = list(self.said["digests"]), dict(self.said["dtypes"])
            lengths = {self._opened.get_slice(name).get_shape()[0] for name in self._opened.keys()}
            if not lengths <= {len(self.prompts)} or len(self._digests) != len(self.prompts):
                raise ValueError("its rows are not as many as its prompts")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete it, and {REMEDY}") from None

    def row(self, number: int) -> dict[str, Tensor]:
        """By name, without the batch dimension, in the dtypes that they had. Raises ValueError if it is damaged."""
        found = {n: self._opened.get_slice(n)[number : number + 1][0] for n in self._opened.keys()}
        if _digest(found) != self._digests[number]:
            raise ValueError(f"{self._file}: damaged (the digest of row {number} differs); delete it, and {REMEDY}")
        return {n: value.to(getattr(torch, self._dtypes[n])) for n, value in found.items()}


class Cached:
    """A cache: prompts, latents and conditions by number, in the order of what it was made of."""

    def __init__(self, settings: Config) -> None:
        """Open the folder. Raises ValueError if it is missing, unfinished or damaged, or not as the options say."""
        self.settings, self._folder = settings, Path(settings.path)
        self.card = read_card(self._folder)
        self.has_images = self.card.images
        seed = self.card.seed if settings.seed is None else settings.seed
        self._seed, self._prompts, self._missing = seed, list[str](), set[int]()
        for name in self.card.items():
            shard = Shard(self._folder / name)
            self._prompts += shard.prompts
            self._missing |= {number for number, _, _ in shard.said["missing"]}
        self._place = {prompt: i for i, prompt in enumerate(distinct(self._prompts, self._missing))}
        self._files = list(parts("prompts", len(self._place), self.card.shard_size))
        for name in [*self._files, UNCOND]:
            if not (self._folder / name).is_file():
                raise ValueError(f"{self._folder}: lacks {name}, the cache is not finished; {REMEDY}")
        self._extra = {p: i for i, p in enumerate(Shard(self._folder / EXTRA).prompts)}
        self._shard = lru_cache(maxsize=64)(lambda name: Shard(self._folder / name))
        self.candidates = Captions(lambda: list(self._place))

    def concept(self, prompt: str) -> str:
        """The prompt itself."""
        return prompt

    def __len__(self) -> int:
        """The number of items, with those that could not be read."""
        return self.card.number

    def item(self, index: int) -> Item:
        """A prompt; its latents are read by ``latents``."""
        return Item(self._prompts[self._number(index)])

    def latents(self, indices: Sequence[int]) -> Tensor:
        """x0 of these items: [B, ...], float32."""
        rows = [divmod(self._number(i), self.card.shard_size) for i in indices]
        names = list(self.card.items())
        return torch.stack([self._shard(names[shard]).row(row)["x0"].float() for shard, row in rows])

    def cond(self, prompts: Sequence[str]) -> Cond:
        """What the family made of these prompts. Raises ValueError if one is not here."""
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def applied(self, family: Family) -> Family:
        """The family with conditions from here; as a whole, for export, it encodes again by itself."""
        device = next(family.denoiser.network.parameters()).device
        row = self._shard(UNCOND).row(0)

        def encode_prompts(prompts: Sequence[str]) -> Cond:
            return {name: to_device(value, device) for name, value in self.cond(prompts).items()}

        def whole(trained: Family) -> Family:
            own = family.whole(family)
            return replace(trained, encode_prompts=own.encode_prompts, uncond=own.uncond)

        return replace(
            family,
            encode_prompts=encode_prompts,
            uncond=lambda: {name: value[None].to(device) for name, value in row.items()},
            whole=whole,
        )

    def check(self, family: str, teacher: Family, path: str, of: Mapping[str, Any] | None) -> None:
        """Raise ValueError, naming what differs, unless a pipeline with these encoders made the cache.

        family: its name; path: of the pipeline; of: the source that it should be made of, as ``described``, or None.
        """
        wanted = replace(
            self.card,
            family=family,
            encoders=encoders_of(path),
            latent_shape=tuple(teacher.latent_shape),
            image_size=teacher.image_size,
            data=dict(of) if of else self.card.data,
            dtype=self.settings.dtype if of else self.card.dtype,
        )
        differs = self.card.difference(wanted)
        if differs:
            raise ValueError(
                f"{self._folder}: stale, made with {differs} (by {self.card.teacher_path}); make it anew in another "
                "data.path, or set back what has changed"
            )

    def _number(self, index: int) -> int:
        n = len(self)
        order = turn(index, n, self._seed) if self._seed is not None else ((index + k) % n for k in range(n))
        return next(number for number in order if number not in self._missing)

    def _row(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self._place:
            shard, row = divmod(self._place[prompt], self.card.shard_size)
            return self._shard(self._files[shard]).row(row)
        if prompt in self._extra:
            return self._shard(EXTRA).row(self._extra[prompt])
        raise ValueError(
            f"{self._folder}: lacks the prompt {prompt!r}; add it to run.sample_prompts or to the file data.prompts, "
            "and give `fastgen cache CONFIG` again"
        )


def distinct(prompts: Sequence[str], missing: set[int]) -> list[str]:
    """The distinct prompts of items by number, in the order in which they first come, but for the missing items'."""
    return list(dict.fromkeys(prompt for i, prompt in enumerate(prompts) if i not in missing))


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Cached(config)
