"""InceptionV3 with random weights, and how images come to it, against clean-fid's and torch-fidelity's own code."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from safetensors.torch import save_file

from fastgen.data import Item
from fastgen.evaluation import features, fid, frechet, inception, inception_score, kid, patch_fid, seen, sfid, weights
from fastgen.evaluation.context import Context
from tests import inception as nvidia

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
FILE = "inception-2015-12-05.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights as TorchScript, .pth and .safetensors."""
    found = tmp_path_factory.mktemp("inception")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        nvidia.write(found)
    tensors = inception.read(found / FILE)
    save_file(tensors, found / "inception.safetensors")
    # what pytorch-fid's file is: a pickle of tensors
    torch.serialization.save(tensors, found / "pt_inception-2015-12-05-6726825d.pth")
    return found


@pytest.fixture(autouse=True)
def forgotten():
    """No network of another test."""
    yield
    features.load_inception.cache_clear()
    features._network.cache_clear()


def noise(count, height, width, seed=0):
    """Smooth enough for resizes to differ, sharp enough to alias."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    sharp = torch.rand(count, 3, height, width, generator=generator)
    return (255 * (0.6 * smooth + 0.4 * sharp)).to(torch.uint8)


def close(got, want, rel=1e-4):
    """Largest and mean difference, as shares of how far the images lie apart."""
    assert got.shape == want.shape
    scale = float((want - want.mean(0)).abs().mean())
    assert float((got - want).abs().max()) < 10 * rel * scale
    assert float((got - want).abs().mean()) < rel * scale


def by_cleanfid(resized, folder, mode):
    """What clean-fid's own module makes of [B, H, W, 3] in 0 to 255."""
    module = InceptionV3W(str(folder), download=False, resize_inside=mode == "legacy_tensorflow").eval()
    with torch.no_grad():
        return module(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2))


# Preparation


def hwc(images):
    return [image.permute(1, 2, 0).numpy() for image in images]


@pytest.mark.parametrize("size", [(64, 80), (299, 299), (411, 320)])
def test_clean_is_clean_fids_resize_to_the_bit(size):
    images = noise(2, *size)
    theirs = np.stack([build_resizer("clean")(image) for image in hwc(images)])
    assert torch.equal(features.clean(images), (torch.from_numpy(theirs).permute(0, 3, 1, 2) - 128) / 128)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(64, 80), (299, 299), (411, 320)])
def test_legacy_pytorch_is_clean_fids_resize_to_the_bit(size):
    images = noise(2, *size)
    theirs = np.stack([build_resizer("legacy_pytorch")(image) for image in hwc(images)])
    assert torch.equal(features.legacy_pytorch(images), 2 * (torch.from_numpy(theirs).permute(0, 3, 1, 2) / 255) - 1)


@pytest.mark.parametrize("size", [(32, 32), (64, 80), (299, 299), (411, 320)])
def test_legacy_tensorflow_is_torch_fidelitys_resize(size):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow", reason="torch-fidelity is missing")
    images = noise(2, *size)
    want = theirs.interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    assert torch.allclose(features.legacy_tensorflow(images), (want - 128) / 128, atol=1e-5)


def test_legacy_tensorflow_on_a_ramp():
    """Position i lies at i W / 299, held at the last pixel."""
    ramp = torch.arange(0, 230, 10, dtype=torch.uint8).expand(1, 3, 5, 23)
    want = (10 * torch.arange(299) * 23 / 299).clamp(max=220)
    assert torch.allclose(128 * features.legacy_tensorflow(ramp)[0, 1, 7] + 128, want, atol=1e-3)


def test_resizes_are_told_apart():
    images = noise(1, 411, 320)
    prepared = [prepare(images) for prepare in (features.clean, features.legacy_pytorch, features.legacy_tensorflow)]
    for i, one in enumerate(prepared):
        assert one.shape == (1, 3, 299, 299)
        assert all(float((one - other).abs().mean()) > 0.02 for other in prepared[:i])


def test_patch_is_torchvisions_centre_and_is_not_resized():
    from torchvision.transforms.functional import center_crop

    for size in ((299, 299), (300, 301), (512, 416)):
        images = noise(1, *size)
        cut = center_crop(images, [299, 299])
        assert torch.equal(features.patch(images), (cut.float() - 128) / 128)
        assert torch.equal(features.patch(images), features.clean(cut)), "DMD2 gives the cut to clean-fid"


def test_patch_of_small_images():
    message = "patch_fid looks at 299 x 299 pixels, the images are 512 x 298; leave it out of eval.metrics"
    with pytest.raises(ValueError, match=message):
        features.patch(noise(1, 512, 298))


# The network


def test_is_clean_fids_network_on_its_clean_images(folder):
    images = noise(3, 64, 80)
    want = by_cleanfid([build_resizer("clean")(image) for image in hwc(images)], folder, "clean")
    close(features.load_inception(str(folder / FILE), "cpu", "clean", "pool")(images), want)


def test_is_what_clean_fid_makes_of_a_folder(folder, tmp_path):
    images = noise(3, 50, 50)
    for i, image in enumerate(hwc(images)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    module = InceptionV3W(str(folder), download=False).eval()
    settings = {"num_workers": 0, "batch_size": 2, "device": "cpu", "verbose": False}
    want = cleanfid.get_folder_features(str(tmp_path), module, mode="clean", **settings)
    close(features.load_inception(str(folder / FILE), "cpu", "clean", "pool")(images), torch.from_numpy(want))


def test_is_clean_fids_network_on_tensorflows_resize(folder):
    images = noise(3, 64, 80)
    want = by_cleanfid([image.astype(np.float32) for image in hwc(images)], folder, "legacy_tensorflow")
    # they sample at positions rounded to float32 in [-1, 1]
    close(features.load_inception(str(folder / FILE), "cpu", "legacy_tensorflow", "pool")(images), want, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_is_pytorch_fids_network(folder, monkeypatch):
    file = folder / "pt_inception-2015-12-05-6726825d.pth"
    tensors = inception.read(file)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: tensors)
    theirs = inception_pytorch.InceptionV3([3], resize_input=False).eval()
    images = noise(3, 64, 80)
    resized = torch.from_numpy(np.stack([build_resizer("legacy_pytorch")(image) for image in hwc(images)]))
    want = theirs(resized.permute(0, 3, 1, 2) / 255)[0].flatten(1)
    close(features.load_inception(str(file), "cpu", "legacy_pytorch", "pool")(images), want)


def test_is_torch_fidelitys_network(folder):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is missing")
    names, file = ["2048", "logits_unbiased"], folder / "pt_inception-2015-12-05-6726825d.pth"
    module = theirs.FeatureExtractorInceptionV3("random", names, feature_extractor_weights_path=file)
    images = noise(3, 64, 80)
    pooled, logits = module(images)
    for output, want in (("pool", pooled), ("logits", logits)):
        close(features.load_inception(str(folder / FILE), "cpu", "legacy_tensorflow", output)(images), want)


def test_spatial_features_are_of_nvidias_mixed_6(folder):
    """ADM's "mixed_6/conv:0", first 7 channels, channels last."""
    images = noise(2, 64, 80)
    script = torch.jit.load(folder / FILE)
    with torch.no_grad():
        x = features.legacy_tensorflow(images)
        for name, layer in script.layers.named_children():
            if name == "mixed_6":
                want = layer.conv(x)
                break
            x = layer(x)
    assert want.shape == (2, 192, 17, 17)
    rows = features.load_inception(str(folder / FILE), "cpu", "legacy_tensorflow", "spatial")(images)
    assert rows.shape == (2, 2023)
    close(rows, want[:, :7].permute(0, 2, 3, 1).reshape(2, 2023))


def test_probabilities_are_nvidias_without_bias(folder):
    images = noise(2, 64, 80)
    rows = features.load_inception(str(folder / FILE), "cpu", "legacy_tensorflow", "logits")(images)
    with torch.no_grad():
        want = torch.jit.load(folder / FILE)(images, no_output_bias=True)
    assert torch.allclose(rows.softmax(1), want, atol=1e-7)
    assert not torch.allclose(rows.softmax(1), torch.jit.load(folder / FILE)(images), atol=1e-5)


def test_a_row_depends_on_its_own_image_alone(folder):
    images = noise(3, 64, 80)
    eyes = features.load_inception(str(folder / FILE), "cpu", "clean", "pool")
    whole = eyes(images)
    close(torch.cat([eyes(images[i : i + 1]) for i in (0, 1, 2)]), whole)
    close(eyes(images[[2, 0, 1]]), whole[[2, 0, 1]])
    assert whole.dtype == torch.float32
    assert whole.device.type == "cpu"


def test_outputs_share_a_pass(folder, monkeypatch):
    calls = []
    forward = inception.InceptionV3.forward
    monkeypatch.setattr(inception.InceptionV3, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    images = noise(2, 64, 80)
    eyes = {
        (way, output): features.load_inception(str(folder / FILE), "cpu", way, output)
        for way in ("clean", "legacy_tensorflow")
        for output in ("pool", "spatial", "logits")
    }
    found = {name: one(images) for name, one in eyes.items()}
    assert calls == [2, 2], "one for each preparation"
    assert len({one.key for one in eyes.values()}) == 6
    assert {name: rows.shape[1] for name, rows in found.items()} == {n: one.num_features for n, one in eyes.items()}
    found["clean", "pool"].zero_()
    assert eyes["clean", "pool"](images).abs().sum() > 0, "what is given out is the caller's"
    eyes["clean", "pool"](images[:1])
    assert calls == [2, 2, 1]


def test_metrics_take_a_pass_for_each_preparation(folder, monkeypatch):
    class Squares:
        has_images = True

        def __len__(self):
            return 6

        def item(self, index):
            return Item("", noise(1, 300, 299, seed=index)[0].permute(1, 2, 0).numpy())

    calls = []
    forward = inception.InceptionV3.forward
    monkeypatch.setattr(inception.InceptionV3, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    monkeypatch.setattr(frechet, "real", lambda *_: None)  # decompositions are slow, and tested elsewhere
    real = seen.Real(Squares(), range(3), 2, alone=True)
    context = Context(reference=real, features="legacy_tensorflow", weights={"inception": str(folder)})
    used = [module.Metric(context) for module in (fid, kid, sfid, patch_fid, inception_score)]
    calls.clear()
    extractors = [one for metric in used for one in metric.extractors]
    assert len({one.key for one in extractors}) == 4
    made = seen.see(
        lambda part: seen.real_images(Squares(), [3 + i for i in part]), [""] * 3, extractors, 2, alone=True
    )
    assert calls == [2, 2, 1, 1], "TensorFlow's resize and the patch, for each of two batches"
    rows = [made.rows[extractors[1].key], real.rows(extractors[1])]
    want = cleanfid.kernel_distance(*(part.double().numpy() for part in rows), num_subsets=1)
    assert used[1].compute(made)["kid"] == pytest.approx(want, rel=1e-6)


def test_files_of_one_network_are_one(folder):
    images = noise(1, 40, 40)
    names = (FILE, "inception.safetensors", "pt_inception-2015-12-05-6726825d.pth")
    found = [features.load_inception(str(folder / name), "cpu", "clean", "pool") for name in names]
    assert len({one.key for one in found}) == 1
    assert len({one.protocol()["sha256"] for one in found}) == 1
    assert torch.equal(found[0](images), found[1](images))
    assert torch.equal(found[0](images), found[2](images))


def test_context_chooses_the_features(folder, monkeypatch):
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(folder))
    for way in ("clean", "legacy_pytorch", "legacy_tensorflow"):
        one = features.extractor(Context(features=way))
        assert one.key.startswith(f"inception-{way}-pool-")
        assert one is features.extractor(Context(features=way)), "loaded once"
        assert one.protocol()["extractor"] == "InceptionV3"
    given = Context(features="clean", weights={"inception": str(folder / "inception.safetensors")})
    assert features.extractor(given).key == features.extractor(Context(features="clean")).key


def test_patch_fid_of_small_real_images_fails_when_it_is_made(folder):
    class Small:
        def statistics(self, extractor):
            return extractor(noise(2, 64, 64), ["", ""])

    with pytest.raises(ValueError, match="patch_fid looks at 299 x 299 pixels, the images are 64 x 64"):
        patch_fid.Metric(Context(reference=Small(), weights={"inception": str(folder)}))


@pytest.mark.parametrize("name", [FILE, "x.pth", "x.safetensors"])
def test_what_is_no_such_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights")
    kind = "no TorchScript" if name == FILE else "not readable as plain tensors"
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: {kind} \(.+\); fetch the file again$"):
        inception.load(tmp_path / name)


def test_what_lacks_tensors_under_nvidia_s_names(tmp_path):
    save_file({"output.weight": torch.zeros(3), "output.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not InceptionV3's weights \(lacks 'layers.conv.weight'\); fetch the file"):
        inception.load(tmp_path / "x.safetensors")


def test_what_lacks_tensors(tmp_path, folder):
    tensors = inception.read(folder / "inception.safetensors")
    del tensors["Mixed_7c.branch_pool.bn.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"\(lacks 1 tensors, such as Mixed_7c.branch_pool.bn.bias\); fetch the file"):
        inception.load(tmp_path / "x.safetensors")
    tensors["Mixed_7c.branch_pool.bn.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"size mismatch for Mixed_7c.branch_pool.bn.bias"):
        inception.load(tmp_path / "x.safetensors")


def test_a_pickle_that_holds_more_than_numbers_is_refused(tmp_path):
    torch.serialization.save({"path": Path("x")}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"x.pth: not readable as plain tensors \(Weights only load failed\); fetch the file again"
    ):
        inception.load(tmp_path / "x.pth")


def test_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"no weights of inception there; they come from {weights.TABLE['inception'].url}"
    ):
        features.extractor(Context(features="clean"))
    with pytest.raises(ValueError, match=r"cmmd needs a CLIP; .*no weights of clip there"):
        features.clip(Context(), "cmmd")
