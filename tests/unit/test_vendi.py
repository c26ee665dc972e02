"""The Vendi score: closed forms, the definition, and any order of the images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgen.evaluation import features, vendi
from fastgen.evaluation.context import Context
from tests.rows import Known, noise, same_however_seen, seen


@pytest.fixture
def metric(monkeypatch):
    """Gives the metric for images of these prompts."""
    eyes = Known()
    monkeypatch.setattr(features, "extractor", lambda context: eyes)
    return lambda prompts=(): vendi.Metric(Context(prompts=prompts))


def test_same_and_orthogonal():
    assert float(vendi.score(torch.tensor([[3.0, 4.0]] * 5) * torch.arange(1, 6)[:, None])) == pytest.approx(1)
    assert float(vendi.score(torch.diag(torch.tensor([1.0, 2, 3, 4, 5])))) == pytest.approx(5)
    groups = torch.eye(3).repeat_interleave(4, dim=0)
    assert float(vendi.score(groups)) == pytest.approx(3)


def test_two_images_at_an_angle():
    """K = [[1, c], [c, 1]]: eigenvalues of K / 2 are (1 +- c) / 2."""
    c = 0.6
    want = math.exp(-sum(w * math.log(w) for w in ((1 + c) / 2, (1 - c) / 2)))
    assert float(vendi.score(torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64))) == pytest.approx(want)


@pytest.mark.parametrize(("count", "width"), [(6, 20), (20, 6), (6, 6)])
def test_it_is_the_definition_for_few_and_many_images(count, width):
    """By NumPy from the matrix of cosines, as the authors' package has it."""
    rows = noise(count, width) + 0.5
    x = rows.numpy().astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w = np.linalg.eigvalsh(x @ x.T / count)
    w = w[w > 1e-14]
    assert float(vendi.score(rows)) == pytest.approx(math.exp(-(w * np.log(w)).sum()), rel=1e-10)


def test_sets_of_one_size_are_scored_together():
    sets = noise(4, 3, 7)
    assert vendi.score(sets).tolist() == pytest.approx([float(vendi.score(one)) for one in sets])


def test_across_seeds_it_is_the_mean_over_prompts_that_come_again(metric):
    """a: one direction; b: two at right angles; c: three; d comes once."""
    prompts = ["a", "b", "c", "d", "a", "b", "c", "c"]
    rows = torch.eye(3)[[0, 0, 0, 1, 0, 1, 1, 2]]
    got = metric(prompts).compute(seen(rows, prompts))
    assert got["vendi_prompt"] == pytest.approx((1 + 2 + 3) / 3)
    shares = np.array([4, 3, 1]) / 8
    assert got["vendi"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_without_prompts_that_come_again_there_is_one_value(metric):
    prompts = ["a", "b", "c"]
    one = metric(prompts)
    assert set(one.compute(seen(torch.eye(3), prompts))) == {"vendi"}
    assert set(one.compute(seen(torch.eye(3), prompts).take([0, 0, 1]))) == {"vendi"}


def test_any_order_or_merge_gives_the_same_numbers(metric):
    prompts = ["a", "b", "a", "c", "b", "a", "c", "d"]
    values = same_however_seen(metric(prompts), seen(noise(8, 5), prompts))
    assert set(values) == {"vendi", "vendi_prompt"}
    assert metric(prompts).per_image(seen(noise(8, 5), prompts)) == {}
    assert metric(prompts).compute(seen(noise(8, 5)[:7], prompts[:7])) != values


def test_message(metric):
    with pytest.raises(ValueError, match="vendi needs at least 1 image, got 0"):
        metric().compute(seen(torch.zeros(0, 3)))
    assert metric().protocol() == {"extractor": "known", "kernel": "cosine"}
