"""The family ``sdxl`` for the contract."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline

from tests import tiny

from .parts import WIDTH, Case, autoencoder, clip


def pipeline(seed: int) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    unet = tiny.unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=tiny.words(),
        tokenizer_2=tiny.words(),
        unet=unet,
        scheduler=tiny.scheduler(),
        add_watermarker=False,
    )


CASE = Case(pipeline, image_sizes=[(16, 24), (32, 16)])
