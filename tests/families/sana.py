"""The family ``sana`` for the contract."""

from __future__ import annotations

import functools

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .parts import WIDTH, Case, flow_scheduler


@functools.cache
def words() -> GemmaTokenizer:
    """A Gemma tokenizer of rare letters: what the pipeline puts before prompts is long, and here few tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, "▁", *"jkqvxz"])}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)


def text_encoder() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(words()),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def autoencoder() -> AutoencoderDC:
    """4 pixels a latent."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (3,)),
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.4, **sides)


def pipeline(
    seed: int, timestep_scale: float = 1.0, sample_size: int = 8, guidance_embeds: bool = False
) -> SanaPipeline:
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=sample_size,
        qk_norm="rms_norm_across_heads",
        timestep_scale=timestep_scale,
        guidance_embeds=guidance_embeds,
    )
    return SanaPipeline(
        tokenizer=words(),
        text_encoder=text_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


CASE = Case(pipeline, image_sizes=[(32, 64), (64, 32)], prompts=("vex", "quiz jukebox kazoo"))
