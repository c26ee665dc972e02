"""The family ``ddpm`` for the contract: unconditional as both pipelines have it, and with classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, UNet2DModel

from tests import tiny

from .parts import Case


def network(seed: int, **changes: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": (8, 16),
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**{**config, **changes})


def ddpm(seed: int) -> DDPMPipeline:
    return DDPMPipeline(network(seed), tiny.scheduler())


def ddim(seed: int) -> DDIMPipeline:
    return DDIMPipeline(network(seed), tiny.scheduler("v_prediction"))


def labelled(seed: int) -> ConsistencyModelPipeline:
    return ConsistencyModelPipeline(network(seed, sample_size=8, num_class_embeds=10), tiny.scheduler())


CASE = Case(ddpm, guidance_scale=None)
MORE = {
    "ddim": Case(ddim, guidance_scale=None, renoising_class="DDPMPipeline"),
    "labelled": Case(labelled, guidance_scale=None, prompts=["3", "7"]),
}
