"""Precision, recall, density and coverage: closed forms, the definitions pair by pair, and any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgen.evaluation import features, prdc
from fastgen.evaluation.context import Context
from tests.rows import Known, Real, noise, same_however_seen, seen


@pytest.fixture
def metric(monkeypatch):
    """Gives the metric against real features."""
    eyes = Known()
    monkeypatch.setattr(features, "extractor", lambda context: eyes)
    return lambda real: prdc.Metric(Context(reference=Real(torch.as_tensor(real, dtype=torch.float32))))


def line(*places):
    """Points on a line in a plane."""
    return [[float(x), 1.0] for x in places]


def test_the_same_images(metric):
    """In each real image's open ball lie itself and its 4 nearer neighbours of 5: density 1, the rest 1."""
    for points in (line(0, 1, 3, 7, 15, 31, 63, 127, 255), noise(30, 6).tolist()):
        got = metric(points).compute(seen(points))
        assert got == {"precision": 1, "recall": 1, "density": pytest.approx(1, rel=1e-12), "coverage": 1}


def test_far_apart(metric):
    real, made = noise(12, 4), noise(9, 4, seed=1) + 1000
    assert metric(real).compute(seen(made)) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_all_made_are_one_real_image(metric):
    """Collapse: what is made is precise, but nothing real lies in its balls of radius 0 but that image."""
    real = line(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    got = metric(real).compute(seen(line(5, 5, 5, 5, 5)))
    # radii of the 5th neighbour: 5, 4, 3, 3, 3, 3, 3, 3, 4, 5; so 5 lies in the open balls of 3 ... 9
    assert got == {"precision": 1, "recall": 0.1, "density": 7 / 5, "coverage": 0.7}


def test_points_on_a_line(metric):
    """Real 0, 10, ..., 90; made 0, 1, 2, 3 and 200. All by hand."""
    got = metric(line(*range(0, 100, 10))).compute(seen(line(0, 1, 2, 3, 200)))
    # closed balls of real, k = 3: radius 30 at 0, 20 at 10, 20 inside: 0, 1, 2, 3 lie in that of 0
    assert got["precision"] == 4 / 5
    # closed balls of made, k = 3: 0: 3, 1: 2, 2: 2, 3: 3, 200: 199, which reaches 1: all real ones but 0, and 0 itself
    assert got["recall"] == 1
    # open balls of real, k = 5: radii 50, 40, 30, 30, ...: 0 lies in those of 0, 10, 20; 1, 2 and 3 in 30's, too
    assert got["density"] == pytest.approx((3 + 4 + 4 + 4 + 0) / 5 / 5)
    # and made ones in those of 0, 10, 20, 30 of the ten
    assert got["coverage"] == 4 / 10


def test_the_balls_of_precision_and_recall_are_closed_and_the_others_open(metric):
    """Real 0, 10, ..., 90, whose radii at 0 are 30 and 50; made 120 away, with a radius of 60 that ends at 0."""
    real = line(*range(0, 100, 10))
    assert metric(real).compute(seen(line(-30, -31, -31, -31)))["precision"] == 1 / 4
    assert metric(real).compute(seen(line(-49, -50, -50, -50)))["density"] == 1 / 4 / 5
    got = metric(real).compute(seen(line(-60, -61, -70, -120)))
    assert got["recall"] == 1 / 10
    assert metric(line(*range(1, 100, 10))).compute(seen(line(-60, -61, -70, -120)))["recall"] == 0


def definition(real, made):
    """Naeem et al. 2020, equations 2, 3, 5 and 7, by all pairs."""
    real, made = real.numpy().astype(np.float64), made.numpy().astype(np.float64)

    def distances(a, b):
        return np.array([[np.linalg.norm(x - y) for y in b] for x in a])

    def radius(points, k):
        return np.sort(distances(points, points), axis=1)[:, k]  # the first is itself

    between = distances(real, made)
    return {
        "precision": (between <= radius(real, 3)[:, None]).any(0).mean(),
        "recall": (between <= radius(made, 3)[None]).any(1).mean(),
        "density": (between < radius(real, 5)[:, None]).sum(0).mean() / 5,
        "coverage": (between.min(1) < radius(real, 5)).mean(),
    }


@pytest.mark.parametrize("block", [1024, 5])
@pytest.mark.parametrize(("count", "shift", "scale"), [(30, 0.0, 1.0), (23, 1.0, 0.5), (40, 0.3, 2.0)])
def test_it_is_the_definition(metric, monkeypatch, block, count, shift, scale):
    monkeypatch.setattr(prdc, "_BLOCK", block)
    real, made = noise(28, 6), scale * noise(count, 6, seed=1) + shift
    got, want = metric(real).compute(seen(made)), definition(real, made)
    assert got == {name: pytest.approx(value, rel=1e-12) for name, value in want.items()}
    assert 0 < got["density"]
    assert min(got["recall"], got["precision"], got["coverage"]) < 1


def test_it_is_the_authors_package(metric, capsys):
    """With one k for all. The package is installed by hand where it is wanted: it is not a dependency."""
    package = pytest.importorskip("prdc", reason="pip install prdc")
    real, made = noise(60, 8), 0.8 * noise(50, 8, seed=1) + 0.2
    want = {k: package.compute_prdc(real.numpy(), made.numpy(), nearest_k=k) for k in (3, 5)}
    got = metric(real).compute(seen(made))
    for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5)):
        assert got[name] == pytest.approx(want[k][name], rel=1e-6), name


def test_any_order_or_merge_gives_the_same_numbers(metric):
    one, made = metric(noise(30, 6)), noise(20, 6, seed=1)
    values = same_however_seen(one, seen(made))
    assert set(values) == set(prdc.ABOUT.values)
    assert set(one.per_image(seen(made))) == {"precision", "density"}
    assert one.compute(seen(made[:12])) != values


def test_the_real_side_is_found_once(monkeypatch):
    eyes, real = Known(), Real(noise(8, 3))
    monkeypatch.setattr(features, "extractor", lambda context: eyes)
    first, _ = (prdc.Metric(Context(reference=real)) for _ in range(2))
    assert real.asked == ["known"]
    assert first.protocol()["nearest"] == {"precision, recall": 3, "density, coverage": 5}


def test_messages(metric):
    with pytest.raises(ValueError, match=r"prdc needs real images; set eval\.reference"):
        prdc.Metric(Context())
    with pytest.raises(ValueError, match="prdc needs at least 6 real images, the reference has 5"):
        metric(noise(5, 3))
    for ask in (prdc.Metric.compute, prdc.Metric.per_image):
        with pytest.raises(ValueError, match="prdc needs at least 4 images, got 3"):
            ask(metric(noise(6, 3)), seen(noise(3, 3)))
