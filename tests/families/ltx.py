"""The family ``ltx`` for the contract, with an autoencoder that is told a timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

from .parts import WIDTH, Case, flow_scheduler, t5, t5_words


def autoencoder(**changes: Any) -> AutoencoderKLLTXVideo:
    """4 frames and 8 x 8 pixels a latent."""
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("LTXVideoDownBlock3D",) * 3,
        "decoder_block_out_channels": (8, 8, 8),
        "layers_per_block": (1,) * 4,
        "decoder_layers_per_block": (1,) * 4,
        "spatio_temporal_scaling": (True, True, False),
        "decoder_spatio_temporal_scaling": (True, True, False),
        "decoder_inject_noise": (False,) * 4,
        "downsample_type": ("conv",) * 3,
        "upsample_residual": (False,) * 3,
        "upsample_factor": (1,) * 3,
        "timestep_conditioning": True,
        "patch_size": 2,
        "scaling_factor": 0.9,
    }
    made = AutoencoderKLLTXVideo(**{**config, **changes})
    made.latents_mean.copy_(torch.tensor([-0.3, 0.2, 0.1, -0.2]))
    made.latents_std.copy_(torch.tensor([1.5, 0.7, 1.2, 0.8]))
    return made


def pipeline(seed: int) -> LTXPipeline:
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=WIDTH,
    )
    scheduler = flow_scheduler(
        1.0,
        use_dynamic_shifting=True,
        base_image_seq_len=16,
        max_image_seq_len=128,
        base_shift=0.95,
        max_shift=2.05,
        shift_terminal=0.1,
    )
    return LTXPipeline(
        scheduler=scheduler, vae=autoencoder(), text_encoder=t5(), tokenizer=t5_words(), transformer=transformer
    )


CASE = Case(pipeline, image_size=(32, 32), image_sizes=[(32, 64), (96, 32)], num_frames=5)
