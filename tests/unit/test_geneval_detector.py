"""Mask2Former between the official evaluator's first and last steps."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from fastgen.evaluation import mask2former
from fastgen.evaluation.mask2former import Mask2Former, fitted, instances, prepare, resize

SIZE = (64, 96)


def network(labels: int = 80) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=labels,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=7,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
    )
    return Mask2FormerForUniversalSegmentation(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mask2former")
    network().save_pretrained(place)
    return place


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), np.uint8))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (800, 800)),
        (1024, 1024, (800, 800)),
        (512, 768, (800, 1200)),
        (480, 1000, (640, 1333)),
        (300, 500, (800, 1333)),
        (1344, 768, (1333, 762)),
    ],
)
def test_the_size_keeps_the_ratio_within_800_and_1333(height, width, expected):
    assert fitted(height, width) == expected


def test_the_resize_is_opencv_s_to_the_bit():
    y, x = np.mgrid[0:37, 0:53]
    image = np.stack([(x * x + 7 * y) % 256, (5 * x * y + 11) % 256, (x * 31 ^ y * 17) % 256], -1).astype(np.uint8)
    hashes = {  # of cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), OpenCV 4.11 and 5.0
        (64, 91): "b8617c349a2364afe1c2068246aeaa883a580e59719d40d7b8e9ebf27d4f02b9",
        (20, 29): "b77d16f24b4e504a57041c65ed344affe9fa1cdd6bf3b6987edd16da4885ac4d",
    }
    for (height, width), expected in hashes.items():
        made = resize(torch.from_numpy(image).permute(2, 0, 1), height, width).permute(1, 2, 0).contiguous()
        assert hashlib.sha256(made.numpy().tobytes()).hexdigest() == expected


def test_a_resize_to_its_own_size_changes_nothing():
    images = noise(2, 9, 13)
    assert torch.equal(resize(images, 9, 13), images)


def test_padding_is_grey_below_and_right():
    images = noise(1, 100, 150)
    pixels, inner = prepare(images, (100, 1000))
    assert inner == (100, 150)
    assert pixels.shape == (1, 3, 128, 160)
    mean, std = torch.tensor(mask2former.MEAN), torch.tensor(mask2former.STD)
    levels = pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)
    assert torch.allclose(levels[:, :, :100, :150], images.float(), atol=1e-3)
    levels[:, :, :100, :150] = 128
    assert torch.allclose(levels, torch.full_like(levels, 128), atol=1e-3)


def test_a_square_is_prepared_as_transformers_does_it_within_a_level():
    from transformers import Mask2FormerImageProcessor

    image = noise(1, 16, 16).float()
    image = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear").to(torch.uint8)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})  # larger: nothing aliases
    theirs = processor(images=list(image), return_tensors="pt")["pixel_values"]
    ours, _ = prepare(image, (96, 160))
    levels = (ours - theirs) * torch.tensor(mask2former.STD).view(3, 1, 1)
    assert levels.abs().max() < 1.01


def plainly(classes, masks, padded, inner, original):
    """The post-processing once more, in float64 and pair by pair: [(score, class, box, mask)], best first."""
    probability = classes.double().softmax(1)[:, :-1]
    pairs = sorted(
        ((float(p), q, c) for q, row in enumerate(probability) for c, p in enumerate(row)), key=lambda t: -t[0]
    )
    made = []
    for p, q, c in pairs[:100]:
        logits = torch.nn.functional.interpolate(masks[None, None, q].double(), padded, mode="bilinear")
        logits = logits[..., : inner[0], : inner[1]]
        logits = torch.nn.functional.interpolate(logits, original, mode="bilinear")[0, 0].numpy()
        mask = logits > 0
        inside = (1 / (1 + np.exp(-logits)))[mask].sum() / (mask.sum() + 1e-6)
        y, x = np.nonzero(mask)
        if len(x):
            made.append((p * inside, c, [x.min(), y.min(), x.max() + 1, y.max() + 1], mask))
    return sorted(made, key=lambda t: -t[0])


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(3)
    classes = 3 * torch.randn(12, 21, generator=generator)
    masks = torch.nn.functional.interpolate(torch.randn(1, 12, 4, 6, generator=generator), (16, 24), mode="bilinear")
    masks = 4 * masks[0] - 1
    masks[5] = -1  # an empty mask
    return classes, masks


def test_instances_are_what_the_rule_says(logits):
    sizes = (64, 96), (60, 90), (40, 60)
    found, expected = instances(*logits, *sizes), plainly(*logits, *sizes)
    assert len(found.scores) == len(expected) < 100
    assert torch.allclose(found.scores, torch.tensor([e[0] for e in expected]).float(), atol=1e-5)
    assert found.classes.tolist() == [e[1] for e in expected]
    assert found.boxes.tolist() == [e[2] for e in expected]
    assert (found.masks.numpy() != np.stack([e[3] for e in expected])).mean() < 1e-4


def test_what_scores_less_can_be_left_out_early(logits):
    sizes = (64, 96), (60, 90), (40, 60)
    full = instances(*logits, *sizes)
    above = float(full.scores[7])
    part = instances(*logits, *sizes, above)
    assert torch.equal(part.scores, full.scores[:7])
    assert torch.equal(part.boxes, full.boxes[:7])
    assert torch.equal(part.masks, full.masks[:7])
    none = instances(*logits, *sizes, 1.0)
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, 40, 60)


def test_a_mask_s_box_is_tight_and_ends_outside():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = True
    assert mask2former.box(mask) == (2, 1, 5, 4)
    assert mask2former.box(torch.zeros(5, 7, dtype=torch.bool)) == (0, 0, 0, 0)


def test_a_row_is_the_image_s_own_whatever_is_beside_it(folder):
    detector, images = Mask2Former(folder, size=SIZE), noise(3, 32, 40)
    together = list(detector(images))
    for one, alone in zip(together, (next(iter(detector(image[None]))) for image in images), strict=True):
        assert torch.allclose(one.scores, alone.scores, atol=1e-5)
        assert one.masks.shape[1:] == (32, 40)
        assert len(one.scores) <= mask2former.MOST


def test_the_protocol_names_folder_hash_and_resize(folder):
    said = Mask2Former(folder, size=SIZE).protocol()
    assert said["extractor"] == f"Mask2Former {folder.name}"
    assert len(said["sha256"]) == 64
    assert said["resize"] == "64 to 96, as OpenCV's bilinear"
    assert "origin" not in said


def test_another_size_is_another_key(folder):
    assert Mask2Former(folder, size=SIZE).key != Mask2Former(folder).key


def test_half_precision_on_disk_is_read_as_float32(tmp_path):
    network().half().save_pretrained(tmp_path)
    assert {p.dtype for p in Mask2Former(tmp_path)._network.parameters()} == {torch.float32}


def test_a_folder_without_it_is_told(tmp_path):
    with pytest.raises(ValueError, match=r": no Mask2Former that Transformers reads \("):
        Mask2Former(tmp_path)


def test_one_of_other_classes_is_told(tmp_path):
    network(labels=133).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Mask2Former of 133 classes; GenEval needs COCO's 80"):
        Mask2Former(tmp_path)


def test_missing_weights_are_told(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "class_predictor" not in n}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"2 weights are missing, class_predictor\.bias the first"):
        Mask2Former(tmp_path)
