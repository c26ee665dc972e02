"""The family ``z_image`` for the contract."""

from __future__ import annotations

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .parts import WIDTH, Case, autoencoder, flow_scheduler
from .qwen_image import words

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}think: "


def chat() -> Qwen2Tokenizer:
    """Of single bytes, with a template for chats."""
    made = words()
    made.chat_template = TEMPLATE
    return made


def text_encoder() -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(chat()),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def pipeline(seed: int) -> ZImagePipeline:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[640, 32, 32],
    )
    with torch.no_grad():  # which begin at 0
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=text_encoder(),
        tokenizer=chat(),
    )


CASE = Case(
    pipeline,
    image_size=(16, 16),
    image_sizes=[(16, 24), (32, 16)],
    prompts=["a red apple", "a dog left of a cat, and two more of them below"],
    guiding=lambda scale: {"guidance_scale": scale - 1},
)
