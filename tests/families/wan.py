"""The family ``wan`` for the contract: Wan 2.1, with one transformer, and Wan 2.2, with two."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from .parts import WIDTH, Case, flow_scheduler, t5_words


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def autoencoder() -> AutoencoderKLWan:
    """4 frames and 8 x 8 pixels a latent."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.2],
        latents_std=[1.5, 0.7, 1.2, 0.8],
    )


def pipeline(seed: int, experts: bool = False) -> WanPipeline:
    torch.manual_seed(seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(t5_words()),
            d_model=WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=8,
        )
    )
    return WanPipeline(
        tokenizer=t5_words(),
        text_encoder=text_encoder,
        vae=autoencoder(),
        scheduler=flow_scheduler(5.0),
        transformer=transformer(),
        transformer_2=transformer() if experts else None,
        boundary_ratio=0.875 if experts else None,
    )


CASE = Case(pipeline, image_size=(32, 32), image_sizes=[(32, 48), (64, 32)], num_frames=5)
MORE = {"experts": Case(lambda seed: pipeline(seed, experts=True), image_size=(32, 32), num_frames=5)}
