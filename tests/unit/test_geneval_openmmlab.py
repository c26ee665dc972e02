"""OpenMMLab's Mask2Former checkpoint as Transformers' network: names, shapes, and what MMDetection's own code gave."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.evaluation import mask2former, openmmlab

SMALL = {"width": 24, "depths": (1, 2, 1, 1), "heads": (1, 2, 3, 4), "features": 64, "layers": (2, 3), "queries": 20}
OFFICIAL = {
    "width": 96,
    "depths": (2, 2, 18, 2),
    "heads": (3, 6, 12, 24),
    "features": 256,
    "layers": (6, 9),
    "queries": 100,
}


def theirs(width, depths, heads, features, layers, queries, wide=(1024, 2048)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of MMDetection 2.28's network, written out as its modules are nested."""
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, out: int, *into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *into), (out,)

    both("backbone.patch_embed.projection", width, 3, 4, 4)
    both("backbone.patch_embed.norm", width)
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        side = width * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}"
            both(f"{name}.norm1", side)
            shapes[f"{name}.attn.w_msa.relative_position_bias_table"] = (169, head)
            shapes[f"{name}.attn.w_msa.relative_position_index"] = (49, 49)
            both(f"{name}.attn.w_msa.qkv", 3 * side, side)
            both(f"{name}.attn.w_msa.proj", side, side)
            both(f"{name}.norm2", side)
            both(f"{name}.ffn.layers.0.0", 4 * side, side)
            both(f"{name}.ffn.layers.1", side, 4 * side)
        if stage < 3:
            both(f"backbone.stages.{stage}.downsample.norm", 4 * side)
            shapes[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * side, 4 * side)
        both(f"backbone.norm{stage}", side)
    pixel = "panoptic_head.pixel_decoder"
    for level in range(3):
        both(f"{pixel}.input_convs.{level}.conv", features, width * 2 ** (3 - level), 1, 1)
        both(f"{pixel}.input_convs.{level}.gn", features)
    for layer in range(layers[0]):
        name = f"{pixel}.encoder.layers.{layer}"
        both(f"{name}.attentions.0.sampling_offsets", 8 * 3 * 4 * 2, features)
        both(f"{name}.attentions.0.attention_weights", 8 * 3 * 4, features)
        both(f"{name}.attentions.0.value_proj", features, features)
        both(f"{name}.attentions.0.output_proj", features, features)
        both(f"{name}.ffns.0.layers.0.0", wide[0], features)
        both(f"{name}.ffns.0.layers.1", features, wide[0])
        both(f"{name}.norms.0", features)
        both(f"{name}.norms.1", features)
    shapes[f"{pixel}.level_encoding.weight"] = (3, features)
    shapes[f"{pixel}.lateral_convs.0.conv.weight"] = (features, width, 1, 1)
    both(f"{pixel}.lateral_convs.0.gn", features)
    shapes[f"{pixel}.output_convs.0.conv.weight"] = (features, features, 3, 3)
    both(f"{pixel}.output_convs.0.gn", features)
    both(f"{pixel}.mask_feature", features, features, 1, 1)
    for layer in range(layers[1]):
        name = f"panoptic_head.transformer_decoder.layers.{layer}"
        for attention in (0, 1):
            shapes[f"{name}.attentions.{attention}.attn.in_proj_weight"] = (3 * features, features)
            shapes[f"{name}.attentions.{attention}.attn.in_proj_bias"] = (3 * features,)
            both(f"{name}.attentions.{attention}.attn.out_proj", features, features)
        both(f"{name}.ffns.0.layers.0.0", wide[1], features)
        both(f"{name}.ffns.0.layers.1", features, wide[1])
        for norm in range(3):
            both(f"{name}.norms.{norm}", features)
    both("panoptic_head.transformer_decoder.post_norm", features)
    for name, rows in (("query_embed", queries), ("query_feat", queries), ("level_embed", 3)):
        shapes[f"panoptic_head.{name}.weight"] = (rows, features)
    both("panoptic_head.cls_embed", 81, features)
    for number in (0, 2, 4):
        both(f"panoptic_head.mask_embed.{number}", features, features)
    return shapes


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor for each, which depends on its name alone."""
    tensors = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("relative_position_index"):
            tensors[name] = openmmlab.position_index(7)
        elif len(shape) == 1:
            centre = 1.0 if name.endswith("weight") else 0.0  # of norms
            tensors[name] = torch.from_numpy(centre + 0.2 * values).float()
        else:
            tensors[name] = torch.from_numpy(values / np.sqrt(np.prod(shape[1:]))).float()
    return tensors


def config(width, depths, heads, features, layers, queries, wide=(1024, 2048)):
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        feature_size=features,
        mask_feature_size=features,
        hidden_dim=features,
        encoder_layers=layers[0],
        decoder_layers=layers[1] + 1,
        num_queries=queries,
        encoder_feedforward_dim=wide[0],
        dim_feedforward=wide[1],
    )


def pictures() -> Tensor:
    """Two of 60 x 90: uint8 [2, 3, 60, 90]."""
    y, x = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    one = torch.stack([x * 255 // 89, y * 255 // 59, (x - 45) ** 2 // 8])
    return torch.stack([one, one.flip(0)]).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The small checkpoint, converted."""
    place = tmp_path_factory.mktemp("converted")
    pickled(place / "small.pth", filled(theirs(**SMALL)))
    openmmlab.convert(place / "small.pth", place / "small", config(**SMALL))
    return place / "small"


def pickled(path: Path, tensors: dict[str, Any]) -> None:
    """A checkpoint as MMDetection writes them."""
    torch.serialization.save({"meta": {"CLASSES": ("person",), "epoch": 50}, "state_dict": tensors}, path)


def test_the_official_architecture_is_filled_shape_by_shape():
    from transformers import Mask2FormerForUniversalSegmentation

    shapes = theirs(**OFFICIAL)
    assert len(shapes) == 649  # as many as MMDetection 2.28.2's own state dict has
    given = {
        name: openmmlab.position_index(7) if name.endswith("index") else torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }
    made = sorted(tuple(tensor.shape) for tensor in openmmlab.renamed(given).values())
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(openmmlab.swin_small())
    ours = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("relative_position_index")}
    assert made == sorted(ours[name] for name in mask2former.needed(list(ours)))


def test_it_gives_what_mmdetection_gave_with_the_same_weights(folder):
    network = mask2former.Mask2Former(folder, size=(96, 160))
    pixels, inner = mask2former.prepare(pictures(), (96, 160))
    with torch.inference_mode():
        output = network._network(pixel_values=pixels)
    assert inner == (96, 144)
    classes, masks = output.class_queries_logits, output.masks_queries_logits
    # recorded with MMDetection 2.28.2 itself (Mask2FormerHead, MaskFormerFusionHead) on PyTorch 2.14
    expected = [1.49948, -0.24826, -1.01763, 0.76315, 0.34584, -0.67245]
    assert torch.allclose(classes[1, 3, :6], torch.tensor(expected), atol=1e-4)
    expected = [-0.18007, -0.23153, -0.26395, -0.15631, -0.20478, -0.16601]
    assert torch.allclose(classes[0, :6, 80], torch.tensor(expected), atol=1e-4)
    expected = [-1.0117, 0.868, 1.0134, 0.8298, -0.6281, -0.2039, 2.0896]
    assert torch.allclose(masks[0, 5, 10, ::6], torch.tensor(expected), atol=1e-3)
    assert classes.double().abs().mean().item() == pytest.approx(0.7823867, abs=1e-5)
    assert masks.double().abs().mean().item() == pytest.approx(1.2015844, abs=1e-4)
    found = list(network(pictures()))
    assert [len(one.scores) for one in found] == [100, 100]
    best = [(0.04133, 0, 3120), (0.04114, 0, 3100), (0.04002, 0, 3127), (0.0394, 0, 3183)]
    best += [(0.0537, 59, 2093), (0.05025, 59, 1955), (0.05014, 59, 2343), (0.04984, 59, 2225)]
    made = [(one.scores[i], one.classes[i], one.masks[i].sum()) for one in found for i in range(4)]
    for (score, number, area), (own_score, own_number, own_area) in zip(best, made, strict=True):
        assert float(own_score) == pytest.approx(score, abs=1e-4)
        assert int(own_number) == number
        assert abs(int(own_area) - area) <= 2
    assert found[0].boxes[:2].tolist() == [[2, 0, 90, 60]] * 2
    assert found[1].boxes[4].tolist() == [3, 11, 90, 60]


def test_merging_patches_channel_by_channel_or_pixel_by_pixel_is_the_same():
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    channels = 5
    x = torch.randn(2, 6 * 8, channels)
    norm, reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    unfolded = nn.Unfold(2, stride=2)(x.view(2, 6, 8, channels).permute(0, 3, 1, 2)).transpose(1, 2)
    expected = reduction(norm(unfolded))
    tensors = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": reduction.weight}
    start = "backbone.stages.0.downsample."
    made = openmmlab.renamed({start + name: tensor.detach() for name, tensor in tensors.items()})
    merging = _merging(SwinPatchMerging, channels)
    merging.load_state_dict({name.partition("downsample.")[2]: tensor for name, tensor in made.items()})
    assert torch.allclose(merging(x, (6, 8)), expected, atol=1e-6)
    assert not torch.allclose(nn.Linear.forward(merging.reduction, merging.norm(unfolded)), expected, atol=1e-2)


def _merging(kind, channels):
    import inspect

    takes = inspect.signature(kind).parameters  # older Transformers ask for a resolution, which they do not look at
    return kind(*([(6, 8)] if "input_resolution" in takes else []), dim=channels)


def test_relative_positions_are_numbered_as_swin_numbers_them():
    index = openmmlab.position_index(2)
    # of pixels (0, 0), (0, 1), (1, 0), (1, 1): 3 (dy + 1) + dx + 1
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_a_checkpoint_that_numbers_them_otherwise_is_refused():
    name = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    with pytest.raises(ValueError, match=f"{name} numbers relative positions otherwise"):
        openmmlab.renamed({name: openmmlab.position_index(7).flip(0)})


def test_the_tensors_of_a_safetensors_file_do_as_well(folder, tmp_path):
    save_file(filled(theirs(**SMALL)), tmp_path / "small.safetensors")
    openmmlab.convert(tmp_path / "small.safetensors", tmp_path / "made", config(**SMALL))
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_folder_says_where_it_comes_from(folder):
    origin = mask2former.Mask2Former(folder).protocol()["origin"]
    assert re.fullmatch(r"a checkpoint of OpenMMLab, small\.pth, [0-9a-f]{64}", origin)


def test_the_official_file_is_known_by_its_hash(tmp_path, monkeypatch):
    save_file(filled(theirs(**SMALL)), tmp_path / "any.safetensors")
    monkeypatch.setattr(openmmlab.weights, "sha256", lambda path: "743b7d99" + "0" * 56)
    openmmlab.convert(tmp_path / "any.safetensors", tmp_path / "made", config(**SMALL))
    assert (tmp_path / "made" / "origin.txt").read_text().startswith("the official detector of OpenMMLab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "roi_head.a": torch.ones(1)},
            "1 tensors are none of MMDetection's Mask2Former .*: roi_head.a",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "query_feat" not in n},
            "1 tensors of the architecture are not in it: ",
        ),
        (
            lambda t: {**t, "backbone.stages.3.blocks.9.norm1.weight": torch.ones(192)},
            "1 tensors have no place in the architecture: .*blocks.9",
        ),
        (
            lambda t: {**t, "panoptic_head.cls_embed.bias": torch.ones(80)},
            r"1 tensors are of another shape: class_predictor.bias \(80,\), not \(81,\)",
        ),
    ],
)
def test_a_tensor_too_many_missing_or_of_another_shape_is_told(tmp_path, change, message):
    save_file(change(filled(theirs(**SMALL))), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        openmmlab.convert(tmp_path / "bad.safetensors", tmp_path / "made", config(**SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: no such checkpoint; fetch it again from https"):
        openmmlab.read(tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth: not readable as plain tensors \(.+\); fetch it again"):
        openmmlab.read(tmp_path / "broken.pth")
    pickled(tmp_path / "other.pth", {"a": 1})
    with pytest.raises(ValueError, match=r"other\.pth: has no tensors, nor any in `state_dict`; fetch it again"):
        openmmlab.read(tmp_path / "other.pth")
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="made: is there already; remove it or name another folder"):
        openmmlab.convert(tmp_path / "other.pth", tmp_path / "made")
