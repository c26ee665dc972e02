"""Trains the emoji world's CLIP and autoencoder and puts the untrained teacher together.

``python -m fastgen.emoji.world clip|vae CONFIG`` trains one; ``... pipeline CLIP VAE OUT`` writes the pipeline that
``fastgen train configs/emoji/teacher.yaml`` then trains; ``... ship RUNS`` copies what came out into the package and
the logs into docs/. Each run resumes from its newest checkpoint. ``make world`` does it all.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel

from .. import checkpoint, config
from ..config import option
from ..ema import EMA
from ..engine import Engine, Optim
from ..method import Batch, Phase, Terms
from ..rng import Noise
from . import networks
from .compose import EmojiSet


@dataclass(frozen=True)
class Recipe:
    """How one of the two networks is trained."""

    out: str = option(help="run folder")
    steps: int = option(help="updates", low=1)
    batch_size: int = option(128, "pictures an update", low=2)
    seed: int = option(0, "of everything random", low=0)
    pool: int = option(32768, "distinct compositions, drawn once", low=1)
    ema: float = option(0.99, "decay of the averaged weights, which are the ones kept", low=0, below=1)
    save_every: int = option(200, "steps between checkpoints", low=1)
    optim: Optim = field(default_factory=Optim)


class Pictures:
    """A fixed pool of the training split's compositions: x0 holds pixels, cond the numbers of name and style."""

    def __init__(self, pool: int, seed: int) -> None:
        """Draw the pool once."""
        self.set = EmojiSet("train", networks.SIZE, seed)
        rows = [self.set.row(i) for i in range(pool)]
        self.captions = [caption for _, caption in (self.set.item(i) for i in range(pool))]
        self.pixels = torch.from_numpy(np.stack([self.set.item(i)[0] for i in range(pool)])).permute(0, 3, 1, 2)
        names, styles = sorted({r.name for r in rows}), sorted({r.style for r in rows})
        self.name = torch.tensor([names.index(r.name) for r in rows])
        # -1: the caption leaves the style open
        self.style = torch.tensor([styles.index(r.style) for r in rows])
        named = torch.tensor([c.startswith(f"{r.style} of ") for c, r in zip(self.captions, rows, strict=True)])
        self.asked = torch.where(named, self.style, -1)

    def batch(self, samples: Sequence[int]) -> Batch:
        """samples -> pixels [B, 3, H, W] in [-1, 1] and, as cond, index, name, style and asked: [B]."""
        index = torch.tensor([s % len(self.pixels) for s in samples])
        cond = {"index": index, "name": self.name[index], "style": self.style[index], "asked": self.asked[index]}
        return Batch(list(samples), cond, {}, self.pixels[index].float() / 127.5 - 1)


class Contrastive:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020), where every true pair in the batch counts as one.

    A caption that leaves the style open is true of its object in every style, so the target is spread over them.
    """

    def __init__(self, model: CLIPModel, tokens: Tensor) -> None:
        """tokens: [pool, L] of the pool's captions."""
        self.model, self.tokens = model, tokens
        self.networks: Mapping[str, nn.Module] = {"clip": model}
        self.phases = (Phase("clip", ["clip"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"image", "text"}: cross-entropies, each [B]."""
        assert batch.x0 is not None
        with torch.autocast(batch.x0.device.type, torch.bfloat16):
            out = self.model(input_ids=self.tokens[batch.cond["index"]], pixel_values=batch.x0)
        cond = batch.cond
        true = (cond["name"][:, None] == cond["name"]) & (
            (cond["asked"] < 0) | (cond["asked"] == cond["style"][:, None])
        )
        logits, true = out.logits_per_image.float(), true.float()  # rows: images, columns: captions
        image = F.cross_entropy(logits, true / true.sum(1, keepdim=True), reduction="none")
        text = F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True), reduction="none")
        return {"image": 0.5 * image, "text": 0.5 * text}


class Autoencoding:
    """L1 on pixels and on their differences (edges), and a KL term that keeps the latents near a Gaussian."""

    def __init__(self, model: AutoencoderKL, kl_weight: float = 1e-3) -> None:
        """kl_weight: of the mean KL per latent number, against mean errors per pixel."""
        self.model, self.kl_weight = model, kl_weight
        self.networks: Mapping[str, nn.Module] = {"vae": model}
        self.phases = (Phase("vae", ["vae"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"pixels", "edges", "kl"}: each [B]."""
        x = batch.x0
        assert x is not None
        with torch.autocast(x.device.type, torch.bfloat16):
            moments = self.model.encode(x).latent_dist
            z = moments.mean + moments.std * rng.normal(moments.mean.shape[1:])
            y = self.model.decode(z).sample.float()
        mean, logvar = moments.mean.float(), moments.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        error = y - x
        edges = error.diff(dim=2).abs().flatten(1).mean(1) + error.diff(dim=3).abs().flatten(1).mean(1)
        return {
            "pixels": error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1),
            "edges": 0.5 * edges,
            "kl": self.kl_weight * kl.flatten(1).mean(1),
        }


def train(method: Contrastive | Autoencoding, data: Pictures, recipe: Recipe) -> None:
    """Train to the end of the recipe; on return the network holds its averaged weights."""
    role, network = next(iter(method.networks.items()))
    engine = Engine(
        method, data, {role: recipe.optim}, batch_size=recipe.batch_size, steps=recipe.steps, seed=recipe.seed
    )
    for p in engine.parameters[role].values():
        p.requires_grad_(True)
    ema = EMA(network, recipe.ema)
    run = Path(recipe.out)
    run.mkdir(parents=True, exist_ok=True)
    found = checkpoint.all_checkpoints(run)
    start = checkpoint.load(found[-1], engine, {role: ema}) if found else 0
    began = time.monotonic()
    for step, logs in engine.run(range(start, recipe.steps)):
        ema.update()
        if (step + 1) % 20 == 0:
            rate = (step + 1 - start) / (time.monotonic() - began)
            shown = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in logs.items())
            line = f"step {step + 1}/{recipe.steps} {shown} {rate:.2f} steps/s"
            print(line, flush=True)
            with (run / "train.log").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            checkpoint.save(run, step + 1, engine, {role: ema}, keep=2)
    with torch.no_grad():
        for name, p in ema.parameters.items():
            p.copy_(ema.average[name])


def train_clip(recipe: Recipe) -> None:
    """Train the CLIP and write it, with tokenizer and image processor, to ``out/clip``."""
    data = Pictures(recipe.pool, recipe.seed)
    run = Path(recipe.out)
    words = networks.tokenizer(vocabulary(), run / "clip")
    torch.manual_seed(recipe.seed)
    model, processor = networks.clip(words)
    tokens = words(data.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    train(Contrastive(model, tokens), data, recipe)
    model.save_pretrained(run / "clip")
    processor.save_pretrained(run / "clip")


def vocabulary() -> list[str]:
    """Every caption of the world, scenes included, for the tokenizer."""
    from . import names, sprites
    from .compose import RELATIONS, open_caption, style_caption

    captions = [
        text
        for row in sprites.load().rows
        if row.core
        for text in (open_caption(row.name), style_caption(row.name, row.style))
    ]
    captions += [f"{number} {core.noun_plural}" for core in names.CORE for number in names.NUMBERS[2:]]
    captions += [core.coloured_phrase for core in names.CORE if core.colour is not None]
    return [*captions, *(f"a dog {relation} a cat and a photo of a bird" for relation in RELATIONS)]


def train_vae(recipe: Recipe) -> None:
    """Train the autoencoder, whiten its latents and write it to ``out/vae``."""
    data = Pictures(recipe.pool, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = networks.autoencoder()
    train(Autoencoding(model), data, recipe)
    with torch.no_grad():
        pixels = data.pixels[:2048].float() / 127.5 - 1
        z = torch.cat([model.encode(x).latent_dist.mean for x in pixels.split(128)])
        networks.whiten(model, z.mean((0, 2, 3)), z.std((0, 2, 3)))
    model.save_pretrained(Path(recipe.out) / "vae")


def ship(runs: Path) -> None:
    """Copy CLIP and teacher into the package's assets, and the logs and the last sample grid into docs/emoji/."""
    assets, docs = Path(__file__).parent / "assets", Path("docs/emoji")
    for source, name in ((runs / "clip" / "clip", "clip"), (runs / "teacher" / "pipeline", "teacher")):
        with checkpoint.atomic_folder(assets / name) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
    docs.mkdir(parents=True, exist_ok=True)
    for name in ("clip", "vae", "teacher"):
        shutil.copy(runs / name / "train.log", docs / f"{name}.log")
    shutil.copy(runs / "teacher" / "metrics.jsonl", docs / "teacher.metrics.jsonl")
    shutil.copy(sorted((runs / "teacher" / "samples").glob("step_*.png"))[-1], docs / "teacher.png")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) == 2 and arguments[0] in ("clip", "vae"):
        recipe = config.decode(Recipe, config.read(arguments[1]), arguments[1])
        (train_clip if arguments[0] == "clip" else train_vae)(recipe)
    elif len(arguments) == 4 and arguments[0] == "pipeline":
        networks.assemble(Path(arguments[1]), Path(arguments[2])).save_pretrained(arguments[3])
    elif len(arguments) == 2 and arguments[0] == "ship":
        ship(Path(arguments[1]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
