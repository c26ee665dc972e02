"""The inception score: closed forms, splits, other libraries' numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastgen.evaluation import features
from fastgen.evaluation.context import Context, Seen
from fastgen.evaluation.inception_score import Metric, inception_score


def logits(count, classes=7, seed=0):
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_of_sure_predictions_is_the_number_of_classes_seen():
    sure = 1000 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, splits=1).tolist() == pytest.approx([5])
    assert inception_score(sure, splits=4).tolist() == pytest.approx([5] * 4)
    assert inception_score(1000 * torch.eye(5)[:3], splits=1).tolist() == pytest.approx([3])


def test_of_equal_predictions_is_one():
    assert inception_score(logits(1).repeat(20, 1)).tolist() == pytest.approx([1] * 10)


def test_of_two_mirrored_predictions():
    p = 0.8
    pair = torch.tensor([[p, 1 - p], [1 - p, p]]).log()
    want = torch.tensor(2 * p**p * (1 - p) ** (1 - p))  # exp of log 2 less the entropy of p
    assert inception_score(pair, splits=1).item() == pytest.approx(float(want), rel=1e-6)


def test_a_constant_added_to_all_logits_changes_nothing():
    rows = logits(20)
    assert inception_score(rows + 3, 2).tolist() == pytest.approx(inception_score(rows, 2).tolist(), rel=1e-6)


def test_splits_are_by_number():
    rows = logits(23)
    found = inception_score(rows, 10)
    bounds = [0, 2, 4, 6, 9, 11, 13, 16, 18, 20, 23]
    want = [inception_score(rows[a:b], 1).item() for a, b in pairwise(bounds)]
    assert found.tolist() == pytest.approx(want, rel=1e-12)


def test_one_split_does_not_depend_on_the_order():
    rows = logits(23)
    mixed = rows[torch.randperm(23, generator=torch.Generator().manual_seed(1))]
    assert inception_score(mixed, 1).item() == pytest.approx(inception_score(rows, 1).item(), rel=1e-10)


def test_is_torch_fidelitys_number_on_the_same_features():
    theirs = pytest.importorskip("torch_fidelity.metric_isc", reason="torch-fidelity is not installed")
    rows = logits(57, 30)
    want = theirs.isc_features_to_metric(rows, splits=10, shuffle=False)
    assert inception_score(rows).mean().item() == pytest.approx(want[theirs.KEY_METRIC_ISC_MEAN], rel=1e-9)


def test_metric(monkeypatch):
    class Eyes:
        key = "eyes"

        def protocol(self):
            return {"extractor": "eyes"}

    asked = []
    monkeypatch.setattr(features, "inception_extractor", lambda *a: asked.append(a[1:]) or Eyes())
    metric = Metric(Context(features="clip"))
    assert asked == [("legacy_tensorflow", "logits")]
    rows = logits(40)
    seen = Seen([""] * 40, {"eyes": rows})
    assert metric.compute(seen) == {"inception_score": pytest.approx(inception_score(rows).mean().item())}
    assert metric.per_image(seen) == {}
    assert metric.protocol() == {"extractor": "eyes", "splits": "10, by the images' numbers"}
    with pytest.raises(ValueError, match="inception_score needs at least 10 images, got 9"):
        metric.compute(seen.take(range(9)))
