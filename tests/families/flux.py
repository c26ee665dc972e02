"""The family ``flux`` for the contract: schnell, with the scheduler of dev, and dev."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from tests import tiny

from .parts import WIDTH, Case, autoencoder, clip, flow_scheduler, t5, t5_words


def pipeline(seed: int, guidance_embeds: bool = False) -> FluxPipeline:
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=tiny.words(),
        text_encoder_2=t5(),
        tokenizer_2=t5_words(),
    )


CASE = Case(
    pipeline,
    image_size=(16, 16),
    image_sizes=[(16, 24), (32, 16)],
    guiding=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
)
MORE = {"dev": replace(CASE, pipeline=lambda seed: pipeline(seed, guidance_embeds=True), guidance_scale=None)}
