"""A StableDiffusionPipeline of the real classes, untrained and as small as they go: 8 x 8 latents, 16 x 16 pixels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastgen.emoji.networks import TOKENS, tokenizer

PROMPTS = ["a red apple", "a dog left of a cat", ""]


@functools.cache
def words() -> CLIPTokenizer:
    """Learnt from PROMPTS once and kept: the trainer numbers tokens by chance, and rounding goes by the numbers."""
    return tokenizer(PROMPTS, Path(__file__).parent / "vocabulary")


def text_encoder() -> CLIPTextModel:
    found = words()
    config = CLIPTextConfig(
        vocab_size=len(found),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
        pad_token_id=found.pad_token_id,
    )
    return CLIPTextModel(config)


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.4,
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def scheduler(prediction_type: str = "epsilon", **changes: Any) -> DDIMScheduler:
    """Stable Diffusion's schedule, DDIM on the trailing grid."""
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "prediction_type": prediction_type,
    }
    return DDIMScheduler(**{**config, **changes})


def pipeline(prediction_type: str = "epsilon", seed: int = 0, **changes: Any) -> StableDiffusionPipeline:
    """Put together anew each time, with the same weights for the same seed. changes: of the U-Net's config."""
    torch.manual_seed(seed)
    made = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=words(),
        unet=unet(**changes),
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def perturbed(network: nn.Module, seed: int = 9) -> nn.Module:
    """A student's network, moved so that it is no longer its teacher's."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=g)
    return network.eval()
