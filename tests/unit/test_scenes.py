"""The source of composed scenes, and what its CLIP is taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from fastgen.data import scenes
from fastgen.emoji import compose, world
from fastgen.method import Batch
from fastgen.rng import Noise

CLIP = Path(world.__file__).parent / "assets" / "clip"


def test_items_depend_on_seed_and_number_alone_and_repeat_at_the_end() -> None:
    one, two = (scenes.open(scenes.Config(size=20, singles=0.3), (32, 32)) for _ in range(2))
    for i in (13, 2, 19):
        assert np.array_equal(one.item(i).image, two.item(i).image)
        assert one.item(i + 20).prompt == one.item(i).prompt
    other = scenes.open(scenes.Config(size=20, seed=1), (32, 32))
    assert any(one.item(i).prompt != other.item(i).prompt for i in range(20))


def test_tasks_take_turns_and_have_geneval_s_record() -> None:
    source = scenes.open(scenes.Config(split="heldout"), (32, 32))
    items = [source.item(i) for i in range(12)]
    assert [item.metadata["tag"] for item in items] == list(compose.TASKS) * 2
    assert all(item.metadata["prompt"] == item.prompt for item in items)
    assert all(item.image.shape == (32, 32, 3) for item in items)
    json.dumps([item.metadata for item in items])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_single_drawings(share: float) -> None:
    source = scenes.open(scenes.Config(singles=share, extra=True), (32, 32))
    alone = sum(source.item(i).metadata is None for i in range(400)) / 400
    assert abs(alone - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-9


def test_a_canvas_must_be_square() -> None:
    with pytest.raises(ValueError, match="the emoji world is square, this pipeline makes 48x32 images"):
        scenes.open(scenes.Config(), (32, 48))


def test_a_caption_made_false_differs_in_relation_or_number() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        told = world.falsified("a dog left of a cat", rng)
        assert told in {f"a dog {r} a cat" for r in ("right of", "above", "below")} | {"a cat left of a dog"}
        assert world.falsified("two dogs", rng) in {"three dogs", "four dogs"}
    assert world.falsified("a red apple", rng) == ""


def test_the_clip_s_loss_is_the_cross_entropy_over_all_true_captions() -> None:
    truths = [
        world.Truth("two dogs", ("two dogs",), "three dogs"),
        world.Truth("twemoji of a cat", ("a cat", "twemoji of a cat"), ""),
        world.Truth("a cat", ("a cat", "noto of a cat"), ""),
    ]
    rng = np.random.default_rng(0)
    data = world.Pictures([rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in truths], truths)
    model, processor = CLIPModel.from_pretrained(CLIP), CLIPProcessor.from_pretrained(CLIP)

    def tokens(texts: list[str]) -> torch.Tensor:
        return processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    method = world.Contrastive(model, tokens, data)
    batch: Batch = data.batch(range(3))
    got = method.loss(batch, Noise(range(3), 0, 0, "clip"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        texts = ["two dogs", "twemoji of a cat", "a cat", "three dogs"]
        logits = model(input_ids=tokens(texts), pixel_values=batch.x0).logits_per_image.float()
    # the second picture is one of "a cat" too; the false caption stands in the rows of pictures alone
    image = logits.log_softmax(1)
    want = torch.stack([-image[0, 0], -(image[1, 1] + image[1, 2]) / 2, -image[2, 2]])
    torch.testing.assert_close(got["image"].detach(), 0.5 * want, atol=1e-4, rtol=1e-4)
    text = logits[:, :3].log_softmax(0)
    want = torch.stack([-text[0, 0], -text[1, 1], -(text[1, 2] + text[2, 2]) / 2])
    torch.testing.assert_close(got["text"].detach(), 0.5 * want, atol=1e-4, rtol=1e-4)


def test_scenes_for_the_clip_are_of_all_drawings() -> None:
    data = world.scenes(30, 0)
    assert data.pixels.shape == (30, 3, 32, 32)
    assert all(truth.text in truth.true for truth in data.truths)
    assert any(truth.false for truth in data.truths)
