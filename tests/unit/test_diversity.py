"""Diversity across seeds: the closed form against all pairs, and who is asked for it."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastgen.data import Item
from fastgen.evaluation import clip_score, diversity, features, judge, runner
from fastgen.evaluation.config import EvalConfig
from fastgen.evaluation.context import Context, merge
from fastgen.evaluation.runner import evaluate, measure_images
from tests import command

CAPTIONS = ("a dog", "twemoji of a dog", "a cat", "a red apple", "a dog", "a cat", "a dog", "twemoji of a dog")


class FakeClip:
    """An image's first two pixels, less 128, are its embedding."""

    num_features = 2

    def images(self, images: Tensor) -> Tensor:
        return images[:, :2, 0, 0].float() - 128

    def protocol(self) -> dict[str, str]:
        return {"extractor": "two pixels"}


class Noises:
    """A source of noise images; every draw has the same captions, in turn."""

    has_images = True
    candidates = ("a dog", "a cat", "a red apple")

    def __init__(self, size: int = 32) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Item:
        pixels = np.random.default_rng([3, index]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Item(CAPTIONS[index % len(CAPTIONS)], pixels)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(command.clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "load_clip", lambda *_: FakeClip())


def pictures(*embeddings: tuple[int, int]) -> Tensor:
    """Images whose embeddings are these: uint8 [B, 3, 1, 1]."""
    return torch.tensor([[128 + x, 128 + y, 0] for x, y in embeddings], dtype=torch.uint8)[:, :, None, None]


def batch_of(count: int) -> tuple[Tensor, list[str]]:
    items = [Noises().item(i) for i in range(count)]
    return torch.stack([torch.from_numpy(item.image).permute(2, 0, 1) for item in items]), [i.prompt for i in items]


@pytest.mark.usefixtures("fake")
def test_it_is_the_mean_over_prompts_of_the_mean_distance_of_a_prompt_s_pairs() -> None:
    """Angles 0, 90 and 180 degrees: distances 1, 2, 1; one direction twice: 0; a prompt that comes once: nothing."""
    prompts = ["a dog", "a dog", "a dog", "a cat", "a cat", "an apple"]
    metric = diversity.Metric(Context("x", prompts=prompts))
    metric.update(pictures((50, 0), (0, 7), (-90, 0), (3, 4), (30, 40), (1, 1)), prompts)
    assert metric.compute() == {"diversity": pytest.approx((4 / 3 + 0) / 2)}
    assert metric.protocol() == {
        "extractor": "two pixels",
        "distance": "1 - cos of two CLIP image embeddings; mean over a prompt's pairs, then over prompts",
        "num_prompts": 2,
        "num_images": 5,
        "pairs": 4,
    }


@pytest.mark.usefixtures("fake")
def test_a_prompt_that_names_the_style_is_another_prompt() -> None:
    prompts = ["a dog", "twemoji of a dog", "a dog"]
    metric = diversity.Metric(Context("x", prompts=prompts))
    metric.update(pictures((5, 0), (0, 5), (3, 4)), prompts)
    assert metric.compute()["diversity"] == pytest.approx(1 - 0.6)


def test_it_equals_all_pairs_by_the_clip_s_own_embeddings(clip: str) -> None:
    images, prompts = batch_of(16)
    seen = features.load_clip(clip, "cpu").images(images).double()
    means = []
    for prompt in dict.fromkeys(prompts):
        own = [seen[i] for i, p in enumerate(prompts) if p == prompt]
        pairs = [1 - float(cosine_similarity(a, b, dim=0)) for a, b in combinations(own, 2)]
        means.append(sum(pairs) / len(pairs))
    found = measure_images([(images, prompts)], Context(clip, prompts=prompts), ["diversity"])
    assert found == {"diversity": pytest.approx(sum(means) / len(means), rel=1e-9)}
    assert found["diversity"] > 1e-3


def test_any_split_order_or_merge_gives_the_same_number(clip: str) -> None:
    images, prompts = batch_of(13)
    context = Context(clip, prompts=prompts)

    def value(*parts: list[int]) -> float:
        whole = diversity.Metric(context)
        for part in parts:
            other = diversity.Metric(context)
            for i in range(0, len(part), 4):
                some = part[i : i + 4]
                other.update(images[some], [prompts[j] for j in some])
            merge(whole, other)
        return whole.compute()["diversity"]

    want = value(list(range(13)))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3)).tolist()
    for parts in ([[0], list(range(1, 13))], [order], [order[:5], order[5:]], [[i] for i in order]):
        assert value(*parts) == pytest.approx(want, rel=1e-5)
    assert value(list(range(12))) != pytest.approx(want, rel=1e-5)


def test_real_images_get_a_value_of_their_own_draw(clip: str) -> None:
    """The second draw's captions need not be those of the first."""
    config = EvalConfig(metrics=["diversity"], clip=clip, num_images=10, batch_size=4, comparison=0)
    [row] = evaluate([], config, Noises())
    drawn = [Noises().item(i) for i in range(10, 20)]
    images = torch.stack([torch.from_numpy(item.image).permute(2, 0, 1) for item in drawn])
    prompts = [item.prompt for item in drawn]
    want = measure_images([(images, prompts)], Context(clip, prompts=prompts), ["diversity"])["diversity"]
    assert row["diversity"] == pytest.approx(want, rel=1e-5)
    assert row["protocol"]["metrics"]["diversity"]["num_prompts"] == 4  # in the first draw one of them comes once
    assert row["fid"] is None


def test_what_is_known_is_not_judged_again(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvalConfig(metrics=["clip_score"], clip=clip, num_images=4, comparison=1)
    first = evaluate([], config, Noises(), out=tmp_path)
    monkeypatch.setattr(runner, "_real_row", None)
    subject = runner.Subject("teacher, 1 step", "teacher", None, 1)
    known = [*first, {"name": subject.name, "role": "teacher"}]
    assert evaluate([subject], config, Noises(), out=tmp_path, known=known) == known


def test_metrics_that_see_the_same_batch_share_its_embeddings(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = batch_of(8)
    eyes = features.Clip(clip, "cpu")
    want, calls = eyes.images(images), []
    whole = eyes._model.get_image_features
    monkeypatch.setattr(eyes._model, "get_image_features", lambda **named: calls.append(1) or whole(**named))
    monkeypatch.setattr(features, "load_clip", lambda *_: eyes)
    context = Context(clip, prompts=prompts)
    assert torch.equal(eyes.images(images.clone()), want)
    for metric in (clip_score.Metric(context), diversity.Metric(context)):
        metric.update(images, prompts)
    assert len(calls) == 0
    images[0] = 255 - images[0]  # the same tensor, but other images
    assert not torch.equal(eyes.images(images), want)
    assert eyes.images(images[:3]).shape == (3, 12)
    assert len(calls) == 2


@pytest.mark.usefixtures("fake")
def test_messages() -> None:
    with pytest.raises(ValueError, match=r"diversity needs a CLIP; set eval\.clip"):
        diversity.Metric(Context(prompts=["a", "a"]))
    with pytest.raises(ValueError, match=r"none of the 2 comes twice; raise the number of images, or leave diversity"):
        diversity.Metric(Context("x", prompts=["a", "b"]))
    metric = diversity.Metric(Context("x", prompts=["a", "a", "b"]))
    with pytest.raises(ValueError, match="prompt 'c' is none of the 2 announced"):
        metric.update(pictures((1, 0)), ["c"])
    metric.update(pictures((1, 0), (1, 0)), ["a", "b"])
    with pytest.raises(ValueError, match="diversity needs at least 2 images of one prompt, got none"):
        metric.compute()


class Odd(Noises):
    """A second draw of 4 captions of which none comes twice."""

    def item(self, index: int) -> Item:
        prompt = ("a dog", "a dog", "a cat", "a cat", "a dog", "a cat", "a red apple", "twemoji of a dog")[index % 8]
        return Item(prompt, super().item(index).image)


def test_a_draw_of_real_images_without_a_repeated_caption_has_no_value(clip: str) -> None:
    config = EvalConfig(metrics=["clip_score", "diversity"], clip=clip, num_images=4, batch_size=4, comparison=0)
    [row] = evaluate([], config, Odd())
    assert row["diversity"] is None
    assert row["clip_score"] is not None


def test_images_that_cannot_be_compared_are_told_before_one_is_made(clip: str) -> None:
    config = EvalConfig(metrics=["diversity"], clip=clip, num_images=3, batch_size=4, comparison=0)
    with pytest.raises(ValueError, match="none of the 3 comes twice"):
        evaluate([runner.Subject("x", "teacher", None, 1)], config, Noises())


@pytest.mark.parametrize(("count", "names"), [(3, {"clip_score"}), (5, {"clip_score", "diversity"})])
def test_quick_evaluations_take_it_where_a_prompt_comes_twice(
    clip: str, tmp_path: Path, count: int, names: set[str]
) -> None:
    rows = [{"file": f"{i}.png", "caption": CAPTIONS[i]} for i in range(count)]
    folder = command.images(tmp_path / "images", count)
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"metrics": ["clip_score", "diversity", "latency"], "clip": clip, "num_images_training": count}
    quick = judge.Quick(section | {"reference": {"source": "images", "path": str(folder)}}, "x.yaml")
    session = SimpleNamespace(
        family=SimpleNamespace(image_size=(16, 16)),
        device=torch.device("cpu"),
        images=lambda prompts, samples: batch_of(count)[0][list(samples)],
    )
    assert set(quick(session)) == {*names, "retrieval"}
