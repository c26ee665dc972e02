"""Which family a pipeline is of, and the size of the images that it is taken at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import export, recipe, train
from fastgen.pipelines import sd, sdxl, stock
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("teacher")
    tiny.pipeline().save_pretrained(made / "teacher")
    (made / "prompts.txt").write_text("a red apple\na dog left of a cat\n")
    return made


def test_a_family_is_known_by_the_pipeline_s_class(folder: Path) -> None:
    assert train.family_of(str(folder / "teacher")).__name__ == sd.__name__
    assert train.family_of(str(folder / "teacher"), "sdxl").__name__ == sdxl.__name__


def test_a_class_that_no_family_takes_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDM2Pipeline"}))
    with pytest.raises(
        ValueError, match=r"is a AudioLDM2Pipeline, which no family takes; known are .*StableDiffusion"
    ):
        train.family_of(str(tmp_path))


@pytest.mark.parametrize(("size", "latents"), [(None, (8, 8)), ((16, 24), (8, 12)), ((32, 16), (16, 8))])
def test_an_image_size_gives_the_latents_theirs(
    folder: Path, size: tuple[int, int] | None, latents: tuple[int, int]
) -> None:
    family = sd.load(folder / "teacher", image_size=size)
    assert family.latent_shape == (4, *latents)
    assert family.image_size == (size or (16, 16))


def test_an_image_size_between_two_latents_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"image size 17 x 16: UNet2DConditionModel takes multiples of 2"):
        sd.load(folder / "teacher", image_size=(17, 16))


def test_a_student_of_another_size_makes_images_of_it(folder: Path) -> None:
    tree = {
        "model": {"path": str(folder / "teacher"), "image_size": [16, 24]},
        "method": {"name": "dmd2"},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt")},
        "optim": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "run": {"out": str(folder / "run"), "steps": 1, "batch_size": 2},
    }
    train.train(recipe.decode(tree, "test"))
    card = export.read_card(folder / "run" / "pipeline")
    assert (card["height"], card["width"]) == (16, 24)
    [image] = fastgen.load(folder / "run" / "pipeline")("a red apple").images
    assert image.size == (24, 16)


def test_a_pipeline_is_rebuilt_with_its_settings() -> None:
    pipeline = tiny.pipeline()
    made = stock.rebuilt(pipeline, unet=tiny.unet())
    assert made.unet is not pipeline.unet
    assert made.vae is pipeline.vae
    assert made.config.requires_safety_checker is False


@pytest.mark.parametrize(("depth", "blocks"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (24, [5, 11, 17, 23])])
def test_some_blocks_of_a_deep_network(depth: int, blocks: list[int]) -> None:
    assert stock.some(depth) == blocks


def test_tokens_as_a_map_are_row_by_row() -> None:
    x_t = torch.arange(24.0).reshape(1, 1, 4, 6)
    tokens = x_t.unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 6, 4)  # a token for each 2 x 2 patch
    found = stock.tokens_as_map(tokens, x_t, 2)
    assert found.shape == (1, 4, 2, 3)
    assert found[0, :, 1, 2].tolist() == x_t[0, 0, 2:, 4:].flatten().tolist()
