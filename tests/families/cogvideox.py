"""The family ``cogvideox`` for the contract: 1.5, whose patches are of two frames, and the first of 1.0."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from .parts import WIDTH, Case, t5, t5_words


def autoencoder() -> AutoencoderKLCogVideoX:
    """4 frames and 8 x 8 pixels a latent."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    )


def scheduler(**changes: Any) -> CogVideoXDDIMScheduler:
    config = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    return CogVideoXDDIMScheduler(**{**config, **changes})


def pipeline(seed: int, **changes: Any) -> CogVideoXPipeline:
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "patch_size_t": 2,
        "use_rotary_positional_embeddings": True,
        "patch_bias": False,
    }
    return CogVideoXPipeline(
        tokenizer=t5_words(),
        text_encoder=t5(),
        vae=autoencoder(),
        transformer=CogVideoXTransformer3DModel(**{**config, **changes}),
        scheduler=scheduler(),
    )


def first(seed: int) -> CogVideoXPipeline:
    """CogVideoX-2B: patches of one frame, other positions, an SNR that is shifted."""
    made = pipeline(seed, patch_size_t=None, use_rotary_positional_embeddings=False, patch_bias=True)
    made.register_modules(scheduler=scheduler(snr_shift_scale=3.0))
    return made


CASE = Case(pipeline, image_sizes=[(16, 32), (32, 16)])
MORE = {"first": Case(first, image_sizes=[(32, 48), (64, 32)])}
