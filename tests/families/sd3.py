"""The family ``sd3`` for the contract."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tests import tiny

from .parts import WIDTH, Case, autoencoder, clip, flow_scheduler, t5, t5_words


def pipeline(seed: int) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip(projection=True),
        tokenizer=tiny.words(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tiny.words(),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=t5_words(),
    )


CASE = Case(pipeline, image_sizes=[(16, 24), (32, 16)])
