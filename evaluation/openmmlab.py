"""From OpenMMLab's Mask2Former checkpoint, which GenEval's published scores were made with, to a Transformers folder.

MMDetection 2's Swin-S instance model (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco) and Transformers'
Mask2FormerForUniversalSegmentation hold the same tensors under other names, but for three things: Swin's query, key
and value are one matrix there; so are the decoder's self-attention's; and MMDetection merges patches channel by
channel (torch.nn.Unfold), Transformers pixel by pixel, column after column, so that the inputs of each downsampling
must be put in another order. Names written are those of the Hub's Mask2Former repositories, which every Transformers
reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.checkpoint import atomic_folder

from . import weights
from .mask2former import ORIGIN, needed

URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
"""The official detector; its name ends in the first digits of its SHA-256."""
EMPTY_WEIGHT = 0.1
"""Weight of "no object" in the loss."""

Split = Callable[[Tensor], Sequence[Tensor]]


def whole(tensor: Tensor) -> Sequence[Tensor]:
    """As it is."""
    return (tensor,)


def thirds(tensor: Tensor) -> Sequence[Tensor]:
    """Query, key and value, one below the other."""
    return tensor.chunk(3)


def merged(tensor: Tensor) -> Sequence[Tensor]:
    """The last axis from (channel, row, column) to (column, row, channel), of 2 x 2 pixels."""
    *rest, width = tensor.shape
    return (tensor.view(*rest, width // 4, 2, 2).transpose(-3, -1).reshape(*rest, width),)


_SWIN = r"backbone\.stages\.(\d+)\."
_BLOCK = _SWIN + r"blocks\.(\d+)\."
_PIXEL = r"panoptic_head\.pixel_decoder\."
_ENCODER = _PIXEL + r"encoder\.layers\.(\d+)\."
_DECODER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\."
_END = r"(weight|bias)"

_TO_SWIN = "model.pixel_level_module.encoder."
_TO_BLOCK = _TO_SWIN + r"encoder.layers.\1.blocks.\2."
_TO_PIXEL = "model.pixel_level_module.decoder."
_TO_ENCODER = _TO_PIXEL + r"encoder.layers.\1."
_TO_TRANSFORMER = "model.transformer_module."
_TO_DECODER = _TO_TRANSFORMER + r"decoder.layers.\1."

RULES: tuple[tuple[str, tuple[str, ...], Split], ...] = (
    (rf"backbone\.patch_embed\.projection\.{_END}", (_TO_SWIN + r"embeddings.patch_embeddings.projection.\1",), whole),
    (rf"backbone\.patch_embed\.norm\.{_END}", (_TO_SWIN + r"embeddings.norm.\1",), whole),
    (_BLOCK + rf"norm1\.{_END}", (_TO_BLOCK + r"layernorm_before.\3",), whole),
    (
        _BLOCK + r"attn\.w_msa\.relative_position_bias_table",
        (_TO_BLOCK + "attention.self.relative_position_bias_table",),
        whole,
    ),
    (
        _BLOCK + rf"attn\.w_msa\.qkv\.{_END}",
        tuple(_TO_BLOCK + rf"attention.self.{name}.\3" for name in ("query", "key", "value")),
        thirds,
    ),
    (_BLOCK + rf"attn\.w_msa\.proj\.{_END}", (_TO_BLOCK + r"attention.output.dense.\3",), whole),
    (_BLOCK + rf"norm2\.{_END}", (_TO_BLOCK + r"layernorm_after.\3",), whole),
    (_BLOCK + rf"ffn\.layers\.0\.0\.{_END}", (_TO_BLOCK + r"intermediate.dense.\3",), whole),
    (_BLOCK + rf"ffn\.layers\.1\.{_END}", (_TO_BLOCK + r"output.dense.\3",), whole),
    (_SWIN + rf"downsample\.(norm|reduction)\.{_END}", (_TO_SWIN + r"encoder.layers.\1.downsample.\2.\3",), merged),
    *((rf"backbone\.norm{i}\.{_END}", (_TO_SWIN + rf"hidden_states_norms.stage{i + 1}.\1",), whole) for i in range(4)),
    (_PIXEL + rf"input_convs\.(\d+)\.conv\.{_END}", (_TO_PIXEL + r"input_projections.\1.0.\2",), whole),
    (_PIXEL + rf"input_convs\.(\d+)\.gn\.{_END}", (_TO_PIXEL + r"input_projections.\1.1.\2",), whole),
    (
        _ENCODER + rf"attentions\.0\.(sampling_offsets|attention_weights|value_proj|output_proj)\.{_END}",
        (_TO_ENCODER + r"self_attn.\2.\3",),
        whole,
    ),
    (_ENCODER + rf"norms\.0\.{_END}", (_TO_ENCODER + r"self_attn_layer_norm.\2",), whole),
    (_ENCODER + rf"ffns\.0\.layers\.0\.0\.{_END}", (_TO_ENCODER + r"fc1.\2",), whole),
    (_ENCODER + rf"ffns\.0\.layers\.1\.{_END}", (_TO_ENCODER + r"fc2.\2",), whole),
    (_ENCODER + rf"norms\.1\.{_END}", (_TO_ENCODER + r"final_layer_norm.\2",), whole),
    (_PIXEL + r"level_encoding\.weight", (_TO_PIXEL + "level_embed",), whole),
    (_PIXEL + r"lateral_convs\.0\.conv\.weight", (_TO_PIXEL + "adapter_1.0.weight",), whole),
    (_PIXEL + rf"lateral_convs\.0\.gn\.{_END}", (_TO_PIXEL + r"adapter_1.1.\1",), whole),
    (_PIXEL + r"output_convs\.0\.conv\.weight", (_TO_PIXEL + "layer_1.0.weight",), whole),
    (_PIXEL + rf"output_convs\.0\.gn\.{_END}", (_TO_PIXEL + r"layer_1.1.\1",), whole),
    (_PIXEL + rf"mask_feature\.{_END}", (_TO_PIXEL + r"mask_projection.\1",), whole),
    (_DECODER + r"attentions\.0\.attn\.in_proj_(weight|bias)", (_TO_DECODER + r"cross_attn.in_proj_\2",), whole),
    (_DECODER + rf"attentions\.0\.attn\.out_proj\.{_END}", (_TO_DECODER + r"cross_attn.out_proj.\2",), whole),
    (_DECODER + rf"norms\.0\.{_END}", (_TO_DECODER + r"cross_attn_layer_norm.\2",), whole),
    (
        _DECODER + r"attentions\.1\.attn\.in_proj_(weight|bias)",
        tuple(_TO_DECODER + rf"self_attn.{name}_proj.\2" for name in "qkv"),
        thirds,
    ),
    (_DECODER + rf"attentions\.1\.attn\.out_proj\.{_END}", (_TO_DECODER + r"self_attn.out_proj.\2",), whole),
    (_DECODER + rf"norms\.1\.{_END}", (_TO_DECODER + r"self_attn_layer_norm.\2",), whole),
    (_DECODER + rf"ffns\.0\.layers\.0\.0\.{_END}", (_TO_DECODER + r"fc1.\2",), whole),
    (_DECODER + rf"ffns\.0\.layers\.1\.{_END}", (_TO_DECODER + r"fc2.\2",), whole),
    (_DECODER + rf"norms\.2\.{_END}", (_TO_DECODER + r"final_layer_norm.\2",), whole),
    (rf"panoptic_head\.transformer_decoder\.post_norm\.{_END}", (_TO_TRANSFORMER + r"decoder.layernorm.\1",), whole),
    (r"panoptic_head\.query_embed\.weight", (_TO_TRANSFORMER + "queries_embedder.weight",), whole),
    (r"panoptic_head\.query_feat\.weight", (_TO_TRANSFORMER + "queries_features.weight",), whole),
    (r"panoptic_head\.level_embed\.weight", (_TO_TRANSFORMER + "level_embed.weight",), whole),
    (rf"panoptic_head\.cls_embed\.{_END}", (r"class_predictor.\1",), whole),
    *(
        (
            rf"panoptic_head\.mask_embed\.{2 * i}\.{_END}",
            (_TO_TRANSFORMER + rf"decoder.mask_predictor.mask_embedder.{i}.0.\1",),
            whole,
        )
        for i in range(3)
    ),
)
"""Name there (a regular expression), name or names here, and how the tensor becomes theirs."""

_INDEX = _BLOCK + r"attn\.w_msa\.relative_position_index"


def position_index(side: int) -> Tensor:
    """Swin's place in the table of relative positions for each two of side x side pixels: int64 [side^2, side^2]."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MMDetection's tensors by Transformers' names, float32. Raises ValueError if one is not of this network."""
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if re.fullmatch(_INDEX, name):
            if not torch.equal(tensor, position_index(round(len(tensor) ** 0.5))):
                raise ValueError(f"{name} numbers relative positions otherwise than Swin does; nothing was converted")
            continue
        for pattern, targets, split in RULES:
            match = re.fullmatch(pattern, name)
            if match:
                names = [match.expand(target) for target in targets]
                found |= {n: part.float().contiguous() for n, part in zip(names, split(tensor), strict=True)}
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are none of MMDetection's Mask2Former with Swin: {_some(unknown)}")
    return found


def convert(checkpoint: Path, folder: Path, config: Any = None) -> None:
    """Write a folder that Transformers' Mask2FormerForUniversalSegmentation and `mask2former.Mask2Former` read.

    Args:
        checkpoint: OpenMMLab's .pth, or its tensors as .safetensors.
        folder: to write; it must not be there.
        config: Transformers' Mask2FormerConfig of another architecture than the official one.

    Raises:
        ValueError: if the checkpoint is not there or not of this architecture, tensor by tensor; nothing is left then.
    """
    from safetensors.torch import save_file

    if folder.exists():
        raise ValueError(f"{folder}: is there already; remove it or name another folder")
    config = swin_small() if config is None else config
    tensors = renamed(read(checkpoint))
    tensors["criterion.empty_weight"] = torch.tensor([1.0] * config.num_labels + [EMPTY_WEIGHT])
    digest = weights.sha256(checkpoint)
    official = digest.startswith(Path(URL).stem.rpartition("-")[2])
    origin = f"{'the official detector' if official else 'a checkpoint'} of OpenMMLab, {checkpoint.name}, {digest}"
    with atomic_folder(folder) as partial:
        config.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / ORIGIN).write_text(origin + "\n", encoding="utf-8")
        _check(partial, checkpoint)


def _check(folder: Path, checkpoint: Path) -> None:
    """Raises ValueError unless what was written fills the architecture, nothing missing and nothing left over."""
    from transformers import Mask2FormerForUniversalSegmentation

    _, found = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if other := sorted(f"{name} {tuple(has)}, not {tuple(wants)}" for name, has, wants in found["mismatched_keys"]):
        raise ValueError(f"{checkpoint}: {len(other)} tensors are of another shape: {_some(other)}")
    if left := sorted(found["unexpected_keys"]):
        raise ValueError(f"{checkpoint}: {len(left)} tensors have no place in the architecture: {_some(left)}")
    if missing := needed(found["missing_keys"]):
        raise ValueError(f"{checkpoint}: {len(missing)} tensors of the architecture are not in it: {_some(missing)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read(checkpoint: Path) -> dict[str, Tensor]:
    """The network's tensors of a checkpoint. Raises ValueError if it is not there or holds more than numbers."""
    trusted = "or write the tensors of a checkpoint that you trust to a .safetensors file"
    return weights.tensors(checkpoint, f"fetch it again from {URL}, {trusted}")


def swin_small() -> Any:
    """The official architecture as Transformers' Mask2FormerConfig."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=80)
