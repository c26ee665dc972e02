"""The Frechet distance: closed forms, invariances, other libraries' numbers; FID, sFID and patch FID with it."""

from __future__ import annotations

import re

import pytest
import torch
from cleanfid import fid as cleanfid

from fastgen.evaluation import features, fid, frechet, patch_fid, sfid
from fastgen.evaluation.context import Context, Seen
from fastgen.evaluation.frechet import gaussian, to_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows):
    return rows.mean(0), torch.cov(rows.T)


def covariance(dimensions, seed):
    root = normal(dimensions, dimensions, seed=seed)
    return root @ root.T


# The distance


def test_of_diagonal_gaussians():
    mean_a, mean_b = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([4.0, -2.0, 1.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.5, 0.5])
    want = 3**2 + 4**2 + 2**2 + 1.5**2
    assert frechet.frechet(mean_a, std_a.square().diag(), mean_b, std_b.square().diag()) == pytest.approx(want)


def test_of_covariances_that_do_not_commute():
    a, b = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double(), torch.tensor([[0.5, -0.4], [-0.4, 3.0]]).double()
    assert not torch.allclose(a @ b, b @ a)
    root = (torch.trace(a @ b) + 2 * (a.det() * b.det()).sqrt()).sqrt()  # tr sqrt(M) of a 2 x 2 matrix
    want = 0.25 + a.trace() + b.trace() - 2 * root
    got = frechet.frechet(torch.zeros(2), a, torch.tensor([0.3, 0.4], dtype=torch.float64), b)
    assert got == pytest.approx(float(want), rel=1e-12)


def test_of_a_scaled_gaussian():
    mean, a = normal(7), covariance(7, 1)
    assert frechet.frechet(mean, a, mean, 9 * a) == pytest.approx(4 * float(a.trace()), rel=1e-12)


def test_to_itself_is_zero():
    mean, a = normal(30), covariance(30, 1)
    assert frechet.frechet(mean, a, mean, a) < 1e-10 * float(a.trace())
    rows = normal(50, 30)
    assert to_rows(gaussian(*moments(rows)), rows) < 1e-10 * 30
    few = 100 * normal(5, 48)
    assert to_rows(gaussian(*moments(few)), few) < 1e-6 * float(few.square().sum())


def test_is_symmetric_and_the_same_by_moments_and_by_rows():
    x, y = normal(40, 12), 1 + normal(60, 12, seed=1) @ covariance(12, 2)
    want = frechet.frechet(*moments(x), *moments(y))
    assert frechet.frechet(*moments(y), *moments(x)) == pytest.approx(want, rel=1e-10)
    assert to_rows(gaussian(*moments(x)), y) == pytest.approx(want, rel=1e-10)
    assert to_rows(gaussian(*moments(y)), x) == pytest.approx(want, rel=1e-10)


def test_does_not_change_under_translation_and_rotation():
    x, y = normal(40, 12), 1 + normal(60, 12, seed=1)
    rotation, _ = torch.linalg.qr(normal(12, 12, seed=3))
    want = to_rows(gaussian(*moments(x)), y)
    moved = [(rows + 5) @ rotation for rows in (x, y)]
    assert to_rows(gaussian(*moments(moved[0])), moved[1]) == pytest.approx(want, rel=1e-10)


def test_a_shift_adds_its_square():
    x, shift = normal(40, 12), normal(12, seed=4)
    assert to_rows(gaussian(*moments(x)), x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


@pytest.mark.parametrize(("reals", "mades"), [(5, 7), (7, 5), (200, 5), (5, 200), (200, 300)])
def test_is_exact_with_fewer_rows_than_features(reals, mades):
    x, y = 10 + 3 * normal(reals, 64), 12 + 2 * normal(mades, 64, seed=1)
    xc, yc = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    # tr sqrt(Xc^T Xc Yc^T Yc) is the nuclear norm of Xc Yc^T
    want = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum()
    want -= 2 * torch.linalg.svdvals(xc @ yc.T).sum()
    assert to_rows(gaussian(*moments(x)), y) == pytest.approx(float(want), rel=1e-8)
    assert frechet.frechet(*moments(x), *moments(y)) == pytest.approx(float(want), rel=1e-6)


def test_of_points_is_their_distance():
    x, y = torch.ones(3, 4), torch.full((2, 4), 3.0)
    assert to_rows(gaussian(*moments(x)), y) == 16
    assert frechet.frechet(*moments(x), *moments(y)) == 16


def test_is_clean_fids_number_on_the_same_features():
    x, y = 0.4 + 0.3 * normal(300, 24).abs(), 0.5 + 0.4 * normal(400, 24, seed=1).abs()
    want = cleanfid.fid_from_feats(x.float().numpy(), y.float().numpy())
    assert to_rows(gaussian(*moments(y.float().double())), x.float()) == pytest.approx(want, rel=1e-6)
    assert frechet.frechet(*moments(x), *moments(y)) == pytest.approx(want, rel=1e-5)


def test_is_torchmetrics_number_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 24

        def forward(self, images):
            return images.flatten(1)[:, :24].double()

    images = torch.randint(0, 256, (2, 50, 3, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = FrechetInceptionDistance(Features())
    theirs.update(images[0], real=True)
    theirs.update(images[1], real=False)
    x, y = (part.flatten(1)[:, :24].double() for part in images)
    assert to_rows(gaussian(*moments(x)), y) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_is_torch_fidelitys_number_on_the_same_features():
    theirs = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    x, y = 0.4 + 0.3 * normal(300, 24).abs(), 0.5 + 0.4 * normal(400, 24, seed=1).abs()
    told = [dict(zip(("mu", "sigma"), (v.numpy() for v in moments(rows)), strict=True)) for rows in (x, y)]
    want = theirs.fid_statistics_to_metric(*told, verbose=False)[theirs.KEY_METRIC_FID]
    assert frechet.frechet(*moments(x), *moments(y)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (torch.zeros(3), torch.eye(2), "a mean of 3 features has no covariance of shape (2, 2)"),
        (torch.tensor([0.0, torch.nan]), torch.eye(2), "mean and covariance must be finite"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -0.5])), "a covariance cannot have the eigenvalue -0.5"),
    ],
)
def test_what_is_no_gaussian(mean, cov, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gaussian(mean, cov)


def test_features_of_another_width():
    with pytest.raises(ValueError, match="features of 4 numbers cannot be held against statistics of 3"):
        to_rows(gaussian(torch.zeros(3), torch.eye(3)), torch.zeros(5, 4))


# The metrics


class Eyes:
    """Sees the first numbers of an image."""

    num_features = 6
    key = "eyes"

    def __call__(self, images, prompts):
        return images.flatten(1)[:, :6].float()

    def protocol(self):
        return {"extractor": "eyes"}


class Rows:
    """A reference of given rows."""

    def __init__(self, rows):
        self.given, self.asked = rows, 0

    def rows(self, extractor):
        return self.given

    def statistics(self, extractor):
        self.asked += 1
        return moments(self.given.double())

    def protocol(self):
        return {"num_images": len(self.given), "sha256": "abc"}


@pytest.fixture
def eyes(monkeypatch):
    found = Eyes()
    monkeypatch.setattr(features, "extractor", lambda _: found)
    return found


def seen(rows):
    return Seen([""] * len(rows), {"eyes": rows.float()})


def test_fid_is_the_distance_to_the_reference(eyes):
    real, made = 2 + normal(30, 6), 3 * normal(20, 6, seed=1)
    metric = fid.Metric(Context(reference=Rows(real)))
    assert metric.extractors == (eyes,)
    assert metric.compute(seen(made)) == {
        "fid": pytest.approx(cleanfid.fid_from_feats(made.numpy(), real.numpy()), rel=1e-5)
    }
    assert metric.per_image(seen(made)) == {}
    assert metric.protocol() == {"extractor": "eyes", "reference": {"num_images": 30, "sha256": "abc"}}


def test_fid_does_not_depend_on_the_order(eyes):
    metric, rows = fid.Metric(Context(reference=Rows(normal(30, 6)))), seen(2 * normal(20, 6, seed=1))
    whole = metric.compute(rows)["fid"]
    assert metric.compute(rows.take(torch.randperm(20).tolist()))["fid"] == pytest.approx(whole, rel=1e-10)
    assert metric.compute(rows.take(range(19)))["fid"] != pytest.approx(whole, rel=1e-6)


def test_reference_is_asked_once(eyes):
    reference = Rows(normal(30, 6))
    for _ in range(2):
        metric = fid.Metric(Context(reference=reference))
        for size in (5, 10):
            metric.compute(seen(normal(size, 6)))
    assert reference.asked == 1


def test_fid_needs_a_reference_and_two_images(eyes):
    with pytest.raises(ValueError, match=r"fid needs real images; set eval.reference to a source that has them"):
        fid.Metric(Context())
    metric = fid.Metric(Context(reference=Rows(normal(30, 6))))
    with pytest.raises(ValueError, match="fid needs at least 2 images, got 1"):
        metric.compute(seen(normal(1, 6)))


@pytest.mark.parametrize(
    ("module", "name", "prepared", "output"),
    [(sfid, "sfid", "legacy_tensorflow", "spatial"), (patch_fid, "patch_fid", "patch", "pool")],
)
def test_sfid_and_patch_fid_are_of_their_own_features(eyes, monkeypatch, module, name, prepared, output):
    asked = []
    monkeypatch.setattr(features, "inception_extractor", lambda *a: asked.append(a[1:]) or eyes)
    real, made = normal(30, 6), 2 * normal(20, 6, seed=1)
    metric = module.Metric(Context(reference=Rows(real), features="clip"))
    assert asked in ([(prepared, output)], [(prepared,)])
    assert metric.compute(seen(made)) == {
        name: pytest.approx(cleanfid.fid_from_feats(made.numpy(), real.numpy()), rel=1e-5)
    }
    assert module.ABOUT.values == (name,)
    with pytest.raises(ValueError, match=f"{name} needs real images"):
        module.Metric(Context())
    with pytest.raises(ValueError, match=f"{name} needs at least 2 images, got 0"):
        metric.compute(seen(torch.zeros(0, 6)))


def test_few_images_of_wide_features_take_a_small_decomposition(monkeypatch):
    sizes, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: sizes.append(len(m)) or eigvalsh(m))
    one = gaussian(torch.zeros(256), torch.eye(256))
    rows = normal(20, 256)
    assert to_rows(one, rows) == pytest.approx(frechet.frechet(torch.zeros(256), torch.eye(256), *moments(rows)))
    assert sizes == [20, 256]
