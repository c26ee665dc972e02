"""What training on a cache asks of every family: it works without the parts that are left out, and gets them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgen import cache, registry
from fastgen.data import images
from fastgen.data.batches import Batches, pixels
from fastgen.data.cached import Cached, kind_of
from fastgen.denoiser import Cond
from fastgen.family import Family

from .test_families import FAMILIES, case


def load(name: str, folder: Path, *without: str) -> Family:
    found = case(name)
    module = registry.find("family", name.partition("-")[0])
    rest = (without,) if without else ()
    family: Family = module.load(folder, "cpu", None, 1.0, found.image_size, found.num_frames, *rest)
    return family


def same(ours: Cond, theirs: Cond) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def parts(kind: str, folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and kind_of(p.name) == kind]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_does_without_what_it_is_told_to_and_gets_it_back(name: str, tmp_path: Path) -> None:
    pipeline: Any = case(name).pipeline(0)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    whole, prompts = load(name, tmp_path), list(case(name).prompts)
    pixels = torch.rand(2, 3, *whole.image_size) * 2 - 1

    images = load(name, tmp_path, "network", "text")
    assert torch.equal(images.encode(pixels), whole.encode(pixels))
    texts = load(name, tmp_path, "network", "vae")
    same(texts.encode_prompts(prompts), whole.encode_prompts(prompts))
    same(texts.uncond(), whole.uncond())
    for other in (images, texts):
        assert (other.latent_shape, other.image_size) == (whole.latent_shape, whole.image_size)

    training = load(name, tmp_path, "text", "vae")
    x_t, t = torch.randn(2, *whole.latent_shape), torch.tensor([whole.denoiser.schedule.t_max] * 2)
    cond = whole.encode_prompts(prompts)
    assert torch.equal(training.denoiser(x_t, t, cond).y, whole.denoiser(x_t, t, cond).y)
    if parts("vae", tmp_path):
        with pytest.raises(ValueError, match="was left out of memory"):
            training.decode(x_t)
        with pytest.raises(ValueError, match="was left out of memory"):
            training.encode(pixels)
    if parts("text", tmp_path):
        with pytest.raises(ValueError, match="was left out of memory"):
            training.encode_prompts(prompts)

    full = training.whole(training)
    same(full.encode_prompts(prompts), cond)
    same(full.uncond(), whole.uncond())
    assert torch.equal(full.decode(x_t), whole.decode(x_t))
    assert torch.equal(full.encode(pixels), whole.encode(pixels))
    drawn = []
    for family in (full, whole):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = family.pipeline(family.denoiser.network, None)
            drawn.append(family.run(made, prompts, 2, torch.Generator().manual_seed(0)))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_gives_what_the_family_would(name: str, tmp_path: Path) -> None:
    """Latents and every tensor of the conditions, in their shapes and dtypes."""
    found, family = case(name), name.partition("-")[0]
    pipeline: Any = found.pipeline(0)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(found.prompts):
        Image.new("RGB", (20, 20), (100 * i, 50, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(prompt)
    model = {"path": str(tmp_path / "teacher"), "family": family}
    model |= {"image_size": found.image_size, "num_frames": found.num_frames}
    of = {"source": "images", "path": str(tmp_path / "images")}
    options = {"source": "cached", "path": str(tmp_path / "cache"), "of": of, "batch_size": len(found.prompts)}
    made = cache.decode({"model": model, "data": options}, "x")
    assert cache.make(made, device=torch.device("cpu")) == (2, len(set(found.prompts)))
    source, whole = Cached(made.options), load(name, tmp_path / "teacher")
    source.check(family, whole, str(tmp_path / "teacher"), None)
    ours = source.applied(load(name, tmp_path / "teacher", "text", "vae"))
    same(ours.encode_prompts(found.prompts), whole.encode_prompts(found.prompts))
    same(ours.uncond(), whole.uncond())
    batch = Batches(source, ours, images=True).batch(range(2))
    read = images.open(images.Config(of["path"]), whole.image_size)
    assert batch.x0 is not None
    expected = whole.encode(pixels([read.item(i).image for i in range(2)]))
    assert torch.allclose(batch.x0, expected, atol=1e-6)
    assert batch.x0.shape == (2, *whole.latent_shape)
