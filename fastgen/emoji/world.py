"""Trains the emoji world's CLIP and autoencoder and puts the untrained teacher together.

``python -m fastgen.emoji.world clip|vae CONFIG`` trains one; ``... pipeline CLIP VAE OUT [UNET]`` writes the pipeline
that ``fastgen train`` then trains; ``... ship RUNS [UNDER]`` copies what came out into the package and the logs into
docs/. Each run resumes from its newest checkpoint. ``make world`` does it all for single drawings, and ``make scenes``
goes on from there to composed scenes.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from .. import checkpoint, config
from ..config import option
from ..data import scenes as source
from ..ema import EMA
from ..engine import Data, Engine
from ..geneval import RELATIONS
from ..method import Batch, Phase, Terms, Trainable
from ..optimizers import Optim
from ..rng import Noise
from . import names, networks
from .compose import EmojiSet, open_caption, style_caption

Words = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one of the two networks is trained."""

    out: str = option(help="run folder")
    steps: int = option(help="updates", low=1)
    batch_size: int = option(128, "pictures an update", low=2)
    seed: int = option(0, "of everything random", low=0)
    pool: int = option(32768, "distinct compositions, drawn once", low=1)
    scenes: bool = option(False, "of the compositions: whether they are scenes of several drawings")
    start: str = option("", "folder of the trained network to begin with; empty: none")
    ema: float = option(0.99, "decay of the averaged weights, which are the ones kept", low=0, below=1)
    save_every: int = option(200, "steps between checkpoints", low=1)
    optim: Optim = field(default_factory=Optim)


class Pictures:
    """A fixed pool of compositions: x0 holds pixels, cond the number in the pool."""

    def __init__(self, pictures: Sequence[np.ndarray], truths: Sequence[Truth]) -> None:
        """pictures: uint8 [H, W, 3] each."""
        self.pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        self.truths = list(truths)

    def batch(self, samples: Sequence[int]) -> Batch:
        """samples -> pixels [B, 3, H, W] in [-1, 1] and, as cond, index: [B]."""
        index = torch.tensor([s % len(self.pixels) for s in samples])
        return Batch(list(samples), {"index": index}, {}, self.pixels[index].float() / 127.5 - 1)


@dataclass(frozen=True)
class Truth:
    """What is said of a picture.

    Attributes:
        text: its caption.
        true: all captions that are true of it.
        false: one that nearly is.
    """

    text: str
    true: tuple[str, ...]
    false: str


def singles(pool: int, seed: int) -> Pictures:
    """Single drawings of the training split. A caption that leaves the style open is true of every style."""
    drawn = EmojiSet("train", networks.SIZE, seed)
    items, rows = [drawn.item(i) for i in range(pool)], [drawn.row(i) for i in range(pool)]
    truths = [
        Truth(text, (open_caption(row.name), style_caption(row.name, row.style)), "")
        for (_, text), row in zip(items, rows, strict=True)
    ]
    return Pictures([image for image, _ in items], truths)


def scenes(pool: int, seed: int) -> Pictures:
    """Composed scenes of all drawings, single ones among them.

    The CLIP that judges must know the drawings that its generator never saw, as it would know real things.
    """
    known = [
        source.open(source.Config(split, seed, pool, singles=0.3, extra=True), (networks.SIZE,) * 2)
        for split in ("train", "train", "heldout")
    ]
    items = [known[i % 3].item(i) for i in range(pool)]
    truths = []
    for i, item in enumerate(items):
        text = item.prompt
        if item.metadata is None and " of " in text:  # names its style, and would be true without
            truths.append(Truth(text, (text, text.partition(" of ")[2]), ""))
        else:
            truths.append(Truth(text, (text,), falsified(text, np.random.default_rng([seed, i, 3]))))
    return Pictures([item.image for item in items if item.image is not None], truths)


def falsified(text: str, rng: np.random.Generator) -> str:
    """A caption with its relation or its number changed; empty for those without."""
    for relation in RELATIONS:
        before, found, after = text.partition(f" {relation} ")
        if found:
            others = [f"{before} {other} {after}" for other in RELATIONS if other != relation]
            return str(rng.choice([*others, f"{after} {relation} {before}"]))
    number, _, rest = text.partition(" ")
    others = [other for other in names.NUMBERS[2:] if other != number]
    return f"{rng.choice(others)} {rest}" if number in names.NUMBERS[2:] else ""


class Contrastive:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020), where every true pair in the batch counts as one.

    A caption may be true of several pictures, so the target is spread over them. Captions that nearly are true
    (Yuksekgonul et al. 2023, arXiv 2210.01936) stand among those that a picture chooses from.
    """

    def __init__(self, model: CLIPModel, words: Words, data: Pictures) -> None:
        """words: the captions -> tokens [N, L]."""
        self.model = model
        known = list(dict.fromkeys(text for t in data.truths for text in (t.text, *t.true, t.false) if text))
        number = {text: i for i, text in enumerate(known)}
        self.tokens = words(known)
        self.text = torch.tensor([number[t.text] for t in data.truths])
        most = max(len(t.true) for t in data.truths)
        self.true = torch.tensor([[number[t.true[min(k, len(t.true) - 1)]] for k in range(most)] for t in data.truths])
        self.false = torch.tensor([number[t.false] if t.false else -1 for t in data.truths])
        self.networks: Mapping[str, nn.Module] = {"clip": model}
        self.phases = (Phase("clip", ["clip"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"image", "text"}: cross-entropies, each [B]."""
        assert batch.x0 is not None
        index = batch.cond["index"]
        false = self.false[index]
        texts = torch.cat([self.text[index], false[false >= 0]])
        with torch.autocast(batch.x0.device.type, torch.bfloat16):
            out = self.model(input_ids=self.tokens[texts], pixel_values=batch.x0)
        true = (self.true[index][:, :, None] == texts).any(1)
        logits, true = out.logits_per_image.float(), true.float()  # rows: images, columns: captions
        own = len(index)
        image = F.cross_entropy(logits, true / true.sum(1, keepdim=True), reduction="none")
        text = F.cross_entropy(logits[:, :own].T, (true[:, :own] / true[:, :own].sum(0)).T, reduction="none")
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


def train(method: Trainable, data: Data, recipe: Recipe) -> None:
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
    data = (scenes if recipe.scenes else singles)(recipe.pool, recipe.seed)
    run = Path(recipe.out)
    if recipe.start:
        model, processor = CLIPModel.from_pretrained(recipe.start), CLIPProcessor.from_pretrained(recipe.start)
    else:
        words = networks.tokenizer(vocabulary(), run / "clip")
        torch.manual_seed(recipe.seed)
        model, processor = networks.clip(words)

    def tokens(texts: Sequence[str]) -> Tensor:
        given = processor.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return torch.as_tensor(given.input_ids)

    train(Contrastive(model, tokens, data), data, recipe)
    (model.half() if recipe.scenes else model).save_pretrained(run / "clip")
    processor.save_pretrained(run / "clip")


def vocabulary() -> list[str]:
    """Every caption of the world, scenes included, for the tokenizer."""
    from . import sprites

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
    data = (scenes if recipe.scenes else singles)(recipe.pool, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = (
        AutoencoderKL.from_pretrained(recipe.start, torch_dtype=torch.float32)
        if recipe.start
        else networks.autoencoder()
    )
    train(Autoencoding(model), data, recipe)
    with torch.no_grad():
        pixels = data.pixels[:2048].float() / 127.5 - 1
        z = torch.cat([model.encode(x).latent_dist.mean for x in pixels.split(128)])
        networks.whiten(model, z.mean((0, 2, 3)), z.std((0, 2, 3)))
    model.save_pretrained(Path(recipe.out) / "vae")


def ship(runs: Path, under: str = "") -> None:
    """Copy what was trained of CLIP and teacher into the package, and logs and the last sample grid into docs/emoji/.

    under: a folder in both.
    """
    assets, docs = Path(__file__).parent / "assets" / under, Path("docs/emoji") / under
    docs.mkdir(parents=True, exist_ok=True)
    for trained, name in ((runs / "clip" / "clip", "clip"), (runs / "teacher" / "pipeline", "teacher")):
        if trained.is_dir():
            with checkpoint.atomic_folder(assets / name) as folder:
                shutil.copytree(trained, folder, dirs_exist_ok=True)
            shutil.copy(trained.parent / "train.log", docs / f"{name}.log")
    if (runs / "vae" / "train.log").is_file():
        shutil.copy(runs / "vae" / "train.log", docs / "vae.log")
    teacher = runs / "teacher"
    if (teacher / "pipeline").is_dir():
        shutil.copy(teacher / "metrics.jsonl", docs / "teacher.metrics.jsonl")
        shutil.copy(sorted((teacher / "samples").glob("step_*.png"))[-1], docs / "teacher.png")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) == 2 and arguments[0] in ("clip", "vae"):
        recipe = config.decode(Recipe, config.read(arguments[1]), arguments[1])
        (train_clip if arguments[0] == "clip" else train_vae)(recipe)
    elif len(arguments) in (4, 5) and arguments[0] == "pipeline":
        clip, vae, out, *unet = map(Path, arguments[1:])
        networks.assemble(clip, vae, unet[0] if unet else None).save_pretrained(out)
    elif len(arguments) in (2, 3) and arguments[0] == "ship":
        ship(Path(arguments[1]), *arguments[2:])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
