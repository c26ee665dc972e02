"""The family ``pixart`` for the contract: alpha, with learned variances and sizes as conditions."""

from __future__ import annotations

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests import tiny

from .parts import WIDTH, Case, autoencoder, t5, t5_words


def pipeline(
    seed: int, cls: type = PixArtAlphaPipeline, sample_size: int = 128, variances: bool = True
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """Alpha of sample_size 128 takes sizes as conditions."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if variances else 4,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=WIDTH,
        use_additional_conditions=False if cls is PixArtSigmaPipeline else None,
    )
    return cls(
        tokenizer=t5_words(), text_encoder=t5(), vae=autoencoder(), transformer=transformer, scheduler=tiny.scheduler()
    )


CASE = Case(pipeline, image_size=(16, 16), image_sizes=[(16, 24), (32, 16)])
