"""Diversity across seeds: the closed form, all pairs, and any order of the images."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastgen.evaluation import diversity, features
from fastgen.evaluation.context import Context, Seen
from tests import command
from tests.rows import Known, images, noise, same_however_seen, seen

PROMPTS = ("a dog", "twemoji of a dog", "a cat", "a red apple", "a dog", "a cat", "a dog", "twemoji of a dog")


@pytest.fixture
def metric(monkeypatch):
    """Gives the metric for images of these prompts."""
    clip = Known()
    monkeypatch.setattr(features, "clip", lambda context, wanted_by: clip)
    return lambda prompts: diversity.Metric(Context(prompts=prompts))


def test_it_is_the_mean_over_prompts_of_the_mean_distance_of_a_prompts_pairs(metric):
    """Angles 0, 90 and 180 degrees: distances 1, 2, 1; one direction twice: 0; a prompt that comes once: nothing."""
    prompts = ["a dog", "a dog", "a dog", "a cat", "a cat", "an apple"]
    rows = [[50, 0], [0, 7], [-90, 0], [3, 4], [30, 40], [1, 1]]
    assert metric(prompts).compute(seen(rows, prompts)) == {"diversity": pytest.approx((4 / 3 + 0) / 2)}
    assert metric(prompts).protocol() == {
        "extractor": "known",
        "distance": "1 - cos of two CLIP image embeddings; mean over a prompt's pairs, then over prompts",
    }


def test_a_prompt_that_names_the_style_is_another_prompt(metric):
    prompts = ["a dog", "twemoji of a dog", "a dog"]
    assert metric(prompts).compute(seen([[5, 0], [0, 5], [3, 4]], prompts))["diversity"] == pytest.approx(1 - 0.6)


def test_it_equals_all_pairs_by_the_clips_own_embeddings(tmp_path):
    folder = str(command.clip(tmp_path / "clip"))
    one = diversity.Metric(Context(weights={"clip": folder}, prompts=PROMPTS))
    [clip] = one.extractors
    rows = clip(images(len(PROMPTS), 16, 16), PROMPTS)
    means = []
    for prompt in dict.fromkeys(PROMPTS):
        own = [rows[i].double() for i, p in enumerate(PROMPTS) if p == prompt]
        pairs = [1 - float(cosine_similarity(a, b, dim=0)) for a, b in combinations(own, 2)]
        means += [sum(pairs) / len(pairs)] if pairs else []
    got = one.compute(Seen(PROMPTS, {clip.key: rows}))
    assert got == {"diversity": pytest.approx(sum(means) / len(means), rel=1e-9)}
    assert got["diversity"] > 1e-3


def test_any_order_or_merge_gives_the_same_number(metric):
    what = seen(noise(len(PROMPTS), 5), PROMPTS)
    values = same_however_seen(metric(PROMPTS), what)
    assert metric(PROMPTS).per_image(what) == {}
    assert metric(PROMPTS).compute(what.take(range(7))) != values


def test_messages(metric, monkeypatch):
    with pytest.raises(ValueError, match=r"none of the 2 comes twice; raise the number of images, or leave diversity"):
        metric(["a", "b"])
    with pytest.raises(ValueError, match="diversity needs at least 2 images of one prompt, got none"):
        metric(["a", "a", "b"]).compute(seen(torch.eye(2), ["a", "b"]))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"diversity needs a CLIP; .*no such folder"):
        diversity.Metric(Context(weights={"clip": "/nowhere/clip"}, prompts=["a", "a"]))
