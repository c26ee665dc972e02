"""Statistics of real images on disk: what is kept, what other programs' files are taken for, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fastgen.data import Item
from fastgen.evaluation import features, fid, kid, seen, sfid, stats
from fastgen.evaluation.context import Context, Seen


class Noise:
    """Noise images, each of its own."""

    def __init__(self, size=11, has_images=True):
        self.size, self.has_images = size, has_images

    def __len__(self):
        return self.size

    def item(self, index):
        pixels = np.random.default_rng([7, index]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Item(f"noise {index}", pixels)


class Eyes:
    """Sees an image's first numbers."""

    def __init__(self, width=6, key="eyes-6"):
        self.width, self.key = width, key

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        return images.flatten(1)[:, : self.width].float() / 255

    def protocol(self):
        return {"extractor": "eyes"}


@pytest.fixture
def eyes(monkeypatch):
    found = Eyes()
    monkeypatch.setattr(features, "extractor", lambda _: found)
    return found


def rows_of(source, extractor):
    return extractor(seen.real_images(source, range(len(source))), [""] * len(source))


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_statistics_are_numpys_whatever_the_batches(tmp_path, batch_size):
    source, extractor = Noise(), Eyes()
    told = stats.make(source, extractor, tmp_path / "sub" / "real.npz", batch_size)
    rows = rows_of(source, extractor).double().numpy()
    with np.load(tmp_path / "sub" / "real.npz", allow_pickle=False) as file:
        assert set(file) == {"mu", "sigma", "features", "number", "sha256"}
        np.testing.assert_allclose(file["mu"], rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(file["sigma"], np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-15)
    images = [seen.real_images(source, [i]) for i in range(11)]
    assert told == {
        "path": str(tmp_path / "sub" / "real.npz"),
        "features": "eyes-6",
        "number": 11,
        "sha256": features.hash_images(images),
        "protocol": {"extractor": "eyes"},
    }


def test_far_from_zero_no_digits_are_lost(tmp_path):
    class Far(Eyes):
        def __call__(self, images, prompts):
            return 1e4 + super().__call__(images, prompts)

    source, extractor = Noise(40), Far()
    stats.make(source, extractor, tmp_path / "real.npz", 7)
    _, covariance = stats.load(tmp_path / "real.npz").statistics(extractor)
    want = np.cov(rows_of(source, extractor).double().numpy(), rowvar=False)
    np.testing.assert_allclose(covariance.numpy(), want, rtol=1e-9, atol=1e-14)


def test_a_stored_reference_stands_for_its_images(tmp_path, eyes):
    source = Noise()
    stats.make(source, eyes, tmp_path / "real.npz", 4, keep_rows=True)
    stored, real = stats.load(tmp_path / "real.npz"), seen.Real(source, range(11), 4)
    assert torch.equal(stored.rows(eyes), real.rows(eyes))
    for one, other in zip(stored.statistics(eyes), real.statistics(eyes), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)
    assert stored.protocol() == real.protocol()
    made = Seen([""] * 5, {"eyes-6": rows_of(Noise(5), eyes) + 0.5})
    for module in (fid, kid):
        by_file, by_source = (module.Metric(Context(reference=ref)).compute(made) for ref in (stored, real))
        assert by_file == pytest.approx(by_source, rel=1e-8)


def test_other_features_are_refused(tmp_path, eyes):
    stats.make(Noise(), eyes, tmp_path / "real.npz", 4, keep_rows=True)
    stored = stats.load(tmp_path / "real.npz")
    message = "real.npz: statistics of eyes-6, but images are seen by eyes-7; make them anew with `fastgen stats`, or"
    for ask in (stored.statistics, stored.rows):
        with pytest.raises(ValueError, match=re.escape(message)):
            ask(Eyes(6, "eyes-7"))


def test_kid_needs_rows(tmp_path, eyes):
    stats.make(Noise(), eyes, tmp_path / "real.npz", 4)
    message = "real.npz: has statistics only, no features of each image; set eval.reference to a source of images, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        kid.Metric(Context(reference=stats.load(tmp_path / "real.npz")))


def test_files_of_clean_fid_and_edm(tmp_path, eyes):
    """mu and sigma alone."""
    rows = rows_of(Noise(), eyes).numpy()
    path = write(tmp_path / "cifar10.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    stored = stats.load(path)
    mean, covariance = stored.statistics(eyes)
    assert (mean.dtype, covariance.dtype) == (torch.float64, torch.float64)
    np.testing.assert_allclose(covariance.numpy(), np.cov(rows, rowvar=False))
    assert stored.protocol()["num_images"] is None
    assert stored.protocol()["file"] == "cifar10.npz"
    assert len(stored.protocol()["file_sha256"]) == 64
    message = "cifar10.npz: statistics of 6 features, but eyes-4 gives 4; set eval.features to theirs"
    with pytest.raises(ValueError, match=message):
        stored.statistics(Eyes(4, "eyes-4"))


def test_files_of_clean_fids_kid(tmp_path, eyes):
    rows = rows_of(Noise(), eyes)
    stored = stats.load(write(tmp_path / "kid.npz", feats=rows.numpy()))
    assert torch.equal(stored.rows(eyes), rows)
    assert torch.allclose(stored.statistics(eyes)[1], torch.cov(rows.double().T))
    assert stored.protocol()["num_images"] == 11
    with pytest.raises(ValueError, match=r"kid.npz: statistics of 6 features, but eyes-4 gives 4"):
        stored.rows(Eyes(4, "eyes-4"))


def test_files_of_adm(tmp_path, monkeypatch, eyes):
    """mu_s and sigma_s are sFID's; the images in ``arr_0`` are not looked at."""
    narrow = Eyes(4, "eyes-4")
    wide, spatial = rows_of(Noise(), eyes).numpy(), rows_of(Noise(9), narrow).numpy()
    arrays = {"mu": wide.mean(0), "sigma": np.cov(wide, rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False), "arr_0": np.zeros((2, 4, 4, 3))}
    stored = stats.load(write(tmp_path / "VIRTUAL_imagenet64.npz", **arrays))
    np.testing.assert_allclose(stored.statistics(eyes)[0].numpy(), arrays["mu"])
    np.testing.assert_allclose(stored.statistics(narrow)[0].numpy(), arrays["mu_s"])
    monkeypatch.setattr(features, "inception_extractor", lambda *_: narrow)
    made = Seen([""] * 9, {"eyes-4": torch.from_numpy(spatial)})
    assert sfid.Metric(Context(reference=stored)).compute(made)["sfid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="statistics of 6 and 4 features, but eyes-5 gives 5"):
        stored.statistics(Eyes(5, "eyes-5"))


def test_what_is_no_file_of_statistics(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            stats.load(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "no.npz", "no.npz: no such file of statistics; `fastgen stats` makes one")
    (tmp_path / "text.npz").write_text("mu")
    refused(tmp_path / "text.npz", "text.npz: not an .npz of plain arrays (")
    write(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object))
    refused(tmp_path / "pickled.npz", "pickled.npz: not an .npz of plain arrays (Object arrays cannot be loaded")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(tmp_path / "one.npy", "one.npy: not an .npz of plain arrays (")
    refused(write(tmp_path / "other.npz", arr_0=np.zeros(3)), "other.npz: has neither mu and sigma nor feats;")
    bad = write(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(2))
    refused(bad, "bad.npz: a mean of shape (3,) has no covariance of shape (2, 2)")
    flat = write(tmp_path / "flat.npz", feats=np.zeros(3))
    refused(flat, "flat.npz: feats must be [images, features], at least 2 images; got (3,)")


@pytest.mark.parametrize(("source", "number"), [(Noise(1), 1), (Noise(5, has_images=False), 0)])
def test_what_has_too_few_images(tmp_path, source, number):
    with pytest.raises(ValueError, match=f"statistics need at least 2 images, the source has {number}"):
        stats.make(source, Eyes(), tmp_path / "real.npz", 4)
    assert not list(tmp_path.iterdir())
