"""KID: closed forms, all subsets at once, other libraries' numbers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid

from fastgen.evaluation import features, kid
from fastgen.evaluation.context import Context, Seen
from fastgen.evaluation.kid import within


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(x, y):
    return kid.kid(x, y, within(y))


def by_hand(x, y):
    """The definition, a pair at a time."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


def test_of_two_points():
    x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[0.0], [-1.0]]).double()
    # k(1, 2) = 27, k(0, -1) = 1; k(1, 0) = k(2, 0) = 1, k(1, -1) = 0, k(2, -1) = -1
    assert value(x, y) == 27 + 1 - 2 * (1 + 1 + 0 - 1) / 4


def test_is_the_definition_whatever_the_blocks(monkeypatch):
    x, y = normal(11, 3), 0.5 + normal(7, 3, seed=1)
    want = by_hand(x, y)
    for block in (1, 2, 4, 11, 2048):
        monkeypatch.setattr(kid, "_BLOCK", block)
        assert value(x, y) == pytest.approx(want, rel=1e-12)


def test_is_the_mean_over_all_subsets():
    """So clean-fid's mean over random subsets tends to it, from both sides."""
    x, y = normal(5, 3), 0.5 + normal(4, 3, seed=1)
    subsets = [value(x[list(i)], y[list(j)]) for i in combinations(range(5), 3) for j in combinations(range(4), 3)]
    assert value(x, y) == pytest.approx(np.mean(subsets), rel=1e-12)
    assert max(subsets) > value(x, y) > min(subsets)


def test_is_clean_fids_number_where_a_subset_is_everything():
    x, y = normal(40, 16).abs(), 0.3 + normal(40, 16, seed=1).abs()
    want = cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=3, max_subset_size=1000)
    assert value(x, y) == pytest.approx(want, rel=1e-9)
    assert value(x.float().double(), y) == pytest.approx(
        cleanfid.kernel_distance(x.float().numpy(), y.numpy(), num_subsets=1), rel=1e-3
    )


def test_is_what_clean_fids_random_subsets_tend_to():
    x, y = normal(60, 8).abs(), 1 + normal(50, 8, seed=1).abs()
    np.random.seed(0)  # the generator that clean-fid draws from
    want = cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=4000, max_subset_size=25)
    assert value(x, y) == pytest.approx(want, rel=0.01)


def test_is_torchmetrics_number_where_a_subset_is_everything():
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(40, 16).abs(), 0.3 + normal(40, 16, seed=1).abs()
    assert value(x, y) == pytest.approx(float(poly_mmd(y, x)), rel=1e-9)


def test_is_torch_fidelitys_number_where_a_subset_is_everything():
    theirs = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity is not installed")
    x, y = normal(40, 16).abs(), 0.3 + normal(40, 16, seed=1).abs()
    want = theirs.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=40, verbose=False)
    assert value(x, y) == pytest.approx(want[theirs.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_is_unbiased():
    """Over draws from one distribution the mean is 0, so that some are below it."""
    found = [value(normal(8, 4, seed=2 * i), normal(8, 4, seed=2 * i + 1)) for i in range(600)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * np.std(found) / 600**0.5


def test_does_not_change_under_rotation():
    x, y = normal(12, 6), 1 + normal(9, 6, seed=1)
    rotation, _ = torch.linalg.qr(normal(6, 6, seed=2))
    assert value(x @ rotation, y @ rotation) == pytest.approx(value(x, y), rel=1e-10)
    assert value(y, x) == pytest.approx(value(x, y), rel=1e-10)


class Eyes:
    key = "eyes"

    def __call__(self, images, prompts):
        return images.flatten(1).float()

    def protocol(self):
        return {"extractor": "eyes"}


class Rows:
    def __init__(self, rows):
        self.given, self.asked = rows, 0

    def rows(self, extractor):
        self.asked += 1
        return self.given

    def protocol(self):
        return {"num_images": len(self.given), "sha256": "abc"}


@pytest.fixture
def eyes(monkeypatch):
    found = Eyes()
    monkeypatch.setattr(features, "extractor", lambda _: found)
    return found


def seen(rows):
    return Seen([""] * len(rows), {"eyes": rows})


def test_metric_holds_rows_against_the_reference(eyes):
    real, made = normal(30, 6).float(), 1 + normal(20, 6, seed=1).float()
    reference = Rows(real)
    metric, again = kid.Metric(Context(reference=reference)), kid.Metric(Context(reference=reference))
    want = value(made.double(), real.double())
    assert metric.compute(seen(made)) == again.compute(seen(made)) == {"kid": want}
    assert reference.asked == 1
    mixed = seen(made).take(torch.randperm(20).tolist())
    assert metric.compute(mixed)["kid"] == pytest.approx(want, rel=1e-10)
    assert metric.compute(seen(made[:19]))["kid"] != pytest.approx(want, rel=1e-6)
    assert metric.per_image(seen(made)) == {}
    told = metric.protocol()
    assert told["reference"] == {"num_images": 30, "sha256": "abc"}
    assert "unbiased, over all pairs of images at once, not over random subsets" in told["kernel"]


def test_what_it_needs(eyes):
    with pytest.raises(ValueError, match=r"kid needs real images; set eval.reference to a source that has them"):
        kid.Metric(Context())
    with pytest.raises(ValueError, match="kid needs at least 2 real images, the reference has 1"):
        kid.Metric(Context(reference=Rows(normal(1, 6))))
    metric = kid.Metric(Context(reference=Rows(normal(5, 6))))
    with pytest.raises(ValueError, match="kid needs at least 2 images, got 1"):
        metric.compute(seen(normal(1, 6)))
