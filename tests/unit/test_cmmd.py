"""CMMD against a closed form, all pairs by hand, and any order of the images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgen.evaluation import cmmd, features, weights
from fastgen.evaluation.context import Context
from tests import command
from tests.rows import Known, Real, noise, same_however_seen, seen


@pytest.fixture
def metric(monkeypatch):
    """Gives the metric against real embeddings."""
    clip = Known()
    monkeypatch.setattr(cmmd, "clip_of", lambda context: clip)
    return lambda real: cmmd.Metric(Context(reference=Real(torch.as_tensor(real))))


def value(metric, made):
    return metric.compute(seen(made))["cmmd"]


def test_two_directions(metric):
    """Made images at one angle to all real ones: 1000 (1 + 1 - 2 exp(-|x - y|^2 / 200)), whatever their lengths."""
    real, made = [[3.0, 0.0], [1.0, 0.0], [0.5, 0.0]], [[0.0, 2.0], [0.0, 7.0]]
    assert value(metric(real), made) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)
    opposite = [[-1.0, 0.0], [-2.0, 0.0]]
    assert value(metric(real), opposite) == pytest.approx(2000 * (1 - math.exp(-4 / 200)), rel=1e-12)


def test_a_half_in_each_of_two_directions(metric):
    """Made: half at right angles to the real direction, where k is q. Means: (1 + q) / 2, 1 and (1 + q) / 2."""
    q = math.exp(-2 / 200)
    got = value(metric([[1.0, 0.0], [2.0, 0.0]]), [[1.0, 0.0], [0.0, 1.0]])
    assert got == pytest.approx(1000 * ((1 + q) / 2 + 1 - (1 + q)), rel=1e-12)


def test_the_same_images_are_no_distance_apart(metric):
    assert value(metric(noise(7, 5)), noise(7, 5)) < 1e-10
    assert value(metric(noise(7, 5)), noise(7, 5)[[0, 1, 2, 3, 4, 5, 6] * 2]) < 1e-10


def by_hand(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair."""
    x, y = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float((i - j).square().sum()) / (2 * 10**2)) for i in a for j in b) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("block", [2048, 3])
def test_it_is_the_definition(metric, monkeypatch, block):
    monkeypatch.setattr(cmmd, "_BLOCK", block)
    real, made = noise(9, 6), noise(7, 6, seed=1) + 0.5
    assert value(metric(real), made) == pytest.approx(by_hand(made, real), rel=1e-10)


def reference_code(x: Tensor, y: Tensor) -> float:
    """As google-research's cmmd computes it: squared distances from inner products, in float32."""
    x, y = (torch.nn.functional.normalize(v) for v in (x, y))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        squares = -2 * a @ b.T + (a @ a.T).diag()[:, None] + (b @ b.T).diag()[None]
        return torch.exp(-squares / (2 * 10**2)).mean()

    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def test_it_is_the_reference_codes_but_for_its_rounding(metric):
    real, made = noise(300, 64), noise(200, 64, seed=1) + 0.5
    assert value(metric(real), made) == pytest.approx(reference_code(made, real), abs=2e-3)
    assert value(metric(real), made) == pytest.approx(reference_code(made.double(), real.double()), rel=1e-9)


def test_any_order_or_merge_gives_the_same_number(metric):
    one = metric(noise(9, 6))
    assert same_however_seen(one, seen(noise(8, 6, seed=1)))["cmmd"] > 0.1
    assert value(one, noise(7, 6, seed=1)) != pytest.approx(value(one, noise(8, 6, seed=1)), rel=1e-6)
    assert one.per_image(seen(noise(8, 6))) == {}


def test_the_real_side_is_found_once(monkeypatch):
    clip, real = Known(), Real(noise(4, 3))
    monkeypatch.setattr(cmmd, "clip_of", lambda context: clip)
    first, second = (cmmd.Metric(Context(reference=real)) for _ in range(2))
    assert real.asked == ["known"]
    assert first.protocol() == second.protocol()
    assert first.protocol()["reference"]["num_images"] == 4
    assert first.protocol()["extractor"] == "known"


def test_which_clip_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    given = command.clip(tmp_path / "mine")
    of_336 = command.clip(tmp_path / "clip-vit-large-patch14-336")
    for named in ({"clip": str(given)}, {"clip_336": str(given), "clip": "x/y"}):
        assert cmmd.clip_of(Context(weights=named)) is features.load_clip(str(given), "cpu")
    assert cmmd.clip_of(Context()) is features.load_clip(str(of_336), "cpu")


def test_messages(metric, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cmmd needs real images; set eval\.reference"):
        cmmd.Metric(Context())
    with pytest.raises(ValueError, match="cmmd needs at least 1 real image, the reference has 0"):
        metric(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="cmmd needs at least 1 image, got 0"):
        value(metric(noise(3, 3)), torch.zeros(0, 3))
    assert "clip_336" in weights.TABLE
